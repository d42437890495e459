"""Inspects and prunes every file by the default command, and judges the results; one JSON file per run."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from onnx_oamip.core.versions import versions

from .manifest import Entry, Manifest
from .samples import write
from .tasks import JUDGES, Case, Verdict

BUDGETS = (0.7, 0.5)
LIMIT = 600.0
"""Seconds after which a command is ended."""
Record = dict[str, Any]


def run_all(
    manifest: Manifest,
    cache: Path,
    out: Path,
    *,
    names: Sequence[str] = (),
    budgets: Sequence[float] = BUDGETS,
    limit: float = LIMIT,
    recover: str | None = None,
) -> None:
    """Inspect and prune files, the smallest first; what has a record already is left as it is.

    Args:
        manifest: The files.
        cache: Folder of ``fetch``.
        out: Folder for records, and pruned files in ``pruned`` below it.
        names: Files to take; all if empty.
        budgets: Shares of the MACs (or parameters, as the manifest says) to keep.
        limit: Seconds after which a command is ended.
        recover: Effort of a recovery behind the refit; None for no recovery.
    """
    more = [] if recover is None else ["--recover", recover]
    chosen = [entry for entry in manifest.entries if not names or entry.name in names]
    chosen.sort(key=lambda entry: entry.path(cache).stat().st_size)
    (out / "pruned").mkdir(parents=True, exist_ok=True)
    for entry in chosen:
        _once(out / f"{entry.name}-inspect.json", lambda e=entry: inspect(e, cache, limit))
        for budget in budgets:
            _once(
                out / f"{entry.name}-{budget}.json",
                lambda e=entry, b=budget: prune(
                    e, manifest, cache, out, budget=b, limit=limit, options=more
                ),
            )
        shutil.rmtree(_statistics(out, entry), ignore_errors=True)


def _statistics(out: Path, entry: Entry) -> Path:
    """Cache of the statistics of a file: the first budget collects them, the second reads them."""
    return out / "statistics" / entry.name


def _once(path: Path, make: Any) -> None:
    """Make a record unless there is one, in one step."""
    if path.exists():
        return
    _store(path, make())


def _store(path: Path, record: Record) -> None:
    """Write a record in one step, and print what it holds."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    found = record.get("kept", record.get("error", ""))
    print(f"{path.stem}: {record['status']} {found} ({record['seconds']:.0f} s)", flush=True)


