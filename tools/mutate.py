"""Mutation testing: small changes to a module, each of which some test must notice.

The changes are mutmut's. Its own runner takes tests by function and all of them; here a test is chosen by the lines it
runs, the changed code is put in place in a forked process, and the first test that fails ends it. Texts are left as
they are, and so are the types of what is declared.

    pip install 'mutmut>=3.8'
    python -m tools.mutate coupling allocation --sample 200 --out mutants.txt

One line a mutant that no test noticed, and a count a module. With ``--sample`` a seeded sample, else all.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import gc
import importlib
import os
import pickle
import random
import resource
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = [
    "tests/graph/ops/test_cases.py::test_case_has_the_stated_units_and_reasons",
    "tests/graph/ops/test_cases.py::test_cut_to_one_unit_per_group_equals_the_masked_model",
]
PLANS = [
    "tests/planning/test_allocation.py",
    "tests/planning/test_budget_program.py",
    "-k",
    "not any_ledger and not densenet",
]
REFITS = [
    "tests/repair/test_least_squares.py",
    "tests/repair/test_mean_folding.py",
    "tests/repair/test_channel_mixing.py",
    "tests/repair/test_row_sampling.py",
    "tests/repair/test_shared_weights.py",
    "-k",
    "not trained_model",
]
TESTS = {
    "graph.coupling": [
        "tests/graph/test_coupling.py",
        "tests/planning/test_allocation.py",
        *CASES,
        "-k",
        "not test_allocation or exclude",
    ],
    "graph.linear_layers": [
        "tests/graph/test_linear_layers.py",
        "tests/repair/test_mean_folding.py",
    ],
    "objective.detection": ["tests/objective/test_detection.py"],
    "objective.losses": ["tests/objective/test_losses.py"],
    "objective.measures": ["tests/objective/test_measures.py"],
    "planning.allocation": PLANS,
    "planning.budget_program": ["tests/programs/test_program_files.py", *PLANS],
    "planning.sensitivity": [
        "tests/planning/test_sensitivity.py",
        "-k",
        "not every_operator_case",
    ],
    **{
        f"repair.{name}": REFITS
        for name in (
            "channel_mixing",
            "cut_model",
            "least_squares",
            "mean_folding",
            "node_refit",
            "problems",
            "refit_scope",
            "row_sampling",
            "stored_weights",
            "targets",
        )
    },
    "repair.residual_joins": ["tests/repair/test_residual_joins.py", *REFITS],
    "repair.ridge": ["tests/repair/test_ridge.py", *REFITS],
}
"""Paths that pytest collects, by module."""
SLOW = 2.0
"""Duration in seconds above which a test is left out of the selection."""


@dataclass(frozen=True)
class Mutant:
    """One change: the lines (1-based) that it touches, and what makes the changed source."""

    lines: range
    make: Callable[[], str]


def mutants(source: str) -> list[Mutant]:
    """All mutants of a file but those of texts, of type annotations and of what is raised."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators, operator_string
    from mutmut.mutation.pragma_handling import IgnoredCode

    raised = {
        i for i, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("raise ")
    }
    wrapper = MetadataWrapper(cst.parse_module(source))
    operators = [o for o in mutation_operators if o[1] is not operator_string]
    visitor = MutationVisitor(operators, IgnoredCode(raised, raised, set()))
    wrapper.visit(visitor)
    places = wrapper.resolve(PositionProvider)

    def made(old: cst.CSTNode, new: cst.CSTNode) -> str:
        return str(wrapper.module.deep_replace(old, new).code)  # type: ignore[union-attr]

    result = []
    for found in visitor.mutations:
        place = places[found.original_node]
        make = functools.partial(made, found.original_node, found.mutated_node)
        result.append(Mutant(range(place.start.line, place.end.line + 1), make))
    return result


