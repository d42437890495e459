"""Verification of a pruned model: gates, which decide whether it is written, and measurements.

Gates: the checker with full shape inference; ONNX Runtime loads and runs it, at two batch sizes where the batch is
symbolic; before refit it equals the original with removed channels zeroed at their consumers, up to rounding; the
budget is met.
Measurements: relative output error, and of every term of the objective how well it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import tee
from typing import Protocol

import numpy as np
import onnx
from ml_dtypes import finfo

from onnx_oamip.core.errors import GateFailed, ModelError, RuleFailed
from onnx_oamip.core.progress import Progress
from onnx_oamip.core.records import (
    Array,
    Bools,
    Floats,
    Measure,
    MetricValues,
    Model,
    Objective,
    Port,
    Verification,
)
from onnx_oamip.core.records.objective import Term
from onnx_oamip.data.dataset import Samples, placeholder
from onnx_oamip.graph.external_data import array, checkable, references
from onnx_oamip.graph.external_data import tensor as stored
from onnx_oamip.graph.ops import Trait, lookup
from onnx_oamip.graph.ops.unrounded import unrounded
from onnx_oamip.graph.outputs import is_float, producer_with, with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.graph.shape_inference import symbol
from onnx_oamip.objective import Measures
from onnx_oamip.objective.metric import Metric

TOLERANCE = 1e-4
"""Largest difference between pruned and masked outputs, relative to the output's scale (float32)."""
TOLERANCE_HALF = 2e-2
"""The same for half-precision outputs, whose own rounding is about 1e-3 a layer."""
ROUNDING = 4.0
"""Times the measured rounding that a difference may be where it exceeds the tolerance."""
ROUNDING_MOST = 1e-2
"""Differences above this share of the scale are not put down to rounding: there it would hide what the cut does."""
BLOCK = 1 << 20
"""Elements of an output that are compared at a time."""
FEW_SAMPLES = 30
"""Number of held-out samples below which a note says how much one of them counts."""
DRAWS = 3


def few_samples(samples: int) -> tuple[str, ...]:
    """Remark on measurements from few samples.

    Args:
        samples: Number of held-out samples; 0 without any.

    Returns:
        A note, if one sample moves the measurements by more than a few points.
    """
    if not 0 < samples < FEW_SAMPLES:
        return ()
    noun = "sample" if samples == 1 else "samples"
    note = (
        f"agreement, accuracy and errors were measured on {samples} {noun} only, where a single one counts "
        f"{100 / samples:.3g} points; give more samples, or `eval_data`"
    )
    return (note,)


@dataclass(frozen=True, slots=True)
class Proof:
    """Largest difference between the cut and the masked model, relative to the scale of the compared tensors.

    ``rounding`` is how far rounding alone moves the masked model there; None where the tolerance was enough.
    ``is_unrounded``: the models only agree where activations keep real numbers in place of their codes.
    """

    distance: float
    rounding: float | None
    is_unrounded: bool = False


class Answers(Protocol):
    """Source of a model's outputs for one feed after the other: a session, or :class:`Recorded`."""

    def stream(self, feeds: Iterable[Mapping[str, Array]]) -> Iterator[list[Array]]:
        """Return the outputs for each feed in turn.

        Args:
            feeds: Arrays by input name, batch by batch.

        Returns:
            For each feed a list of outputs, in a fixed order.
        """
        ...


@dataclass(frozen=True, eq=False)
class Recorded:
    """Outputs that are known already, batch by batch: the feeds must be those that they were found for."""

    outputs: list[list[Array]]

    def stream(self, feeds: Iterable[Mapping[str, Array]]) -> Iterator[list[Array]]:  # noqa: ARG002
        """Return the recorded outputs.

        Args:
            feeds: The feeds that the outputs were computed for; not read.

        Returns:
            For each feed a list of outputs, in the order of the recording.
        """
        return iter(self.outputs)


