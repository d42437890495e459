"""Signals whose exception Python cannot raise: stderr has the sentence about the end of the run alone."""

from __future__ import annotations

import os
import weakref

import pytest

from onnx_oamip.cli.interrupt import signals_end_the_work


class _Kept:
    """An object whose end calls back."""


@pytest.mark.skipif(os.name != "posix", reason="signals end the work on POSIX systems alone")
@pytest.mark.parametrize(("error", "is_reported"), [(KeyboardInterrupt, False), (ValueError, True)])
def test_interrupt_in_a_callback_is_not_reported(
    error: type[BaseException], is_reported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[type[BaseException]] = []
    monkeypatch.setattr("sys.unraisablehook", lambda found: reported.append(found.exc_type))

    def call_back(_: object) -> None:
        raise error

    with signals_end_the_work():
        kept = _Kept()
        watched = weakref.ref(kept, call_back)
        del kept
    assert watched() is None
    assert reported == [error] * is_reported