def readers(source: str) -> dict[int, set[int]]:
    """Of the lines that define constants of a file, the lines that read these: no test runs the former by itself."""
    tree = ast.parse(source)
    read: dict[str, set[int]] = defaultdict(set)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            read[node.id].add(node.lineno)
    result: dict[int, set[int]] = defaultdict(set)
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for named in ast.walk(node):
                if isinstance(named, ast.Name) and isinstance(named.ctx, ast.Store):
                    for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                        result[line] |= read[named.id]
    return result


def difference(source: str, code: str) -> str:
    """The lines that differ, in one line of text."""
    lines = difflib.unified_diff(source.splitlines(), code.splitlines(), n=0, lineterm="")
    return " ".join(
        t[0] + t[1:].strip() for t in lines if t[:1] in "+-" and t[:3] not in ("+++", "---")
    )


def apply(module: ModuleType, code: str) -> None:
    """Give what a loaded module defines the code of a changed source, and its constants their values."""
    fresh = ModuleType(module.__name__)
    fresh.__package__, fresh.__file__ = module.__package__, module.__file__
    exec(compile(code, str(module.__file__), "exec"), vars(fresh))
    for name, new in vars(fresh).items():
        old = getattr(module, name, None)
        if isinstance(new, type) and new.__module__ == module.__name__:
            for key, member in vars(new).items():
                _swap(vars(old).get(key), member)
        elif getattr(new, "__module__", None) == module.__name__:
            _swap(old, new)
        elif name.isupper() and new != old:
            for other in [
                m for n, m in sys.modules.items() if n.startswith(("onnx_oamip", "test_")) and m
            ]:
                if vars(other).get(name) is old:
                    setattr(other, name, new)


def _swap(old: Any, new: Any) -> None:
    for unwrap in ("fget", "__func__", "__wrapped__", "func"):
        if not isinstance(new, FunctionType) and hasattr(new, unwrap):
            old, new = getattr(old, unwrap), getattr(new, unwrap)
    if isinstance(old, FunctionType) and isinstance(new, FunctionType):
        old.__code__, old.__defaults__, old.__kwdefaults__ = (
            new.__code__,
            new.__defaults__,
            new.__kwdefaults__,
        )


