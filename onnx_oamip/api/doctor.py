"""Diagnosis of an installation: versions, devices, solvers, optional packages, cache, and a tiny prune per device."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from onnx_oamip.api import pipeline
from onnx_oamip.artifacts import cache
from onnx_oamip.core.errors import EnvironmentMissing, OamipError, OutputError
from onnx_oamip.core.extras import MODULES
from onnx_oamip.core.json_values import plain_document
from onnx_oamip.core.settings import Settings
from onnx_oamip.core.versions import versions
from onnx_oamip.graph.input_guards import memory
from onnx_oamip.graph.runtime import DEVICES, resolve_device, runtime
from onnx_oamip.programs import solvers
from onnx_oamip.programs.solvers import SolverRecord
from onnx_oamip.reporting import documents
from onnx_oamip.reporting.documents import Document

TRIAL = """<ir_version: 8, opset_import: ["": 17]> trial (float[N, 8] x) => (float[N, 4] y)
{ h = MatMul(x, first) r = Relu(h) y = MatMul(r, second) }"""
WEIGHTS = {"first": (8, 64), "second": (64, 4)}
"""Network of the trial, and the shapes of its weights."""
SAMPLES = 64


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """One device.

    Attributes:
        name: ``cpu`` or ``cuda``.
        usable: ONNX Runtime can run on it.
        seconds: Duration of pruning a tiny network on it; None if that was not tried or failed.
        problem: Reason why the device cannot be used or the trial failed; empty if there is none.
    """

    name: str
    usable: bool
    seconds: float | None
    problem: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Result of ``diagnose``.

    Attributes:
        versions: Version by package; None for a package that is not installed.
        system: Description of the machine by name.
        providers: Execution providers of ONNX Runtime.
        devices: Devices with the result of the trial.
        solvers: Solvers with their licences.
        extras: Missing packages by optional feature; empty for one that can be used.
        cache: Folder of the cache, None if nothing is stored.
        cache_bytes: Size of all its entries.
        problems: Sentences about what prevents or limits the use of the package.
    """

    versions: dict[str, str | None]
    system: dict[str, str | int]
    providers: tuple[str, ...]
    devices: tuple[DeviceCheck, ...]
    solvers: tuple[SolverRecord, ...]
    extras: dict[str, tuple[str, ...]]
    cache: str | None
    cache_bytes: int
    problems: tuple[str, ...]

    @property
    def document(self) -> Document:
        """The JSON document of the command ``doctor``."""
        found = {
            **documents.solvers(self.solvers),
            "system": self.system,
            "providers": self.providers,
            "devices": [asdict(device) for device in self.devices],
            "extras": self.extras,
            "cache": {"folder": self.cache, "bytes": self.cache_bytes},
            "problems": self.problems,
            "versions": self.versions,
        }
        return plain_document(found)


def diagnose() -> Diagnosis:
    """Examine the installation, and prune a tiny network on every device.

    Returns:
        The findings; ``problems`` is empty if everything that the package needs works.

    Raises:
        EnvironmentMissing: ONNX Runtime is not installed.
    """
    providers = tuple(runtime().get_available_providers())
    devices = tuple(_device(name) for name in DEVICES)
    found = tuple(solvers.available())
    folder, problem = _cache()
    problems = [
        f"the trial on {device.name} failed: {device.problem}"
        for device in devices
        if device.usable and device.problem
    ]
    if not any(solver.usable for solver in found):
        problems.append("no solver is usable; install highspy, which needs no licence")
    if problem:
        problems.append(problem)
    return Diagnosis(
        versions=versions(),
        system={
            "platform": platform.platform(),
            "processors": os.cpu_count() or 1,
            "free_memory": memory(),
        },
        providers=providers,
        devices=devices,
        solvers=found,
        extras={extra: _missing(modules) for extra, modules in MODULES.items()},
        cache=None if folder is None else str(folder),
        cache_bytes=0 if folder is None else _size(folder),
        problems=tuple(problems),
    )


def _device(name: str) -> DeviceCheck:
    try:
        resolve_device(name)
    except EnvironmentMissing as error:
        return DeviceCheck(name, usable=False, seconds=None, problem=str(error))
    start = time.perf_counter()
    try:
        _try_prune(name)
    except OamipError as error:
        return DeviceCheck(name, usable=True, seconds=None, problem=str(error))
    return DeviceCheck(name, usable=True, seconds=time.perf_counter() - start, problem="")


def _try_prune(device: str) -> None:
    """Prune a tiny network with the default methods. Raises OamipError if that fails."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(TRIAL)
    for name, shape in WEIGHTS.items():
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    samples = {"x": rng.standard_normal((SAMPLES, 8)).astype(np.float32)}
    settings = Settings.create(
        macs=0.5, task="values", align=1, device=device, cache="off", force=True, no_provenance=True
    )
    pipeline.pruned(proto, samples, settings)


def _cache() -> tuple[Path | None, str]:
    """Folder of the cache, and a sentence about it if it cannot be used."""
    try:
        store = cache.open_store("auto")
    except OutputError as error:
        return None, str(error)
    return store.folder, store.problem


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.npz"))


def _missing(modules: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in modules if importlib.util.find_spec(name) is None)
