"""The steps of "Add a solver" in CONTRIBUTING.md, followed in a copy of the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from conftest import ROOT
from graphs import build

from onnx_oamip.core.options.validation import choices_of
from onnx_oamip.core.settings import Settings
from onnx_oamip.core.solvers import PACKAGES
from onnx_oamip.programs import solvers

MODULE = '''
"""A solver for the test: scipy's own milp."""

import time

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csc_array

from onnx_oamip.programs.solvers.dialect import Dialect
from onnx_oamip.programs.solvers.spec import Backend, Licence, Limit, Termination

DIALECT = Dialect(
    name="scipy",
    title="scipy",
    instead="highs",
    ends={"0": Termination.OPTIMAL, "2": Termination.INFEASIBLE, "3": Termination.UNBOUNDED},
    limits={"1": Limit.TIME},
    gap="mip_rel_gap",
    time="time_limit",
    nodes="node_limit",
)


def solve(program, limits):
    began = time.perf_counter()
    matrix = csc_array(program.matrix)
    # Early releases of milp take short indices alone.
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int32), matrix.indptr.astype(np.int32)
    rows = LinearConstraint(matrix, program.row_lower, program.row_upper)
    found = milp(
        program.objective,
        integrality=program.integer.astype(int),
        bounds=Bounds(program.lower, program.upper),
        constraints=rows if program.n_rows else None,
        options=DIALECT.parameters(limits),
    )
    return DIALECT.solution(
        program,
        limits,
        solve,
        status=str(found.status),
        began=began,
        values=found.x,
        bound=found.mip_dual_bound,
    )


BACKEND = Backend(
    name=DIALECT.name,
    package="scipy",
    licence=lambda: Licence("open source (BSD), any size", None, None, True),
    rows=lambda program: program.n_rows,
    solve=solve,
)
'''
NETWORK = """(float[N,6] x) => (float[N,3] y) <float[6,12] a, float[12,3] b> {
    h = MatMul(x, a)
    r = Relu(h)
    y = MatMul(r, b)
}"""
NAMES = '"auto", "gurobi", "highs", "scip"'
ENTRIES = '"gurobi": "gurobipy", "highs": "highspy"'


def test_solver_is_one_module_and_one_table_entry(tmp_path: Path) -> None:
    # With compiled modules, which stay valid: compiling again would take longer than the run.
    shutil.copytree(ROOT / "onnx_oamip", tmp_path / "onnx_oamip")
    (tmp_path / "onnx_oamip/programs/solvers/scipy.py").write_text(MODULE)
    table = tmp_path / "onnx_oamip/core/solvers.py"
    text = table.read_text()
    assert text.count(NAMES) == text.count(ENTRIES) == 1
    text = text.replace(NAMES, f'{NAMES}, "scipy"').replace(ENTRIES, f'{ENTRIES}, "scipy": "scipy"')
    table.write_text(text)
    onnx.save(build(NETWORK), tmp_path / "m.onnx")
    data = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=data)
    command = [sys.executable, "-m", "onnx_oamip", "plan", "m.onnx", "--data", "d.npz"]
    options = ["--macs", "0.5", "--align", "1", "--solver", "scipy", "--cache", "off"]
    done = subprocess.run(
        [*command, *options, "-o", "plan.json", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["programs"][-1]["solver"] == "scipy"
    assert document["versions"]["scipy"]


def test_every_solver_is_in_the_table() -> None:
    """The names in settings are those of the table, and those of the backends."""
    names = choices_of(Settings.model_fields["solver"])
    assert names == ("auto", *PACKAGES)
    assert list(solvers.BACKENDS) == list(PACKAGES)
    for name, backend in solvers.BACKENDS.items():
        assert (backend.name, backend.package) == (name, PACKAGES[name])
