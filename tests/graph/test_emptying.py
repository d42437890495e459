"""Emptied groups: which groups a graph can do without, and what is left of it without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from branch_networks import MAY_BE_EMPTIED, NETS
from graphs import CNN, GROUPED, MLP, RESIDUAL, assert_exact, build, distance, feed, load

from onnx_oamip.core.errors import ModelError
from onnx_oamip.core.records import Bools, Coupling
from onnx_oamip.graph.coupling import couple
from onnx_oamip.graph.emptying import Emptying, emptied_groups
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import branch_constants, rewrite


def _without(coupling: Coupling, groups: frozenset[int], rng: np.random.Generator) -> Bools:
    """Some units of all groups but these, of which there is none."""
    keep = rng.random(coupling.n_units) < 0.7
    for number, group in enumerate(coupling.groups):
        keep[group.units[0]] = True
        if number in groups:
            keep[group.units] = False
    return keep


@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
@pytest.mark.parametrize("name", NETS)
def test_model_without_groups_equals_the_masked_one(name: str, half: bool, tmp_path: Path) -> None:
    text = NETS[name]
    if half:
        text = text.replace("float[", "float16[").replace("float s = {2.0}", "float16[1] s")
    model = load(build(text, opset=20), tmp_path)
    coupling = couple(model)
    bundles = Emptying(model, coupling).bundles()
    names = [group.name for group in coupling.groups]
    found = {names[g]: {names[i] for i in bundle} for g, bundle in bundles.items()}
    assert found == MAY_BE_EMPTIED[name]

    rng = np.random.default_rng(0)
    tolerance = 2e-2 if half else 1e-5
    values = feed(model, 1, 3)
    for bundle in (*bundles.values(), frozenset[int]().union(*bundles.values())):
        keep = _without(coupling, bundle, rng)
        assert emptied_groups(coupling, keep) == bundle
        cut = assert_exact(model, coupling, keep, tolerance)
        folded = branch_constants.fold(model, coupling, keep, cut)
        onnx.checker.check_model(folded, full_check=True)
        assert folded.graph.output == model.proto.graph.output
        first, second = Session(cut, "cpu"), Session(folded, "cpu")
        assert distance(first.run(values), second.run(values)) < tolerance
        # Nothing is left of the branches: no tensor without elements, and no layer of theirs.
        assert all(0 not in tensor.dims for tensor in folded.graph.initializer)
        left = {tensor.name for tensor in folded.graph.initializer}
        assert left.isdisjoint(names[g] for g in bundle)
        assert len(folded.graph.node) <= len(cut.graph.node) < len(model.nodes)


def test_first_layer_takes_the_constants_of_all_blocks(tmp_path: Path) -> None:
    model = load(build(NETS["mobile"], opset=20), tmp_path)
    coupling = couple(model)
    groups = frozenset().union(*Emptying(model, coupling).bundles().values())
    keep = ~np.isin(coupling.unit_group, sorted(groups))
    folded = branch_constants.fold(model, coupling, keep, rewrite.cut(model, coupling, keep))
    operators = [node.op_type for node in folded.graph.node]
    assert operators == ["Conv", "GlobalAveragePool", "Flatten", "Gemm"]
    assert {t.name for t in folded.graph.initializer} == {"w0", "b0", "w4", "b4"}
    # The layer that takes up the constant has the name of the last sum, which its output equals.
    assert folded.graph.node[0].output[0] == folded.graph.node[1].input[0] == "z"


@pytest.mark.parametrize(
    ("text", "group", "reason"),
    [
        (MLP, "w2", "the graph output 'y' would be a constant"),
        (MLP, "w1", "would read a constant"),
        (CNN, "w1", "would read a constant"),
        (GROUPED, "w1", "would read a constant"),
        (RESIDUAL, "w1", "the graph output 'y' would be a constant"),
        (NETS["transformer"], "wq", "which has no output without it"),
    ],
)
def test_group_that_the_graph_needs_is_kept(
    text: str, group: str, reason: str, tmp_path: Path
) -> None:
    model = load(build(text, opset=20), tmp_path)
    coupling = couple(model)
    number = [g.name for g in coupling.groups].index(group)
    graph = Emptying(model, coupling)
    assert number not in graph.bundles()
    assert reason in graph.effect({number}).obstacle
    with pytest.raises(ModelError, match="keep at least one of them"):
        rewrite.cut(model, coupling, coupling.unit_group != number)


def test_all_branches_of_a_join_cannot_go_without_another_way(tmp_path: Path) -> None:
    text = NETS["inception"].replace("s = Add(k, h)", "s = Relu(k)")
    model = load(build(text, opset=20), tmp_path)
    coupling = couple(model)
    graph = Emptying(model, coupling)
    bundles = graph.bundles()
    assert len(bundles) == 3
    (first, one), (second, other), (third, _) = bundles.items()
    assert set(graph.bundles(one)) == {second, third}
    assert first not in graph.bundles(one)
    assert graph.bundles(one | other) == {}