def _forked(work: Callable[[], object], seconds: float) -> object:
    """Run ``work`` in a process of its own; its result, 'time' where it exceeds its CPU time or hangs, or 'crash'."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        limit = int(seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        signal.alarm(100 * limit)
        with contextlib.suppress(BaseException), os.fdopen(write, "wb") as pipe:
            pickle.dump(work(), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        ends = (signal.SIGPROF, signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)
        return "time" if os.WTERMSIG(status) in ends else "crash"
    return pickle.loads(told) if told else "crash"


def _fails(item: pytest.Item) -> bool:
    from _pytest.runner import runtestprotocol

    return any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


@dataclass(frozen=True)
class Seen:
    """Seconds of every test by its place in the collection, and the tests that ran a line of a file."""

    seconds: dict[int, float]
    lines: dict[tuple[str, int], list[int]]


def watch(items: Sequence[pytest.Item], files: frozenset[str]) -> Seen:
    """Run every test once and note which lines of ``files`` it runs. A test that fails is left out."""
    here: set[tuple[str, int]] = set()

    def line(frame: FrameType, *_: object) -> Any:
        here.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    def call(frame: FrameType, *_: object) -> Any:
        return line(frame) if frame.f_code.co_filename in files else None

    seconds: dict[int, float] = {}
    lines: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        here.clear()
        began = time.process_time()
        threading.settrace(call)  # work is spread over threads that start later
        sys.settrace(call)
        failed = _fails(item)
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        if not failed:
            seconds[i] = time.process_time() - began
            for key in here:
                lines[key].append(i)
    return Seen(seconds, dict(lines))


class Runner:
    """A pytest plugin that runs mutants instead of the tests."""

    def __init__(self, names: Sequence[str], args: argparse.Namespace) -> None:
        self.names, self.args = names, args
        self.told: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        modules = {name: importlib.import_module(f"onnx_oamip.{name}") for name in self.names}
        gc.freeze()
        files = frozenset(str(module.__file__) for module in modules.values())
        seen = _forked(functools.partial(watch, session.items, files), 3600)
        assert isinstance(seen, Seen), seen
        for name, module in modules.items():
            self.one(session, name, module, seen)
        return True

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.told.append(text)

    def one(self, session: pytest.Session, name: str, module: ModuleType, seen: Seen) -> None:
        path = Path(str(module.__file__))
        source = path.read_text()
        every, reading = mutants(source), readers(source)
        rng = random.Random(self.args.seed)
        chosen = every
        if self.args.again:
            known = self.args.again.read_text()
            near = [m for m in every if f"{name}.py:{m.lines.start} " in known]
            chosen = [
                m
                for m in near
                if f"{name}.py:{m.lines.start} {difference(source, m.make())}\n" in known
            ]
        if self.args.sample:
            chosen = rng.sample(chosen, min(self.args.sample, len(chosen)))
        count: Counter[str] = Counter()
        until = time.monotonic() + 60 * self.args.minutes
        for mutant in chosen:
            if time.monotonic() > until:
                break
            touched = {*mutant.lines, *(line for n in mutant.lines for line in reading.get(n, ()))}
            found = {i for n in touched for i in seen.lines.get((str(path), n), ())}
            if not found and any(n in reading for n in mutant.lines):
                found = set(seen.seconds)  # a default of a parameter, or what only tests read
            wanted = list(self.order(sorted(found), seen, rng))
            verdict = "no test"
            if wanted:
                tests = {session.items[i]: seen.seconds[i] for i in wanted}
                work = functools.partial(self.survives, tests, module, mutant.make())
                verdict = str(_forked(work, 20 + 5 * sum(tests.values())))
            count[verdict] += 1
            if verdict not in ("killed", "time", "crash"):
                shown = f"{len(wanted)} of {len(found)} tests"
                self.say(
                    f"{verdict} ({shown}) {name}.py:{mutant.lines.start} {difference(source, mutant.make())}"
                )
        numbers = ", ".join(f"{k} {v}" for k, v in sorted(count.items()))
        self.say(f"{name}: {sum(count.values())} of {len(every)} mutants: {numbers}")

    def order(self, found: Sequence[int], seen: Seen, rng: random.Random) -> Iterator[int]:
        """Quick tests in any order, then the others by time, until the seconds are spent."""
        mixed = sorted(found, key=lambda i: (max(seen.seconds[i], 0.25), rng.random()))
        spent = 0.0
        for i in mixed:
            if spent > self.args.seconds or seen.seconds[i] > SLOW:
                return
            spent += seen.seconds[i]
            yield i

    @staticmethod
    def survives(tests: Mapping[pytest.Item, float], module: ModuleType, code: str) -> str:
        try:
            apply(module, code)
        except Exception:  # it cannot even be loaded
            return "killed"
        for item, seconds in tests.items():
            # The limit ends a mutant that does not terminate.
            signal.setitimer(signal.ITIMER_PROF, 1 + 10 * seconds)
            if _fails(item):
                return "killed"
        return "survived"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module", nargs="+", choices=sorted(TESTS))
    parser.add_argument(
        "--sample", type=int, default=0, help="mutants a module, drawn at random (0: all of them)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--again", type=Path, help="only the mutants that this file, written with --out, tells"
    )
    parser.add_argument(
        "--tests", nargs="+", help="what pytest is to collect, instead of what goes with the module"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="time of the tests that one mutant is shown to"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=1e6,
        help="take no further mutant of a module after that time",
    )
    parser.add_argument("--out", type=Path, help="also write what is printed to this file")
    args = parser.parse_args()
    os.chdir(ROOT)
    batches: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in args.module:
        batches[tuple(args.tests or TESTS[name])].append(name)
    told: list[str] = []
    for tests, names in batches.items():
        runner = Runner(names, args)
        options = [
            "-q",
            "-s",
            "--tb=no",
            "--assert=plain",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
        ]
        pytest.main([*options, *tests], plugins=[runner])
        told += runner.told
    if args.out:
        args.out.write_text("".join(f"{line}\n" for line in told))


if __name__ == "__main__":
    main()
