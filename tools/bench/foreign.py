"""Models that others made: what may go in each, and 70 % of the parameters through the whole pipeline.

The text recognition of ``rapidocr_onnxruntime``, the nine classic graphs inside the ``onnx`` package, and two
transformers with open lengths by both exporters of torch. What is not installed is left out, and the table says so. The
data is random: only the structure and the proof matter, so latency is not judged.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx

from onnx_oamip import prune
from onnx_oamip.core.errors import OamipError
from onnx_oamip.core.records import Array, Report
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.runtime import Session

from .coverage import EXPORTERS
from .studies import ROOT, Row, save

COLUMNS = (
    "model",
    "exporter",
    "params",
    "units",
    "groups",
    "pinned %",
    "params kept",
    "masked equivalence",
    "rounding",
    "batches",
    "sizes",
    "remark",
)
KEEP = 0.7
SAMPLES = 32
OCR = {
    "ch_ppocr_mobile_v2.0_cls_infer": ((48, 192), (48, 96)),
    "ch_PP-OCRv4_det_infer": ((64, 64), (96, 128)),
    "ch_PP-OCRv4_rec_infer": ((48, 64), (48, 160)),
}
"""(height, width) of the data, and another at which the model must run."""
LENGTHS = (7, 12)


class Missing(Exception):
    """A package needed for a model is not installed; the message names it."""


@dataclass(frozen=True)
class Subject:
    """One file to prune: ``make`` writes it, and gives its data and feeds of other sizes with their names."""

    name: str
    exporter: str
    make: Callable[[Path, int], tuple[Path, Mapping[str, Array], Mapping[str, Mapping[str, Array]]]]


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per file; ``names`` are parts of names."""
    rows: list[Row] = []
    for subject in subjects():
        if names and not any(n.lower() in subject.name.lower() for n in names):
            continue
        row: Row = {"model": subject.name, "exporter": subject.exporter}
        with tempfile.TemporaryDirectory() as folder:
            try:
                path, data, others = subject.make(Path(folder), seed)
                row.update(measure(path, data, others, Path(folder), seed))
            except Missing as missing:
                row["remark"] = f"left out: {missing}"
            except OamipError as error:
                row["remark"] = str(error).replace("|", "/")
        rows.append(row)
        print(row, flush=True)
    return save(out, "foreign", rows, COLUMNS, seed)


def measure(
    path: Path,
    data: Mapping[str, Array],
    others: Mapping[str, Mapping[str, Array]],
    folder: Path,
    seed: int,
) -> Row:
    """Prune by the pipeline's defaults, then run the written file at the other sizes."""
    np.savez(folder / "data.npz", **dict(data))  # type: ignore[arg-type]
    settings = Settings.create(params=KEEP, seed=seed, force=True)
    report = prune(path, folder / "data.npz", folder / "pruned.onnx", settings)
    original, pruned = (Session(str(p), "cpu") for p in (path, folder / "pruned.onnx"))
    ran = []
    for size, feed in others.items():
        pairs = zip(original.run(feed), pruned.run(feed), strict=True)
        if not all(a.shape == b.shape and np.isfinite(b).all() for a, b in pairs):
            raise AssertionError(f"{path.name} gives something else than the original at {size}")
        ran.append(size)
    found = report.verification
    return {
        "params": report.before.params,
        "units": report.coupling.n_units,
        "groups": len(report.coupling.groups),
        "pinned %": round(100 * pinned_share(report), 1),
        "params kept": report.after.params / report.before.params,
        "masked equivalence": f"{found.masked_equivalence:.0e}",
        "rounding": None if found.rounding is None else f"{found.rounding:.0e}",
        "batches": ", ".join(map(str, found.batches)),
        "sizes": ", ".join(ran),
    }


def pinned_share(report: Report) -> float:
    """Channels of weights that cannot go, over all that are listed either way."""
    coupling, model = report.coupling, report.model
    stuck = sum(p.count for p in coupling.pinned)
    free = sum(
        held * len(group.units)
        for group in coupling.groups
        for (tensor, _), held in group.multiplicity.items()
        if tensor in model.constants and model.constants[tensor].ndim > 1
    )
    return stuck / max(stuck + free, 1)


def subjects() -> Iterator[Subject]:
    """All models, those that turn out to be missing among them."""
    for name in OCR:
        yield Subject(name, "PaddlePaddle", partial(_recogniser, name))
    for name in _zoo().NAMES:
        yield Subject(f"light {name}", "Caffe2, PyTorch", partial(_classic, name))
    for name in ("sentence embedder", "speech encoder and decoder"):
        for exporter, dynamo in EXPORTERS.items():
            yield Subject(name, exporter, partial(_transformer, name, dynamo))


def _recogniser(
    name: str,
    folder: Path,  # noqa: ARG001
    seed: int,
) -> tuple[Path, dict[str, Array], dict[str, dict[str, Array]]]:
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or not package.submodule_search_locations:
        raise Missing("rapidocr_onnxruntime is not installed")
    rng = np.random.default_rng(seed)
    size, other = OCR[name]
    feeds = {
        f"{n}x{h}x{w}": {"x": rng.standard_normal((n, 3, h, w), np.float32)}
        for n, (h, w) in ((1, size), (3, other))
    }
    path = Path(package.submodule_search_locations[0]) / "models" / f"{name}.onnx"
    return path, {"x": rng.standard_normal((SAMPLES, 3, *size), np.float32)}, feeds


def _classic(
    name: str,
    folder: Path,
    seed: int,
) -> tuple[Path, dict[str, Array], dict[str, dict[str, Array]]]:
    zoo = _zoo()
    proto = zoo.with_weights(name, seed)
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path, {zoo.image(proto): zoo.images(8)}, {"1x224x224": {zoo.image(proto): zoo.images(1)}}


def _transformer(
    name: str, dynamo: bool, folder: Path, seed: int
) -> tuple[Path, dict[str, Array], dict[str, dict[str, Array]]]:
    missing = [p for p in ("torch", "onnxscript") if importlib.util.find_spec(p) is None]
    if missing:
        raise Missing(f"{' and '.join(missing)}, of the extra 'experiments', not installed")
    from .architectures_foreign import NETWORKS, export

    (entry,) = [n for n in NETWORKS if n.name == name]
    path = folder / "model.onnx"
    export(entry, dynamo, path, seed)

    def made(count: int, length: int) -> dict[str, Array]:
        return {n: x.numpy() for n, x in entry.inputs(count, length).items()}

    return (
        path,
        made(SAMPLES, LENGTHS[0]),
        {f"{n}x{k}": made(n, k) for n, k in zip((1, 3), LENGTHS, strict=True)},
    )


def _zoo() -> ModuleType:
    """The graphs of the onnx package with weights, as the tests use them."""
    spec = importlib.util.spec_from_file_location(
        "zoo_networks", ROOT / "tests" / "support" / "zoo_networks.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
