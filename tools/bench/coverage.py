"""Study of the share of parameters that stays when every group is halved, on well-known architectures.

Random weights: only the structure matters. Both exporters of torch; beside it what onnxsim and Torch-Pruning keep of
the same network when asked for half of the channels. Needs the ``experiments`` extra.
"""

from __future__ import annotations

import io
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Model,
)
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite

from .studies import Row, save

if TYPE_CHECKING:
    from .architectures import Architecture

COLUMNS = (
    "network",
    "exporter",
    "params",
    "kept %",
    "goal %",
    "onnxsim %",
    "Torch-Pruning %",
    "cut = masked",
    "pinned",
    "reasons",
)
SECONDS = 60
EXPORTERS = {"TorchScript": False, "dynamo": True}


def run(out: Path, seed: int, names: tuple[str, ...] = ()) -> str:
    """One row per network and exporter; ``names`` are parts of names."""
    from .architectures import ARCHITECTURES

    rows: list[Row] = []
    for entry in ARCHITECTURES:
        if names and not any(n.lower() in entry.name.lower() for n in names):
            continue
        rival = torch_pruning(entry, seed)
        for exporter, dynamo in EXPORTERS.items():
            row = {
                "network": entry.name,
                "exporter": exporter,
                "goal %": 100 * entry.most,
                "Torch-Pruning %": rival,
            }
            with tempfile.TemporaryDirectory() as folder:
                try:
                    file, values = export(entry, dynamo, Path(folder), seed)
                    row.update(measure(file, values))
                except Exception as error:
                    row["reasons"] = _said(error)
            rows.append(row)
            print({k: v for k, v in row.items() if k != "reasons"}, row.get("reasons"), flush=True)
    return save(out, "coverage", rows, COLUMNS, seed)


def export(
    entry: Architecture, dynamo: bool, folder: Path, seed: int
) -> tuple[Path, dict[str, Array]]:
    """Write the network, with a batch of any length where the exporter manages; returns file and inputs."""
    import torch

    from .architectures import build

    net, inputs = build(entry, seed)
    names = [f"input{i}" for i in range(len(inputs))]
    file = folder / "model.onnx"
    torch.backends.mha.set_fastpath_enabled(False)  # its one fused operator has no ONNX form
    with (
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        if dynamo:
            free: dict[str, Any] = {
                "dynamic_shapes": tuple({0: torch.export.Dim("batch")} for _ in inputs)
            }
        else:
            free = {"dynamic_axes": {n: {0: "batch"} for n in names}}
        try:
            torch.onnx.export(
                net,
                inputs,
                str(file),
                input_names=names,
                dynamo=dynamo,
                external_data=False,
                **free,
            )
        except Exception:
            torch.onnx.export(
                net, inputs, str(file), input_names=names, dynamo=dynamo, external_data=False
            )
    values = {n: x.numpy() for n, x in zip(names, inputs, strict=True)}
    if entry.quantize:
        file = _quantized(file, values)
    return file, values


def _quantized(file: Path, values: dict[str, Array]) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [values]

        def get_next(self) -> dict[str, Array] | None:
            return self.left.pop() if self.left else None

    target = file.with_name("quantized.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(str(file), str(target), Once(), per_channel=True)
    return target


def halves(coupling: Coupling) -> Bools:
    """Every other unit of every group."""
    keep = np.zeros(coupling.n_units, bool)
    for group in coupling.groups:
        keep[group.units[::2]] = True
    return keep


def measure(file: Path, values: dict[str, Array]) -> Row:
    """Cut half of every group: share kept, distance from the masked original, what is pinned and why."""
    model = models.load(file)
    coupling = couple(model)
    keep = halves(coupling)
    before = parameters(onnx.load(file))
    cut = rewrite.cut(model, coupling, keep)
    onnx.checker.check_model(cut, full_check=True)
    reasons: Counter[str] = Counter()
    for pinned in coupling.pinned:
        reasons[_short(pinned.reason)] += pinned.count
    return {
        "params": before,
        "kept %": round(100 * parameters(cut) / before, 1),
        "onnxsim %": onnxsim(file, before),
        "cut = masked": f"{apart(model, coupling, cut, keep, values):.0e}",
        "pinned": sum(reasons.values()),
        "reasons": "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(3)),
    }


def apart(
    model: Model, coupling: Coupling, cut: onnx.ModelProto, keep: Bools, values: dict[str, Array]
) -> float:
    """Largest relative difference between the cut model and the original with removed channels zeroed, two batches."""
    small, masked = Session(cut, "cpu"), Session(rewrite.mask(model, coupling, keep), "cpu")
    worst = 0.0
    for stop in (1, 2) if isinstance(model.inputs[0].dims[0], str) else (2,):
        feed = {n: x[:stop] for n, x in values.items()}
        for a, b in zip(masked.run(feed), small.run(feed), strict=True):
            if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
                return float("inf")
            scale = float(np.abs(a).max(initial=1e-12))
            worst = max(
                worst,
                float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0)) / scale,
            )
    return worst


