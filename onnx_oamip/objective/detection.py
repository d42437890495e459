"""The objective of a model, from its structure, the labels of its data and what the user says.

What the structure leaves open is never guessed in silence: raw floats [N, K] without labels get the kind ``ambiguous``
(their loss is the worse of class divergence and squared error), and every assumption is a note that names the option
which says otherwise. Labels make classes (whole numbers below the number of classes), binary terms (zeros and ones) or
values (floats). The user's choice goes before both.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from onnx_oamip.core.errors import DataError, SettingsError
from onnx_oamip.core.records import Array, Model
from onnx_oamip.core.records.objective import (
    CHOICES,
    Kind,
    Objective,
    Term,
)
from onnx_oamip.graph.ops import kinds
from onnx_oamip.graph.ops.compositions import normalised, sigmoid
from onnx_oamip.objective.structure import Graph
from onnx_oamip.objective.tails import Tails

DECISIONS = 2.25
"""Weight of decisions beside values. Both cost 1 where the average answer is given; but a decision is right or wrong,
and a box that is a little off is still a box."""
BOX = 4
"""Coordinates of a box."""
ORDER: tuple[Kind, ...] = ("classes", "binary", "ambiguous", "values")
"""Kinds in the order in which labels look for their term."""


def detect(
    model: Model,
    labels: Array | None = None,
    task: str | None = None,
    outputs: Mapping[str, tuple[str, float]] | None = None,
    *,
    in_source: int | None = None,
) -> Objective:
    """Find the terms by which a pruned model is judged.

    Args:
        model: The original.
        labels: Labels of the data, samples along axis 0: classes, zeros and ones, or floats.
        task: The kind of the model's output (``--task``), for models with one output to decide about.
        outputs: (kind, weight) by name of an output, or of a term (``--output``).
        in_source: Number of samples in the data that the labels are a part of, for messages. Default: that of labels.

    Returns:
        The objective without scales (``normaliser.Normaliser`` finds them).

    Raises:
        SettingsError: ``task`` or ``outputs`` name no output, or a kind that it cannot have.
        DataError: A label is no class of the term that the labels belong to, or labels of floats or of several axes
            fit no term.
    """
    chosen = dict(outputs or {})
    tails = Tails(Graph(model))
    terms, notes = _of_outputs(tails, chosen)
    known = {name for term in terms for name in (term.name, term.output)}
    known |= {port.name for port in model.outputs}
    for name in chosen:
        if name not in known:
            have = ", ".join(f"'{port.name}'" for port in model.outputs)
            raise SettingsError(
                f"`outputs` names '{name}', but the outputs of {model.path or 'the model'} are {have}."
            )
    terms = [
        _as_chosen(tails, term, chosen[term.name]) if _by_part(term, chosen) else term
        for term in terms
    ]
    if task is not None:
        terms = _with_task(tails, terms, task)
    if labels is not None:
        shape = (len(labels) if in_source is None else in_source, *labels.shape[1:])
        terms, note = _labelled(tails, terms, labels, shape)
        notes += note
    assumed = _with_assumptions(tails, terms)
    terms, more = _without_repetitions([_by_state(tails.graph, term) for term in assumed])
    if (
        terms
        and all(term.kind == "ignore" for term in terms)
        and any(term.source == "user" for term in terms)
    ):
        raise SettingsError(
            "every output is ignored, so nothing could be measured; leave one of `outputs` out."
        )
    terms = _weighted(terms)
    assumptions = (term.assumption for term in terms if term.assumption)
    return Objective(tuple(terms), tuple(dict.fromkeys((*notes, *more, *assumptions))))


def _of_outputs(
    tails: Tails, chosen: Mapping[str, tuple[str, float]]
) -> tuple[list[Term], list[str]]:
    """(terms of all outputs, notes)."""
    graph = tails.graph
    terms = []
    notes = []
    for name in dict.fromkeys(port.name for port in graph.model.outputs):
        whole = Term(name, name, name, "ignore", graph.channel_axis(name))
        if name in graph.given or graph.constant(name) is not None:
            if name in graph.given:
                what = "an input of the model"
            else:
                what = "a constant"
            terms.append(whole)
            notes.append(
                f"output '{name}' is {what}, which pruning does not change: it is not measured"
            )
        elif name in chosen:
            terms.append(_as_chosen(tails, whole, chosen[name]))
        else:
            terms += _of_output(tails, name)
    return terms, notes


def _of_output(tails: Tails, name: str) -> list[Term]:
    """The terms of one output by structure."""
    found = tails.terms(name)
    if not found:
        note = (
            f"output '{name}' comes from no floating tensor that can be found, so it is compared for equality; "
            f"leave it out with `outputs={name}=ignore`"
        )
        return [Term(name, name, name, "exact", assumption=note)]
    alone = len(found) == 1
    note = ""
    if not alone and all(term.kind == "values" and not term.decided for term in found):
        note = _otherwise(
            f"output '{name}' joins {len(found)} branches, which are taken for values",
            replace(found[0], output=name),
            "classes",
        )
    return [
        replace(
            term,
            name=name if alone else f"{name}/{_short(term)}",
            output=name,
            assumption=term.assumption or note,
        )
        for term in found
    ]


def _short(term: Term) -> str:
    if term.part is None:
        return term.tensor
    return f"{term.tensor}{term.part}"


def at_outputs(
    model: Model,
    objective: Objective,
    missing: Collection[str],
) -> Objective:
    """Read terms at their outputs where another file of the model lacks the tensors in front of them.

    Args:
        model: The original.
        objective: Terms without scales.
        missing: Tensors that the other file does not have.

    Returns:
        The objective with one term for every output that lost a tensor, and a note about it.
    """
    lost = {t.output: t for t in objective.judged if t.tensor in missing}
    if not lost:
        return objective
    graph = Graph(model)
    terms = [t for t in objective.terms if t.output not in lost]
    for name, old in lost.items():
        alone = sum(t.output == name for t in objective.terms) == 1
        kind: Kind = old.kind if alone else "values"
        if not graph.floating(name):
            kind = "exact"
        same = replace(old, kind=kind, part=None, form="auto", threshold=None, tail="")
        whole = replace(same, name=name, tensor=name, axis=graph.channel_axis(name), stacked=())
        terms.append(_by_state(graph, whole))
    named = ", ".join(f"'{name}'" for name in lost)
    note = f"{named} is compared as it is: the other model has no tensor of the name in front of it"
    return replace(objective, terms=tuple(terms), notes=(*objective.notes, note))


# ------------------------------------------------------------------------------------------------------ user's choice


def _by_part(term: Term, chosen: Mapping[str, tuple[str, float]]) -> bool:
    return term.name in chosen and term.output not in chosen


def _as_chosen(tails: Tails, term: Term, choice: tuple[str, float]) -> Term:
    """A term with the kind and the weight that the user stated."""
    kind, weight = choice
    if kind not in CHOICES:
        raise SettingsError(f"`outputs={term.name}={kind}`: the kinds are {', '.join(CHOICES)}.")
    if not (math.isfinite(weight) and weight > 0):
        raise SettingsError(
            f"`outputs={term.name}={kind}:{weight:g}`: a weight is a number above 0."
        )
    return replace(
        _of_kind(tails, term, kind, f"`outputs={term.name}={kind}`"), weight=float(weight)
    )


def _of_kind(
    tails: Tails,
    term: Term,
    kind: str,
    option: str,
) -> Term:
    """A term turned into another kind. Raises SettingsError where it cannot be one."""
    plain = replace(
        term,
        kind="ignore",
        source="user",
        assumption="",
        form="auto",
        threshold=None,
        tail="",
        fill=tails.fill(term.tensor) if kind == "values" else None,
    )
    if kind == "ignore":
        return plain
    if term.name == term.output:
        found = tails.terms(term.tensor)
    else:
        found = [term]
    same = [t for t in found if t.kind == kind]
    if len(same) == 1 == len(found):
        return replace(
            same[0],
            name=term.name,
            output=term.output,
            weight=term.weight,
            source="user",
        )
    floats = tails.graph.floating(term.tensor)
    # Decisions made from one tensor of floats.
    if not floats and len(found) == 1:
        plain = replace(
            plain,
            tensor=found[0].tensor,
            axis=found[0].axis,
            part=found[0].part,
            decided=found[0].decided,
        )
        floats = True
    if not floats:
        raise SettingsError(
            f"{option} does not fit: '{term.name}' holds {_type(tails.graph.model, term.output)} and comes from no "
            "single floating tensor; leave it out, or say ignore."
        )
    if kind in ("classes", "embedding") and plain.axis is None:
        plain = replace(plain, axis=_positions(tails, plain))
    columns = _columns(tails, plain)
    if kind in ("classes", "embedding") and columns is not None and columns < 2:
        what = "classes" if kind == "classes" else "vectors"
        raise SettingsError(
            f"{option} does not fit: '{term.name}' has one column, and {what} need at least two."
        )
    return replace(plain, kind=kind)  # type: ignore[arg-type]


def _type(model: Model, name: str) -> str:
    return next((port.dtype.name for port in model.outputs if port.name == name), "no floats")


def _columns(tails: Tails, term: Term) -> int | None:
    lengths = tails.graph.lengths(term.tensor)
    if lengths is None:
        return None
    if term.axis is None or term.axis >= len(lengths):
        return 1
    if term.part and term.part.axis == term.axis:
        return term.part.stop - term.part.start
    return lengths[term.axis]


def _positions(tails: Tails, term: Term) -> int | None:
    """The last axis of a tensor of one column, where it counts positions; None where it has no such axis."""
    shape = tails.graph.shape(term.tensor) or ()
    last = len(shape) - 1
    return last if last > 0 and shape[last] > 1 else None


def _with_task(tails: Tails, terms: list[Term], task: str) -> list[Term]:
    """The terms where ``--task`` gives the kind of what the structure leaves open, or of the only output."""
    kinds = [kind for kind in CHOICES if kind != "ignore"]
    if task not in kinds:
        raise SettingsError(f"`task={task}`: the tasks are {', '.join(kinds)}.")
    free = [t for t in terms if t.kind != "ignore" and t.source != "user"]
    outputs = {t.output for t in free}
    if not free and any(t.source == "user" for t in terms):
        raise SettingsError(
            f"`task={task}` and `outputs` both state what the outputs hold; leave one of the two out."
        )
    if len(outputs) == 1:
        name = next(iter(outputs))
        whole = Term(name, name, name, "ignore", tails.graph.channel_axis(name))
        return [
            *(t for t in terms if t.output != name),
            _of_kind(tails, whole, task, f"`task={task}`"),
        ]
    decided = any(t.kind in ("classes", "binary") for t in free)
    vectors = task in ("classes", "embedding")
    ambiguous = [
        t for t in free if t.kind == "ambiguous" and not (vectors and _columns(tails, t) == 1)
    ]
    if decided or not ambiguous:
        raise SettingsError(
            f"`task={task}` does not say which of the model's {len(outputs)} outputs it is about; "
            "give `outputs`."
        )
    option = f"`task={task}`"
    return [_of_kind(tails, t, task, option) if t in ambiguous else t for t in terms]


# ------------------------------------------------------------------------------------------------------------- labels


def _labelled(
    tails: Tails,
    terms: list[Term],
    labels: Array,
    shape: tuple[int, ...],
) -> tuple[list[Term], list[str]]:
    """(terms, notes) where the labels belong to the first term that they fit.

    Args:
        tails: The ends of the network.
        terms: All terms.
        labels: Labels of some samples.
        shape: Shape of the labels of all samples, for messages.
    """
    wrong: Term | None = None
    for kind in ORDER:
        for place, term in enumerate(terms):
            if term.kind != kind:
                continue
            fitting = _fit(tails, term, labels)
            if fitting is not None:
                return [*terms[:place], fitting, *terms[place + 1 :]], []
            if kind == "ambiguous" and _bits(labels) and _one_number(tails, term, labels):
                raise DataError(
                    f"'labels' of shape {shape} may be independent decisions or classes marked by a 1 for the "
                    f"raw output '{term.output}'; give one class per sample, or `outputs={term.output}=binary`."
                )
            if (
                kind in ("classes", "ambiguous")
                and _whole(labels)
                and _one_class(tails, term, labels)
            ):
                wrong = wrong or term
    if wrong is not None:
        raise DataError(
            f"'labels' has the class {int(labels.max())}, but the model's output '{wrong.output}' has "
            f"{_columns(tails, wrong)} classes, which count from 0."
        )
    if not _whole(labels) or sum(length != 1 for length in labels.shape[1:]):
        raise DataError(
            f"'labels' is {labels.dtype} of shape {shape}, which fits no output of the model; expected "
            "integers, one class per sample (or per position); zeros and ones, one per binary decision; or floats, "
            "one per value."
        )
    return terms, [f"labels of shape {shape} fit no output of the model and are not used"]


def _fit(tails: Tails, term: Term, labels: Array) -> Term | None:
    """The term that the labels make of this one, None where they do not fit."""
    columns = _columns(tails, term)
    bits = _bits(labels)
    kind: Kind | None = None
    if not _whole(labels):
        fits = term.kind in ("ambiguous", "values") and _one_number(tails, term, labels)
        kind = "values" if fits else None
    elif (
        bits
        and term.kind != "classes"
        and _one_number(tails, term, labels)
        and (columns == 1 or (labels.ndim > 1 and term.kind != "ambiguous"))
    ):
        kind = "binary"
    elif (
        term.kind != "values"
        and columns is not None
        and columns > 1
        and _one_class(tails, term, labels)
    ):
        if labels.min(initial=0) >= 0 and labels.max(initial=0) < columns:
            kind = "classes"
        else:
            kind = None
    if kind is None or (term.source == "user" and term.kind != kind):
        return None
    form = term.form if term.kind == kind else "auto"
    source = term.source if term.kind == kind else "labels"
    return replace(
        term,
        kind=kind,
        labelled=True,
        form=form,
        source=source,
        assumption="",
        balanced=term.balanced and kind != "classes",
    )


def _whole(labels: Array) -> bool:
    return labels.dtype.kind in "iub"


def _bits(labels: Array) -> bool:
    return _whole(labels) and bool(np.isin(labels, (0, 1)).all())


def _one_class(tails: Tails, term: Term, labels: Array) -> bool:
    """Check for one label for every decision of a sample."""
    lengths = tails.graph.lengths(term.tensor)
    if lengths is None or term.axis is None or term.part is not None:
        return False
    if _is_over_samples(tails.graph, term):
        return False
    return _per_sample(labels, tuple(n for axis, n in enumerate(lengths) if axis != term.axis))


def _one_number(tails: Tails, term: Term, labels: Array) -> bool:
    """Check for one label for every number of a sample."""
    lengths = tails.graph.lengths(term.tensor)
    return lengths is not None and term.part is None and _per_sample(labels, lengths)


def _per_sample(labels: Array, lengths: tuple[int | None, ...]) -> bool:
    """Check that labels have these lengths behind their samples; those of 1 do not count. Or one whole feed each."""
    given = tuple(n for n in labels.shape[1:] if n != 1)
    return given in (tuple(n for n in lengths[1:] if n != 1), tuple(n for n in lengths if n != 1))


# -------------------------------------------------------------------------------------------------------- assumptions


def _with_assumptions(tails: Tails, terms: list[Term]) -> list[Term]:
    """The terms with an assumption in place of every kind that the structure leaves open."""
    terms = [_as_box(tails, term, terms) for term in terms]
    decided = any(
        t.kind in ("classes", "binary")
        and t.source != "labels"
        and not tails.graph.feeds_a_layer(t.output)
        for t in terms
    )
    open_maps = [
        t for t in terms if t.kind == "ambiguous" and (tails.graph.rank(t.tensor) or 0) > 3
    ]
    result = []
    for term in terms:
        if term.kind == "ambiguous" and term.source != "user":
            result.append(_assumed_kind(tails, term, decided, len(open_maps) > 1))
        elif (
            term.kind == "binary"
            and term.source == "structure"
            and tails.graph.like_an_input(term.output)
        ):
            note = f"output '{term.output}' has the shape of an input picture: its sigmoid gives values, not decisions"
            values = _behind_sigmoid(tails, term)
            result.append(replace(values, assumption=_otherwise(note, term, "binary")))
        else:
            result.append(term)
    return result


def _as_box(tails: Tails, term: Term, terms: list[Term]) -> Term:
    """A term of values in place of four sigmoids for every position that other terms score."""
    if not _is_box_like(tails, term):
        return term
    positions = _positions_shape(tails, term)
    others = [
        other
        for other in terms
        if other is not term
        and other.kind in ("classes", "binary", "ambiguous")
        and _positions_shape(tails, other) == positions
    ]
    if not others or any(_is_box_like(tails, other) for other in others):
        return term
    note = f"the four sigmoids of '{term.name}' are taken for boxes, as other numbers score the same positions"
    values = _behind_sigmoid(tails, term)
    return replace(values, assumption=f"{note}; `outputs={term.output}=binary` says otherwise")


def _is_box_like(tails: Tails, term: Term) -> bool:
    """Test for a sigmoid of four columns over positions of one axis."""
    rank = tails.graph.rank(term.tensor)
    is_sigmoid = term.kind == "binary" and term.form == "logits" and term.source == "structure"
    return is_sigmoid and rank == 3 and _columns(tails, term) == BOX


def _positions_shape(tails: Tails, term: Term) -> tuple[int, ...]:
    """Lengths of the axes of a term but that of its columns."""
    shape = tails.graph.shape(term.tensor) or ()
    return tuple(length for axis, length in enumerate(shape) if axis != term.axis)


def _assumed_kind(
    tails: Tails,
    term: Term,
    decided: bool,
    several_maps: bool,
) -> Term:
    """Kind that is assumed for raw floats."""
    reason = _why_values(tails, term, decided, several_maps)
    known = tails.graph.lengths(term.tensor) or (None, None)
    lengths = ["?" if length is None else str(length) for length in known]
    if tails.graph.counts_samples(term.tensor):
        lengths[0] = "N"
    shape = ", ".join(lengths)
    if reason is None:
        note = (
            f"output '{term.output}' [{shape}] may hold class scores or values: the loss takes the worse of class "
            f"divergence and squared error; `outputs={term.output}=classes` or `outputs={term.output}=values` decides"
        )
        return replace(term, assumption=note)
    note = f"output '{term.output}' [{shape}] is taken for values, {reason}"
    columns = _columns(tails, term)
    if columns is not None and columns < 2:
        note = _otherwise(note, term, "binary")
        if tails.graph.rank(term.tensor) == 2 and _positions(tails, term) is not None:
            note += f", or `outputs={term.output}=classes` where one of the positions is chosen"
        return replace(_as_values(term), assumption=note)
    return replace(_as_values(term), assumption=_otherwise(note, term, "classes"))


def _why_values(
    tails: Tails,
    term: Term,
    decided: bool,
    several_maps: bool,
) -> str | None:
    """Reason that raw floats are no class scores; None where they may be."""
    graph = tails.graph
    columns = _columns(tails, term)
    rank = graph.rank(term.tensor)
    if rank is None or columns is None:
        return "as the number of its columns is not known"
    if columns < 2 or term.axis is None or _is_over_samples(graph, term):
        return "as it has one column"
    if decided:
        return "as another output holds decisions"
    if graph.feeds_a_layer(term.output):
        return "as further layers read it"
    if (behind := graph.trace(term.tensor).node) is not None and behind.op in kinds.NOT_SCORES:
        return f"as it ends in {behind.op}"
    if behind is not None and normalised(graph, behind):
        return "as it ends in a normalisation"
    if graph.state_axis(term.tensor) is not None:
        return "as it holds states of recurrent layers"
    if rank > 3 and several_maps:
        return "as there are several maps"
    if graph.like_an_input(term.output):
        return "as it has the shape of an input picture"
    return None


def _is_over_samples(graph: Graph, term: Term) -> bool:
    """Test for classes or columns along the axis of the samples."""
    return term.axis == 0 and graph.counts_samples(term.tensor)


def _by_state(graph: Graph, term: Term) -> Term:
    """A term whose directions and layers of a recurrent state are columns: one row per sample, not one for each."""
    if term.kind not in ("values", "embedding") or term.axis is None or term.part is not None:
        return term
    axis = graph.state_axis(term.tensor)
    return term if axis in (None, term.axis) else replace(term, stacked=(axis,))


def _as_values(term: Term) -> Term:
    return replace(term, kind="values", form="auto", threshold=None)


def _behind_sigmoid(tails: Tails, term: Term) -> Term:
    """A term of values that a sigmoid gives, in place of decisions by its logits."""
    values = _as_values(term)
    for node in tails.graph.readers.get(term.tensor, ()):
        if sigmoid(tails.graph, node) == term.tensor:
            return replace(values, tensor=node.outputs[0])
    return values


def _otherwise(note: str, term: Term, kind: str) -> str:
    return f"{note}; `outputs={term.output}={kind}` says otherwise"


def _weighted(terms: list[Term]) -> list[Term]:
    """The terms where decisions beside values count ``DECISIONS`` times, unless the user gave their weight."""
    kinds_there = {term.kind for term in terms}
    if not kinds_there & {"classes", "binary"} or not kinds_there & {"values", "embedding"}:
        return terms
    return [
        replace(term, weight=DECISIONS)
        if term.kind in ("classes", "binary") and term.source != "user"
        else term
        for term in terms
    ]


def _without_repetitions(terms: list[Term]) -> tuple[list[Term], list[str]]:
    """(terms, notes) with every slice of a tensor measured once, by its structure where one output has any."""
    found: dict[object, Term] = {}
    notes = []
    for i, term in enumerate(terms):
        if term.kind == "ignore":
            found[i] = term
            continue
        key = (term.tensor, term.part)
        known = found.get(key)
        if known is None:
            found[key] = term
            continue
        if known.output != term.output:
            notes.append(
                f"output '{term.output}' is measured with '{known.output}', which holds the same numbers"
            )
        better = _rank(term) < _rank(known)
        found[key] = term if better else known
    return list(found.values()), notes


def _rank(term: Term) -> tuple[bool, bool, int]:
    """Smaller where more is known about a term."""
    return (
        term.source != "user",
        not term.labelled,
        1 if term.kind in ("ambiguous", "values", "exact") else 0,
    )
