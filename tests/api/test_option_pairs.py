"""Every pair of options together: a result that honours all of them, or one sentence that says why there is none.

Rows cover every pair of values that does not contradict itself (``covering``), on networks of a few dozen units. What
a result owes to its options is computed here, from the original model, the scores and the file that was written.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import CNN, MLP, RESIDUAL, build, constants, feed

from onnx_oamip import apply, document, frontier, plan, prune, score
from onnx_oamip.api.prepare import prepare
from onnx_oamip.core.errors import BudgetNotMet, OamipError, SettingsError
from onnx_oamip.core.records import Array, Bools, Coupling, Floats, Model, Report
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph import cost
from onnx_oamip.graph import loading as models
from onnx_oamip.graph.coupling import couple, exclude
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.surgery import rewrite

Row = dict[str, Any]
NETS = {"mlp": MLP, "cnn": CNN, "residual": RESIDUAL}
EXCLUDED = "w1"
METHODS: dict[str, Row] = {
    **{
        name: {"importance": name}
        for name in (
            "obs",
            "activation",
            "nnrelief",
            "l2",
            "l1",
            "random",
            "snacs",
            "mint",
            "correlation",
        )
    },
    **{
        f"oamip {mode} {form}": {"importance": "oamip", "mode": mode, "formulation": form}
        for mode, form in (
            ("auto", "exact"),
            ("joint", "paper"),
            ("joint", "exact"),
            ("per-class", "paper"),
            ("decoupled", "exact"),
        )
    },
}
FEW_METHODS = (
    "obs",
    "nnrelief",
    "l2",
    "snacs",
    "mint",
    "oamip joint exact",
    "oamip decoupled exact",
)
"""Methods of the default tier: every kind of statistics, and programs."""
UNITS: dict[str, Sequence[Any]] = {
    "method": tuple(METHODS),
    "verb": ("prune", "score and prune", "plan and apply", "frontier"),
    "budget": ("macs", "params", "size", "alpha", "threshold", "max_drop"),
    "iterations": (1, 2, 3),
    "allocate": ("mip", "global", "uniform"),
    "refit": ("least-squares", "bias", "none"),
    "limits": ("none", "snacs"),
    "protect": (0.0, 0.3),
    "floor": (0.0, 0.4),
    "align": (1, 2),
    "excluded": (False, True),
    "net": tuple(NETS),
}
CONNECTIONS: dict[str, Sequence[Any]] = {
    "budget": ("alpha", "params", "max_drop"),
    "iterations": (1, 2, 3),
    "allocate": ("mip", "global", "uniform"),
    "refit": ("least-squares", "bias", "none"),
    "signal": ("mean", "paper"),
    "sparse": (False, True),
    "excluded": (False, True),
    "net": tuple(NETS),
}
BUDGETS = {
    "macs": 0.75,
    "params": 0.75,
    "size": 0.8,
    "alpha": 0.9,
    "threshold": 0.05,
    "max_drop": 30.0,
}


def consistent(row: Mapping[str, Any]) -> bool:
    """No two values contradict each other: those that do are in ``REFUSED``."""
    alpha = row["budget"] != "alpha" or row["method"] == "nnrelief"
    rounds = row["iterations"] == 1 or (
        row["verb"] in ("prune", "frontier")
        and row["budget"] in ("macs", "params", "size", "alpha")
    )
    levels = row["verb"] != "frontier" or row["budget"] in ("macs", "params", "size")
    return alpha and rounds and levels


def covering(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]) -> list[Row]:
    """Rows that hold every pair of values of two factors that any allowed row holds, each the best of a few drawn."""
    rng = random.Random(0)

    def draw(fixed: Row, tries: int) -> Iterator[Row]:
        for _ in range(tries):
            row = {
                name: fixed[name] if name in fixed else rng.choice(values)
                for name, values in factors.items()
            }
            if allowed(row):
                yield row

    open_ = {
        ((a, x), (b, y)): None
        for a, b in itertools.combinations(factors, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }
    rows: list[Row] = []
    while open_:
        first = next(iter(open_))
        drawn = list(itertools.islice(draw(dict(first), 2000), 50))
        if drawn:
            rows.append(max(drawn, key=lambda row: sum(pair in open_ for pair in pairs(row))))
        # A pair that no row can hold is left out.
        for pair in pairs(rows[-1]) if drawn else (first,):
            open_.pop(pair, None)
    return rows


def pairs(row: Row) -> Iterator[tuple[Any, ...]]:
    return itertools.combinations(row.items(), 2)


def name(row: Row) -> str:
    return " ".join(str(value) for value in row.values())


def given(folder: Path, net: str) -> Path:
    """model.onnx, and data.npz with the model's own classes as labels."""
    path = folder / "model.onnx"
    path.write_bytes(build(NETS[net]).SerializeToString())
    model = models.load(path)
    values = feed(model, 1, 48)
    np.savez(
        folder / "data.npz",
        **values,
        labels=Session(model.proto, "cpu").run(values)[0].argmax(axis=1),
    )
    return path


