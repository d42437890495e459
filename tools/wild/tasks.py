"""Judges: how much of what the original does the pruned file still does, at the task of the model.

Every judge gives a share: 1 where the pruned file does all that the original does; from 0.95 on it is usable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import reading, sounds
from .draw import SEED, Array, Feeds, session
from .faces import face_pictures, mtcnn
from .manifest import Entry, Manifest
from .samples import held_out, wake_mels


@dataclass(frozen=True)
class Case:
    """A pruned file beside its original."""

    entry: Entry
    manifest: Manifest
    cache: Path
    samples: Path
    pruned: Path
    siblings: Mapping[str, Path]
    """Files pruned to the same budget, by the names of their entries."""

    @property
    def original(self) -> Path:
        """The original file."""
        return self.entry.path(self.cache)


@dataclass(frozen=True)
class Verdict:
    """Share of the task that is kept, how it was measured, and further numbers."""

    measure: str
    kept: float
    detail: Mapping[str, float]


def answers(path: Path, feeds: Feeds) -> dict[str, list[Array]]:
    """Outputs of a model in plain ONNX Runtime, one run per sample."""
    run = session(path)
    ranks = {i.name: len(i.shape) for i in run.get_inputs()}
    names = [output.name for output in run.get_outputs()]
    found: dict[str, list[Array]] = {name: [] for name in names}
    for i in range(len(next(iter(feeds.values())))):
        # the element of a vector is no array, which a scalar input needs
        feed = {
            k: np.asarray(v[i]) if v.ndim > ranks[k] else v[i : i + 1] for k, v in feeds.items()
        }
        for name, values in zip(names, run.run(None, feed), strict=True):
            found[name].append(np.asarray(values))
    return found


def both(case: Case) -> tuple[dict[str, list[Array]], dict[str, list[Array]]]:
    """Answers of the original and of the pruned file on the held-out samples."""
    feeds = held_out(case.samples)
    return answers(case.original, feeds), answers(case.pruned, feeds)


def explained(before: Sequence[Array], after: Sequence[Array]) -> float:
    """Share of the variance over samples, position by position, that is reproduced (R²)."""
    first = np.stack([np.ravel(values) for values in before]).astype(np.float64)
    second = np.stack([np.ravel(values) for values in after]).astype(np.float64)
    spread = float(((first - first.mean(axis=0)) ** 2).sum())
    return 1 - float(((first - second) ** 2).sum()) / max(spread, 1e-30)


def values(case: Case) -> Verdict:
    """The smallest share of variance that any float output reproduces."""
    before, after = both(case)
    floats = [name for name in before if np.issubdtype(before[name][0].dtype, np.floating)]
    shares = {name: explained(before[name], after[name]) for name in floats}
    return Verdict("R² of the worst output", min(shares.values()), shares)


def classes(case: Case, *, output: str, axis: int = -1) -> Verdict:
    """Share of positions with the same most likely class."""
    before, after = both(case)
    same = [
        np.mean(b.argmax(axis) == a.argmax(axis))
        for b, a in zip(before[output], after[output], strict=True)
    ]
    return Verdict("agreement", float(np.mean(same)), {})


def tags(case: Case, *, output: str, mask: str) -> Verdict:
    """Share of filled positions with the same tag, a number; ``mask`` is an input that is 1 where filled."""
    before, after = both(case)
    filled = held_out(case.samples)[mask].astype(bool)
    first, second = (np.concatenate(found[output])[filled] for found in (before, after))
    return Verdict("tags alike", float(np.mean(first == second)), {"tags": float(filled.sum())})


def embedding(case: Case, *, output: str) -> Verdict:
    """Share of held-out samples whose nearest other sample is still the same, by angle."""
    before, after = both(case)

    def vectors(found: Mapping[str, list[Array]]) -> Array:
        rows = np.stack([np.ravel(v.mean(axis=1) if v.ndim == 3 else v) for v in found[output]])
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))

    first, second = vectors(before), vectors(after)
    cosine = float((first * second).sum(axis=1).mean())
    return Verdict("cosine", cosine, {"R²": explained(before[output], after[output])})


def f1(right: float, wrong: float, missed: float) -> float:
    """F1 of counts; 1 where there is nothing to find and nothing was found."""
    return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 1.0


def decided(before: Array, after: Array) -> Verdict:
    """F1 of decisions, with the original's as the truth."""
    right = float((before & after).sum())
    wrong, missed = float((after & ~before).sum()), float((before & ~after).sum())
    detail = {"positive": float(before.mean()), "agreement": float((before == after).mean())}
    return Verdict("F1 of decisions", f1(right, wrong, missed), detail)


