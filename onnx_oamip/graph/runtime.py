"""ONNX Runtime at one place: devices, sessions, and running feeds through a graph."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from onnx_oamip.core.errors import (
    EnvironmentMissing,
    ModelError,
    OamipError,
    OutOfMemory,
)
from onnx_oamip.core.records import Array
from onnx_oamip.graph import external_data, input_guards, subgraphs
from onnx_oamip.graph.ops import kinds

FOLDER = "session.model_external_initializers_file_folder_path"
PATIENCE = 120.0
"""Seconds that one run of a graph with a Loop may take: a few bytes can ask for one without an end."""
TICK = 0.2
"""Seconds between looks at the clock and the memory meanwhile."""


def runtime() -> Any:
    """The onnxruntime module, quiet; EnvironmentMissing says what to install.

    Since 1.29 its makers' builds keep an identifier of the machine on disk and send them names and digests of models
    that are loaded (docs/Privacy.md of ONNX Runtime). What runs here is nobody else's business.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentMissing(
            "ONNX Runtime is not installed; install it with pip install 'onnx-oamip[cpu]', or 'onnx-oamip[gpu]' for "
            "CUDA."
        ) from error
    onnxruntime.set_default_logger_severity(4)
    onnxruntime.disable_telemetry_events()  # where somebody had imported it before
    return onnxruntime


def resolve_device(device: str) -> str:
    """``auto`` takes CUDA where there is one. Asking for CUDA where there is none is an error, not a CPU run."""
    available = "CUDAExecutionProvider" in runtime().get_available_providers()
    if device == "cuda" and not (available and _cuda_works()):
        found = ", ".join(runtime().get_available_providers())
        raise EnvironmentMissing(
            f"`device=cuda` was asked for but ONNX Runtime offers only {found} here; "
            "install 'onnx-oamip[gpu]' on a machine with an NVIDIA GPU, or use `device=cpu`."
        )
    if device == "auto":
        return "cuda" if available and _cuda_works() else "cpu"
    return device


def _cuda_works() -> bool:
    """The provider may be compiled in without a driver: only a session tells."""
    relu = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
    rt = runtime()
    try:
        if hasattr(rt, "preload_dlls"):
            rt.preload_dlls()
        session = rt.InferenceSession(relu.SerializeToString(), providers=["CUDAExecutionProvider"])
    except Exception:  # any failure here means the same: no CUDA
        return False
    return "CUDAExecutionProvider" in session.get_providers()


EXACT = {"session.qdq_matmulnbits_accuracy_level": "1", "session.disable_double_qdq_remover": "1"}
"""Products in float32; no merging of quantisations. A release that does not know an entry ignores it."""
FUSION = "QDQSelectorActionTransformer"
"""What makes one integer kernel of an operator between DequantizeLinear and QuantizeLinear."""
UNFUSED = (
    "ONNX Runtime refuses this model once it has fused its quantised operators, so it was run and timed without that; "
    f"the result needs the same: InferenceSession(path, disabled_optimizers=['{FUSION}'])"
)


def _watch(options: Any, done: threading.Event) -> None:
    """End a run that takes more than its time, or most of the memory that was free."""
    end, least = time.monotonic() + PATIENCE, input_guards.memory() // 4
    while not done.wait(min(TICK, PATIENCE)):
        if time.monotonic() >= end or input_guards.memory() < least:
            options.terminate = True
            return


def _check_crashes(nodes: Iterable[onnx.NodeProto], what: str) -> None:
    """Raises ModelError for what ends the process in ONNX Runtime's kernels for the CPU, where errors are due."""
    for node in nodes:
        why = ""
        packed = (node.domain, node.op_type) == kinds.PACKED_ATTENTION
        if packed and not any(node.input[2:3]):
            why = "has no bias; give it one of zeros"
        if kinds.CONVOLUTION in node.op_type and any(
            a.name == "group" and a.i < 1 for a in node.attribute
        ):
            why = "has less than one group; export the model again"
        if why:
            raise ModelError(
                f"ONNX Runtime cannot run {what}, it would crash: {node.op_type} '{node.name}' {why}."
            )


_NO_ROOM = re.compile(r"bad.alloc|failed to allocate|out of memory|available memory", re.IGNORECASE)
"""What ONNX Runtime's own errors say where memory has run out."""


def _refusal(error: Exception, what: str) -> OamipError:
    """ONNX Runtime's error, of an undocumented type, as what it means."""
    text = str(error).replace("\n", " ")[:300]
    if isinstance(error, MemoryError) or _NO_ROOM.search(text):
        return OutOfMemory(
            f"there is not enough memory to {what}; give a smaller `max_memory`, fewer samples, or a smaller model."
        )
    return ModelError(f"ONNX Runtime cannot {what}: {text}")


