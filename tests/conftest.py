"""Shared paths and fixtures; options that select tests by duration."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A test starts from nothing, and leaves nothing behind.
os.environ["ONNX_OAMIP_CACHE"] = "off"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # some tests import the runtime before the package does
# Every program that a test starts would compile all modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell ignores Ctrl-C for what it runs in the background, and every process started from here would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"

# The same examples on every machine and every run; `explore` looks for new ones.
settings.register_profile(
    "ci",
    max_examples=300,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    print_blob=True,
)
settings.register_profile(
    "explore", settings.get_profile("ci"), max_examples=1000, derandomize=False
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# ------------------------------------------------------------------------------------------------- tiers of tests

TESTS = Path(__file__).parent
FAST = TESTS / "fast.json"
"""Number of tests that the fast tier runs of every file that takes longer: the first ones. 0 is none."""
FAST_SECONDS = 0.5
"""Processor seconds that a file may take in the fast tier."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--fast",
        action="store_true",
        help="of every file run as many tests as tests/fast.json says",
    )
    parser.addoption(
        "--record-fast",
        action="store_true",
        help=f"run every file for {FAST_SECONDS:g} s and write to tests/fast.json how far it came",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-fast"):
        config.pluginmanager.register(FastRecorder())


def fast_counts() -> dict[str, int]:
    counts: dict[str, int] = json.loads(FAST.read_text(encoding="utf-8"))
    return counts


def file_of(item: pytest.Item) -> str:
    return item.path.relative_to(TESTS).as_posix()


def pytest_report_header(config: pytest.Config) -> str | None:
    if not config.getoption("--fast"):
        return None
    counts = fast_counts()
    none = sorted(file for file, count in counts.items() if count == 0)
    return (
        f"fast tier: the first tests of {len(counts) - len(none)} long files, "
        f"none of {', '.join(none)}, all of the others"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--fast") and collection_path.is_file():
        return fast_counts().get(collection_path.relative_to(TESTS).as_posix()) == 0 or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        keep_first(config, items, fast_counts())
    if config.getoption("--slow") or config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Keep modules and tests, which stay to the end, out of every search for cycles."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def constant_latency() -> Iterator[None]:
    """Compare no latencies: every pruned model takes half of the original's time."""
    from onnx_oamip.api import proof
    from onnx_oamip.verification.latency import Ratio

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "compare_latency", lambda *_, **__: Ratio(0.5, 0.4, 0.6, 9))
        yield


@pytest.fixture(scope="session", autouse=True)
def short_programs() -> Iterator[None]:
    """Spend a hundredth of the operations on the programs of a group: the groups of the tests are small."""
    from onnx_oamip.importance.oamip import decoupled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoupled, "FLOPS_PER_GROUP", decoupled.FLOPS_PER_GROUP / 100)
        yield


@pytest.fixture
def measured_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare latencies after all, for a moment in place of seconds."""
    from onnx_oamip.api import proof
    from onnx_oamip.verification.latency import compare_latency

    monkeypatch.setattr(proof, "compare_latency", compare_latency)
    monkeypatch.setattr(proof, "GATE_SECONDS", (0.02, 0.1))


@pytest.fixture
def separate_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importance methods that a test registers are removed after it."""
    from onnx_oamip.importance.registry import REGISTRY

    monkeypatch.setattr(REGISTRY, "_plugins", dict(REGISTRY._plugins))


def keep_first(config: pytest.Config, items: list[pytest.Item], counts: dict[str, int]) -> None:
    """Deselect the tests of a file beyond its count."""
    seen: Counter[str] = Counter()
    kept, left_out = [], []
    for item in items:
        file = file_of(item)
        seen[file] += 1
        (left_out if seen[file] > counts.get(file, len(items)) else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


class FastRecorder:
    """Measures how many tests of every file fit in the fast tier, and writes that down at the end.

    Processor time depends less than wall-clock time on what else the machine does.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        before = sum(os.times()[:4])
        try:
            return (yield)
        finally:
            file = file_of(item)
            self.seconds[file] = self.seconds.get(file, 0.0) + sum(os.times()[:4]) - before
            self.counts[file] += self.seconds[file] <= FAST_SECONDS

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.seconds.get(file_of(item), 0.0) > FAST_SECONDS:
            pytest.skip("the file takes longer than the fast tier allows")

    def pytest_sessionfinish(self) -> None:
        """Replace the entries of the files that ran, and drop those of files that do not exist any more."""
        known = fast_counts() if FAST.exists() else {}
        counts = {file: count for file, count in known.items() if (TESTS / file).exists()}
        for file, seconds in self.seconds.items():
            counts.pop(file, None)
            if seconds > FAST_SECONDS:
                counts[file] = self.counts[file]
        FAST.write_text(json.dumps(dict(sorted(counts.items())), indent=1) + "\n", encoding="utf-8")
