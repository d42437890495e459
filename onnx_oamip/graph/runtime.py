"""ONNX Runtime: choice of the device, sessions, and running feeds through a graph."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from onnx_oamip.graph import (
    external_data,
    input_guards,
    integer_weights,
    op_libraries,
    random_numbers,
    subgraphs,
)
from onnx_oamip.graph.ops import kinds

EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
PATIENCE = 120.0
"""Seconds that one run of a graph with a Loop may take: a few bytes can ask for one without an end."""
TICK = 0.2
"""Seconds between two checks of the time and the memory during such a run."""
UNSATURATED = "session.x64quantprecision"
"""Entry that makes uint8 of the int8 weights of integer products on processors without instructions for int8."""
EXACT = {
    "session.qdq_matmulnbits_accuracy_level": "1",
    "session.disable_double_qdq_remover": "1",
    UNSATURATED: "1",
}
"""Products in float32; no merging of quantisations; no sums of 16 bits, which saturate on processors without
instructions for int8. A release that does not know an entry ignores it."""
FUSION = "QDQSelectorActionTransformer"
"""Optimiser that makes one integer kernel of an operator between DequantizeLinear and QuantizeLinear."""
SHIFT = "QDQS8ToU8Transformer"
"""Optimiser that makes uint8 of int8 codes for these integer kernels. With ``session.x64quantprecision``, on processors
without instructions for int8, it also rewrites weights, and wrongly: it adds one zero point for the whole tensor to
scales per axis, fails where two nodes share a zero point, and in some releases ends the process."""
UNFUSED = (
    "ONNX Runtime refuses this model once it has fused its quantised operators, so it was run and timed without that; "
    f"the result needs the same: InferenceSession(path, disabled_optimizers=['{FUSION}'])"
)
_OUT_OF_MEMORY = re.compile(
    r"bad.alloc|failed to allocate|out of memory|available memory", re.IGNORECASE
)
"""Text of ONNX Runtime's errors where memory has run out; they have no type of their own."""


_UNREGISTERED = "is not a registered function/op"
"""Text of ONNX Runtime's error for an operator that it does not know."""


# --------------------------------------------------------------------------------------------- module and device


DEVICES = ("cpu", "cuda")
"""Devices that a run can be asked for."""


