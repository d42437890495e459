"""Fuzzing of the command line: a process that runs it on broken files, and the check of each outcome.

``python tests/support/fuzzing.py model 17 23`` runs single cases in the foreground and keeps their files.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20
SECONDS = 10
"""Processor time of a case, most of which take milliseconds; more is a hang. Waiting may take ``WAIT`` times that."""
ODD_SECONDS = 120
"""The same for a whole run of odd models."""
WAIT = 10
SPACE = 3 << 30
"""Address space of a worker above what its libraries take."""
MEASURED_SECONDS = 0.02
"""After which a measurement of latencies ends."""
RESIDENT = 256 << 20
MULTIPLE = 16
"""A case may make the process grow by ``RESIDENT`` bytes, and by ``MULTIPLE`` times its file."""
RUNS_OF_MODEL = 3
"""It may also grow by so many times the memory that ONNX Runtime takes to run the model on two samples: up to three
models are loaded at a time, and a few bytes of attributes may state large activations."""
MEMORY_MARGIN = 1.25
"""A run of odd models may make the process grow by so many times ``--max-memory``."""
QUICK = (
    "--macs",
    "0.5",
    "--importance",
    "l2",
    "--allocate",
    "uniform",
    "--refit",
    "none",
    "--force",
    "--device",
    "cpu",
)
EXHAUSTED = re.compile(
    r"bad.?alloc|(un|not )able to allocate|failed to alloc|out of memory|memoryerror", re.IGNORECASE
)
ERROR_KEYS = {"schema_version", "error", "hint", "status"}
TRACE = re.compile(r"Traceback|Error\('|<class '")


@dataclass(frozen=True)
class Outcome:
    """End of one case: ``pruned``, ``inspected``, ``refused`` (a sentence), or what must not be."""

    case: int
    kind: str
    text: str = ""

    @property
    def good(self) -> bool:
        """A verified model or a sentence."""
        return self.kind in ("pruned", "refused")


# ----------------------------------------------------------------------------------------------------- the worker


class _Watch:
    """Notes every file that is opened for writing outside the folder, and everything that is started."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, (str, bytes)):
                where = os.path.realpath(os.fsdecode(path))
                secret = where == "/etc/passwd" or where.endswith("secret.bin")
                if (writes and not where.startswith(self.folder)) or secret:
                    self.seen.append(f"opened {where}")
        elif event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.fork",
            "os.posix_spawn",
            "pickle.find_class",
            "socket.connect",
            "ctypes.dlopen",
            "os.symlink",
            "os.chmod",
            "os.kill",
        ):
            self.seen.append(f"{event} {args[:1]}")