def decisions(case: Case, *, output: str, threshold: float = 0.5, logits: bool = False) -> Verdict:
    """F1 of independent decisions on the held-out samples."""
    limit = 0.0 if logits else threshold
    before, after = both(case)
    return decided(
        *(np.concatenate([np.ravel(v) for v in found[output]]) > limit for found in (before, after))
    )


def silence(case: Case, *, output: str, most: float) -> Verdict:
    """F1 of speech: positions whose first class, silence, has at most this probability."""
    before, after = both(case)
    return decided(
        *(np.concatenate([v[..., 0].ravel() for v in f[output]]) <= most for f in (before, after))
    )


def pitch(case: Case, *, frequency: str, confidence: str, cents: float = 50) -> Verdict:
    """Share of frames that are unvoiced in both, or voiced in both with pitches less than a quarter tone apart."""
    voiced, tones = [], []
    for found in both(case):
        voiced.append(np.concatenate([np.ravel(v) for v in found[confidence]]) >= 0.5)
        tones.append(np.concatenate([np.ravel(v) for v in found[frequency]]))
    near = 1200 * np.abs(np.log2(tones[1] / tones[0])) < cents
    alike = (voiced[0] == voiced[1]) & (near | ~voiced[0])
    detail = {
        "voiced": float(voiced[0].mean()),
        "voicing": float((voiced[0] == voiced[1]).mean()),
        "near where both are voiced": float(near[voiced[0] & voiced[1]].mean()),
    }
    return Verdict("frames with the same pitch", float(alike.mean()), detail)


def wake_embedding(case: Case, *, said: Mapping[str, str]) -> Verdict:
    """F1 of the wake words that the package's own nets find in 20 clips each behind this embedding."""
    folder = case.manifest.folder(case.cache, "openwakeword") / "openwakeword/resources/models"
    mel, rng = session(folder / "melspectrogram.onnx"), np.random.default_rng([SEED, 6])
    embeds = [session(path) for path in (case.original, case.pruned)]
    found: list[list[bool]] = [[], []]
    for file, text in said.items():
        net = session(folder / file)
        name = net.get_inputs()[0].name
        for i in range(20):
            voice = str(rng.choice(sounds.VOICES[1]))
            phrase = sounds.speech(text, voice, int(rng.integers(120, 180))) if i % 2 else None
            mels = wake_mels(mel, sounds.clip(rng, 1, 4 * sounds.RATE, phrase))
            windows = np.stack([mels[s : s + 76] for s in range(0, len(mels) - 75, 8)])[..., None]
            for embed, heard in zip(embeds, found, strict=True):
                rows = embed.run(None, {"input_1": windows})[0].reshape(len(windows), -1)
                parts = sounds.windows(rows, 16, range(16, len(rows) + 1))
                heard.append(max(net.run(None, {name: w[None]})[0].max() for w in parts) > 0.5)
    verdict = decided(*(np.array(heard) for heard in found))
    before, after = both(case)
    shares = {f"R² {name}": explained(before[name], after[name]) for name in before}
    return Verdict(verdict.measure, verdict.kept, {**verdict.detail, **shares})