def settings(row: Row, **more: Any) -> Settings:
    options = {key: value for key, value in row.items() if key in Settings.model_fields}
    return Settings.create(
        **{
            **METHODS[row.get("method", "nnrelief")],
            **options,
            row["budget"]: BUDGETS[row["budget"]],
            "exclude": (EXCLUDED,) if row["excluded"] else (),
            "device": "cpu",
            "workers": 1,
            "solver": "highs",
            "time_limit": 1.0,
            "cache": "off",
            "force": True,
            **more,
        }
    )


def refused(error: OamipError, folder: Path, kinds: tuple[type[OamipError], ...]) -> None:
    """The error is of one of some kinds, its message is one sentence, and nothing was written."""
    assert isinstance(error, kinds), repr(error)
    assert re.fullmatch(r"\S.{20,}\.", str(error)), str(error)
    assert error.exit_code == (2 if isinstance(error, SettingsError) else 1)
    assert not (folder / "out.onnx").exists()


# -------------------------------------------------------------------------------------------------------------- units


def run(folder: Path, row: Row, wanted: Settings) -> Report | None:
    """Run the row's command on model.onnx; out.onnx, or None for a frontier, which compares its own files."""
    model, source, out = folder / "model.onnx", str(folder / "data.npz"), folder / "out.onnx"
    if row["verb"] == "score and prune":
        score(model, source, folder / "scores.npz", wanted)
        return prune(model, source, out, wanted, scores=folder / "scores.npz")
    if row["verb"] == "plan and apply":
        plan(model, source, folder / "plan.json", wanted)
        return apply(model, folder / "plan.json", source, out, {"force": True, "cache": "off"})
    if row["verb"] == "frontier":
        (folder / "levels").mkdir()
        found = frontier(model, source, wanted, (0.75,), save_dir=folder / "levels")
        assert found.settings["iterations"] == row["iterations"]
        for point in found.points:
            if point.output is not None:
                check_file(folder, row, Path(point.output), {"macs": point.asked})
        return None
    return prune(model, source, out, wanted)


def check_file(folder: Path, row: Row, out: Path, budgets: Mapping[str, float]) -> None:
    """Budgets, floors, constraints and excluded tensors, from the files alone."""
    model, small = models.load(folder / "model.onnx"), models.load(out)
    before, after = cost.count(model), cost.count(small)
    used = {
        "macs": after.macs / before.macs,
        "params": after.params / before.params,
        "size": out.stat().st_size / (folder / "model.onnx").stat().st_size,
    }
    for kind, share in budgets.items():
        if kind in used:
            assert used[kind] <= share + 1e-9, (kind, used[kind])
    if row["excluded"]:
        assert constants(small.proto)[EXCLUDED].shape == constants(model.proto)[EXCLUDED].shape