def command(arguments: Sequence[str], limit: float) -> Record:
    """Run the command line, and measure seconds, processor time and peak memory of that process.

    Returns:
        ``status`` (done, refused with status 1 or 2, failed by a traceback, or over the limit), ``exit``, ``seconds``,
        ``processor``, ``peak_mib``, ``stdout`` and ``error`` (the last line of stderr).
    """
    started = time.perf_counter()
    environment = {**os.environ, "ONNX_OAMIP_CACHE": "off"}
    full = [sys.executable, "-m", "onnx_oamip", *arguments]
    with subprocess.Popen(
        full, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        heard: list[str] = []
        reader = threading.Thread(target=lambda: heard.append(process.stderr.read()))  # type: ignore[union-attr]
        reader.start()
        stdout = process.stdout.read()  # type: ignore[union-attr]
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        timer.cancel()
        reader.join()
    lines = "".join(heard).strip().splitlines()
    traced = any(row.startswith("Traceback") for row in lines)
    ended = {0: "done", 1: "refused", 2: "refused"}.get(process.returncode, "failed")
    return {
        "status": "over the limit" if late.is_set() else "failed" if traced else ended,
        "exit": process.returncode,
        "seconds": round(time.perf_counter() - started, 2),
        "processor": round(used.ru_utime + used.ru_stime, 2),
        "peak_mib": used.ru_maxrss // 1024,
        "stdout": stdout,
        "error": lines[-1] if lines and process.returncode else "",
    }


def inspect(entry: Entry, cache: Path, limit: float) -> Record:
    """Inspect a file."""
    record = command(["inspect", str(entry.path(cache)), "--json"], limit)
    stdout = record.pop("stdout")
    if record["status"] == "done":
        found = json.loads(stdout)
        record["cost"] = found["cost"]
        record["groups"] = len(found["groups"])
        record["units"] = sum(group["units"] for group in found["groups"])
        record["skipped"] = [
            {key: row[key] for key in ("tensor", "channels", "reason")} for row in found["skipped"]
        ]
        record["objective"] = found["objective"]
        record["notes"] = found["notes"]
    return _about(entry, record)


def prune(
    entry: Entry,
    manifest: Manifest,
    cache: Path,
    out: Path,
    *,
    budget: float,
    limit: float,
    options: Sequence[str] = (),
) -> Record:
    """Prune a file with the default command and more options, and judge the result in plain ONNX Runtime.

    Where the budget cannot be met, as inputs and outputs of the model keep their width, the smallest one that can be
    met takes its place, and the record has it as ``least``.
    """
    try:
        data = _apart(write, entry, manifest, cache)
    except Exception as error:  # the record says why there are no samples
        record = {"status": "no samples", "seconds": 0.0, "error": str(error)}
        return _about(entry, record | {"trace": traceback.format_exc()})
    pruned = out / "pruned" / f"{entry.name}-{budget}.onnx"
    arguments = ["--data", str(data), "-o", str(pruned), *entry.options, *options]
    arguments += ["--cache", str(_statistics(out, entry)), "--json"]

    def command_at(share: float) -> Record:
        at = [f"--{entry.budget}", str(share)]
        return command(["prune", str(entry.path(cache)), *at, *arguments], limit)

    record = command_at(budget)
    if (least := least_budget(record["error"], entry.budget)) is not None:
        record = {**command_at(least), "least": least}
    stdout = record.pop("stdout")
    record["asked"] = budget
    if record["status"] != "done":
        return _about(entry, record)
    found = json.loads(stdout)
    for key in ("before", "after", "verification", "notes", "timings"):
        record[key] = found[key]
    if found.get("recovery"):
        record["recovery"] = found["recovery"]
    record["align"] = found["settings"].get("align")
    record = judged(record, entry, manifest, cache, out, budget=budget)
    return _about(entry, record)


def least_budget(error: str, budget: str) -> float | None:
    """Smallest budget that a refusal names.

    Args:
        error: The last line of stderr.
        budget: Name of the budget, as of its option.

    Returns:
        The share; None if the command failed for another reason, or not at all.
    """
    found = re.search(rf"the least that can be met is --{budget} (\d[\d.e-]*)", error)
    return float(found[1]) if found else None


def judged(
    record: Record, entry: Entry, manifest: Manifest, cache: Path, out: Path, *, budget: float
) -> Record:
    """A record with the verdict of the judge of a file, in place of that which it may have."""
    data = _apart(write, entry, manifest, cache)
    record = {k: v for k, v in record.items() if k not in ("measure", "kept", "detail", "trace")}
    record |= {"status": "done", "error": ""}
    pruned = out / "pruned" / f"{entry.name}-{budget}.onnx"
    siblings = {
        other.name: path
        for other in manifest.entries
        if (path := out / "pruned" / f"{other.name}-{budget}.onnx").exists()
    }
    case = Case(entry, manifest, cache, data, pruned, siblings)
    try:
        verdict = _apart(_judge, case)
        record |= {"measure": verdict.measure, "kept": verdict.kept, "detail": dict(verdict.detail)}
    except Exception as error:  # the record says what the pruned file, or its judge, cannot do
        record |= {"status": "not judged", "error": f"{type(error).__name__}: {error}"}
        record["trace"] = traceback.format_exc()
    return record


def judge_all(
    manifest: Manifest,
    cache: Path,
    out: Path,
    *,
    names: Sequence[str] = (),
    budgets: Sequence[float] = BUDGETS,
) -> None:
    """Judge pruned files again, where a judge has changed; arguments as in ``run_all``."""
    for entry in manifest.entries:
        for budget in budgets:
            path = out / f"{entry.name}-{budget}.json"
            if (names and entry.name not in names) or not path.exists():
                continue
            record = json.loads(path.read_text(encoding="utf-8"))
            if "after" in record:
                _store(path, judged(record, entry, manifest, cache, out, budget=budget))


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process.

    The peak memory of a command counts that of the process that starts it, which must therefore stay small.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _judge(case: Case) -> Verdict:
    return JUDGES[case.entry.judge](case, **dict(case.entry.judged))


def _about(entry: Entry, record: Record) -> Record:
    """A record with the file and the versions it is about."""
    about = {"name": entry.name, "task": entry.task, "budget": entry.budget, "sha256": entry.sha256}
    return {**about, **record, "versions": dict(versions())}
