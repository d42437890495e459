"""Written programs: another solver reads them, finds the same optimum, and the names say what variables stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
from graphs import MLP, build, load
from graphs import samples as random_samples
from knapsack_programs import knapsack
from onnx import ModelProto

from onnx_oamip.api import pipeline, prepare
from onnx_oamip.core.errors import DataError, OutputError, SettingsError
from onnx_oamip.core.records import Array
from onnx_oamip.core.settings import Settings
from onnx_oamip.graph.runtime import Session
from onnx_oamip.planning import search
from onnx_oamip.programs import solvers
from onnx_oamip.programs.program_files import ProgramFile, distinct, read_solution
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
    file = ProgramFile("a/title", str(tmp_path / f"p{suffix}"))
    names = [f"unit {i}" for i in range(program.n_variables)]
    file.write(lambda: program, lambda: names, lambda: {0: "the limit"})
    assert file.path is not None
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
        ProgramFile("title", str(tmp_path / "file")).write(lambda: program, lambda: ["a", "b", "c"])


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


@pytest.mark.parametrize(
    "text",
    [
        "# Objective value = 3\nkeep_a_0 1\nkeep_a_1 0.5\n",  # Gurobi
        "solution status: optimal\nobjective value: 3\nkeep_a_0   1 \t(obj:1)\nkeep_a_1  0.5\n",  # SCIP
        "Model status\nOptimal\n\n# Columns 2\nkeep_a_0 1\nkeep_a_1 0.5\n# Rows 0\n",  # HiGHS
        "Optimal - objective value 3\n  0 keep_a_0 1 2\n  1 keep_a_1 0.5 0\n",  # CBC
    ],
)
def test_solutions_of_several_solvers_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.sol").write_text(text)
    found = read_solution(tmp_path / "p.sol")
    assert {name: found[name] for name in found if name.startswith("keep")} == {
        "keep_a_0": 1.0,
        "keep_a_1": 0.5,
    }
    values = ProgramFile("p", solutions=str(tmp_path)).values(lambda: ["keep_a_1", "keep_a_2"])
    assert values is not None
    assert values.tolist() == [0.5, 0.0]


def test_unsuitable_solutions_are_errors(tmp_path: Path) -> None:
    (tmp_path / "p.sol").write_text("nothing here\n")
    with pytest.raises(DataError, match="no line NAME VALUE"):
        read_solution(tmp_path / "p.sol")
    (tmp_path / "p.sol").write_text("other 1\n")
    with pytest.raises(DataError, match="none of the variables"):
        ProgramFile("p", solutions=str(tmp_path)).values(lambda: ["keep_a_0"])
    assert ProgramFile("q", solutions=str(tmp_path)).values(lambda: ["keep_a_0"]) is None


def _write_solution(program: Path, folder: Path) -> None:
    _, values = solved(program)
    lines = [f"{name} {value}" for name, value in values.items()]
    folder.mkdir(exist_ok=True)
    (folder / f"{program.stem}.sol").write_text("\n".join(lines))


def test_solution_of_the_budget_program_goes_back_in(tmp_path: Path) -> None:
    """The plan is that of the run that wrote the program, and the solution is read in every round."""
    path, source = _task(MLP, tmp_path)
    written = _settings(write_program=str(tmp_path / "programs"), importance="l2")
    first = search.plan(pipeline.prepare(path, source, written))
    _write_solution(tmp_path / "programs" / "budget.mps", tmp_path / "solutions")
    read = _settings(read_solutions=str(tmp_path / "solutions"), importance="l2")
    second = search.plan(pipeline.prepare(path, source, read))
    assert second.widths.tolist() == first.widths.tolist()
    assert all(record["solutions_read"] == 1 for record in second.programs)


def test_solution_that_loses_more_or_exceeds_the_budget_is_not_taken(tmp_path: Path) -> None:
    """Widths of 1 meet every budget at a high loss; full widths lose nothing and exceed it."""
    path, source = _task(MLP, tmp_path)
    folder = tmp_path / "solutions"
    folder.mkdir()
    settings = _settings(read_solutions=str(folder), importance="l2")
    ready = pipeline.prepare(path, source, settings)
    for width in (1, 1000):
        lines = [f"at_least_{width}_of_{group.name} 1" for group in ready.coupling.groups]
        (folder / "budget.sol").write_text("\n".join(lines))
        plan = search.plan(ready)
        assert [record["solutions_taken"] for record in plan.programs] == [0] * len(plan.programs)


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_solution_of_an_importance_program_is_a_first_point(tmp_path: Path, mode: str) -> None:
    path, source = _task(TINY, tmp_path)
    options = {"importance": "oamip", "mode": mode, "refit": "bias", "time_limit": 20}
    written = _settings(write_program=str(tmp_path / "programs"), **options)
    first = pipeline.score(path, source, tmp_path / "s.npz", written)
    programs = sorted((tmp_path / "programs").iterdir())
    for program in programs:
        _write_solution(program, tmp_path / "solutions")
    read = _settings(read_solutions=str(tmp_path / "solutions"), **options)
    second = pipeline.score(path, source, tmp_path / "t.npz", read)
    records = second.scores.programs
    assert sum(record["solutions_read"] for record in records) == len(programs)
    if mode == "joint":  # the first point found here keeps all units
        assert records[0]["solutions_taken"] == 1
    for before, after in zip(first.scores.programs, records, strict=True):
        assert after["objective"] <= before["objective"] * (1 + 1e-6)


def test_folder_without_solutions_of_this_run_is_an_error(tmp_path: Path) -> None:
    path, source = _task(MLP, tmp_path)
    settings = _settings(read_solutions=str(tmp_path), importance="l2")
    with pytest.raises(SettingsError, match="no program of this run"):
        pipeline.plan(path, source, None, settings)


@pytest.mark.parametrize(
    "options",
    [
        {"write_program": "p.lp", "allocate": "uniform", "importance": "l2"},
        {"read_solutions": "solved", "allocate": "global"},
        {"write_program": "programs", "granularity": "connection", "importance": "nnrelief"},
    ],
    ids=str,
)
def test_files_of_programs_are_refused_where_none_is_solved(options: dict[str, str]) -> None:
    budget = {"alpha": 0.9} if "granularity" in options else {"macs": 0.5}
    with pytest.raises(SettingsError, match="solve none; leave it out"):
        prepare.check(Settings.create(**budget, **options), "data.npz")  # type: ignore[arg-type]
    scores = Settings.create(macs=0.5, allocate="uniform", write_program="p.lp", importance="oamip")
    prepare.check(scores, "data.npz")
    with pytest.raises(SettingsError, match="`allocate=uniform` and these budgets solve none"):
        prepare.check(scores, "data.npz", scored=True)


@pytest.mark.parametrize("name", ["write_program", "read_solutions"])
def test_files_of_programs_are_refused_for_scores_that_need_none(name: str, tmp_path: Path) -> None:
    path, source = _task(MLP, tmp_path)
    settings = _settings(**{name: str(tmp_path / "programs")}, importance="l2")
    with pytest.raises(
        SettingsError, match=rf"`{name}` is .*`importance=l2` solves none"
    ) as caught:
        pipeline.score(path, source, None, settings)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "programs").exists()