def parameters(proto: onnx.ModelProto) -> int:
    """Elements of floating or quantised constants of rank one or more, wherever the file keeps them."""
    held = list(proto.graph.initializer)
    held += [
        a.t
        for n in proto.graph.node
        if n.op_type == "Constant"
        for a in n.attribute
        if a.name == "value"
    ]
    wide = {onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL}
    return sum(
        int(numpy_helper.to_array(t).size) for t in held if t.data_type not in wide and t.dims
    )


def onnxsim(file: Path, before: int) -> Any:
    """Share that onnxsim keeps at sparsity 0.5, channels and heads; or why there is none."""
    try:
        from onnxsim import pruning
    except ImportError:
        return "not installed"
    try:
        proto = pruning.apply_structured_pruning(onnx.load(file), 0.5)
        proto = pruning.apply_attention_head_pruning(proto, 0.5)
        return round(100 * parameters(proto) / before, 1)
    except Exception as error:
        return _said(error)


def torch_pruning(entry: Architecture, seed: int) -> Any:
    """Share that Torch-Pruning keeps at ratio 0.5 with its group magnitude, the output layers left alone."""
    try:
        import torch
        import torch_pruning as tp
    except ImportError:
        return "not installed"
    if entry.quantize:
        return "n/a"
    from .architectures import build

    net, inputs = build(entry, seed)
    before = sum(p.numel() for p in net.parameters())
    outputs = [
        m
        for n, m in net.named_modules()
        if n.split(".")[-1] in ("out", "tag") and "attention" not in n
    ]
    last = [
        m
        for m in net.modules()
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d))
    ]
    heads = {
        getattr(m, name): m.shared if name in ("k", "v") and hasattr(m, "shared") else entry.heads
        for m in net.modules()
        for name in ("q", "k", "v", "qkv")
        if entry.heads and isinstance(getattr(m, name, None), torch.nn.Linear)
    }
    try:
        silent = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
        with warnings.catch_warnings(), silent[0], silent[1], _limit(SECONDS):
            warnings.simplefilter("ignore")
            pruner = tp.pruner.MetaPruner(
                net,
                inputs if len(inputs) > 1 else inputs[0],
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=0.5,
                ignored_layers=outputs or last[-1:],
                num_heads=heads,
            )
            pruner.step()
            net(*inputs)
        return round(100 * sum(p.numel() for p in net.parameters()) / before, 1)
    except Exception as error:
        return _said(error)


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError inside after so long: some graphs are never done."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def _said(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {text[0][:70].replace('|', '/')}"
        if text
        else type(error).__name__
    )


def _short(reason: str) -> str:
    """A reason without the names of nodes and tensors, so that equal ones count together."""
    parts = reason.split("'")
    return " ".join(" ".join(parts[::2]).replace("|", "/").split())[:90]