def wake_words(case: Case, *, said: Sequence[str], frames: int = 16) -> Verdict:
    """F1 of what is heard in 120 clips, half of them with the wake phrase, at every 80 ms."""
    folder = case.manifest.folder(case.cache, "openwakeword") / "openwakeword/resources/models"
    mel, embed = session(folder / "melspectrogram.onnx"), session(folder / "embedding_model.onnx")
    rng, heard = np.random.default_rng([SEED, 3]), []
    for i in range(120):
        text = said[i // 2 % len(said)] if i % 2 else None
        voice = str(rng.choice(sounds.VOICES[1]))
        phrase = sounds.speech(text, voice, int(rng.integers(120, 180))) if text else None
        mels = wake_mels(mel, sounds.clip(rng, 1, 4 * sounds.RATE, phrase))
        windows = np.stack([mels[s : s + 76] for s in range(0, len(mels) - 75, 8)])[..., None]
        rows = embed.run(None, {"input_1": windows})[0].reshape(len(windows), -1)
        heard.append(sounds.windows(rows, frames, range(frames, len(rows) + 1)))
    peaks = []
    for path in (case.original, case.pruned):
        run = session(path)
        name = run.get_inputs()[0].name
        scores = [[run.run(None, {name: w[None]})[0] for w in windows] for windows in heard]
        peaks.append(np.array([np.max(s, axis=0).ravel() for s in scores]) > 0.5)
    return decided(*(found[:, 1:] if found.shape[1] > 1 else found for found in peaks))


def streams(
    case: Case, *, name: str, length: int, context: int, states: Mapping[str, str], rate: bool
) -> Verdict:
    """F1 of voice decisions in 20 streams, each model with the state that it has itself."""
    rng = np.random.default_rng([SEED, 4])
    heard = sounds.clips(rng, 1, 20, 4 * sounds.RATE)
    found = []
    for path in (case.original, case.pruned):
        run = session(path)
        shapes = {
            i.name: [d if isinstance(d, int) else 1 for d in i.shape] for i in run.get_inputs()
        }
        given = [output.name for output in run.get_outputs()]
        scores = []
        for audio in heard:
            state: Feeds = {key: np.zeros(shapes[key], np.float32) for key in states}
            for end in range(length + context, len(audio), length):
                feed = {name: audio[None, end - length - context : end], **state}
                if rate:
                    feed["sr"] = np.array(sounds.RATE, np.int64)
                got = dict(zip(given, run.run(None, feed), strict=True))
                state = {key: got[value] for key, value in states.items()}
                scores.append(float(np.ravel(got[given[0]])[0]))
        found.append(np.array(scores) > 0.5)
    return decided(*found)


def edits(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Levenshtein distance."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


def read_alike(before: Sequence[Sequence[Any]], after: Sequence[Sequence[Any]]) -> Verdict:
    """Share of characters that are read as by the original."""
    wrong = sum(edits(b, a) for b, a in zip(before, after, strict=True))
    characters = sum(len(b) for b in before)
    same = float(np.mean([list(b) == list(a) for b, a in zip(before, after, strict=True)]))
    kept = max(0.0, 1 - wrong / max(characters, 1))
    return Verdict("characters read", kept, {"characters": characters, "lines alike": same})


def ctc(case: Case, *, output: str, blank: int) -> Verdict:
    """Characters of texts read along a sequence, repeats and blanks removed."""

    def text(scores: Array) -> list[int]:
        best = np.ravel(scores.argmax(axis=-1))
        kept = best[np.r_[True, best[1:] != best[:-1]]]
        return [int(k) for k in kept if k != blank]

    before, after = both(case)
    return read_alike([text(v) for v in before[output]], [text(v) for v in after[output]])


def ocr(case: Case, *, role: str) -> Verdict:
    """Text that the package's own pipeline reads on twelve pages and posters."""
    pages = reading.pages(np.random.default_rng([SEED, 5]), case.cache, 1, 6)
    read = []
    for path in (case.original, case.pruned):
        options: dict[str, Any] = {f"{role}_model_dir": str(path), "use_angle_cls": role == "cls"}
        reader = reading.reader(case.manifest, case.cache, **options)
        texts = []
        for page in pages:
            found = reader.ocr(page, cls=role == "cls")[0] or []
            texts.append("\n".join(row[1][0] for row in found))
        read.append(texts)
    return read_alike(read[0], read[1])


def overlap(first: Array, second: Array) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:4], second[2:4])
    inside = float(np.prod(np.clip(high - low, 0, None)))
    areas = [float(np.prod(np.clip(box[2:4] - box[:2], 0, None))) for box in (first, second)]
    return inside / max(sum(areas) - inside, 1e-9)


def matched(before: Sequence[Array], after: Sequence[Array], least: float = 0.5) -> int:
    """Number of boxes of one list that have a partner of their own in the other."""
    free, count = list(after), 0
    for box in before:
        best = max(free, key=lambda other: overlap(box, other), default=None)
        if best is not None and overlap(box, best) >= least:
            free = [other for other in free if other is not best]
            count += 1
    return count


def found_alike(before: Sequence[Sequence[Array]], after: Sequence[Sequence[Array]]) -> float:
    """F1 of boxes in pictures, with the original's as the truth."""
    right = sum(matched(b, a) for b, a in zip(before, after, strict=True))
    return f1(right, sum(map(len, after)) - right, sum(map(len, before)) - right)


