"""Pruned files handed over to other tools, and the outputs there against those of ONNX Runtime on the same file.

Every tool reads the original and the pruned file: what it cannot do with both has nothing to do with pruning.
"""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_oamip.data import dataset
from onnx_oamip.graph import loading

from ..bench import studies
from . import samples
from .draw import SEED, Array, Feeds, session
from .manifest import Manifest

RUNS = 8
"""Samples that outputs are compared on."""
CALIBRATION = 32
"""Samples for the ranges of static int8."""
COLUMNS = ("tool", "version", "file", "pruned", "original", "bytes kept", "bytes of pruned")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Pair:
    """A pruned file with its original, and feeds of one sample each."""

    name: str
    original: Path
    pruned: Path
    feeds: Sequence[Feeds]


@dataclass(frozen=True)
class Work:
    """A file that a tool gets, a folder to write to, and the folder of the installed npm packages."""

    file: Path
    all_feeds: Sequence[Feeds]
    place: Path
    modules: Path

    def feeds(self, count: int) -> Sequence[Feeds]:
        """The first samples, one by one."""
        return self.all_feeds[:count]


Outputs = list[dict[str, Array]]
Handed = tuple[Outputs, int | None]
"""Outputs for the first samples, and the bytes of what the tool wrote, None if it wrote nothing."""


def run(file: Path, feeds: Sequence[Feeds]) -> Outputs:
    """Outputs of plain ONNX Runtime."""
    opened = session(file)
    names = [output.name for output in opened.get_outputs()]
    return [dict(zip(names, opened.run(None, feed), strict=True)) for feed in feeds]


def _written(work: Work, file: Path) -> Handed:
    """Outputs and size of a file that a tool made."""
    return run(file, work.feeds(RUNS)), file.stat().st_size


def openvino(work: Work) -> Handed:
    """OpenVINO on the CPU in single precision; the size is that of its intermediate representation."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(work.file)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(model, "CPU", exact)
    names = [port.get_any_name() for port in compiled.outputs]
    found = [dict(zip(names, compiled(feed).values(), strict=True)) for feed in work.feeds(RUNS)]
    ov.save_model(model, work.place / "ir.xml", compress_to_fp16=False)
    return found, sum(path.stat().st_size for path in work.place.glob("ir.*"))


def static_int8(work: Work) -> Handed:
    """ONNX Runtime's static quantisation: QuantizeLinear and DequantizeLinear around layers, ranges of samples."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(work.feeds(CALIBRATION))

        def get_next(self) -> Feeds | None:
            return next(self._feeds, None)

    ready, target = work.place / "ready.onnx", work.place / "static.onnx"
    quant_pre_process(work.file, ready, skip_symbolic_shape=True)
    quantize_static(ready, target, Reader(), per_channel=True)
    return _written(work, target)


def dynamic_int8(work: Work) -> Handed:
    """ONNX Runtime's dynamic quantisation: int8 weights, ranges of activations at run time."""
    from onnxruntime.quantization import quantize_dynamic

    target = work.place / "dynamic.onnx"
    quantize_dynamic(work.file, target, per_channel=True)
    return _written(work, target)


def optimiser(work: Work) -> Handed:
    """ONNX Runtime's optimiser for transformers, in the general form of BERT."""
    from onnxruntime.transformers.optimizer import optimize_model

    target = work.place / "optimised.onnx"
    made = optimize_model(str(work.file), "bert", num_heads=0, hidden_size=0, use_gpu=False)
    made.save_model_to_file(str(target))
    return _written(work, target)


def slim(work: Work) -> Handed:
    """OnnxSlim."""
    import onnxslim

    target = work.place / "slim.onnx"
    onnx.save(onnxslim.slim(str(work.file)), target)
    return _written(work, target)


def simplifier(work: Work) -> Handed:
    """ONNX Simplifier."""
    import onnxsim

    target = work.place / "sim.onnx"
    made, same = onnxsim.simplify(onnx.load(work.file))
    if not same:
        raise RuntimeError("its own check finds other outputs")
    onnx.save(made, target)
    return _written(work, target)


def web(work: Work) -> Handed:
    """onnxruntime-web: WebAssembly in Node.js."""
    given, made = work.place / "feeds.json", work.place / "outputs.json"
    found: Outputs = []
    for feed in work.feeds(RUNS):
        given.write_text(json.dumps([_packed(name, value) for name, value in feed.items()]))
        _node("web.mjs", work.modules, work.file, given, made)
        found.append({row["name"]: _unpacked(row) for row in json.loads(made.read_text())})
    return found, None


def netron(work: Work) -> Handed:
    """Netron's parser, which must find the nodes, weights, inputs and outputs of the file."""
    import netron as package

    read = json.loads(_node("netron.mjs", Path(package.__file__).parent, work.file))
    graph = onnx.load(work.file, load_external_data=False).graph
    used = {name for node in graph.node for name in node.input}
    weights = [tensor.name for tensor in graph.initializer if tensor.name in used]
    expected = {
        "nodes": len(graph.node),
        "initializers": len(weights),
        "inputs": [port.name for port in graph.input if port.name not in weights],
        "outputs": [port.name for port in graph.output],
    }
    if read != expected:
        raise RuntimeError(f"it shows {read}, not {expected}")
    return run(work.file, work.feeds(RUNS)), None