def runtime() -> Any:
    """Imports ONNX Runtime, without its log output and its telemetry.

    Since 1.29 the official builds keep an identifier of the machine on disk and send it with names and digests of the
    models that are loaded (docs/Privacy.md of ONNX Runtime). Users of this package have not agreed to that.

    Returns:
        The onnxruntime module.

    Raises:
        EnvironmentMissing: It is not installed.
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
    # The environment variable comes too late if the program has imported ONNX Runtime before.
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def quantiser() -> Any:
    """Imports the quantiser of ONNX Runtime.

    Returns:
        The module ``onnxruntime.quantization``.

    Raises:
        EnvironmentMissing: ONNX Runtime is not installed.
    """
    runtime()
    from onnxruntime import quantization

    return quantization


def resolve_device(device: str) -> str:
    """Chooses the device to run on.

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA where it is available.

    Returns:
        ``cpu`` or ``cuda``.

    Raises:
        EnvironmentMissing: CUDA is requested but not available. There is no silent fallback to the CPU.
    """
    providers = runtime().get_available_providers()
    if device not in ("cuda", "auto"):
        return device
    if "CUDAExecutionProvider" in providers and _cuda_works():
        return "cuda"
    if device == "auto":
        return "cpu"
    raise EnvironmentMissing(
        f"`device=cuda` was asked for but ONNX Runtime offers only {', '.join(providers)} here; "
        "install 'onnx-oamip[gpu]' on a machine with an NVIDIA GPU, or use `device=cpu`."
    )


def _cuda_works() -> bool:
    """Tests CUDA by opening a session: the provider may be compiled in without a driver being installed."""
    relu = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
    rt = runtime()
    try:
        if hasattr(rt, "preload_dlls"):
            rt.preload_dlls()
        session = rt.InferenceSession(relu.SerializeToString(), providers=["CUDAExecutionProvider"])
    except Exception:  # any failure here means that CUDA cannot be used
        return False
    return "CUDAExecutionProvider" in session.get_providers()


# ------------------------------------------------------------------------------------------------------ guards


def _watch(options: Any, done: threading.Event) -> None:
    """Terminates a run that exceeds its time, or uses most of the memory that was free.

    Args:
        options: Run options of the session.
        done: Set when the run has ended.
    """
    end = time.monotonic() + PATIENCE
    least_memory = input_guards.memory() // 4
    while not done.wait(min(TICK, PATIENCE)):
        if time.monotonic() >= end or input_guards.memory() < least_memory:
            options.terminate = True
            return


def _check_crashes(nodes: Iterable[onnx.NodeProto], what: str) -> None:
    """Raises ModelError for nodes on which kernels of ONNX Runtime crash the process instead of raising an error."""
    for node in nodes:
        has_no_bias = not any(node.input[2:3])
        has_no_group = any(a.name == "group" and a.i < 1 for a in node.attribute)
        defect = ""
        if (node.domain, node.op_type) == kinds.PACKED_ATTENTION and has_no_bias:
            defect = "has no bias; give it one of zeros"
        if kinds.CONVOLUTION in node.op_type and has_no_group:
            defect = "has less than one group; export the model again"
        if defect:
            raise ModelError(
                f"ONNX Runtime cannot run {what}, it would crash: {node.op_type} '{node.name}' {defect}."
            )


@contextmanager
def runtime_errors(action: str) -> Iterator[None]:
    """Turns the undocumented exceptions of ONNX Runtime into errors of this package.

    Args:
        action: The attempted action as a verb phrase, for the message.

    Raises:
        ModelError: ONNX Runtime refuses the model.
        OutOfMemory: The memory does not suffice.
    """
    try:
        yield
    except OamipError:
        raise
    except Exception as error:
        raise _as_oamip_error(error, action) from error


def _as_oamip_error(error: Exception, action: str) -> OamipError:
    text = str(error).replace("\n", " ")[:300]
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        return OutOfMemory(
            f"there is not enough memory to {action}; give a smaller `max_memory`, fewer samples, or a smaller model."
        )
    advice = ""
    if _UNREGISTERED in text:
        advice = "; give the library of this custom operator by `op_library`."
    return ModelError(f"ONNX Runtime cannot {action}: {text}{advice}")


# ---------------------------------------------------------------------------------------------------- sessions


class Session:
    """A loaded graph on one device.

    ONNX Runtime fuses quantised operators into integer kernels, and makes such kernels also for scales per channel,
    which they then refuse. A model that fails with them and runs without them is run without them.

    Attributes:
        inputs: Names of the graph inputs.
        outputs: Names of the graph outputs.
        unfused: True if the session runs without these integer kernels.
    """

    def __init__(
        self,
        proto: Any,
        device: str,
        threads: int | None = None,
        *,
        what: str = "the model",
        profile: str | os.PathLike[str] | None = None,
        spin: bool = False,
        exact: bool = False,
        lean: bool = False,
    ) -> None:
        """Loads a graph.

        Args:
            proto: A model, or the path of a model file.
            device: ``cpu`` or ``cuda``.
            threads: Threads within an operator. Default: the choice of ONNX Runtime.
            what: Description of the model for error messages.
            profile: Prefix of a file that records every kernel of every run.
            spin: Let idle threads wait busily, as ONNX Runtime has it by default and a deployment does. Without it,
                sessions that take turns leave each other the cores.
            exact: Leave out optimisations that round one way in a model and another way in a cut of it: weights of
                few bits multiplied by activations that are rounded as well, neighbouring quantisations merged into
                one, and integer kernels of operators between quantisations.
            lean: Release memory after every run, for sessions of which many are open at once.

        Raises:
            ModelError: ONNX Runtime refuses the model.
            OutOfMemory: The memory does not suffice.
        """
        entries = dict(EXACT) if exact else {}
        if not spin:
            entries["session.intra_op.allow_spinning"] = "0"
        self._what = what
        self.unfused = exact
        self._detached: Mapping[str, Array] = {}
        self._is_watched = False
        with runtime_errors(f"load {what}"):
            content: str | bytes
            if isinstance(proto, (str, os.PathLike)):
                content = os.fspath(proto)
            else:
                if exact:
                    proto = integer_weights.separated(proto)
                if not spin:  # speed is measured with the model's own operators
                    proto = random_numbers.repeatable(proto)
                nodes = list(subgraphs.nodes(proto.graph))
                self._is_watched = not spin and any(n.op_type in kinds.LOOP for n in nodes)
                if device == "cpu":
                    _check_crashes(nodes, what)
                content = self._serialise(proto, entries, spin)
            opener = _Opener(
                content=content,
                detached=self._detached,
                entries=entries,
                device=device,
                threads=threads,
                profile=profile,
                lean=lean,
                exact=exact,
            )
            try:
                self._session = opener.open(unfused=exact)
            except Exception:
                if not exact and not _is_quantised(content):
                    raise
                # Some releases have no kernel for int8 activations with weights made uint8.
                entries.pop(UNSATURATED, None)
                self._session = opener.open(unfused=True)
                self.unfused = True
            # Some kernels refuse only in the first run. Keeping a path for that costs nothing; the bytes of a graph
            # are kept only if it is quantised.
            may_fail_later = not self.unfused and (
                isinstance(content, str) or _is_quantised(content)
            )
            self._opener = opener if may_fail_later else None
        # Sequences and maps are not compared with anything.
        self.outputs = [o.name for o in self._session.get_outputs() if o.type.startswith("tensor")]
        self.inputs = [i.name for i in self._session.get_inputs()]

    def _serialise(
        self,
        proto: onnx.ModelProto,
        entries: dict[str, str],
        spin: bool,
    ) -> bytes:
        """Bytes of a graph; adds session entries if it refers to files, and notes the values to pass along."""
        small, self._detached = external_data.detached(proto)
        if external_data.references(small):
            small = external_data.under_root(small)
            entries[EXTERNAL_DATA_FOLDER] = external_data.FILESYSTEM_ROOT
            # The session maps the files. Copies in the layout of its kernels only pay where speed is measured.
            if not spin:
                entries["session.disable_prepacking"] = "1"
        return small.SerializeToString()

    def run(self, feed: Mapping[str, Array], names: Sequence[str] | None = None) -> list[Array]:
        """Computes the outputs for one feed.

        Args:
            feed: Values of the graph inputs by name.
            names: Outputs to compute. Default: all that are tensors.

        Returns:
            Their values, in the order of ``names``.

        Raises:
            ModelError: The model cannot be run on this feed, or has a Loop that runs longer than ``PATIENCE``.
            OutOfMemory: The memory does not suffice.
        """
        wanted = list(names) if names else self.outputs
        inputs = dict(feed)
        with runtime_errors(f"run {self._what} on this data"):
            try:
                values = self._run(wanted, inputs)
            except OamipError:
                raise
            except Exception:
                if self._opener is None:
                    raise
                self._session = self._opener.open(unfused=True)
                self.unfused = True
                values = self._run(wanted, inputs)
        self._opener = None
        return values

    def _run(self, names: list[str], feed: dict[str, Array]) -> list[Array]:
        if not self._is_watched:
            values: list[Array] = self._session.run(names, feed)
            return values
        options = runtime().RunOptions()
        done = threading.Event()
        threading.Thread(target=_watch, args=(options, done), daemon=True).start()
        try:
            values = self._session.run(names, feed, options)
        except Exception as error:
            if options.terminate:
                raise ModelError(
                    f"{self._what} was not done with one feed after {PATIENCE:g} seconds or took all memory, and it "
                    "has a Loop, which may never end; bound its trip count."
                ) from error
            raise
        finally:
            done.set()
        return values

    def end_profile(self) -> str:
        """Stops recording the kernels.

        Returns:
            Path of the recording, a JSON list of events with durations in microseconds.
        """
        return str(self._session.end_profiling())

    def stream(self, feeds: Iterable[Mapping[str, Array]]) -> Iterator[list[Array]]:
        """Computes all outputs for one feed after another.

        Args:
            feeds: Values of the graph inputs by name.

        Yields:
            The outputs for each feed.
        """
        for feed in feeds:
            yield self.run(feed)


@dataclass(frozen=True)
class _Opener:
    """Settings of a session, from which it can be opened with and without integer kernels.

    Attributes:
        content: Path of a model file, or a serialised graph.
        detached: Values of initialisers that the graph only names.
        entries: Session entries of ONNX Runtime.
        exact: True if these are the entries of an exact session.
    """

    content: str | bytes
    detached: Mapping[str, Array]
    entries: Mapping[str, str]
    device: str
    threads: int | None
    profile: str | os.PathLike[str] | None
    lean: bool
    exact: bool

    def open(self, unfused: bool) -> Any:
        """Opens the session; ``unfused``: without integer kernels."""
        rt = runtime()
        options = rt.SessionOptions()
        options.log_severity_level = 4
        op_libraries.register(options)
        for key, value in self.entries.items():
            options.add_session_config_entry(key, value)
        if self.lean:
            options.enable_cpu_mem_arena = False
        if self.threads:
            options.intra_op_num_threads = self.threads
        if self.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = os.fspath(self.profile)
        values = [
            rt.OrtValue.ortvalue_from_numpy(external_data.aligned(value))
            for value in self.detached.values()
        ]
        options.add_external_initializers(list(self.detached), values)
        providers = ["CPUExecutionProvider"]
        if self.device == "cuda":
            providers.insert(0, "CUDAExecutionProvider")
        disabled = [FUSION] if unfused else []
        if self.exact:
            disabled.append(SHIFT)
        return rt.InferenceSession(
            self.content,
            options,
            providers=providers,
            disabled_optimizers=disabled or None,
            # On the CPU there is nothing to fall back to: ONNX Runtime would print why, and try the same again.
            enable_fallback=int(self.device == "cuda"),
        )


def _is_quantised(content: str | bytes) -> bool:
    """Tests whether a file, or a serialised graph, has operators that the fusion starts from."""
    if isinstance(content, str):
        content = Path(content).read_bytes()
    return kinds.DEQUANTISATION in content
