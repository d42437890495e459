"""Terms of a model's outputs, found by looking through the operators at the ends of the graph.

A float tensor is read by ``explain``: what a softmax or sigmoid reads, unit vectors, the parts of a Concat, or the
tensor itself. Decisions (integers, booleans, and floats that depend on them, whose number may differ by sample) are
read by ``decide``: the tensors in front of ArgMax, TopK, NonMaxSuppression and comparisons. What ``explain`` knows
nothing about has the kind ``ambiguous`` for the moment: it may hold class scores or values (``detection`` settles it).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_oamip.core.records import Node
from onnx_oamip.core.records.objective import Form, Kind, Term
from onnx_oamip.graph.ops import Trait, domains, has, kinds
from onnx_oamip.graph.ops.compositions import mask_fill, mixture, sigmoid, softmax, unit_vectors
from onnx_oamip.objective.structure import DEPTH, Graph, Origin

OPEN: tuple[Kind, ...] = ("ambiguous", "values")


@dataclass
class Tails:
    """Reader of the ends of a graph."""

    graph: Graph
    boxes: frozenset[str] = field(init=False)
    """Tensors that a NonMaxSuppression takes for boxes, and those they are views of."""
    _decisive: dict[str, bool] = field(default_factory=dict)
    _learnt: dict[str, bool] = field(default_factory=dict)
    _probable: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        suppressed = [
            n
            for n in self.graph.model.nodes
            if n.op == "NonMaxSuppression" and n.domain in domains.STANDARD
        ]
        self.boxes = frozenset(
            name for n in suppressed for name in self.graph.trace(n.inputs[0]).seen
        )

    def terms(self, tensor: str) -> list[Term]:
        """Find the terms of a graph output.

        Args:
            tensor: Name of the output. If it is an integer or depends on decisions, the terms are the floating-point
                tensors that the decisions are made from.

        Returns:
            The terms; empty if no such tensor can be reached.
        """
        if self.graph.floating(tensor) and not self.decisive(tensor):
            return self.explain(tensor)
        found = self.decide(tensor, set(), 0)
        settled = (replace(t, kind="values") if t.kind == "ambiguous" else t for t in found)
        return [replace(term, decided=True) for term in _distinct(settled)]

    # -------------------------------------------------------------------------------------------------------- floats

    def explain(self, tensor: str) -> list[Term]:
        """Find the terms of a floating-point tensor that depends on no decision.

        Args:
            tensor: Its name.

        Returns:
            The terms of the first rule that recognises the operators in front of it; else one ambiguous term.
        """
        origin = self.graph.trace(tensor)
        boxes = next((name for name in origin.seen if name in self.boxes), None)
        if boxes is not None:
            return [self._term(boxes, "values", tail="boxes of NonMaxSuppression")]
        node = origin.node
        if node is not None:
            rules = (
                self._classes,
                self._binary,
                self._embedding,
                self._concat,
                self._reduced,
                self._branch,
                self._probabilities,
            )
            for rule in rules:
                if found := rule(origin, node):
                    return found
        while (copy := self.graph.maker(tensor)) is not None and has(copy, Trait.COPIES):
            tensor = copy.inputs[0]
        return [self._term(tensor, "ambiguous")]

    def _term(
        self,
        tensor: str,
        kind: Kind,
        axis: int | None = None,
        form: Form = "auto",
        tail: str = "",
    ) -> Term:
        if axis is None:
            place = self.graph.channel_axis(tensor)
        else:
            place = axis
        masked = self.fill(tensor) if kind in OPEN else None
        return Term("", "", tensor, kind, place, form=form, tail=tail, fill=masked)

    def fill(self, tensor: str) -> float | None:
        """Find the number that a mask puts into a tensor, or adds to it.

        Args:
            tensor: Name of a floating-point tensor.

        Returns:
            The number, such as -1e9; None where no mask of large numbers is applied.
        """
        node = self.graph.trace(tensor).node
        return None if node is None else mask_fill(self.graph, node, self.learnt)

    def _classes(self, origin: Origin, node: Node) -> list[Term]:
        found = softmax(self.graph, node)
        if found is None:
            return []
        logits, axis = found
        term = self._term(
            logits,
            "classes",
            axis,
            "logits",
            f"{_called(node, 'Softmax')} over axis {axis}",
        )
        # A slice of the classes is decided by all of them.
        whole = origin.part is None or origin.part.axis == axis
        return [term if whole else replace(term, part=origin.part)]

    def _binary(self, origin: Origin, node: Node) -> list[Term]:
        logits = sigmoid(self.graph, node)
        if logits is not None:
            found = self._term(logits, "binary", form="logits", tail=_called(node, "Sigmoid"))
            return [replace(found, part=origin.part)]
        if node.op == "HardSigmoid":
            found = self._term(origin.tensor, "binary", form="probabilities", tail=node.op)
            return [replace(found, part=origin.part)]
        if (
            node.op == "Sub"
            and self.graph.number(node.inputs[0]) == 1
            and self.probable(node.inputs[1])
        ):
            return self.explain(node.inputs[1])  # 1 - p decides as p does
        return []

    def _embedding(self, origin: Origin, node: Node) -> list[Term]:
        found = unit_vectors(self.graph, node)
        if found is None:
            return []
        vectors, axis = found
        if origin.part is None or origin.part.axis != axis:
            part = origin.part
        else:
            part = None
        term = self._term(vectors, "embedding", axis, tail=_called(node, "division by the length"))
        return [replace(term, part=part)]

    def _concat(self, origin: Origin, node: Node) -> list[Term]:
        """The parts of a Concat where one is more than a plain tensor, or they come from branches; else none."""
        if node.op != "Concat" or origin.part is not None:
            return []
        computed = [
            name
            for name in node.inputs
            if self.graph.constant(name) is None and name not in self.graph.given
        ]
        found = [self.explain(name) for name in computed]
        are_plain = all(len(terms) == 1 and terms[0].kind == "ambiguous" for terms in found)
        if are_plain and not self._joins_branches(node, computed):
            return []
        axis = int(node.attrs.get("axis", 0)) % (self.graph.rank(node.outputs[0]) or 1)
        tail = f"Concat along axis {axis}"
        result = []
        for name, terms in zip(computed, found, strict=True):
            for term in terms:
                if term.kind == "ambiguous":  # beside decisions: boxes, offsets, landmarks
                    values = self._term(name, "values", tail=tail)
                    is_map = (self.graph.rank(name) or 0) > 2
                    # Coordinates that are joined with scores are columns, also if one channel became all of them.
                    result.append(
                        replace(values, axis=axis) if values.axis is None and is_map else values
                    )
                else:
                    result.append(replace(term, tail=", ".join(filter(None, (term.tail, tail)))))
        return _distinct(result)

    def _joins_branches(self, node: Node, parts: list[str]) -> bool:
        """Test for columns over positions that several branches give, such as raw boxes and scores of a detector.

        Parts of one large layer, as some exporters cut it, read the same tensor, and are joined as they are.
        """
        rank = self.graph.rank(node.outputs[0]) or 0
        axis = int(node.attrs.get("axis", 0)) % max(rank, 1)
        if rank < 3 or axis != self.graph.channel_axis(node.outputs[0]):
            return False
        read = set()
        for name in parts:
            layer = self.graph.maker(name)
            read.add(layer.inputs[0] if layer is not None and self.graph.heavy(layer) else name)
        return len(read) == len(parts) > 1

    def _reduced(self, origin: Origin, node: Node) -> list[Term]:  # noqa: ARG002
        """Terms of the probabilities of which a node takes the largest: all of them decide which it is."""
        if node.op not in ("ReduceMax", "TopK") or not self.probable(node.inputs[0]):
            return []
        return [
            replace(term, tail=f"{term.tail}, {node.op}") for term in self.explain(node.inputs[0])
        ]

    def _probabilities(self, origin: Origin, node: Node) -> list[Term]:
        """Products and other combinations of probabilities."""
        classes = mixture(self.graph, origin.tensor)
        if classes is not None:
            described = f"{node.op} of class probabilities"
            term = self._term(origin.tensor, "classes", classes, tail=described)
            return [replace(term, part=origin.part)]
        if not self.probable(origin.tensor):
            return []
        term = self._term(
            origin.tensor,
            "binary",
            form="probabilities",
            tail=f"{node.op} of probabilities",
        )
        return [replace(term, part=origin.part)]

    def _branch(self, origin: Origin, node: Node) -> list[Term]:
        """One term for the output of an If whose branches all end in classes or embeddings, measured at that output."""
        found = [self.explain(name) for name in self.graph.branches(origin.tensor)]
        kinds = {(term.kind, term.axis) for terms in found for term in terms}
        if len(kinds) != 1 or any(len(terms) != 1 for terms in found):
            return []
        kind, axis = kinds.pop()
        if kind not in ("classes", "embedding"):
            return []
        return [replace(self._term(origin.tensor, kind, axis, tail=node.op), part=origin.part)]

    def probable(self, tensor: str, depth: int = 0) -> bool:
        """Check by structure whether a tensor holds probabilities.

        Args:
            tensor: Its name.
            depth: Steps taken so far, up to ``DEPTH``.

        Returns:
            True if it is made by a softmax or a sigmoid, also through operators that keep probabilities.
        """
        if tensor not in self._probable:
            self._probable[tensor] = False
            origin = self.graph.trace(tensor)
            if origin.node is not None and depth < DEPTH:
                self._probable[tensor] = self._gives_probabilities(
                    origin.node, origin.tensor, depth
                )
        return self._probable[tensor]

    def _gives_probabilities(self, node: Node, tensor: str, depth: int) -> bool:
        if node.op == "HardSigmoid" or sigmoid(self.graph, node) is not None:
            return True
        if node.op not in kinds.LOGARITHMS and softmax(self.graph, node) is not None:
            return True
        if branches := self.graph.branches(tensor):
            return all(self.probable(name, depth + 1) for name in branches)
        computed = [name for name in node.inputs if name and self.graph.constant(name) is None]
        if node.op == "Sub":
            return self.graph.number(node.inputs[0]) == 1 and self.probable(
                node.inputs[1], depth + 1
            )
        alone = node.op == "Mul" and len(computed) < 2  # by a constant: a size, not a probability
        stays = node.op in kinds.KEEP_PROBABILITIES and not alone and bool(computed)
        return stays and all(self.probable(name, depth + 1) for name in computed)

    # ----------------------------------------------------------------------------------------------------- decisions

    def decisive(self, tensor: str, depth: int = 0) -> bool:
        """Check whether a tensor depends on a decision behind the last layer.

        Args:
            tensor: Its name.
            depth: Steps taken so far, up to ``DEPTH``.

        Returns:
            True behind an ArgMax, a TopK, a comparison and the like.
        """
        if tensor not in self._decisive:
            self._decisive[tensor] = False
            node = self.graph.maker(tensor)
            if self._counts(tensor, depth):
                self._decisive[tensor] = True
            elif node is not None and node.op in kinds.POSTPROCESSING and depth < DEPTH:
                self._decisive[tensor] = self._decides(node, tensor, depth)
        return self._decisive[tensor]

    def _counts(self, tensor: str, depth: int = 0) -> bool:
        """Check whether a tensor is the number of decisions, such as that of the boxes that a suppression leaves."""
        node = self.graph.maker(tensor)
        if node is None or node.op not in kinds.COUNTS or depth >= DEPTH:
            return False
        decided = node.inputs[0]
        return self.graph.shape(decided) is None and self.decisive(decided, depth + 1)

    def _decides(self, node: Node, tensor: str, depth: int) -> bool:
        read = [name for name in node.inputs if name]
        if node.op == "Where" and all(self.graph.constant(name) is None for name in read[1:]):
            read = read[1:]  # a choice between two computed values is an activation
        if any(self.decisive(name, depth + 1) for name in read):
            return True
        values = node.op == "TopK" and tensor == node.outputs[0] and self.probable(node.inputs[0])
        return node.op in kinds.DECISIONS and not values and any(self.learnt(name) for name in read)

    def learnt(self, tensor: str, depth: int = 0) -> bool:
        """Check whether a tensor depends on a layer or on an operator that is not known.

        Args:
            tensor: Its name.
            depth: Steps taken so far, up to ``DEPTH``.

        Returns:
            False for tensors that are computed from constants and lengths alone.
        """
        if tensor not in self._learnt:
            self._learnt[tensor] = False
            node = self.graph.makers.get(tensor)
            if node is not None and (node.op not in kinds.LENGTHS or self._counts(tensor, depth)):
                cheap = node.op in kinds.POSTPROCESSING and self.graph.maker(tensor) is not None
                inside = depth < DEPTH and any(
                    self.learnt(name, depth + 1) for name in node.inputs if name
                )
                self._learnt[tensor] = not cheap or inside
        return self._learnt[tensor]

    def decide(self, tensor: str, seen: set[str], depth: int) -> list[Term]:
        """Find the terms that a decision is made from.

        Args:
            tensor: Name of a tensor that holds a decision, or depends on one.
            seen: Tensors that were visited; this one is added.
            depth: Steps taken so far, up to ``DEPTH``.

        Returns:
            The terms of the floating-point tensors in front of the decision.
        """
        node = self.graph.maker(tensor)
        if tensor in seen or not self.learnt(tensor):
            return []
        seen.add(tensor)
        if self.graph.floating(tensor) and not self.decisive(tensor):
            if self.graph.shape(tensor) is not None:
                return self.explain(tensor)
            return []
        if node is not None and node.op in kinds.COUNTS:
            return self.decide(node.inputs[0], seen, depth + 1)
        if node is None or node.op not in kinds.POSTPROCESSING or depth > DEPTH:
            return []
        if node.op in ("ArgMax", "Hardmax"):
            return self._largest(node, seen, depth)
        if node.op == "ArgMin":
            return self._least(node, seen, depth)
        if node.op == "TopK":
            return self._top(node, seen, depth)
        if node.op == "NonMaxSuppression":
            boxes = self._scores(node.inputs[0], seen, depth)
            return [*boxes, *self._suppressed(node, seen, depth)]
        if node.op in kinds.COMPARISONS:
            return self._compared(node, seen, depth)
        if node.op in kinds.SIGN:
            found = self._scores(node.inputs[0], seen, depth)
            return [self._at(term, 0.0, node.op, "scores") for term in found]
        read = [
            name
            for name in node.inputs
            if self.graph.op(name) not in kinds.LENGTHS or self._counts(name)
        ]
        return [term for name in read for term in self.decide(name, seen, depth + 1)]

    def _scores(self, tensor: str, seen: set[str], depth: int) -> list[Term]:
        """The terms of a tensor that a decision compares; the tensor may hold decisions itself."""
        if not self.graph.floating(tensor) or self.decisive(tensor):
            return self.decide(tensor, seen, depth + 1)
        if self.graph.constant(tensor) is None:
            return self.explain(tensor)
        return []

    def _largest(self, node: Node, seen: set[str], depth: int) -> list[Term]:
        source = node.inputs[0]
        rank = self.graph.rank(node.inputs[0])
        found = self._scores(source, seen, depth)
        tail = f"{node.op} of {{}}"
        if len(found) == 1 and found[0].kind == "classes":
            return [replace(found[0], tail=tail.format(found[0].tail))]
        if rank is None or not self.graph.floating(source) or self.decisive(source):
            return found
        axis = int(node.attrs.get("axis", 0 if node.op == "ArgMax" else -1)) % max(rank, 1)
        behind = self.graph.maker(source)  # a sigmoid does not change which is largest
        if behind is not None:
            logits = sigmoid(self.graph, behind)
        else:
            logits = None
        return [
            self._term(logits or source, "classes", axis, "auto", f"{node.op} over axis {axis}")
        ]

    def _least(self, node: Node, seen: set[str], depth: int) -> list[Term]:
        """The place of the least value, such as a distance: classes by the negated values."""
        source = node.inputs[0]
        rank = self.graph.rank(source)
        if rank is None or not self.graph.floating(source) or self.decisive(source):
            return self._scores(source, seen, depth)
        axis = int(node.attrs.get("axis", 0)) % max(rank, 1)
        term = self._term(source, "classes", axis, "logits", f"{node.op} over axis {axis}")
        return [replace(term, least=True)]

    def _top(self, node: Node, seen: set[str], depth: int) -> list[Term]:
        source = node.inputs[0]
        found = self._scores(source, seen, depth)
        if len(found) == 1 and found[0].kind == "ambiguous":
            axis = int(node.attrs.get("axis", -1)) % max(self.graph.rank(source) or 1, 1)
            return [self._term(source, "classes", axis, tail=f"TopK over axis {axis}")]
        return [replace(term, tail=f"{term.tail}, TopK" if term.tail else "TopK") for term in found]

    def _suppressed(self, node: Node, seen: set[str], depth: int) -> list[Term]:
        """Scores of NonMaxSuppression, decided at its threshold."""
        if len(node.inputs) > 4 and node.inputs[4]:
            limit = self.graph.number(node.inputs[4])
        else:
            limit = None
        found = self._scores(node.inputs[1], seen, depth)
        return [self._at(term, limit, "scores of NonMaxSuppression", "auto") for term in found]

    def _compared(self, node: Node, seen: set[str], depth: int) -> list[Term]:
        numbers = [self.graph.number(name) for name in node.inputs]
        computed = [name for name in node.inputs if self.graph.constant(name) is None]
        found = [term for name in computed for term in self._scores(name, seen, depth)]
        limit = next((n for n in numbers if n is not None), None)
        if limit is None:
            return found
        return [self._at(term, limit, node.op, "scores") for term in found]

    def _at(
        self,
        term: Term,
        limit: float | None,
        tail: str,
        form: Form,
    ) -> Term:
        """A term that is decided at a threshold (of probabilities, where it reads logits)."""
        described = ", ".join(filter(None, (term.tail, tail)))
        if term.kind == "ambiguous":
            return replace(term, kind="binary", form=form, threshold=limit, tail=described)
        if term.kind == "binary" and limit is not None and term.form == "logits":
            inside = float(np.clip(limit, 1e-6, 1 - 1e-6))
            return replace(term, threshold=float(np.log(inside / (1 - inside))), tail=described)
        if term.kind == "binary" and term.form == "probabilities":
            return replace(term, threshold=limit, tail=described)
        return replace(term, tail=described)


def _called(node: Node, usual: str) -> str:
    """Name of the operator, or of the operator that a composition of others stands for."""
    if node.op in kinds.COMPOSED:
        return node.op
    return usual


def _distinct(terms: Iterable[Term]) -> list[Term]:
    """One term for each slice of a tensor; a comparison with 0 is dropped where the slice has another term."""
    found: dict[object, Term] = {}
    for term in terms:
        key = (term.tensor, term.part)
        more = (
            key in found and found[key].kind in OPEN and term.kind not in OPEN and not _sign(term)
        )
        if key not in found or _sign(found[key]) or more:
            found[key] = term
    return list(found.values())


def _sign(term: Term) -> bool:
    return term.kind == "binary" and term.form == "scores" and term.threshold == 0