def faces_found(case: Case, *, net: str) -> Verdict:
    """F1 of faces that the three stages find with this net replaced; and with all that are pruned."""
    shown = face_pictures(case.manifest, case.cache, 1)

    def found(replaced: Mapping[str, Path]) -> list[list[Array]]:
        detector = mtcnn(case.manifest, case.cache, replaced)
        return [[box[:4] for box in detector.detect_faces_raw(picture)[0]] for picture in shown]

    before = found({})
    after = found({net: case.pruned})
    others = {name.removeprefix("mtcnn-"): path for name, path in case.siblings.items()}
    together = {
        **{k: v for k, v in others.items() if k in ("pnet", "rnet", "onet")},
        net: case.pruned,
    }
    detail = {
        "faces": sum(map(len, before)),
        "nets replaced": len(together),
        "F1 together": found_alike(before, found(together)),
    }
    return Verdict("F1 of faces", found_alike(before, after), detail)


def suppressed(boxes: Array, scores: Array, limit: float = 0.5) -> list[Array]:
    """Boxes that overlap no better one by more than a limit."""
    kept: list[Array] = []
    for box in boxes[np.argsort(-scores)]:
        if all(overlap(box, other) <= limit for other in kept):
            kept.append(box)
    return kept


def detections(case: Case, *, output: str, threshold: float) -> Verdict:
    """F1 of boxes above a threshold; a column holds centre, size and the scores of the classes (YOLOv8)."""

    def boxes(values: Array) -> list[Array]:
        rows = values[0].T
        best, kind = rows[:, 4:].max(axis=1), rows[:, 4:].argmax(axis=1)
        chosen = best >= threshold
        half = rows[chosen, 2:4] / 2
        middle = rows[chosen, :2] + 1e4 * kind[chosen, None]  # boxes of two classes never overlap
        return suppressed(np.hstack([middle - half, middle + half]), best[chosen])

    before, after = both(case)
    first, second = ([boxes(v) for v in found[output]] for found in (before, after))
    detail = {"boxes": float(sum(map(len, first)))}
    detail |= {f"R² {name}": explained(before[name], after[name]) for name in before}
    if not detail["boxes"]:
        return Verdict("R² of the worst output", min(list(detail.values())[1:]), detail)
    return Verdict("F1 of boxes", found_alike(first, second), detail)


def note_events(onsets: Array, frames: Array) -> set[tuple[int, int]]:
    """Notes (time, pitch): peaks of the onsets above 0.5 where the note then sounds for at least 11 frames."""
    later = np.pad(onsets, ((1, 1), (0, 0)))
    peaks = (onsets > 0.5) & (onsets >= later[:-2]) & (onsets > later[2:])
    sounding = np.lib.stride_tricks.sliding_window_view(frames, 11, axis=0).mean(axis=-1) > 0.3
    return {(int(t), int(p)) for t, p in np.argwhere(peaks[: len(sounding)] & sounding)}


def notes_found(case: Case, *, onsets: str, frames: str) -> Verdict:
    """F1 of notes within 50 ms."""
    before, after = both(case)
    events = [
        [note_events(o[0], f[0]) for o, f in zip(found[onsets], found[frames], strict=True)]
        for found in (before, after)
    ]
    right = 0
    for first, second in zip(*events, strict=True):
        free = set(second)
        for time, pitch in sorted(first):
            near = [(t, pitch) for t in range(time - 4, time + 5) if (t, pitch) in free]
            if near:
                free.discard(min(near, key=lambda note: abs(note[0] - time)))
                right += 1
    first_count, second_count = (sum(map(len, found)) for found in events)
    kept = f1(right, second_count - right, first_count - right)
    detail = {"notes": float(first_count)}
    detail |= {f"R² {name}": explained(before[name], after[name]) for name in before}
    return Verdict("F1 of notes", kept, detail)


JUDGES: dict[str, Callable[..., Verdict]] = {
    function.__name__: function
    for function in (
        values,
        classes,
        tags,
        embedding,
        decisions,
        silence,
        pitch,
        wake_embedding,
        wake_words,
        streams,
        ctc,
        ocr,
        faces_found,
        detections,
        notes_found,
    )
}
"""Judges by the name in the manifest."""