def _peak(reset: bool = False) -> int:
    """Largest resident size so far, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")
    )
    return int(line.split()[1]) << 10


def _call(arguments: list[str], watch: _Watch | None = None) -> tuple[int, str, str]:
    from onnx_oamip.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), watch or nullcontext():
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


def judge(status: int, out: str, err: str, *, as_json: bool = False) -> str:
    """Describe the fault in the end of a command; empty where it is a result or one sentence.

    With ``as_json``, stdout has to state that sentence as a document; without it, an error leaves stdout empty.
    """
    if any(not c.isprintable() and c != "\n" for c in out):
        return f"prints control characters: {out[:500]!r}"
    if status == 0:
        return ""
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    sentence = "\n".join(lines)
    if status not in (1, 2):
        return f"status {status}: {out[:100]}{err[:300]}"
    if not sentence.startswith("Error: ") or "\n" in sentence or not sentence.isprintable():
        return f"not one line: {err[:500]!r}"
    if len(sentence) > 2000:
        return f"{len(sentence)} characters"
    if EXHAUSTED.search(sentence) and "asks for" not in sentence:
        return f"memory: {sentence[:500]}"
    if not sentence.endswith((".", "?", "!")):
        return f"not a sentence: {sentence[:300]}"
    stated = _states(out, sentence.removeprefix("Error: "), status) if as_json else not out
    if not stated:
        return f"status {status}: {out[:300]}{err[:300]}"
    return ""


def _states(out: str, sentence: str, status: int) -> bool:
    """True if all of stdout is the document with which ``--json`` states this error."""
    try:
        document = json.loads(out)
    except ValueError:
        return False
    if not isinstance(document, dict) or set(document) != ERROR_KEYS:
        return False
    error, hint = document["error"], document["hint"]
    parts = [error] if hint is None else [error, hint]
    return (
        (document["schema_version"], document["status"]) == (1, status)
        and all(isinstance(part, str) and part for part in parts)
        and "; ".join(parts) == sentence
    )


def _files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def run_model(number: int, folder: Path, watch: _Watch) -> Outcome:
    """Prune (and look at) one mutated model."""
    import mutated_files
    import numpy as np
    import onnx

    content, beside = mutated_files.model(np.random.default_rng([SEED, 0, number]))
    place, target = folder / "in", folder / "out"
    place.mkdir(), target.mkdir()
    path = place / "model.onnx"
    path.write_bytes(content)
    for name, what in beside.items():
        if isinstance(what, bytes):
            (place / name).write_bytes(what)
        else:
            (place / name).symlink_to(what)
    before = _files(place)
    status, out, err = _call(
        ["prune", str(path), "-o", str(target / "out.onnx"), "--cache", "off", *QUICK], watch
    )
    wrong = judge(status, out, err)
    written = _files(target)
    if not wrong and (
        written != ({"out.onnx"} if status == 0 else set()) or _files(place) != before
    ):
        wrong = f"files: {written}, {_files(place) ^ before}"
    if not wrong and status == 0:
        onnx.checker.check_model(str(target / "out.onnx"))
    if not wrong:
        as_json = number % 2 == 1
        looked = _call(["inspect", str(path), *(["--json"] if as_json else [])], watch)
        wrong = judge(*looked, as_json=as_json)
        if not wrong and looked[0] and not status:
            wrong = f"pruned, but inspect says {looked[2]}"
    return Outcome(
        number, "wrong" if wrong else "refused" if status else "pruned", wrong or err.strip()
    )


def run_data(number: int, folder: Path, watch: _Watch) -> Outcome:
    """Prune a sound model with one broken source of samples."""
    import mutated_files
    import numpy as np
    from graphs import build

    model = folder / "model.onnx"
    model.write_bytes(build(mutated_files.DATA_MODEL).SerializeToString())
    name, files = mutated_files.data(np.random.default_rng([SEED, 1, number]))
    for inner, content in files.items():
        (folder / inner).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / inner).write_bytes(content)
        else:
            (folder / inner).symlink_to(content)
    before = _files(folder)
    out = folder / "out.onnx"
    ended = _call(
        [
            "prune",
            str(model),
            "--data",
            str(folder / name),
            "-o",
            str(out),
            "--cache",
            "off",
            *QUICK,
        ],
        watch,
    )
    wrong = judge(*ended)
    if not wrong and _files(folder) - before != (set() if ended[0] else {"out.onnx"}):
        wrong = f"files: {_files(folder) ^ before}"
    return Outcome(
        number, "wrong" if wrong else "refused" if ended[0] else "pruned", wrong or ended[2].strip()
    )


def run_odd(number: int, folder: Path, watch: _Watch) -> Outcome:
    """Prune one odd but sound model on odd samples with random options, and run what is written."""
    import numpy as np
    import odd_models

    from onnx_oamip.core.settings import Settings

    rng = np.random.default_rng([SEED, 2, number])
    odd, options = odd_models.draw(rng)
    as_json = bool(rng.random() < 0.5)
    path, data, target = folder / "model.onnx", folder / "data.npz", folder / "out"
    target.mkdir()
    path.write_bytes(odd.proto.SerializeToString())
    np.savez(data, **odd.arrays)
    given = ["prune", str(path), "--data", str(data), "-o", str(target / "out.onnx")]
    common = ["--cache", "off", "--device", "cpu", *(["--json"] if as_json else ["-q"])]
    start = _peak(reset=True)
    ended = _call([*given, *common, *options])
    grown = _peak() - start
    reported = f"{', '.join(odd.oddities)}; {' '.join(options)}; "
    wrong = judge(*ended, as_json=as_json)
    limit = Settings(max_memory=options[options.index("--max-memory") + 1]).max_memory or 0
    if not wrong and grown > MEMORY_MARGIN * limit:
        wrong = f"grew by {grown >> 20} MiB"
    expected = {"out.onnx"} if ended[0] == 0 and "--dry-run" not in options else set()
    written = _files(target)
    if not wrong and written != expected:
        wrong = f"files: {written}"
    if not wrong and written:
        wrong = odd_models.difference(odd, (target / "out.onnx").read_bytes())
    kind = "wrong" if wrong else "refused" if ended[0] else "pruned"
    return Outcome(number, kind, f"{reported}{wrong or ended[2].strip()}")


RUNS = {"model": run_model, "data": run_data, "odd": run_odd}
BOUNDED = ("model", "data")
"""Kinds whose cases are files of a few bytes: they need little memory, and start and open nothing."""


def _one(kind: str, number: int, root: Path, watch: _Watch) -> Outcome:
    folder = root / "box" / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (root / "box" / "secret.bin").write_bytes(bytes(4096))
    start = _peak(reset=True)
    watch.seen.clear()
    seconds = SECONDS if kind in BOUNDED else ODD_SECONDS
    faulthandler.dump_traceback_later(seconds * WAIT, exit=True)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(spent.ru_utime + spent.ru_stime) + seconds + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        outcome = RUNS[kind](number, folder, watch)
    except (Exception, SystemExit) as error:
        at = error.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        where = "" if at is None else f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}"
        outcome = Outcome(
            number, "raised", f"{type(error).__name__} at {where}: {str(error)[:300]}"
        )
        if os.environ.get("FUZZ_TRACE"):
            raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    grown = _peak() - start
    if outcome.good and watch.seen:
        return Outcome(number, "reached out", "; ".join(watch.seen))
    allowed = RESIDENT + MULTIPLE * size
    if kind in BOUNDED and outcome.good and grown > allowed:
        allowed += RUNS_OF_MODEL * _memory_of_a_run(folder / "in" / "model.onnx")
    if kind in BOUNDED and outcome.good and grown > allowed:
        return Outcome(number, "memory", f"{grown >> 20} MiB for {size} bytes: {outcome.text}")
    return outcome


def _memory_of_a_run(path: Path) -> int:
    """Bytes by which a process grows that runs a model on two random samples; 0 if the model does not run."""
    script = (
        "import sys, fuzzing; from onnx_oamip.data import dataset; from onnx_oamip.graph import loading, runtime\n"
        "model = loading.load(sys.argv[1]); feeds = dataset.placeholder(model, 0, 2)\n"
        "before = fuzzing._peak(reset=True)\n"
        "runtime.Session(model.proto, 'cpu').run(next(feeds.batches(2))[1]); print(fuzzing._peak() - before)"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    return int(ended.stdout) if ended.returncode == 0 else 0


def prepare(root: Path) -> _Watch:
    """Everything that is loaded once, and the bounds of the process."""
    # What is imported later would count as reaching out.
    import PIL.Image
    from graphs import build

    from onnx_oamip.api import proof
    from onnx_oamip.graph import runtime
    from onnx_oamip.planning import latency_model
    from onnx_oamip.verification import latency

    PIL.Image.init()
    # Times are measured for a moment, and do not decide.
    proof.compare_latency = lambda *_, **__: latency.Ratio(0.5, 0.4, 0.6, 9)
    measure = latency.interleave

    def short(calls: Any, seconds: float, *more: Any, **named: Any) -> Any:
        return measure(calls, min(seconds, MEASURED_SECONDS), *more, **named)

    latency.interleave = latency_model.interleave = short
    runtime.PATIENCE = 0.5
    tempfile.tempdir = str(root)
    os.chdir(root)
    warm = root / "warm.onnx"
    warm.write_bytes(
        build(
            "(float[N,4] x) => (float[] y) <float[4,8] a, float[8,2] b> { h = MatMul(x, a)  r = Relu(h)"
            "  y = MatMul(r, b) }"
        ).SerializeToString()
    )
    for command in (
        ["prune", str(warm), "-o", str(root / "warm-out.onnx"), "--cache", "off", *QUICK],
        ["inspect", str(warm)],
        ["inspect", str(warm), "--json"],
    ):
        status, _, err = _call(command)
        assert status == 0, err
    sys.dont_write_bytecode = True  # a module that is imported later is no file of the command
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPACE, used + SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return _Watch(root)


def work(kind: str) -> None:
    """Numbers come in line by line, outcomes go out."""
    faulthandler.enable()
    faulthandler.register(signal.SIGXCPU, chain=True)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        watch = prepare(Path(root).resolve())
        for line in sys.stdin:
            outcome = _one(kind, int(line), Path(root).resolve(), watch)
            answers.write(json.dumps([outcome.case, outcome.kind, outcome.text]) + "\n")
            answers.flush()


# ------------------------------------------------------------------------------------------------------ the watch


def outcomes(kind: str, numbers: Iterable[int]) -> Iterator[Outcome]:
    """Outcomes in order; a worker that dies is one, and another worker goes on behind it."""
    import onnx_oamip

    package = str(Path(onnx_oamip.__file__).parent.parent)  # the worker tests what its parent does
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "ONNX_OAMIP_CACHE": "off",
        "COLUMNS": "200",
    }
    worker: subprocess.Popen[str] | None = None
    with tempfile.TemporaryFile("w+") as errors:
        for number in numbers:
            if worker is None:
                errors.seek(0), errors.truncate()
                worker = subprocess.Popen(
                    [sys.executable, __file__, kind],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                )
            assert worker.stdin is not None
            assert worker.stdout is not None
            answer = ""
            try:
                worker.stdin.write(f"{number}\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
            except BrokenPipeError:
                pass
            if answer:
                yield Outcome(*json.loads(answer))
                continue
            status = worker.wait()
            worker = None
            errors.seek(0)
            said = errors.read()
            trace = "".join(
                f"{x.strip()}; " for x in said.splitlines() if "File " in x and "onnx" in x
            )[:900]
            head = next(
                (x for x in said.splitlines() if x.startswith(("Fatal", "Timeout"))), said[-300:]
            )
            ended = "hung" if "Timeout" in head or status == -signal.SIGXCPU else "died"
            yield Outcome(number, ended, f"status {status}, {head}: {trace}")
        if worker is not None:
            assert worker.stdin is not None
            worker.stdin.close()
            worker.wait()


def summary(
    kind: str, numbers: Sequence[int], workers: int = 1
) -> tuple[Counter[str], list[Outcome]]:
    """(outcomes by kind, those that must not be), found by so many processes side by side."""
    with ThreadPoolExecutor(workers) as threads:
        parts = threads.map(lambda i: list(outcomes(kind, numbers[i::workers])), range(workers))
        found = sorted((o for part in parts for o in part), key=lambda o: o.case)
    return Counter(o.kind for o in found), [o for o in found if not o.good]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        work(sys.argv[1])
    else:
        kind, *numbers = sys.argv[1:]
        listed = range(*map(int, numbers)) if len(numbers) == 2 else map(int, numbers)
        counted: Counter[str] = Counter()
        for found in outcomes(kind, listed):
            counted[found.kind] += 1
            if not found.good or len(numbers) != 2:
                sys.stdout.write(f"{found.case} {found.kind}: {found.text[:700]}\n")
                sys.stdout.flush()
        sys.stdout.write(f"{dict(counted)}\n")