def _packed(name: str, value: Array) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"name": name, "type": value.dtype.name, "dims": value.shape, "data": data}


def _unpacked(row: Mapping[str, Any]) -> Array:
    return np.frombuffer(base64.b64decode(row["data"]), row["type"]).reshape(row["dims"])


def _node(script: str, *arguments: Path) -> str:
    """Stdout of a script in Node.js."""
    command = ["node", str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return done.stdout


TOOLS: dict[str, tuple[str, Callable[[Work], Handed]]] = {
    "OpenVINO": ("openvino", openvino),
    "ONNX Runtime, static int8": ("onnxruntime", static_int8),
    "ONNX Runtime, dynamic int8": ("onnxruntime", dynamic_int8),
    "ONNX Runtime, transformer optimiser": ("onnxruntime", optimiser),
    "onnxruntime-web (WebAssembly)": ("npm:onnxruntime-web", web),
    "OnnxSlim": ("onnxslim", slim),
    "onnxsim": ("onnxsim", simplifier),
    "Netron's parser": ("netron", netron),
}
"""Tools by name: the package that has their version, and the function that runs them."""


def apart(before: Outputs, after: Outputs) -> float:
    """Largest difference of any output, relative to the largest magnitude of that output."""
    worst = 0.0
    for name in before[0]:
        first, second = (
            np.stack([row[name] for row in rows]).astype(np.float64) for rows in (before, after)
        )
        scale = float(np.abs(first).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(first - second).max(initial=0.0)) / scale)
    return worst


def rows(pairs: Sequence[Pair], modules: Path) -> list[studies.Row]:
    """One row for every tool and file: how far its outputs are from those of ONNX Runtime, or why it fails."""
    found = []
    for tool, (package, function) in TOOLS.items():
        for pair in pairs:
            row: studies.Row = {"tool": tool, "version": _version(package, modules)}
            row["file"] = pair.name
            sizes = {}
            for kind, file in (("pruned", pair.pruned), ("original", pair.original)):
                row[kind], sizes[kind] = _cell(function, file, pair.feeds, modules)
            made = sizes["pruned"]
            row["bytes kept"] = row["bytes of pruned"] = None
            if made and sizes["original"]:
                row["bytes kept"] = round(made / sizes["original"], 2)
                row["bytes of pruned"] = round(made / pair.pruned.stat().st_size, 2)
            print(row, flush=True)
            found.append(row)
    return found


def _cell(
    function: Callable[[Work], Handed], file: Path, feeds: Sequence[Feeds], modules: Path
) -> tuple[str, int | None]:
    """The difference that a tool makes, or why it fails, and the bytes of what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        work = Work(file, feeds, Path(folder), modules)
        try:
            made, size = function(work)
        except Exception as error:  # the row says what the tool cannot do
            return f"fails: {str(error).strip().splitlines()[-1][:120]}", None
        return f"{apart(run(file, work.feeds(RUNS)), made):.0e}", size


def _version(package: str, modules: Path) -> str:
    registry, _, name = package.rpartition(":")
    if registry:
        described = json.loads((modules / name / "package.json").read_text())
        return str(described["version"])
    return metadata.version(name)


def load(text: str) -> Pair:
    """Read ``ORIGINAL.onnx,PRUNED.onnx,SAMPLES.npz``."""
    original, pruned, data = map(Path, text.split(","))
    return Pair(original.stem, original, pruned, _feeds(original, data))


def _feeds(model: Path, data: Path) -> list[Feeds]:
    """Feeds of one sample each, as this package reads them."""
    found = dataset.load(data, loading.load(model))
    assert found is not None
    return [feed for _, feed in itertools.islice(found.batches(1), CALIBRATION)]


def simplify_all(manifest: Manifest, cache: Path, out: Path) -> None:
    """Hand every original to onnxsim, for the table of the real files; what has a record is left as it is."""
    for entry in manifest.entries:
        path = out / f"{entry.name}-onnxsim.json"
        if path.exists():
            continue
        file = entry.path(cache)
        feeds = _feeds(file, samples.write(entry, manifest, cache))
        difference, size = _cell(simplifier, file, feeds, Path())
        share = round(size / file.stat().st_size, 3) if size else None
        path.write_text(json.dumps({"apart": difference, "bytes": share}) + "\n", encoding="utf-8")
        print(entry.name, difference, share, flush=True)


def write(pairs: Sequence[Pair], modules: Path, study: Path | None = None) -> str:
    """The table as Markdown; with ``study``, also saved as the study ``handover`` in that folder."""
    found = rows(pairs, modules)
    if study is not None:
        studies.store(study, "handover", found, COLUMNS, SEED)
    return studies.table(found, COLUMNS)