def importance_of_units(model: Model, coupling: Coupling) -> Floats:
    """Share of the absolute weight of consumers (n_units,), every output's weights summing to one."""
    total = np.zeros(coupling.n_units)
    for consumer in coupling.consumers:
        assert consumer.weight is not None
        weight = np.moveaxis(np.abs(model.constants[consumer.weight]), consumer.weight_axis, 0)
        if weight.ndim == 4:
            weight = weight.mean(axis=(2, 3))
        share = (weight / weight.sum(axis=0)).mean(axis=1)
        labels = coupling.axes[consumer.data, consumer.axis]
        np.add.at(total, labels[labels >= 0], share[labels >= 0])
    return total


def check_units(folder: Path, row: Row, keep: Bools, coupling: Coupling) -> None:
    """Floors, alignment and protected units of the original's groups, and upper limits of what may be removed."""
    model = models.load(folder / "model.onnx")
    values = importance_of_units(model, coupling)
    least = np.full(len(coupling.groups), row["floor"])
    # Three rounds must keep to what one round finds.
    if row["limits"] == "snacs" and row["iterations"] > 1:
        once = settings(row, iterations=1)
        least = np.maximum(
            least, prepare(model.path, str(folder / "data.npz"), once).constraints.floor
        )
    for group, floor in zip(coupling.groups, least, strict=True):
        kept, count = keep[group.units], len(group.units)
        assert kept.sum() >= max(1, np.ceil(floor * count - 1e-6))
        assert kept.sum() % row["align"] == 0 or kept.all()
        share = int(np.ceil(row["protect"] * count - 1e-9))
        protected = np.argsort(-values[group.units])[:share]
        assert kept[protected].all(), f"{group.name} lost protected units"


ROWS = covering(UNITS, consistent)
FEW_ROWS = covering({**UNITS, "method": FEW_METHODS}, consistent)
"""Every pair of values but those of further methods, which differ in their scores alone."""


@pytest.mark.parametrize(
    "row",
    [
        *(pytest.param(row, id=name(row)) for row in FEW_ROWS),
        *(
            pytest.param(row, id=f"{name(row)}, all methods", marks=pytest.mark.slow)
            for row in ROWS
        ),
    ],
)
def test_pairs_of_options_meet_their_promises_for_units(row: Row, tmp_path: Path) -> None:
    path = given(tmp_path, row["net"])
    wanted = settings(row)
    try:
        report = run(tmp_path, row, wanted)
    except OamipError as error:
        keeping = (
            row["limits"] != "none"
            or row["floor"]
            or row["protect"]
            or row["excluded"]
            or row["align"] > 1
        )
        kinds = (
            *((BudgetNotMet,) if keeping else ()),
            *((SettingsError,) if "oamip" in row["method"] else ()),
        )
        refused(error, tmp_path, kinds)
        return
    if report is None:
        return
    model = models.load(path)
    coupling = exclude(model, couple(model), wanted.exclude)
    assert [g.name for g in coupling.groups] == [g.name for g in report.coupling.groups]
    keep = report.plan.keep
    check_file(tmp_path, row, tmp_path / "out.onnx", {row["budget"]: BUDGETS[row["budget"]]})
    check_units(tmp_path, row, keep, coupling)
    reported = document(report)
    assert reported["settings"]["iterations"] == row["iterations"]
    assert reported["verification"]["masked_equivalence"] is not None
    if row["budget"] == "alpha" and row["iterations"] == 1 and report.scores is not None:
        assert keep[report.scores.values > 0].all(), (
            "alpha removes nothing but units without a connection"
        )
    if row["budget"] == "max_drop":
        found = report.verification
        assert found.accuracy_before is not None
        assert found.accuracy_after is not None
        assert 100 * (found.accuracy_before - found.accuracy_after) <= BUDGETS["max_drop"] + 1e-6
    # Nothing but the cut: zeros do the same.
    if row["refit"] == "none" and "paper" not in row["method"]:
        values = feed(model, 7, 5)
        masked = Session(rewrite.mask(model, coupling, keep), "cpu").run(values)[0]
        small = Session(onnx.load(tmp_path / "out.onnx"), "cpu").run(values)[0]
        np.testing.assert_allclose(small, masked, rtol=1e-3, atol=1e-4)


