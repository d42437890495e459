"""Written programs: another solver reads them, finds the same optimum, and the names say what variables stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
from graphs import MLP, build, load
from graphs import samples as random_samples
from knapsack_programs import knapsack
from onnx import ModelProto

from onnx_oamip.api import pipeline
from onnx_oamip.core.errors import OutputError
from onnx_oamip.core.records import Array
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.runtime import Session
from onnx_oamip.planning import search
from onnx_oamip.programs import solvers
from onnx_oamip.programs.program_files import ProgramFile, distinct
from onnx_oamip.programs.solvers import SolverLimits

highspy = pytest.importorskip("highspy")
TINY = """(float[N,4] x) => (float[N,3] y)
<float[4,4] w1, float[4] b1, float[4,3] w2, float[3] b2, float[3,3] w3> {
    a = Gemm(x, w1, b1)  h = Relu(a)  b = Gemm(h, w2, b2)  r = Relu(b)  y = Gemm(r, w3)
}"""


def solved(path: Path) -> tuple[float, dict[str, float]]:
    """Optimum of a file, and the value of every variable by name."""
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    model.setOptionValue("time_limit", 20.0)
    assert model.readModel(str(path)) == highspy.HighsStatus.kOk
    model.run()
    assert model.getModelStatus() == highspy.HighsModelStatus.kOptimal
    names = model.getLp().col_names_
    values = dict(zip(names, model.getSolution().col_value, strict=True))
    return float(model.getInfo().objective_function_value), values


def _task(text: str, folder: Path) -> tuple[Path, dict[str, Array]]:
    proto: ModelProto = build(text, seed=3)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    model = load(proto, folder)
    source: dict[str, Array] = {}
    for part, seed in (("", 0), ("eval.", 1)):
        made = random_samples(model, 60, seed)
        source.update({f"{part}{name}": value for name, value in made.items()})
        source[f"{part}labels"] = Session(proto, "cpu").run(made)[0].argmax(-1)
    return path, source


def _settings(**values: object) -> Settings:
    quick = {"macs": 0.5, "align": 1, "device": "cpu", "workers": 1, "cache": "off"}
    return Settings.create(**{**quick, "solver": "highs", **values})


@pytest.mark.parametrize("suffix", [".mps", ".lp"])
def test_written_program_has_the_same_optimum(tmp_path: Path, suffix: str) -> None:
    program = knapsack(12, seed=1)
    expected = solvers.solve(program, SolverLimits(gap=0.0), "highs")
    file = ProgramFile(str(tmp_path / f"p{suffix}"), "a/title")
    names = [f"unit {i}" for i in range(program.n_variables)]
    file.write(program, names, {0: "the limit"})
    assert file.path == tmp_path / f"p-a_title{suffix}"
    optimum, values = solved(file.path)
    assert optimum == pytest.approx(expected.objective)
    assert list(values) == [f"unit_{i}" for i in range(program.n_variables)]
    assert "the_limit" in file.path.read_text()


def test_names_are_made_distinct() -> None:
    assert distinct(["a/b", "a b", "a_b", "c"]) == ["a_b", "a_b__1", "a_b__2", "c"]


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    program = knapsack(3, seed=0)
    with pytest.raises(OutputError):
        ProgramFile(str(tmp_path / "file"), "title").write(program, ["a", "b", "c"])


def test_budget_program_is_written_with_groups_and_widths(tmp_path: Path) -> None:
    """The optimum of the file is the loss of the plan: every group has the width that its thresholds reach."""
    path, source = _task(MLP, tmp_path)
    folder = tmp_path / "programs"
    settings = _settings(write_program=str(folder), importance="l2")
    ready = pipeline.prepare(path, source, settings)
    plan = search.plan(ready)
    _, values = solved(folder / "budget.mps")
    assert ready.ladder is not None
    loss = 0.0
    for group, widths, losses in zip(
        ready.coupling.groups, ready.ladder.widths, ready.ladder.cost, strict=True
    ):
        reached = [
            int(width)
            for width in widths
            if values.get(f"at_least_{width}_of_{group.name}", 0.0) > 0.5
        ]
        width = max([int(widths[0]), *reached])
        loss += float(losses[widths.tolist().index(width)])
    assert loss == pytest.approx(plan.programs[-1]["objective"], rel=2e-3, abs=1e-9)
    assert " macs" in (folder / "budget.mps").read_text()


def test_programs_of_groups_are_written_with_units(tmp_path: Path) -> None:
    path, source = _task(MLP, tmp_path)
    settings = _settings(
        write_program=str(tmp_path / "p.lp"), importance="oamip", mode="decoupled", refit="bias"
    )
    scored = pipeline.score(path, source, tmp_path / "s.npz", settings)
    group = scored.coupling.groups[0]
    units = len(group.units)
    files = sorted(tmp_path.glob(f"p-importance-{group.name}-*-of-{units}.lp"))
    assert len(files) >= 3
    for file in files:
        kept = int(file.stem.rsplit("-of-")[0].rsplit("-")[-1])
        _, values = solved(file)
        chosen = [values.get(f"keep_{group.name}_{i}", 0.0) for i in range(units)]
        assert sum(chosen) == pytest.approx(kept)


@pytest.mark.parametrize("formulation", ["exact", "paper"])
def test_joint_program_is_written_with_tensors_and_samples(
    tmp_path: Path, formulation: str
) -> None:
    """With all cuts that were added the file is a relaxation: its optimum lies below the best point's objective."""
    path, source = _task(TINY, tmp_path)
    settings = _settings(
        write_program=str(tmp_path / "programs"),
        importance="oamip",
        mode="joint",
        formulation=formulation,
        time_limit=20,
    )
    scored = pipeline.score(path, source, tmp_path / "s.npz", settings)
    (file,) = (tmp_path / "programs").iterdir()
    optimum, values = solved(file)
    record = scored.scores.programs[0]
    assert optimum <= record["objective"] + 1e-4
    if formulation == "exact":
        kinds = {name.split("_")[0] for name in values}
        assert {"keep", "loss", "value"} <= kinds
        assert any("_sample1_" in name for name in values)
    first = scored.coupling.groups[0]
    assert set(distinct([f"keep_{first.name}_{i}" for i in range(len(first.units))])) <= set(values)
