"""A pruned transformer is still one to ONNX Runtime: its optimisers fuse as much as before, to the same outputs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from bert_encoder import LENGTH, bert
from conftest import MODELS
from graphs import assert_exact, distance, load, random_keep
from onnx import ModelProto

from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Group,
)
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import attention_scale, rewrite


def _kind(group: Group) -> str:
    """Weights of a group of the encoder."""
    tensors = {t for t, _ in group.multiplicity}
    if "words" in tensors:
        return "residual"
    return next(
        what for what in ("wide", "query", "value") if any(f".{what}.weight" in t for t in tensors)
    )


def _half(coupling: Coupling, *kinds: str) -> Bools:
    rng, keep = np.random.default_rng(0), np.ones(coupling.n_units, bool)
    for group in coupling.groups:
        if _kind(group) in kinds:
            keep[rng.permutation(group.units)[: len(group.units) // 2]] = False
    return keep


def _values() -> dict[str, Array]:
    rng = np.random.default_rng(1)
    # The optimiser takes a mask for the number of ones in front.
    lengths = np.asarray([LENGTH, 4, 3])
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(0, 20, (3, LENGTH)), "attention_mask": mask}


def _optimised(proto: ModelProto, folder: Path) -> ModelProto:
    pytest.importorskip(
        "sympy", reason="ONNX Runtime's transformer optimiser infers shapes with sympy"
    )
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    path = folder / "encoder.onnx"
    onnx.save(proto, path)
    found: Any = optimizer.optimize_model(
        str(path), "bert", num_heads=0, hidden_size=0, opt_level=0, use_gpu=False
    )
    result: ModelProto = found.model
    return result


def _counts(proto: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


@pytest.mark.parametrize(
    "kinds", [(), ("wide",), ("value",), ("query",), ("wide", "value", "query")]
)
def test_transformer_optimiser_fuses_pruned_models_like_the_originals(
    kinds: tuple[str, ...], tmp_path: Path
) -> None:
    model = load(bert(), tmp_path)
    coupling = couple(model)
    keep = _half(coupling, *kinds)
    cut = assert_exact(model, coupling, keep, 2e-5)
    pruned = attention_scale.rescale(model, coupling, keep, cut)
    before, after = _optimised(model.proto, tmp_path), _optimised(pruned, tmp_path)
    counts = _counts(before)
    assert counts["Attention"] == 2
    assert counts["SkipLayerNormalization"] == 4
    assert counts["BiasGelu"] == 2
    assert _counts(after) == counts
    values = _values()
    want = Session(cut, "cpu").run(values)
    assert distance(want, Session(pruned, "cpu").run(values)) < 1e-5
    # Fused attention takes the scale of its logits from the size of its heads.
    assert distance(want, Session(after, "cpu").run(values)) < 1e-5


def test_fused_attention_differs_without_the_rewritten_scale(tmp_path: Path) -> None:
    model = load(bert(), tmp_path)
    coupling = couple(model)
    cut = rewrite.cut(model, coupling, _half(coupling, "query"))
    want = Session(cut, "cpu").run(_values())
    assert distance(want, Session(_optimised(cut, tmp_path), "cpu").run(_values())) > 1e-2


def test_restored_zeros_prevent_fusion_of_normalisation(tmp_path: Path) -> None:
    """Fused neighbours remain correct; ``--exclude`` keeps the width of the residual stream."""
    model = load(bert(), tmp_path)
    coupling = couple(model)
    cut = assert_exact(model, coupling, _half(coupling, "residual"), 2e-5)
    found = _optimised(cut, tmp_path)
    assert _counts(found)["SkipLayerNormalization"] == 0
    assert _counts(found)["BiasGelu"] == 2
    values = _values()
    assert distance(Session(cut, "cpu").run(values), Session(found, "cpu").run(values)) < 1e-5


def _session_optimised(proto: ModelProto, folder: Path) -> ModelProto:
    """Model as a session optimises it, without the layouts of one machine."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return onnx.load(folder / "optimised.onnx")


@pytest.mark.parametrize("name", ["vit-fashion", "mobilenet-fashion", "resnet20-fashion"])
def test_sessions_fuse_pruned_shipped_networks_like_the_originals(
    name: str, tmp_path: Path
) -> None:
    """Operators of what a session runs, one for one, but for the nodes that put zeros back."""
    path = MODELS / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{name} is not there")
    model = models.load(path)
    coupling = couple(model)
    keep = random_keep(coupling, np.random.default_rng(0), 0.6)
    cut = rewrite.cut(model, coupling, keep)
    restored = _counts(cut) - _counts(model.proto)
    assert set(restored) <= {"Pad", "Slice"}
    before, after = (_counts(_session_optimised(p, tmp_path)) for p in (model.proto, cut))
    assert after == before + restored
    fused = {
        "vit-fashion": "BiasGelu",
        "mobilenet-fashion": "FusedConv",
        "resnet20-fashion": "FusedConv",
    }
    assert before[fused[name]] > 0
