"""The fast tier of the tests: its list is of files that exist, and it keeps the first tests of each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import conftest
import pytest


def test_listed_files_exist() -> None:
    counts = conftest.fast_counts()
    assert counts
    assert [file for file in counts if not (conftest.TESTS / file).exists()] == []


def test_first_tests_of_every_file_are_kept() -> None:
    names = ("a/test_x.py", "a/test_x.py", "test_y.py", "a/test_x.py", "test_y.py", "test_z.py")
    items: list[Any] = [SimpleNamespace(path=conftest.TESTS / name) for name in names]
    everything, left_out = list(items), []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config: Any = SimpleNamespace(hook=hook)
    conftest.keep_first(config, items, {"a/test_x.py": 2, "test_y.py": 0})
    assert items == [everything[0], everything[1], everything[5]]
    assert left_out == [everything[2], everything[3], everything[4]]


def test_recorder_counts_the_tests_before_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    file = tmp_path / "fast.json"
    file.write_text('{"test_gone.py": 3, "test_fast_tier.py": 3}')
    monkeypatch.setattr(conftest, "FAST", file)
    recorder = conftest.FastRecorder()
    recorder.seconds = {"test_architecture.py": 2 * conftest.FAST_SECONDS, "test_fast_tier.py": 0.0}
    recorder.counts.update({"test_architecture.py": 4, "test_fast_tier.py": 9})
    recorder.pytest_sessionfinish()
    assert conftest.fast_counts() == {"test_architecture.py": 4}
