"""A run of several stages, described in one file: prune, recover, int8, and checks of every model that they write.

A stage whose inputs and settings are unchanged since the last run in the same folder is not run again
(``artifacts.stage_files``).
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx_oamip.api import comparison, pipeline, recovery
from onnx_oamip.api import prepare as preparing
from onnx_oamip.api.quantisation import int8
from onnx_oamip.artifacts import cache, stage_files
from onnx_oamip.artifacts.output import check_new_folder
from onnx_oamip.artifacts.shipped_sizes import zipped_file
from onnx_oamip.artifacts.stage_files import StageRecord
from onnx_oamip.core.atomic_files import output_errors
from onnx_oamip.core.budgets import counted_shares
from onnx_oamip.core.errors import OutputError, SettingsError
from onnx_oamip.core.json_values import plain_document
from onnx_oamip.core.notebook import tables
from onnx_oamip.core.options import QuantisationOptions
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import Budget, Model
from onnx_oamip.core.settings import Settings
from onnx_oamip.core.versions import versions
from onnx_oamip.data import dataset
from onnx_oamip.data.sources import File, SampleSets, Source, samples_of, source_name
from onnx_oamip.graph import cost, op_libraries
from onnx_oamip.graph.loading import load
from onnx_oamip.graph.runtime import resolve_device
from onnx_oamip.objective import metric as metrics
from onnx_oamip.recovery import recover as training
from onnx_oamip.reporting import documents
from onnx_oamip.verification import latency

ORIGINAL, PRUNE, RECOVER, INT8, CHECK = "original", "prune", "recover", "int8", "check"
UNRELATED = frozenset({"cache", "workers", "scheduler", "force"})
"""Settings that do not change what a stage writes."""
UNMEASURED = "the {} of the last model was not measured, so that its limit cannot be checked"


@dataclass(frozen=True)
class Stages:
    """Stages of a run with their settings; None for a stage that is left out.

    Attributes:
        prune: Settings of ``prune``.
        recover: Settings of ``recover``.
        int8: Settings of the samples for ``int8``.
        quantisation: How the model is quantised.
        check: Settings of the checks, as those of ``verify``.
        limits: What the last model must keep to: shares of the original's cost, and ``max_drop``.
        seconds: Approximate time of the measurement of latency.
    """

    prune: Settings | None = None
    recover: Settings | None = None
    int8: Settings | None = None
    quantisation: QuantisationOptions = field(default_factory=QuantisationOptions.create)
    check: Settings = field(default_factory=Settings.create)
    limits: Budget = field(default_factory=Budget)
    seconds: float = 3.0

    @property
    def names(self) -> list[str]:
        """Names of the stages that write a model, in their order."""
        given = {PRUNE: self.prune, RECOVER: self.recover, INT8: self.int8}
        return [name for name, settings in given.items() if settings is not None]


@dataclass(frozen=True)
class RunDescription:
    """Task of a run: model, data and stages.

    Attributes:
        model: Model file.
        data: Samples.
        eval_data: Held-out samples; None for the held-out part of ``data``.
        folder: Where the stages write.
        stages: The stages with their settings.
    """

    model: File
    data: Source
    eval_data: Source | None
    folder: Path
    stages: Stages


@dataclass(frozen=True, eq=False, repr=False)
class StagedRun:
    """Result of ``run``.

    Attributes:
        original: The model before all stages.
        folder: Where the stages wrote.
        rows: Size, latency and quality of the original and of the model of every stage.
        limits: What the last model had to keep to.
        broken: Limits that it does not keep to and checks that do not hold, in sentences.
        records: The stages in their order, the checks last.
        settings: Settings of every stage.
    """

    original: Model
    folder: Path
    rows: list[dict[str, Any]]
    limits: Budget
    broken: tuple[str, ...]
    records: tuple[StageRecord, ...]
    settings: Mapping[str, Any]

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document of the command ``run``."""
        found = {
            "schema_version": documents.SCHEMA_VERSION,
            "model": {"path": self.original.path, "sha256": self.original.sha256},
            "folder": str(self.folder),
            "stages": self.rows,
            "limits": asdict(self.limits),
            "broken": list(self.broken),
            "notes": self._notes(),
            "timings": {record.stage: record.seconds for record in self.records},
            "reused": [record.stage for record in self.records if record.reused],
            "settings": self.settings,
            "versions": versions(),
        }
        return plain_document(found)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{row['stage']} {row['bytes']:,} bytes" for row in self.rows)
        return f"<StagedRun {self.original.path} -> {self.folder}: {sizes}>"

    def _repr_html_(self) -> str:
        rows = []
        for row in self.rows:
            found = row["verification"] or {}
            ratio = found.get("latency")
            rows.append(
                (
                    row["stage"],
                    f"{row['macs']:,}",
                    f"{row['bytes']:,}",
                    f"{row['zip_bytes']:,}",
                    "" if ratio is None else f"{ratio['median']:.1%}",
                    "" if found.get("agreement") is None else f"{found['agreement']:.2%}",
                )
            )
        header = ("model", "MACs", "bytes", "zip", "time", "agreement")
        limits = [(sentence,) for sentence in self.broken]
        return tables(repr(self).strip("<>"), (rows, header), (limits, ("limit broken",)))

    def _notes(self) -> list[str]:
        """Remarks of all stages, each once."""
        notes: dict[str, None] = {}
        for record in self.records:
            notes |= {f"{record.stage}: {note}": None for note in record.document.get("notes", ())}
        return list(notes)