class Session:
    """A loaded graph on one device.

    ``profile`` is the prefix of a file that records every kernel of every run. ``spin``: idle threads wait busily, as
    ONNX Runtime has it by default and a deployment does; without it, sessions that take turns leave each other the
    cores. ``exact`` leaves out what rounds one way in a model and another way in a cut of it: weights of few bits
    multiplied by activations that are rounded as well, neighbouring quantisations merged into one, and integer kernels
    of what stands between quantisations. ``lean`` gives memory back after every run, for sessions of which many are
    open at once.

    ``unfused``: without those kernels. ONNX Runtime makes them also where they then refuse the scales, one for every
    channel; what fails with them and runs without them is run without them.
    """

    def __init__(
        self,
        proto: Any,
        device: str,
        threads: int | None = None,
        what: str = "the model",
        profile: str | os.PathLike[str] | None = None,
        spin: bool = False,
        exact: bool = False,
        lean: bool = False,
    ) -> None:
        entries = dict(EXACT) if exact else {}
        if not spin:
            entries["session.intra_op.allow_spinning"] = "0"
        self._what, self.unfused = what, exact
        self._held: Mapping[str, Array] = {}
        self._watched = False
        with _saying(f"load {what}"):
            content: str | bytes
            if isinstance(proto, (str, os.PathLike)):
                content = os.fspath(proto)
            else:
                nodes = list(subgraphs.nodes(proto.graph))
                self._watched = not spin and any(n.op_type in kinds.LOOP for n in nodes)
                if device == "cpu":
                    _check_crashes(nodes, what)
                small, self._held = external_data.detached(proto)
                if external_data.references(small):
                    # The session maps files itself, and makes copies in its own order only where speed is measured.
                    small = external_data.under_root(small)
                    entries[FOLDER] = external_data.FILESYSTEM_ROOT
                    if not spin:
                        entries["session.disable_prepacking"] = "1"
                content = small.SerializeToString()
            opened = partial(_opened, content, self._held, entries, device, threads, profile, lean)
            try:
                self._session = opened(exact)
            except Exception:
                if exact or not _quantised(content):
                    raise
                self._session, self.unfused = opened(True), True
            # Some kernels refuse only when they run; what is opened from its path costs nothing to keep at hand.
            waiting = not self.unfused and (isinstance(content, str) or _quantised(content))
            self._again: Callable[[], Any] | None = partial(opened, True) if waiting else None
        self.outputs = [o.name for o in self._session.get_outputs()]
        self.inputs = [i.name for i in self._session.get_inputs()]

    def run(self, feed: Mapping[str, Array], names: Sequence[str] | None = None) -> list[Array]:
        """Outputs for one feed, in the order of ``names`` (default: all).

        Raises ModelError for what cannot run, and for a Loop that goes on for more than ``PATIENCE`` seconds.
        """
        wanted, given = list(names) if names else None, dict(feed)
        with _saying(f"run {self._what} on this data"):
            try:
                found = self._run(wanted, given)
            except OamipError:
                raise
            except Exception:
                if self._again is None:
                    raise
                self._session, self.unfused = self._again(), True
                found = self._run(wanted, given)
        self._again = None
        return found

    def _run(self, names: list[str] | None, feed: dict[str, Array]) -> list[Array]:
        if not self._watched:
            found: list[Array] = self._session.run(names, feed)
            return found
        options, done = runtime().RunOptions(), threading.Event()
        threading.Thread(target=_watch, args=(options, done), daemon=True).start()
        try:
            found = self._session.run(names, feed, options)
        except Exception as error:
            if options.terminate:
                raise ModelError(
                    f"{self._what} was not done with one feed after {PATIENCE:g} seconds or took all memory, and it "
                    "has a Loop, which may never end; bound its trip count."
                ) from error
            raise
        finally:
            done.set()
        return found

    def end_profile(self) -> str:
        """Stop recording; the path of the file (a JSON list of events, durations in microseconds)."""
        return str(self._session.end_profiling())

    def stream(self, feeds: Iterable[Mapping[str, Array]]) -> Iterator[list[Array]]:
        """Outputs for each feed in turn."""
        for feed in feeds:
            yield self.run(feed)


def _opened(
    content: str | bytes,
    held: Mapping[str, Array],
    entries: Mapping[str, str],
    device: str,
    threads: int | None,
    profile: str | os.PathLike[str] | None,
    lean: bool,
    unfused: bool,
) -> Any:
    rt = runtime()
    options = rt.SessionOptions()
    options.log_severity_level = 4
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if lean:
        options.enable_cpu_mem_arena = False
    if threads:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = os.fspath(profile)
    options.add_external_initializers(
        list(held),
        [rt.OrtValue.ortvalue_from_numpy(external_data.aligned(v)) for v in held.values()],
    )
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"][device != "cuda" :]
    return rt.InferenceSession(
        content, options, providers=providers, disabled_optimizers=[FUSION] if unfused else None
    )


def _quantised(content: str | bytes) -> bool:
    """Whether a file, or a serialised graph, has what the fusion starts from."""
    serialised = content if isinstance(content, bytes) else Path(content).read_bytes()
    return kinds.DEQUANTISATION in serialised


@contextmanager
def _saying(what: str) -> Iterator[None]:
    try:
        yield
    except OamipError:
        raise
    except Exception as error:  # onnxruntime raises its own undocumented types
        raise _refusal(error, what) from error