@dataclass
class _Errors:
    """Running error of one floating output.

    ``lost``: infinities of the original in place of which stands an ordinary number. ``comparable``: both models gave
    arrays of one shape so far.
    """

    squared: float = 0.0
    scale: float = 0.0
    lost: int = 0
    comparable: bool = True

    def add(self, old: Array, new: Array) -> None:
        """Add a batch."""
        if old.shape != new.shape:
            self.comparable = False
            return
        a = old.astype(np.float64)
        b = new.astype(np.float64)
        known = np.isfinite(a)
        self.squared += float(np.square(a[known] - b[known]).sum())
        self.scale += float(np.square(a[known]).sum())
        self.lost += int((np.isinf(a) & ~_beyond(old, b)).sum())

    def relative(self) -> float | None:
        """The relative error; infinite where infinities were lost, None where nothing can be compared."""
        if not self.comparable:
            return None
        if self.lost:
            return float(np.inf)
        return float(np.sqrt(self.squared / self.scale)) if self.scale else None


def structure(proto: onnx.ModelProto) -> None:
    """Check that a model is valid ONNX with consistent shapes (gate 1).

    Args:
        proto: The pruned model.

    Raises:
        GateFailed: The checker of ONNX or its shape inference refuses the model.
    """
    try:
        onnx.checker.check_model(checkable(proto), full_check=True)
    except Exception as error:  # the checker raises several types
        text = str(error).strip().splitlines()[0][:300]
        raise GateFailed(f"the pruned model fails the ONNX checker: {text}.") from error


@contextmanager
def judged(model: Model) -> Iterator[None]:
    """Find out whether a failing operator rule is the fault of the model or of the rule.

    If a rule fails inside the block, the model is run once: if ONNX Runtime refuses it too, the model is at fault.

    Args:
        model: A model that has not run yet, whose operator rules the block applies.

    Raises:
        ModelError: A rule failed and the model does not run.
        RuleFailed: A rule failed although the model runs: the rule is wrong.
    """
    try:
        yield
    except RuleFailed as failed:
        try:
            Session(model.proto, "cpu", what="it").run(
                placeholder(model, 0, 1).feed(np.zeros(1, np.int64))
            )
        except ModelError as refused:
            raise ModelError(
                f"{failed.args[0]} has inputs or attributes that do not fit its operator: "
                f"{str(refused).rstrip('.')}; export the model again."
            ) from failed
        raise


def prove(
    model: Model,
    masked: onnx.ModelProto,
    cut: onnx.ModelProto,
    samples: Samples,
    batch_size: int,
    *,
    objective: Objective | None = None,
) -> Proof:
    """Check masked equivalence (gate 3): the cut model computes the same as the masked original.

    Every output is compared on its own. In front of a final sigmoid or softmax its input is compared too, because a
    saturated output would hide a wrong cut. Outputs made of decisions (ArgMax, NonMaxSuppression) jump where rounding
    decides; in their place, the tensors that the terms of the objective compare in front of them are compared.

    An output may differ by :func:`tolerance`. Where its values are small beside those that it is computed from, its
    rounding error exceeds that. It may then differ by ``ROUNDING`` times the change of the masked model's output when
    each weight is moved by one unit in the last place, the precision of the weights in the file. Where activations are
    quantised, rounding decides between two codes; the difference is due to it where the outputs agree if both models
    keep the real numbers in place of their codes (:func:`unrounded`).

    Args:
        model: The original.
        masked: The original with removed channels set to zero at their consumers.
        cut: The model after surgery, before refit.
        samples: Samples to compare on.
        batch_size: Samples of one run.
        objective: Terms that replace outputs made of decisions; None to compare the outputs alone.

    Returns:
        The largest difference, and the rounding error that explains it where the tolerance is exceeded.

    Raises:
        GateFailed: An output differs by more than is allowed.

    Source:
        Backward error: Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 1.5.
    """
    names, most = _proved_tensors(model, objective)

    def session(proto: onnx.ModelProto, what: str) -> Session:
        """A session on the CPU: rounding must not depend on a provider's reduced precision."""
        compared = with_outputs(model, names, proto)
        return Session(compared, "cpu", what=what, exact=True, lean=True)

    reference = session(masked, "the masked model")
    found = differences(reference, session(cut, "the cut model"), samples, batch_size)
    worst = float(found.max(initial=0.0))
    rounding = None
    allowed = np.full(len(found), tolerance(model))
    if (np.isfinite(found) & (found > allowed) & (found <= most)).any():
        own = np.zeros(len(found))
        for draw in range(DRAWS):
            twin = session(rounded(model, masked, draw), "the masked model")
            own = np.maximum(own, differences(reference, twin, samples, batch_size))
        place = int(found.argmax())
        rounding = float(own[place])
        allowed = np.maximum(allowed, np.minimum(ROUNDING * own, most))
    if (found <= allowed).all():
        return Proof(worst, rounding)
    if np.isfinite(found).all():
        # A code of an activation near a tie may be another one, which moves all that is computed from it.
        masked_without_codes, cut_without_codes = unrounded(masked), unrounded(cut)
        if masked_without_codes is not None and cut_without_codes is not None:
            first = session(masked_without_codes, "the masked model")
            second = session(cut_without_codes, "the cut model")
            if (differences(first, second, samples, batch_size) <= tolerance(model)).all():
                return Proof(worst, worst, is_unrounded=True)
    place = int((found / allowed).argmax())
    explained = "" if rounding is None else f" and more than rounding explains ({own[place]:.0e})"
    raise GateFailed(
        f"the cut model differs from the masked original by {found[place]:.2e} of the scale of '{names[place]}', "
        f"more than {tolerance(model):.0e}{explained}; nothing was written, please report this model."
    )


