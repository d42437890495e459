"""The command ``recover``: refusals before any work, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from graphs import build, load

from onnx_oamip.api import recovery as api
from onnx_oamip.api.pipeline import prune
from onnx_oamip.artifacts.recovered_models import Recovered
from onnx_oamip.cli import main
from onnx_oamip.cli.interrupt import first_interrupt_stops, signals_end_the_work
from onnx_oamip.core.errors import GateFailed, SettingsError
from onnx_oamip.core.options.recovery import Effort, effort_of
from onnx_oamip.core.records import Model, Objective, Recovery, Term
from onnx_oamip.core.settings import Settings
from onnx_oamip.recovery import recover as recovery


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the extra."""
    for name in [name for name in sys.modules if name.startswith("onnx_oamip.recovery.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500", Effort(steps=500)),
        ("90s", Effort(seconds=90)),
        ("10m", Effort(seconds=600)),
        ("1.5h", Effort(seconds=5400)),
    ],
)
def test_effort_is_steps_or_a_time(text: str, expected: Effort) -> None:
    assert effort_of(text) == expected
    assert Settings.create(recover=text).recover == text


def test_effort_may_be_a_number() -> None:
    assert Settings.create(recover=500).recover == "500"


@pytest.mark.parametrize("text", ["0", "0m", "-5", "1.5", "10 minutes", "", True])
def test_other_efforts_are_refused(text: object) -> None:
    with pytest.raises(
        SettingsError, match=r"`recover`: .* is not an effort; give a number of steps"
    ):
        Settings.create(recover=text)


def test_missing_torch_names_the_extra(
    no_torch: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["recover", "p.onnx", "--original", "m.onnx", "--data", "d.npz"]
    code = main([*command, "-o", str(tmp_path / "out.onnx")])
    assert code == 2
    error = capsys.readouterr().err
    assert "recovery needs the packages of the extra 'recover'" in error
    assert "pip install 'onnx-oamip[recover]'" in error
    assert not list(tmp_path.iterdir())


def test_prune_names_the_extra_before_any_work(
    no_torch: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", "no-model.onnx", "--data", "d.npz", "--macs", "0.5", "--recover"]
    assert main([*command, "-o", str(tmp_path / "out.onnx")]) == 2
    assert "extra 'recover'" in capsys.readouterr().err


def test_recovery_without_data_is_refused(tmp_path: Path) -> None:
    chosen = Settings.create(
        macs=0.5, importance="l2", allocate="uniform", refit="none", recover="10"
    )
    with pytest.raises(Exception, match="`recover` needs samples to train on; give `data`"):
        prune("model.onnx", None, None, chosen)


def test_recovery_of_connections_is_refused() -> None:
    chosen = Settings.create(
        granularity="connection", importance="nnrelief", alpha=0.9, recover="10", refit="none"
    )
    with pytest.raises(SettingsError, match="`recover` changes all weights"):
        prune("model.onnx", "data.npz", None, chosen)


def test_output_over_an_input_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(b"kept")
    command = ["recover", "p.onnx", "--original", str(model), "--data", "d.npz", "-o", str(model)]
    assert main(command) == 2
    assert "is --original itself" in capsys.readouterr().err
    assert model.read_bytes() == b"kept"


def test_notes_state_a_refusal_and_what_was_left_out() -> None:
    found = Recovery(
        accepted=False,
        before=0.5,
        after=0.6,
        steps=10,
        slowed=0,
        best_step=10,
        batch=8,
        held_bytes=0,
        seconds=1.0,
        ended="budget",
        samples=80,
        held_out=20,
        augment="none",
        device="cpu",
        weights=3,
        features=(),
        left_out=("Loop 'a': torch has no function for it",),
        curve=((10, 0.6),),
        refusal="the held-out objective (0.5) did not fall by more than noise",
    )
    refused, left_out = recovery.notes(found)
    assert "was not taken, as the held-out objective (0.5) did not fall" in refused
    assert "Loop 'a'" in left_out


# ---------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_first_interrupt_only_asks_to_stop_and_the_second_ends_the_work() -> None:
    with signals_end_the_work():
        with first_interrupt_stops() as stop:
            assert not stop()
            os.kill(os.getpid(), signal.SIGINT)
            assert stop()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("keep", [True, False])
def test_keep_best_hands_over_a_way_to_stop(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def recover(*_: object, stop: object, **__: object) -> Recovered:
        given.append(stop)
        raise SettingsError("enough.")

    monkeypatch.setattr(api, "recover", recover)
    command = ["recover", "p.onnx", "--original", "m.onnx", "--data", "d.npz"]
    main([*command, "-o", str(tmp_path / "out.onnx"), *(["--keep-best"] if keep else [])])
    assert (given[0] is not None) == keep


def _loaded(text: str, folder: Path) -> Model:
    return load(build(text), folder)


def test_outputs_of_another_width_are_refused(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,{0}] y) <float[6,5] w1, float[5,{0}] w2> {{
        h = MatMul(x, w1)  y = MatMul(h, w2) }}"""
    first, other = (_loaded(text.format(width), tmp_path) for width in (4, 3))
    api.check_output_shapes(first, first)
    with pytest.raises(
        GateFailed, match=r"the output 'y' has the shape \[1, 4\] in .* and \[1, 3\] in"
    ):
        api.check_output_shapes(first, other)


def test_inner_tensors_of_another_width_are_compared_at_the_outputs(tmp_path: Path) -> None:
    text = """(float[N,6] x) => (float[N,3] y) <float[6,{0}] w1, float[{0},3] w2> {{
        h = MatMul(x, w1)  y = MatMul(h, w2) }}"""
    first, other = (_loaded(text.format(width), tmp_path) for width in (5, 4))
    objective = Objective((Term("y", "y", "h", "values", 1),))
    assert api._other_tensors(first, other, objective) == ["h"]
    assert api._other_tensors(first, first, objective) == []
