"""Shared paths and fixtures; slow tests run only when asked for."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A test starts from nothing, and leaves nothing behind.
os.environ["ONNX_OAMIP_CACHE"] = "off"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # some tests import the runtime before the package does

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or config.getoption("-m"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def separate_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importance methods that a test registers are removed after it."""
    from onnx_oamip.importance.registry import REGISTRY

    monkeypatch.setattr(REGISTRY, "_plugins", dict(REGISTRY._plugins))