def _proved_tensors(model: Model, objective: Objective | None) -> tuple[list[str], Floats]:
    """Tensors that masked equivalence compares, and the most that rounding may explain of each (tensors,)."""
    terms = objective.judged if objective is not None else ()
    decided = {term.output for term in terms if term.decided}
    exact = {term.output for term in terms if term.kind == "exact"}
    names = [port.name for port in model.outputs if port.name not in decided - exact]
    names += [term.tensor for term in terms if term.decided]
    # The output of a saturating operator hides differences of large inputs: its input is compared too.
    makers = [producer_with(model, name, Trait.SATURATES) for name in names]
    sources = [node.inputs[0] for node in makers if node is not None]
    compared = list(dict.fromkeys([*names, *sources]))
    # Any rounding may be reported for an output that is proved at its source.
    most = np.full(len(compared), ROUNDING_MOST)
    most[[i for i, node in enumerate(makers) if node is not None]] = np.inf
    return compared, most


def same(
    model: Model,
    one: onnx.ModelProto,
    other: onnx.ModelProto,
    samples: Samples,
    batch_size: int,
) -> None:
    """Check that two forms of a pruned model compute the same.

    Args:
        model: The original.
        one: The form that is analysed.
        other: The form that is written.
        samples: Samples to compare on.
        batch_size: Samples of one run.

    Raises:
        GateFailed: An output differs by more than :func:`tolerance`.
    """
    names = [port.name for port in model.outputs]
    analysed, written = (
        Session(with_outputs(model, names, proto), "cpu", what="the pruned model", exact=True)
        for proto in (one, other)
    )
    found = float(differences(analysed, written, samples, batch_size).max(initial=0.0))
    if not found <= tolerance(model):
        raise GateFailed(
            f"the pruned model with its branches in their nodes differs by {found:.2e} of an output's scale from that "
            "without them; nothing was written, please report this model."
        )


