"""prune(...): the only place where the order of stages exists."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from . import calibrate, cost, data, plan, refit, rewrite, verify
from . import model as models
from .coupling import couple, exclude
from .data import Samples
from .errors import BudgetNotMet, DataError, GateFailed, OutputError, SettingsError
from .importance import METHODS
from .records import Array, Bools, Budget, Cost, Coupling, Model, Pruned, Report, Verification
from .runtime import LARGE, Session, resolve_device
from .settings import Settings

Source = str | os.PathLike[str] | Mapping[str, Array]
PROOF_SAMPLES = 64
"""Samples on which pruned and masked are compared: exactness does not need more."""


def prune(
    path: str | os.PathLike[str],
    source: Source | None,
    output: str | os.PathLike[str] | None,
    settings: Settings,
    eval_data: Source | None = None,
    progress: calibrate.Progress | None = None,
) -> Report:
    """Prune one model and write it if every gate holds.

    ``source`` is calibration data (see ``data``), ``output`` the file to write (None: nothing is written). Raises
    OamipError: exit code 2 for bad input, 1 for a budget or gate that was not met; then no file is written.
    """
    clock = _Clock()
    method = METHODS.get(settings.importance)
    if method is None:
        raise SettingsError(f"--importance '{settings.importance}' is unknown; choose one of {', '.join(METHODS)}.")
    if settings.budget == Budget():
        raise SettingsError("nothing says how much to keep; give --macs, --params, --size or --threshold.")
    if source is None and (method.needs_data or settings.refit != "none"):
        asks = f"--importance {settings.importance}" if method.needs_data else f"--refit {settings.refit}"
        raise DataError(f"{asks} needs calibration data; give --data, or use --importance l2 --refit none.")
    device = resolve_device(settings.device)
    target = None if output is None else check_output(path, output, (source, eval_data))

    with clock("load"):
        model = models.load(path)
        samples, held = _samples(model, source, eval_data, settings.seed)
        model = models.rebind(model, samples.bindings(model))
    with clock("couple"):
        coupling = exclude(model, couple(model), settings.exclude)
        ledger = cost.ledger(model, coupling)
        before = replace(ledger.cost(cost.full_widths(coupling)), bytes=model.file_bytes)
        _something_free(model, coupling)
    statistics = None
    if source is not None:
        with clock("calibrate"):
            statistics = calibrate.collect(model, coupling, samples, device, settings.batch_size, progress)
    with clock("score"):
        scores = method.score(model, coupling, statistics, settings)
    with clock("plan"):
        reserve = refit.new_biases(model, coupling) if settings.refit != "none" else 0
        limit = plan.limits(settings.budget, before, reserve)
        chosen = plan.allocate(model, coupling, ledger, scores, limit, settings)
    with clock("rewrite"):
        raw = rewrite.cut(model, coupling, chosen.keep)
    with clock("refit"):
        pruned = Pruned(raw, raw)
        if settings.refit == "bias" and statistics is not None:
            pruned = refit.fold_means(model, coupling, chosen.keep, statistics, raw)
    with clock("verify"):
        after = cost.count(models.from_proto(pruned.proto, model.bindings))
        _meets(settings.budget, before, after)
        verification = _prove(model, coupling, chosen.keep, pruned, samples, held, device, settings, progress)
    sha256 = None
    if target is not None:
        with clock("write"):
            sha256, size = write(pruned.proto, target)
            after = replace(after, bytes=size)
    return Report(
        model=model,
        output=None if target is None else str(target),
        output_sha256=sha256,
        before=before,
        after=after,
        budget=settings.budget,
        coupling=coupling,
        scores=scores,
        plan=chosen,
        verification=verification,
        timings=clock.seconds,
        settings={**settings.model_dump(mode="json"), "device": device},
        notes=(*chosen.notes, *pruned.notes),
    )


def compare(
    original: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    source: Source,
    settings: Settings,
    progress: calibrate.Progress | None = None,
) -> Verification:
    """Check a pruned file against its original on data: checker, two batch sizes, error, agreement, accuracy."""
    device = resolve_device(settings.device)
    model, other = models.load(original), models.load(pruned)
    for ours, theirs, what in ((model.inputs, other.inputs, "inputs"), (model.outputs, other.outputs, "outputs")):
        if [(p.name, p.dtype) for p in ours] != [(p.name, p.dtype) for p in theirs]:
            names = [", ".join(p.name for p in ports) for ports in (ours, theirs)]
            raise GateFailed(f"the two models have different {what}: {names[0]} against {names[1]}.")
    samples = data.load(source, model, data.EVALUATION) or data.load(source, model)
    assert samples is not None
    model = models.rebind(model, samples.bindings(model))
    verify.structure(other.proto)
    after = Session(other.proto, device, what=str(pruned))
    batches = verify.runs_at(model, after, samples)
    before = Session(model.proto, device, what=str(original))
    found = verify.compare(model, before, after, samples, settings.batch_size, progress)
    return replace(found, batches=batches)


def _samples(model: Model, source: Source | None, eval_data: Source | None, seed: int) -> tuple[Samples, Samples | None]:
    """(calibration, evaluation). Without data: a few random feeds for the exactness proof and nothing else."""
    held = data.load(eval_data, model) if eval_data is not None else None
    if source is None:
        return held or data.placeholder(model, seed), held
    samples = data.load(source, model)
    assert samples is not None
    if held is None:
        held = data.load(source, model, data.EVALUATION)
    if held is None:
        return data.hold_out(samples, seed)
    return samples, held


def _something_free(model: Model, coupling: Coupling) -> None:
    if not coupling.n_units:
        reasons = sorted((p.reason for p in coupling.pinned), key=lambda r: not r.startswith("--exclude"))
        why = f", for example because {reasons[0]}" if reasons else ": it has no weights"
        raise BudgetNotMet(f"no channel of {model.path} can be removed{why}; see 'onnx-oamip inspect'.")


def _meets(budget: Budget, before: Cost, after: Cost) -> None:
    for name, share, old, new in (
        ("macs", budget.macs, before.macs, after.macs),
        ("params", budget.params, before.params, after.params),
        ("size", budget.size, before.bytes, after.bytes),
    ):
        if share is not None and new > share * old:
            raise GateFailed(
                f"the pruned model keeps {new / max(old, 1):.4f} of its {name}, more than --{name} {share}; "
                "nothing was written."
            )


def _prove(
    model: Model,
    coupling: Coupling,
    keep: Bools,
    pruned: Pruned,
    samples: Samples,
    held: Samples | None,
    device: str,
    settings: Settings,
    progress: calibrate.Progress | None,
) -> Verification:
    verify.structure(pruned.proto)
    size = settings.batch_size
    original = Session(model.proto, device, what=model.path)
    # Rounding of the proof must not depend on a provider's reduced precision: it is done on the CPU.
    masked = Session(rewrite.mask(model, coupling, keep), "cpu", what="the masked model")
    cut = Session(pruned.raw, "cpu", what="the cut model")
    few = samples.take(np.arange(min(samples.count, max(PROOF_SAMPLES, samples.fixed_batch or 1))))
    distance = verify.difference(masked, cut, few, size)
    if not distance <= verify.tolerance(model):
        raise GateFailed(
            f"the cut model differs from the masked original by {distance:.2e} of the output's scale, more than "
            f"{verify.tolerance(model):.0e}; nothing was written, please report this model."
        )
    final = Session(pruned.proto, device, what="the pruned model")
    batches = verify.runs_at(model, final, samples)
    if held is None:
        return Verification(distance, None, None, None, None, batches, 0)
    found = verify.compare(model, original, final, held, size, progress)
    return replace(found, masked_equivalence=distance, batches=batches)


def check_output(
    path: str | os.PathLike[str], output: str | os.PathLike[str], sources: Iterable[Source | None] = ()
) -> Path:
    """The output path, if it can be written to. Raises OutputError before any work is done."""
    target = Path(output)
    if not target.parent.is_dir():
        raise OutputError(f"the output folder {target.parent} does not exist; make it or choose another -o.")
    if target.is_dir():
        raise OutputError(f"the output {target} is a folder; give a file name.")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"the output folder {target.parent} is not writable; choose another -o.")
    inputs = [Path(path), *models.external_paths(path), *(Path(s) for s in sources if isinstance(s, (str, os.PathLike)))]
    for written in (target, target.with_name(f"{target.name}.data")):
        if any(written.exists() and p.exists() and written.samefile(p) for p in inputs):
            raise OutputError(f"writing {target} would overwrite the input {written}; choose another -o.")
    return target


def write(proto: onnx.ModelProto, target: Path) -> tuple[str, int]:
    """Write aside, flush, rename: the target is either complete or as it was. Returns (sha256, bytes)."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        side = f"{target.name}.data"
        if proto.ByteSize() >= LARGE:
            copy = onnx.ModelProto()
            copy.CopyFrom(proto)
            onnx.save_model(copy, str(folder / target.name), save_as_external_data=True, location=side)
        else:
            (folder / target.name).write_bytes(proto.SerializeToString(deterministic=True))
        digest, size = hashlib.sha256(), 0
        # Weights first: a model file never points at weights that are not there yet.
        for name in (side, target.name):
            if (folder / name).exists():
                with (folder / name).open("rb+") as stream:
                    os.fsync(stream.fileno())
                size += (folder / name).stat().st_size
                os.replace(folder / name, target.parent / name)
        for name in (target.name, side) if proto.ByteSize() >= LARGE else (target.name,):
            with (target.parent / name).open("rb") as stream:
                while chunk := stream.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest(), size
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