def run(
    given: RunDescription,
    *,
    again: bool = False,
    progress: Progress | None = None,
) -> StagedRun:
    """Run the stages one after the other, and measure every model against the original.

    Args:
        given: Model, samples, folder and stages. The folder is made if it does not exist.
        again: Run every stage, whether its inputs have changed or not.
        progress: Called as ``progress(stage, done, total)``.

    Returns:
        The models with their measurements, and the limits that are broken.

    Raises:
        OamipError: Bad input or a missing package. Finished stages stay in the folder.
        BudgetNotMet: The budget of the stage ``prune`` cannot be met.
        GateFailed: The result of a stage failed a check.
    """
    stages, data = given.stages, given.data
    if not stages.names:
        raise SettingsError(
            "no stage is described, so that there is nothing to run; add a table [prune], [recover] or [int8]."
        )
    if stages.recover is not None:
        training.check()
    if stages.prune is not None:
        preparing.check(stages.prune, data, False)
    dataset.check_extras(data, given.eval_data)
    original = load(given.model, stated=stages.check.shapes)
    work = _Work(original, given, again, progress)
    work.identify_samples()
    _make(given.folder)
    for name in stages.names:
        work.run(name)
    found = work.check()
    rows = list(found.document["stages"])
    settings = {name: own.model_dump(mode="json") for name, own in work.settings().items()}
    if stages.int8 is not None:
        settings[INT8] |= stages.quantisation.model_dump(mode="json")
    return StagedRun(
        original=original,
        folder=given.folder,
        rows=rows,
        limits=stages.limits,
        broken=(*failed(rows), *broken(rows[0], rows[-1], stages.limits)),
        records=tuple(work.records),
        settings={
            "data": source_name(data),
            "eval_data": source_name(given.eval_data),
            "seconds": stages.seconds,
            **settings,
        },
    )