def rounded(model: Model, proto: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """Copy a model with its weights moved by one unit in the last place, up or down at random.

    Args:
        model: The original, from which the weights of operators that multiply are found.
        proto: The model to copy.
        seed: Seed of the directions.

    Returns:
        The copy. Weights that would become infinite are unchanged.
    """
    weights = {
        name
        for node in model.nodes
        for name in node.inputs
        if (spec := lookup(node.domain, node.op, node.version)) is not None
        and spec.cost is not None
        and name in model.constants
        and model.constants[name].ndim > 1
        and model.dtypes[name].kind == "f"
    }
    rng = np.random.default_rng(seed)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    aside = bool(references(proto))
    for tensor in result.graph.initializer:
        if tensor.name in weights:
            value = array(tensor)
            step = float(np.finfo(value.dtype).eps) * rng.choice(
                np.asarray([-1, 1], np.int8), value.shape
            )
            moved = (value.astype(np.float64) * (1 + step)).astype(value.dtype)
            tensor.CopyFrom(stored(np.where(np.isfinite(moved), moved, value), tensor.name, aside))
    return result


def differences(
    reference: Session,
    other: Session,
    samples: Samples,
    batch_size: int,
) -> Floats:
    """Measure how far the outputs of two models differ.

    Args:
        reference: Session of the first model.
        other: Session of the other one, with the same outputs.
        samples: Samples to run on.
        batch_size: Samples of one run.

    Returns:
        For every output (outputs,) the largest absolute difference over the largest finite magnitude of the
        reference, over all samples. Infinite where shapes or integers differ, where only one side is NaN or infinite,
        and beside a reference of zeros.
    """
    worst = np.zeros(len(reference.outputs))
    largest = np.zeros(len(reference.outputs))
    for _, feed in samples.batches(batch_size):
        for i, (a, b) in enumerate(zip(reference.run(feed), other.run(feed), strict=True)):
            if a.shape != b.shape:
                worst[i] = np.inf
            elif is_float(a.dtype):
                gap, magnitude = _compared(a, b)
                # NaN loses every comparison: it must not slip through max()
                worst[i] = max(worst[i], gap) if np.isfinite(gap) else np.inf
                largest[i] = max(largest[i], magnitude)
            elif not np.array_equal(a, b):
                worst[i] = np.inf
    return np.divide(
        worst,
        largest,
        out=np.where(worst > 0, np.inf, 0.0),
        where=(largest > 0) & np.isfinite(worst),
    )


def tolerance(model: Model) -> float:
    """Return the largest difference allowed between the cut and the masked model.

    Args:
        model: The original.

    Returns:
        A share of the output's scale: ``TOLERANCE``, or ``TOLERANCE_HALF`` if an output is in half precision.
    """
    half = any(p.dtype.itemsize < 4 and is_float(p.dtype) for p in model.outputs)
    return TOLERANCE_HALF if half else TOLERANCE


def _compared(a: Array, b: Array) -> tuple[float, float]:
    """Largest difference of two arrays, and largest finite magnitude of the first.

    Equal infinities (a masked logit) do not differ. Large outputs are compared in blocks, as float64 takes more memory.
    """
    gap = largest = 0.0
    first, second = a.reshape(-1), b.reshape(-1)
    for start in range(0, first.size, BLOCK):
        x, y = (part[start : start + BLOCK].astype(np.float64) for part in (first, second))
        with np.errstate(invalid="ignore"):
            difference = np.abs(np.where(x == y, 0.0, x - y))
        gap = float(np.maximum(gap, difference.max()))  # NaN stays
        largest = max(largest, float(np.abs(x[np.isfinite(x)]).max(initial=0.0)))
    return gap, largest


def watched(model: Model, objective: Objective) -> list[str]:
    """Name the tensors that are compared.

    Args:
        model: The original.
        objective: Its terms.

    Returns:
        The graph outputs, then the other tensors that terms of the objective compare; each once.
    """
    return list(dict.fromkeys([*(port.name for port in model.outputs), *objective.tensors]))


def watch(
    model: Model,
    objective: Objective,
    device: str,
    proto: onnx.ModelProto | None = None,
    what: str = "the model",
) -> Session:
    """Open a model, or one made of it, for :func:`compare`.

    Args:
        model: The original.
        objective: The terms.
        device: Where the model runs.
        proto: A model made of the original, None for itself.
        what: Its name in messages.

    Returns:
        A session whose outputs are those of :func:`watched`.
    """
    names = watched(model, objective)
    made = model.proto if proto is None else proto
    own = names == [port.name for port in model.outputs]
    return Session(made if own else with_outputs(model, names, made), device, what=what)


def compare(
    model: Model,
    objective: Objective,
    before: Answers,
    after: Session,
    *,
    samples: Samples,
    batch_size: int,
    progress: Progress | None = None,
) -> Verification:
    """Compare a pruned model with its original on evaluation data.

    Args:
        model: The original.
        objective: Its terms, with their scales.
        before: Answers of the original: the tensors of :func:`watched`, in order.
        after: The pruned model, opened by :func:`watch`.
        samples: Evaluation samples.
        batch_size: Samples of one run.
        progress: Callback ``(stage, done, total)``.

    Returns:
        The measures of every term and the errors of the outputs, without the results of gates.
    """
    total = samples.usable()
    names = watched(model, objective)
    place = {name: i for i, name in enumerate(names)}
    tensors = [place[name] for name in objective.tensors]
    floating = [i for i, port in enumerate(model.outputs) if is_float(port.dtype)]
    errors = {i: _Errors() for i in dict.fromkeys(place[model.outputs[i].name] for i in floating)}
    measures = Measures(objective)
    batches, same = tee(samples.batches(batch_size))
    answers = before.stream(feed for _, feed in same)
    for (index, feed), old in zip(batches, answers, strict=True):
        new = after.run(feed, names)
        for i, error in errors.items():
            error.add(old[i], new[i])
        labels = None if samples.labels is None else samples.labels[index]
        measures.update([old[i] for i in tensors], [new[i] for i in tensors], labels)
        if progress:
            progress("verify", int(index[-1]) + 1, total)
    outputs = measures.results()
    first = _first_decisions(objective)
    decided = next((m.values for m in outputs if first and m.term == first.name), {})
    return Verification(
        masked_equivalence=None,
        output_relative_error=_worst(outputs, [error.relative() for error in errors.values()]),
        agreement=decided.get("agreement"),
        accuracy_before=decided.get("accuracy_before"),
        accuracy_after=decided.get("accuracy_after"),
        batches=(),
        samples=total,
        outputs=outputs,
        agreement_of=first.name if first else None,
    )


def user_metric(
    metric: Metric,
    model: Model,
    proto: onnx.ModelProto,
    *,
    samples: Samples,
    device: str,
    batch_size: int,
) -> MetricValues:
    """Measure the user's own metric of a pruned model and of its original.

    Args:
        metric: The metric; it remembers its value of the original.
        model: The original.
        proto: The pruned model.
        samples: Evaluation samples.
        device: Where the models run.
        batch_size: Samples of one run.

    Returns:
        Both values.

    Raises:
        DataError: The user's function failed, or returned no finite number.
    """

    def value(made: onnx.ModelProto) -> float:
        if metric.reads_model:
            return metric.of_model(made)
        session = Session(made, device)
        names = [port.name for port in model.outputs]
        runs = [session.run(feed, names) for _, feed in samples.batches(batch_size)]
        outputs = {n: _joined([run[i] for run in runs], samples) for i, n in enumerate(names)}
        labels = None if samples.labels is None else samples.labels[: samples.usable()]
        return metric.of_outputs(outputs, labels)

    if metric.original is None:
        metric.original = value(model.proto)
    return MetricValues(metric.name, metric.original, value(proto))


def _joined(values: list[Array], samples: Samples) -> Array | list[Array]:
    """Values of all feeds of an output along axis 0; a list of them where their shapes are unequal.

    Where axis 0 of the output counts no samples, as that of a recurrent state, the feeds are stacked along a new one.
    """
    counts_samples = all(value.ndim for value in values) and (
        sum(map(len, values)) == samples.usable()
    )
    if not samples.whole and counts_samples:
        return np.concatenate(values)
    return np.stack(values) if len({value.shape for value in values}) == 1 else values


def _worst(outputs: Sequence[Measure], errors: Sequence[float | None]) -> float | None:
    """The largest relative error of the outputs, or where none can be compared that of the terms."""
    known = [error for error in errors if error is not None]
    if not known:
        found = (measure.values.get("relative_error") for measure in outputs)
        known = [error for error in found if error is not None]
    return max(known, key=lambda error: np.inf if np.isnan(error) else error, default=None)


def _first_decisions(objective: Objective) -> Term | None:
    """The term whose decisions are reported, if any: labelled terms first, then classes, scores and binary."""
    kinds = ("classes", "ambiguous", "binary")
    decided = [term for term in objective.judged if term.kind in kinds]
    return min(decided, key=lambda t: (not t.labelled, kinds.index(t.kind)), default=None)


def _beyond(old: Array, new: Floats) -> Bools:
    """Mask of values of ``new`` beyond half the largest number of the type of ``old``, with the same sign."""
    most = float(finfo(old.dtype).max)  # type: ignore[no-untyped-call]
    return np.asarray(np.sign(old.astype(np.float64)) * new >= most / 2)


def runs_at(
    model: Model,
    session: Session,
    samples: Samples,
    before: Callable[[], Session] | None = None,
) -> tuple[int, ...]:
    """Run the pruned model at the batch sizes that its input allows (gate 2).

    Args:
        model: The original.
        session: The pruned model, opened by :func:`watch`.
        samples: Samples to run on.
        before: Opens the original. Called only if an output holds NaN or infinity, to see whether the original's does
            too; None to refuse all of them.

    Returns:
        Batch sizes that ran: 1 and 2, or the fixed one of the model.

    Raises:
        GateFailed: An output has the wrong length, or NaN or infinity where the original has a number.
    """
    sizes = [1] if samples.whole else [samples.fixed_batch] if samples.fixed_batch else [1, 2]
    for size in sizes:
        assert size is not None
        index = np.arange(size, dtype=np.int64) % samples.count
        feed = samples.feed(index)
        names = [port.name for port in model.outputs]
        outputs = session.run(feed, names)
        sound = all(np.isfinite(v).all() for v in outputs if is_float(v.dtype))
        truths = before().run(feed, names) if before and not sound else [None] * len(outputs)
        for port, value, truth in zip(model.outputs, outputs, truths, strict=True):
            if not samples.whole and _leads_with_batch(model, samples, port) and len(value) != size:
                raise GateFailed(
                    f"the pruned model gives {len(value)} rows in '{port.name}' for a batch of {size}."
                )
            if is_float(value.dtype) and not _sound(value, truth):
                raise GateFailed(f"the pruned model gives NaN or infinity in '{port.name}'.")
    return tuple(s for s in sizes if s is not None)


def _sound(value: Array, truth: Array | None) -> bool:
    """Check that all values are numbers, or the very infinities of the original (classes that are ruled out)."""
    found = value.astype(np.float64)
    same = (
        False if truth is None or truth.shape != value.shape else (truth == value) | np.isnan(truth)
    )
    return bool((np.isfinite(found) | same).all())


def numbers(model: Model, found: Verification) -> None:
    """Check that the outputs of the pruned model are finite wherever those of the original are.

    Args:
        model: The original.
        found: The comparison of both models on the evaluation data.

    Raises:
        GateFailed: They are not.
    """
    error = found.output_relative_error
    if error is not None and not np.isfinite(error):
        raise GateFailed(
            "on the evaluation data the outputs of the pruned model hold NaN or infinity where there are numbers "
            f"in those of {model.path}, or the other way round; nothing was written, ask for less, or prune in float32."
        )


def _leads_with_batch(model: Model, samples: Samples, port: Port) -> bool:
    """True if axis 0 of an output has the symbol of the batch of the first input that has one."""
    for source in model.inputs:
        axis = samples.layouts[source.name].axis
        if axis is not None and source.dims:
            same_dim = bool(port.dims) and port.dims[0] == source.dims[axis]
            return same_dim and symbol(port, 0) == symbol(source, axis)
    return False
