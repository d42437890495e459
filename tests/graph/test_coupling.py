"""Couplings by themselves: what a group is called, in what order units stand, and what is left without some groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import NETS, assert_exact, build, load

from onnx_oamip.core.records import Coupling, Model, Pinned
from onnx_oamip.graph.coupling import couple, exclude

SPLIT = """(float[N,3,6,6] x) => (float[N,4,4,4] y, float[N,5,4,4] z)
    <float[9,3,3,3] w1, float[9] b1, int64[2] parts = {6, 3}, float[4,6,1,1] w2, float[5,3,1,1] w3> {
        a = Conv(x, w1, b1)
        h, g = Split<axis = 1>(a, parts)
        y = Conv(h, w2)
        z = Conv(g, w3)
    }"""
BRANCHES = """(float[N,6] x, bool go) => (float[N,4] y)
    <float[6,8] w1, float[8,10] w2, float[10,8] w3, float[8,4] w4> {
        h = MatMul(x, w1)
        s = If(go) <
            then_branch = yes () => (float[N,8] p) { a = MatMul(h, w2)  r = Relu(a)  p = MatMul(r, w3) },
            else_branch = no () => (float[N,8] q) { q = Relu(h) }
        >
        y = MatMul(s, w4)
    }"""


def _coupled(text: str, folder: Path) -> tuple[Model, Coupling]:
    model = load(build(text), folder)
    return model, couple(model)


def test_groups_of_one_weight_have_distinct_names(tmp_path: Path) -> None:
    model, coupling = _coupled(SPLIT, tmp_path)
    assert [g.name for g in coupling.groups] == ["w1", "w1#2"]
    first, second = coupling.groups
    # The weight that comes first in the graph, not one of those that read it; units in the order of its channels.
    np.testing.assert_array_equal(coupling.axes["w1", 0], np.arange(9))
    np.testing.assert_array_equal(first.units, np.arange(6))
    np.testing.assert_array_equal(second.units, np.arange(6, 9))
    np.testing.assert_array_equal(coupling.unit_group, [0] * 6 + [1] * 3)
    assert {t for t, _ in first.multiplicity if t in model.constants} == {"w1", "b1", "w2"}
    assert {t for t, _ in second.multiplicity if t in model.constants} == {"w1", "b1", "w3"}
    assert set(first.multiplicity.values()) == set(second.multiplicity.values()) == {1}


@pytest.mark.parametrize("net", ["mlp", "cnn", "residual", "grouped", "attention"])
def test_units_follow_the_order_of_the_graph(net: str, tmp_path: Path) -> None:
    model, coupling = _coupled(NETS[net], tmp_path)
    seen = np.concatenate(
        [coupling.axes[key] for key in coupling.axes if key[0] in model.constants]
    )
    free = seen[seen >= 0]
    first = np.unique(free, return_index=True)[1]
    assert sorted(set(free.tolist())) == list(range(coupling.n_units))
    for g, group in enumerate(coupling.groups):
        np.testing.assert_array_equal(coupling.unit_group[group.units], g)
        assert (np.diff(group.units) > 0).all()
        for key, x in coupling.axes.items():
            held = np.isin(x, group.units).sum()
            assert held == group.multiplicity.get(key, 0) * len(group.units)
    assert (np.diff(first) > 0).all()
    assert (np.diff([group.units[0] for group in coupling.groups]) > 0).all()


def test_pinned_axes_report_channel_count_and_main_reason(tmp_path: Path) -> None:
    _, coupling = _coupled(SPLIT, tmp_path)
    found = {(p.tensor, p.axis): p for p in coupling.pinned}
    assert set(found) == {("w1", 1), ("w2", 0), ("w3", 0)}  # the interface; a bias is no weight
    assert {k: p.count for k, p in found.items()} == {("w1", 1): 3, ("w2", 0): 4, ("w3", 0): 5}
    assert all(p.given for p in found.values())
    assert found["w2", 0].reason == "it is part of the graph output 'y'"
    assert "a graph input (x)" in found["w1", 1].reason


@pytest.mark.parametrize(
    ("outputs", "tail", "given"),
    [
        pytest.param("int64[] y", "y = ArgMax <axis = 1> (l)", True, id="result"),
        pytest.param(
            "int64[] y", "a = ArgMin <axis = -1> (l) y = Mul(a, a)", True, id="arithmetic"
        ),
        pytest.param("float[] v, int64[] y", "v, y = TopK(l, two)", True, id="largest"),
        pytest.param(
            "float[N,2] y",
            "a = ArgMax <axis = 1, keepdims = 0> (l) e = Gather(w3, a) y = MatMul(e, w4)",
            False,
            id="a layer reads the choice",
        ),
        pytest.param("int64[] y", "y = ArgMax <axis = 0> (l)", False, id="another axis"),
        pytest.param(
            "int64[N,1] y",
            "a = ArgMax <axis = 1> (l) y = some.Thing(a)",
            False,
            id="unknown operator",
        ),
    ],
)
def test_classes_that_a_graph_output_is_chosen_of_are_the_interface(
    outputs: str, tail: str, given: bool, tmp_path: Path
) -> None:
    text = f"""(float[N,6] x) => ({outputs}) <float[6,8] w1, float[8,5] w2, float[5,4] w3, float[4,2] w4,
        int64[1] two = {{2}}> {{ h = MatMul(x, w1) l = MatMul(h, w2) {tail} }}"""
    model = load(build(text, domains={"some": 1}), tmp_path)
    coupling = couple(model)
    pin = next(pin for pin in coupling.pinned if (pin.tensor, pin.axis) == ("w2", 1))
    assert (pin.count, pin.given) == (5, given)
    assert ("chooses among them for the graph output 'y'" in pin.reason) == given
    assert coupling.groups
    assert all(("w2", 1) not in group.multiplicity for group in coupling.groups)


def test_pinned_axes_include_quantised_weights_but_not_indices(tmp_path: Path) -> None:
    text = (
        """(float[N,6] x) => (float[N,4] y, float[] z)
        <float[6,8] w1, int8[8,4] w2 = {"""
        + ", ".join(str(i - 16) for i in range(32))
        + """}, float scale = {0.25},
         int64[1,2] where = {3, 5}> {
            h = MatMul(x, w1)
            d = DequantizeLinear(w2, scale)
            y = MatMul(h, d)
            z = Gather<axis = 1>(x, where)
        }"""
    )
    _, coupling = _coupled(text, tmp_path)
    assert [g.name for g in coupling.groups] == ["w1"]
    assert {p.tensor for p in coupling.pinned} == {"w1", "w2"}


CUTS = {
    "residual": (NETS["residual"], ["w1", "w2"]),
    "grouped": (NETS["grouped"], ["w1", "w2"]),
    "attention": (NETS["attention"], ["we", "wq", "wv"]),
    "split": (SPLIT, ["w2", "w3"]),
    "branches": (BRANCHES, ["w1", "w2"]),
}


@pytest.mark.parametrize(
    ("net", "pattern"), [(n, p) for n, (_, patterns) in CUTS.items() for p in patterns]
)
def test_excluding_a_group_leaves_the_others_unchanged(
    net: str, pattern: str, tmp_path: Path
) -> None:
    model, coupling = _coupled(CUTS[net][0], tmp_path)
    fewer = exclude(model, coupling, [pattern])
    names = [g.name for g in fewer.groups]
    assert len(names) < len(coupling.groups)
    stays = np.zeros(coupling.n_units, bool)
    for group in coupling.groups:
        stays[group.units] = group.name in names
    assert fewer.n_units == stays.sum() == len(fewer.unit_group)
    rng = np.random.default_rng(0)
    keep = np.ones(coupling.n_units, bool)
    keep[stays] = rng.uniform(size=fewer.n_units) < 0.5
    for key in coupling.axes:
        whole = coupling.keep(key, keep)
        assert (key in fewer.axes) == bool(
            (stays[coupling.axes[key]] & (coupling.axes[key] >= 0)).any()
        )
        np.testing.assert_array_equal(
            fewer.keep(key, keep[stays]) if key in fewer.axes else True, whole
        )
        assert fewer.axes.get(key, coupling.axes[key]).min() >= -1
    kept = [g for g in coupling.groups if g.name in names]
    for g, (old, new) in enumerate(zip(kept, fewer.groups, strict=True)):
        assert (old.name, old.multiplicity) == (new.name, new.multiplicity)
        np.testing.assert_array_equal(np.flatnonzero(stays)[new.units], old.units)
        np.testing.assert_array_equal(fewer.unit_group[new.units], g)
    for was, now in ((coupling.consumers, fewer.consumers), (coupling.inside, fewer.inside)):
        assert now == tuple(c for c in was if (c.data, c.axis) in fewer.axes)
    # Every weight that a group leaves is listed as pinned.
    added = fewer.pinned[len(coupling.pinned) :]
    assert fewer.pinned[: len(coupling.pinned)] == coupling.pinned
    expected = [
        Pinned(*key, held * len(g.units), f"`exclude='{pattern}'` keeps it", True)
        for g in coupling.groups
        if g.name not in names
        for key, held in g.multiplicity.items()
        if key[0] in model.constants and len(model.shapes[key[0]]) > 1
    ]
    assert list(added) == expected
    assert expected


def test_exclusion_reason_names_the_pattern(tmp_path: Path) -> None:
    model, coupling = _coupled(SPLIT, tmp_path)
    fewer = exclude(model, coupling, ["w2", "w3"])
    assert fewer.n_units == 0
    assert (fewer.groups, fewer.axes, fewer.consumers) == ((), {}, ())
    reasons = {(p.tensor, p.reason) for p in fewer.pinned[len(coupling.pinned) :]}
    assert reasons == {
        ("w1", "`exclude='w2'` keeps it"),
        ("w2", "`exclude='w2'` keeps it"),
        ("w1", "`exclude='w3'` keeps it"),
        ("w3", "`exclude='w3'` keeps it"),
    }


STORED = {
    "half precision": ("float16", "{0}v = Cast<to = 1>({0})"),
    "codes": ("int8", "{0}c = Cast<to = 1>({0}) {0}v = Mul({0}c, {0}s)"),
}


@pytest.mark.parametrize("form", STORED)
def test_taps_of_a_kernel_behind_a_cast_are_no_pinned_channels(form: str, tmp_path: Path) -> None:
    """The same axes are listed as for a weight that the layer reads itself."""
    layers = """a = Conv(x, {w1}) b = Conv<group = 6>(a, {w2}) c = Conv(b, {w3}) d = Flatten(c) y = MatMul(d, w4)"""
    shapes = {"w1": "6,3,3,3", "w2": "6,1,3,3", "w3": "4,6,1,1"}
    kind, make = STORED[form]
    views = " ".join(make.format(name) for name in shapes)
    scales = ", ".join(f"float[{shape[0]},1,1,1] {name}s" for name, shape in shapes.items())
    found = []
    for stored_as, before, after in (("float", "", ""), (kind, views, "v")):
        weights = ", ".join(f"{stored_as}[{shape}] {name}" for name, shape in shapes.items())
        body = layers.format(**{name: name + after for name in shapes})
        net = f"""(float[N,3,6,6] x) => (float[N,5] y) <{weights}, {scales}, float[16,5] w4> {{ {before} {body} }}"""
        _, coupling = _coupled(net, tmp_path)
        listed = {(p.tensor, p.axis, p.count, p.reason) for p in coupling.pinned}
        found.append((coupling.n_units, {entry for entry in listed if entry[0] in shapes}))
    plain, stored = found
    assert plain[1]
    assert stored[0] == plain[0] > 0
    assert {entry[:3] for entry in stored[1]} == {entry[:3] for entry in plain[1]}


def test_channels_that_another_reader_of_a_view_reads_whole_are_listed(tmp_path: Path) -> None:
    net = """(float[N,3,5,5] x) => (float[] y, float[] z) <float16[6,3,3,3] w, float[6,4] w2> {
        v = Cast<to = 1>(w) a = Conv(x, v) b = GlobalAveragePool(a) c = Flatten(b) y = MatMul(c, w2)
        t = Cast<to = 1>(w) z = ReduceSum(t) }"""
    _, coupling = _coupled(net, tmp_path)
    assert not coupling.n_units
    assert ("w", 0, 6) in {(p.tensor, p.axis, p.count) for p in coupling.pinned}


FOLDED = {
    "transpose": ("t = Transpose<perm = [1, 0]>(stored) a = MatMul(x, t)", "float[8,5] stored"),
    "reshape": (
        "t = Reshape(stored, s) a = MatMul(x, t)",
        "float[5,2,4] stored, int64[2] s = {5, 8}",
    ),
    "factor": (
        "q = Transpose<perm = [1, 0]>(stored) t = Mul(f, q) a = MatMul(x, t)",
        "float[1] f = {0.5}, float[8,5] stored",
    ),
    "fused": ("a = com.microsoft.FusedMatMul<transB = 1>(x, stored)", "float[8,5] stored"),
}


@pytest.mark.parametrize("case", FOLDED)
def test_weight_that_is_folded_on_loading_has_its_name_in_the_file(
    case: str, tmp_path: Path
) -> None:
    body, weights = FOLDED[case]
    net = f"""(float[N,5] x) => (float[N,4] y) <{weights}, float[8,6] w2, float[6,4] w3> {{
        {body} b = Relu(a) c = MatMul(b, w2) d = Relu(c) y = MatMul(d, w3) }}"""
    model = load(build(net, domains={"com.microsoft": 1}), tmp_path)
    coupling = couple(model)
    first, second = coupling.groups
    assert first.name != "stored"
    expected = ("stored", "f") if case == "factor" else ("stored",)
    assert model.file_names(first.name) == expected
    assert model.file_names(second.name) == (second.name,)
    fewer = exclude(model, coupling, ["stored"])
    assert [group.name for group in fewer.groups] == [second.name]


def test_folded_node_is_excluded_by_its_name(tmp_path: Path) -> None:
    net = """(float[N,5] x) => (float[N,4] y) <float[8,5] stored, float[8,6] w2, float[6,4] w3> {
        [turn] t = Transpose<perm = [1, 0]>(stored) a = MatMul(x, t) b = Relu(a) c = MatMul(b, w2) d = Relu(c)
        y = MatMul(d, w3) }"""
    model, coupling = _coupled(net, tmp_path)
    assert [group.name for group in exclude(model, coupling, ["turn"]).groups] == ["w2"]


# ------------------------------------------------------------------------------------------------- what cannot be tied


def test_channels_in_a_branch_have_their_consumers_inside(tmp_path: Path) -> None:
    """A sum inside a branch has no statistic; a sum behind the branch has one."""
    _, coupling = _coupled(BRANCHES, tmp_path)
    assert [g.name for g in coupling.groups] == ["w1", "w2"]
    assert [c.weight for c in coupling.inside] == ["w2", "w3"]
    assert [(c.weight, c.data, c.axis, c.slot, c.weight_axis) for c in coupling.consumers] == [
        ("w4", "s", 1, 0, 0)
    ]


def test_constant_read_whole_by_another_node_is_kept(tmp_path: Path) -> None:
    """The bias is a number for every input feature there, none of which may go."""
    text = """(float[N,6] x, float[N,8] v) => (float[N,4] y, float[N,8] z)
        <float[8,6] w1, float[8] b1, float[8,7] w2, float[7,4] w3> {
            h = Gemm<transB = 1>(x, w1, b1)
            r = Relu(h)
            s = MatMul(r, w2)
            t = Relu(s)
            y = MatMul(t, w3)
            z = Add(v, b1)
        }"""
    model, coupling = _coupled(text, tmp_path)
    assert [g.name for g in coupling.groups] == ["w2"]
    (node,) = (n for n in model.nodes if n.outputs == ("z",))
    why = {(p.tensor, p.axis): (p.reason, p.given) for p in coupling.pinned}
    assert why["w1", 0] == why["w2", 0] == (f"{node} reads 'b1' whole", False)
    keep = np.arange(coupling.n_units) % 2 == 0
    assert_exact(model, coupling, keep, 1e-6, (1, 3))


def test_axes_of_different_length_are_not_tied(tmp_path: Path) -> None:
    """Such a model runs nowhere; the message names the fault on both sides."""
    text = """(float[N,3,6,6] x) => (float[] y) <float[8,3,1,1] w1, float[4,9,1,1] w2> {
        h = Conv(x, w1)
        y = Conv(h, w2)
    }"""
    model, coupling = _coupled(text, tmp_path)
    assert coupling.n_units == 0
    why = {(p.tensor, p.axis): (p.count, p.reason) for p in coupling.pinned}
    reason = f"{model.nodes[1]} ties axes of different length at 'w2'"
    assert (why["w1", 0], why["w2", 1]) == ((8, reason), (9, reason))


def test_body_of_an_operator_without_control_flow_is_ignored(tmp_path: Path) -> None:
    """ONNX refuses it of its own operators, and says nothing of those of other domains."""
    text = """(float[N,6] x) => (float[N,4] y) <float[6,8] w1, float[8,4] w2> {
        h = MatMul(x, w1)
        r = Relu(h)
        y = MatMul(r, w2)
    }"""
    proto = build(text, domains={"com.microsoft": 1})
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Gelu", "com.microsoft"
    inner = onnx.parser.parse_graph("g () => (float[N,8] p) { p = Identity(h) }")
    proto.graph.node[1].attribute.append(onnx.helper.make_attribute("extra", inner))
    model = load(proto, tmp_path)
    coupling = couple(model)
    assert coupling.n_units == 0
    assert [p.reason for p in coupling.pinned if p.tensor == "w1" and p.axis == 1] == [
        f"{model.nodes[1]} has a subgraph that is not followed"
    ]


@pytest.mark.parametrize(
    "nodes", ["y = Relu(x)", "y = MatMul(x, w)", "h = MatMul(x, w)  y = Abs(h)"]
)
def test_model_without_prunable_channels_has_no_units(nodes: str, tmp_path: Path) -> None:
    _, coupling = _coupled(f"(float[N,6] x) => (float[] y) <float[6,6] w> {{ {nodes} }}", tmp_path)
    assert (coupling.n_units, coupling.groups, coupling.consumers) == (0, (), ())
    assert coupling.axes == {}
    assert sorted(p.count for p in coupling.pinned) == ([6, 6] if "w" in nodes else [])


def test_single_unit_is_listed_with_the_node_that_joined_it(tmp_path: Path) -> None:
    """Eight channels are joined in two steps, the second by the residual addition; one channel is not listed."""
    text = """(float[N,3,6,6] x) => (float[N,4,6,6] y)
    <float[8,3,1,1] w1, float[8,8,1,1] w2, float[1,8,1,1] w3, float[4,1,1,1] w4, float[8] gain, float[8] b,
     int64[8] turned = {4, 5, 6, 7, 0, 1, 2, 3}> {
        h = Conv(x, w1)
        n = GroupNormalization<num_groups = 2>(h, gain, b)
        t = Gather<axis = 1>(n, turned)
        s = Add(t, h)
        c = Conv(s, w2)
        r = Relu(c)
        g = Conv(r, w3)
        y = Conv(g, w4)
    }"""
    coupling = couple(load(build(text, 21), tmp_path))
    assert sorted(len(group.units) for group in coupling.groups) == [1, 1, 8]
    listed = {(p.tensor, p.axis): p for p in coupling.pinned if "one unit" in p.reason}
    assert {key: p.count for key, p in listed.items()} == {("w1", 0): 8, ("w2", 1): 8}
    assert {p.reason for p in listed.values()} == {
        "Add 'Add_3' joins them into one unit, which stays"
    }