def failed(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Checks of the models of a run that do not hold.

    Args:
        rows: Rows of the original and of the stages.

    Returns:
        A sentence for every such check.
    """
    return tuple(
        f"the model of {row['stage']} fails a check: {failure}"
        for row in rows
        if row["verification"]
        for failure in row["verification"]["failures"]
    )


def broken(original: Mapping[str, Any], last: Mapping[str, Any], limits: Budget) -> tuple[str, ...]:
    """Compare the last model of a run with its limits.

    Args:
        original: Row of the original.
        last: Row of the model.
        limits: Shares of the original's cost, and the largest loss.

    Returns:
        A sentence for every limit that is broken or cannot be checked.
    """
    found = []
    for kind, share in counted_shares(limits):
        kept = last[kind.cost] / original[kind.cost]
        if kept > share:
            found.append(f"the last model has {kept:.1%} of the {kind.noun}, over {share:.1%}")
    verification = last["verification"]
    ratio = verification["latency"]
    if limits.latency is not None and ratio is None:
        found.append(UNMEASURED.format("latency"))
    elif limits.latency is not None and ratio["low"] > limits.latency:
        found.append(
            f"the last model takes {ratio['median']:.1%} of the time (at least {ratio['low']:.1%} within the 95 % "
            f"interval), over {limits.latency:.1%}"
        )
    if limits.max_drop is not None:
        found += _dropped(verification, limits.max_drop)
    return tuple(found)


def _dropped(verification: Mapping[str, Any], allowed: float) -> list[str]:
    """The loss of the worst output, or of the user's metric, if it is above the limit."""
    if verification["metric"] is not None:
        lost, what = verification["metric"]["lost"], verification["metric"]["name"]
        unit = "of the metric"
    elif verification["outputs"]:
        worst = max(verification["outputs"], key=lambda measure: measure["lost"] or 0.0)
        lost, what, unit = worst["lost"], worst["output"], "points"
    else:
        return [UNMEASURED.format("loss")]
    if lost is None or lost > allowed:
        return [f"the last model loses {lost or 0:.2f} {unit} ('{what}'), over {allowed:g}"]
    return []


@dataclass
class _Work:
    """A run on its way: the models so far, and the records of their stages."""

    original: Model
    given: RunDescription
    again: bool
    progress: Progress | None
    records: list[StageRecord] = field(default_factory=list)
    _samples: SampleSets | None = None
    _identity: dict[str, Any] | None = None

    def settings(self) -> dict[str, Settings]:
        """Settings of the stages that run, and of the checks."""
        stages = self.given.stages
        own = {PRUNE: stages.prune, RECOVER: stages.recover, INT8: stages.int8}
        return {n: s for n, s in own.items() if s is not None} | {CHECK: stages.check}

    @property
    def last(self) -> Path:
        """Model of the last stage; the original before the first one."""
        written = [record.output for record in self.records if record.output is not None]
        return written[-1] if written else Path(self.original.path)

    def run(self, name: str) -> None:
        """Run a stage that writes a model, unless it is up to date."""
        make = {PRUNE: self._prune, RECOVER: self._recover, INT8: self._int8}[name]
        options = self.given.stages.quantisation.model_dump(mode="json") if name == INT8 else {}
        self._stage(name, {"input": self._sha256(), "options": options}, make)

    def check(self) -> StageRecord:
        """Measure all models, unless that is up to date."""
        models = [record.sha256 for record in self.records]
        depends = {
            "models": models,
            "seconds": self.given.stages.seconds,
            "paths": [self.original.path, str(self.given.folder)],
        }
        return self._stage(CHECK, depends, self._check)

    def _sha256(self) -> str:
        digests = [record.sha256 for record in self.records if record.sha256 is not None]
        return digests[-1] if digests else self.original.sha256

    def _stage(
        self,
        name: str,
        depends: Mapping[str, Any],
        make: Callable[[], tuple[Path | None, str | None, Mapping[str, Any]]],
    ) -> StageRecord:
        """Record of a stage, from the folder if it is up to date."""
        inputs = cache.fingerprint(
            {**depends, "samples": self.identify_samples(), "settings": self._decisive(name)}
        )
        path = self.given.folder / f"{name}.json"
        record = None if self.again else stage_files.load(path, inputs)
        if record is None:
            start = time.perf_counter()
            output, sha256, document = make()
            seconds = time.perf_counter() - start
            record = StageRecord(name, inputs, output, sha256, seconds, document)
            stage_files.save(record, path)
        self.records.append(record)
        return record

    def _decisive(self, name: str) -> dict[str, Any]:
        """Settings that decide the result of a stage, with digests of the files that they name."""
        settings = self.settings()[name]
        found = settings.model_dump(mode="json", exclude=set(UNRELATED))
        if settings.latency_table is not None:
            table = Path(settings.latency_table).read_bytes()
            found["latency_table"] = hashlib.sha256(table).hexdigest()
        if settings.metric is not None:
            source = inspect.getsourcefile(metrics.load(settings.metric).function)
            found["metric_source"] = None if source is None else Path(source).read_text("utf-8")
        return found

    def _sets(self) -> SampleSets:
        """Calibration and held-out samples, as the stage ``prune`` divides them."""
        if self._samples is None:
            settings = self.given.stages.check
            first = self.given.stages.prune or self.given.stages.recover or self.given.stages.int8
            assert first is not None
            settings = settings.model_copy(update={"seed": first.seed})
            self._samples = samples_of(
                self.original, self.given.data, self.given.eval_data, settings
            )
        return self._samples

    def identify_samples(self) -> dict[str, Any]:
        """Digests of the samples."""
        if self._identity is None:
            sets = self._sets()
            assert sets.held_out is not None  # there are data
            self._identity = {
                "calibration": cache.identity(self.original, sets.calibration),
                "held_out": cache.identity(self.original, sets.held_out),
            }
        return self._identity

    def _prune(self) -> tuple[Path, str | None, Mapping[str, Any]]:
        assert self.given.stages.prune is not None
        target = self.given.folder / f"{PRUNE}.onnx"
        result = pipeline.pruned(
            self.original.path,
            self.given.data,
            self.given.stages.prune,
            eval_data=self.given.eval_data,
            progress=self.progress,
        )
        report = result.save(target)
        self._plan.unlink(missing_ok=True)
        if report.settings["granularity"] == "unit" and report.settings["iterations"] == 1:
            result.plan.save(self._plan)
        return target, report.output_sha256, documents.document(report)

    @property
    def _plan(self) -> Path:
        """Plan of the stage ``prune``, for ``recover``."""
        return self.given.folder / f"{PRUNE}.plan.json"

    def _recover(self) -> tuple[Path, str | None, Mapping[str, Any]]:
        assert self.given.stages.recover is not None
        target = self.given.folder / f"{RECOVER}.onnx"
        found = recovery.recover(
            self.last,
            self.original.path,
            self.given.data,
            self.given.stages.recover,
            target,
            plan_file=self._plan
            if self.given.stages.prune is not None and self._plan.exists()
            else None,
            eval_data=self.given.eval_data,
            progress=self.progress,
        )
        return target, found.output_sha256, documents.recovered(found)

    def _int8(self) -> tuple[Path, str | None, Mapping[str, Any]]:
        assert self.given.stages.int8 is not None
        target = self.given.folder / f"{INT8}.onnx"
        found = int8(
            self.last,
            self.given.data,
            target,
            self.given.stages.int8,
            self.given.stages.quantisation,
            eval_data=self.given.eval_data,
            progress=self.progress,
        )
        return target, found.sha256, found.document

    def _check(self) -> tuple[None, None, Mapping[str, Any]]:
        """Rows of the final table."""
        stages = self.given.stages
        op_libraries.use(stages.check.op_library)
        device = resolve_device(stages.check.device)
        samples = self._sets().held_out
        assert samples is not None
        paths = [
            Path(self.original.path),
            *(r.output for r in self.records if r.output is not None),
        ]
        timings = latency.bench(
            paths,
            latency.feeds_of(samples, 1),
            device,
            seconds=stages.seconds,
            memory=False,
        )
        before = replace(cost.count(self.original), bytes=self.original.file_bytes)
        rows: list[dict[str, Any]] = []
        notes: dict[str, None] = {}
        kept = before
        for name, path, timing in zip((ORIGINAL, *stages.names), paths, timings, strict=True):
            model = self.original if name == ORIGINAL else load(path, stated=stages.check.shapes)
            # Recovery changes values alone, and quantisation is no change of widths.
            kept = cost.count(model) if name == PRUNE else kept
            row = {
                "stage": name,
                "path": str(path),
                "sha256": model.sha256,
                "macs": kept.macs,
                "params": kept.params,
                "bytes": model.file_bytes,
                "zip_bytes": zipped_file(path),
                "milliseconds": timing.p50_ms,
                "verification": None,
            }
            if name != ORIGINAL:
                found = comparison.compare_on(
                    self.original,
                    model,
                    samples,
                    stages.check,
                    device=device,
                    progress=self.progress,
                )
                notes |= dict.fromkeys(found.objective.notes)
                share = kept.macs / before.macs if before.macs and name != INT8 else None
                speed = latency.described(timing.ratio, share=share)
                row["verification"] = documents.verified(replace(found, latency=speed))
            rows.append(row)
        return None, None, plain_document({"stages": rows, "notes": list(notes)})


def _make(folder: Path) -> None:
    """Make the folder of a run. Raises OutputError where it cannot be made."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the folder {folder} of the run is a file; give another one.")
    if not folder.exists():
        check_new_folder(folder, "folder")
        with output_errors(folder):
            folder.mkdir(parents=True)
