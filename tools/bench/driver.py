"""Studies one after the other, each in a process of its own, and what became of them."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

from onnx_oamip.core.errors import EnvironmentMissing

from . import figures
from .studies import LeftOut, known_step

OWN = ("onnx_oamip", "tools")
TIMED = ("speed", "latency", "cost")
"""Studies of time: there the step of widths is measured. Others take the device's default and are the same again."""


class Outcome(NamedTuple):
    """Outcome of a study, with its reason."""

    name: str
    what: Literal["done", "left out", "failed"]
    why: str = ""


def study(
    name: str, out: Path, seed: int, models: tuple[str, ...], extra: Mapping[str, Any]
) -> Outcome:
    """Run one study here; whatever it raises is its outcome."""
    os.environ["ONNX_OAMIP_CACHE"] = (
        "off"  # what an earlier run found out would be neither timed nor made again
    )
    try:
        run = import_module(f"{__package__}.{name}").run
        more = {key: value for key, value in extra.items() if key in signature(run).parameters}
        with known_step(name not in TIMED):
            text = run(out, seed, models, **more)
        figures.draw(name, out, out)
    except (LeftOut, EnvironmentMissing) as missing:
        return Outcome(name, "left out", str(missing))
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] in OWN:
            return _failed(name, missing)
        return Outcome(
            name,
            "left out",
            f"{missing.name} is not installed; pip install -e '.[experiments]' brings it.",
        )
    except Exception as error:  # whatever it is, the other studies come next
        return _failed(name, error)
    if not text:
        return Outcome(
            name,
            "left out",
            "nothing could be measured with these options; what it printed says why.",
        )
    return Outcome(name, "done")


def _failed(name: str, error: Exception) -> Outcome:
    traceback.print_exception(error)
    return Outcome(name, "failed", f"{type(error).__name__}: {error}")


def apart(name: str, *options: Any) -> Outcome:
    """Run one study in a fresh process: memory, threads and imports of others would count, and a crash end them."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(study, name, *options).result()
        except BrokenProcessPool:
            return Outcome(
                name, "failed", "its process was killed; there may be too little memory."
            )


def drive(names: Sequence[str], *options: Any, one: Callable[..., Outcome] = apart) -> int:
    """Run studies in turn and say what became of them; the exit status."""
    found = []
    for name in names:
        found.append(one(name, *options))
        if found[-1].what != "done":
            print(f"{name} {found[-1].what}: {found[-1].why}", flush=True)
    done = [outcome.name for outcome in found if outcome.what == "done"]
    print(f"\ndone: {', '.join(done) or 'none'}")
    for outcome in found:
        if outcome.what != "done":
            print(f"{outcome.what}: {outcome.name}: {outcome.why}")
    return 0 if done and all(outcome.what != "failed" for outcome in found) else 1
