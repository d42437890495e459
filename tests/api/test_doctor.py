"""Diagnosis of an installation."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnx_oamip.api import doctor
from onnx_oamip.cli import main
from onnx_oamip.core.errors import GateFailed
from onnx_oamip.core.json_values import plain
from onnx_oamip.programs import solvers
from onnx_oamip.programs.solvers import SolverRecord


def test_healthy_installation_has_no_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONNX_OAMIP_CACHE", str(tmp_path))
    (tmp_path / "entry.npz").write_bytes(bytes(100))
    monkeypatch.setattr(doctor, "DEVICES", ("cpu",))
    found = doctor.diagnose()
    assert found.problems == ()
    assert found.devices[0].usable
    assert found.devices[0].seconds is not None
    assert (found.cache, found.cache_bytes) == (str(tmp_path), 100)
    assert found.extras["report"] == ()
    assert {solver["name"] for solver in found.document["solvers"]} == set(solvers.BACKENDS)
    assert plain(found.document) == found.document
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "no problem found" in shown
    assert "passed" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_failed_trial_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise GateFailed("the pruned model differs.")

    monkeypatch.setattr(doctor, "_try_prune", fails)
    monkeypatch.setattr(doctor, "DEVICES", ("cpu",))
    found = doctor.diagnose()
    assert found.devices == (doctor.DeviceCheck("cpu", True, None, "the pruned model differs."),)
    assert found.problems == ("the trial on cpu failed: the pruned model differs.",)
    monkeypatch.setattr(doctor, "diagnose", lambda: found)
    assert main(["doctor", "--json"]) == 1


def test_missing_device_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_try_prune", lambda _: None)
    found = doctor.diagnose()
    cuda = found.devices[1]
    if not cuda.usable:
        assert "onnx-oamip[gpu]" in cuda.problem
        assert cuda.seconds is None
    assert found.problems == ()


def test_no_usable_solver_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_try_prune", lambda _: None)
    absent = SolverRecord("highs", False, None, "not installed", None, None, False)
    monkeypatch.setattr(doctor.solvers, "available", lambda: [absent])
    assert any("no solver is usable" in problem for problem in doctor.diagnose().problems)