def test_option_rows_cover_every_pair() -> None:
    """No pair of values that a consistent row can hold is missing: drawn rows hold nothing else."""
    held = {pair for row in ROWS for pair in pairs(row)}
    rng = random.Random(1)
    drawn = ({key: rng.choice(values) for key, values in UNITS.items()} for _ in range(10_000))
    rows = [row for row in drawn if consistent(row)]
    assert len(rows) > 1000
    assert all(pair in held for row in rows for pair in pairs(row))


# -------------------------------------------------------------------------------------------------------- connections


@pytest.mark.parametrize("row", covering(CONNECTIONS, lambda _: True), ids=name)
def test_pairs_of_options_meet_their_promises_for_connections(row: Row, tmp_path: Path) -> None:
    path = given(tmp_path, row["net"])
    wanted = settings(row, granularity="connection")
    try:
        report = prune(path, str(tmp_path / "data.npz"), tmp_path / "out.onnx", wanted)
    except OamipError as error:
        refused(error, tmp_path, (BudgetNotMet,))
        return
    before, after = _weights(models.load(path)), _weights(models.load(tmp_path / "out.onnx"))
    zeros = {key: np.count_nonzero(value == 0) for key, value in after.items() if value.ndim > 1}
    assert sum(zeros.values()) > 0 or row["budget"] == "max_drop"
    for key, value in before.items():
        if value.ndim > 1:
            assert after[key].shape == value.shape
    assert report.connections is not None
    assert len(report.connections.rounds) == row["iterations"]
    if row["budget"] == "params":
        assert report.connections.kept <= BUDGETS["params"] * report.connections.total
    if row["excluded"]:
        excluded = constants(build(NETS[row["net"]]))[EXCLUDED]
        assert [zeros[key] for key, value in before.items() if np.array_equal(value, excluded)] == [
            0
        ]


def _weights(model: Model) -> dict[tuple[str, int], Array]:
    """Constants by the node and the slot that read them: a refit may rename them."""
    return {
        (node.name, slot): model.constants[tensor]
        for node in model.nodes
        for slot, tensor in enumerate(node.inputs)
        if tensor in model.constants
    }


# ----------------------------------------------------------------------------------------------------- contradictions

REFUSED: dict[str, dict[str, Any]] = {
    "connections of another method": {
        "granularity": "connection",
        "importance": "obs",
        "params": 0.5,
    },
    "connections to MACs": {"granularity": "connection", "importance": "nnrelief", "macs": 0.5},
    "connections and protected units": {"protect": 0.3},
    "connections and limits of units": {"limits": "snacs"},
    "connections and a floor of units": {"floor": 0.2},
    "rounds to a drop": {"iterations": 2, "max_drop": 3.0},
    "rounds to a threshold": {"iterations": 2, "threshold": 0.1},
    "an alpha of another method": {"importance": "l2", "alpha": 0.9, "macs": 0.5},
}


@pytest.mark.parametrize("values", REFUSED.values(), ids=REFUSED)
def test_contradictory_options_give_one_sentence(values: Row, tmp_path: Path) -> None:
    path = given(tmp_path, "mlp")
    base = (
        {}
        if len(values) > 1
        else {"granularity": "connection", "importance": "nnrelief", "params": 0.5}
    )
    wanted = Settings.create(**{"device": "cpu", "cache": "off", **base, **values})
    with pytest.raises(SettingsError) as caught:
        prune(path, str(tmp_path / "data.npz"), tmp_path / "out.onnx", wanted)
    refused(caught.value, tmp_path, (SettingsError,))
