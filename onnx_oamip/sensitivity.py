"""What each group's width costs: the loss of the model with only that group narrowed and its consumers repaired.

For every group one part of the graph is made: everything behind its first consumer, with the consumers' weights, bias
shifts and masks as inputs. A level then only feeds other numbers; nothing in front of the group runs again and no
session is rebuilt. Cost: about (1 + levels) halves of a forward pass per group. Groups run in parallel threads, each
with single-threaded sessions: ONNX Runtime and LAPACK release the interpreter lock, weights are shared instead of
copied to other processes, and results do not depend on the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper
from threadpoolctl import threadpool_limits

from .affine import matrix_shape, site, unmatrix
from .calibrate import Progress
from .gram import Problem, compensate, problems
from .model import reads
from .records import Array, Consumer, Coupling, Floats, Gram, Ints, Model
from .runtime import Session
from .subgraph import Slicer, element_types
from .verify import head

LEVELS = (0.8, 0.6, 0.45, 0.3, 0.15)
"""Shares of a group's width at which the loss is measured; the full width costs nothing."""


@dataclass(frozen=True)
class Sensitivity:
    """``widths`` (levels,) ascending, last the full width; ``loss`` (levels,), never rising with width."""

    widths: Ints
    loss: Floats


def measure(
    model: Model,
    coupling: Coupling,
    grams: Mapping[str, Gram],
    order: Floats,
    feeds: Sequence[Mapping[str, Array]],
    device: str,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Sensitivity, ...]:
    """Per group the loss at a few widths, units removed by rising ``order`` (n_units,).

    The loss is the mean KL divergence from the original class probabilities (a classification head), or the squared
    output error relative to the output's energy (anything else).
    """
    slicer = Slicer(model.proto)
    types = _types(model, slicer, feeds, device)
    original = Session(model.proto, device, threads=None)
    wanted = _outputs(model)
    reference = [original.run(feed, wanted) for feed in feeds]
    done = 0

    def one(g: int) -> Sensitivity:
        nonlocal done
        found = _group(model, coupling, grams, order, feeds, reference, wanted, slicer, types, device, g)
        done += 1
        if progress:
            progress("sensitivity", done, len(coupling.groups))
        return found

    # One thread a worker for linear algebra too, or the workers wait for each other.
    with threadpool_limits(1), ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return tuple(pool.map(one, range(len(coupling.groups))))


def levels(width: int) -> Ints:
    """Widths measured for a group, ascending, the full width last; 1 is always among them."""
    shares = np.asarray([1 / width, *sorted(LEVELS), 1.0])
    return np.unique(np.clip(np.round(shares * width), 1, width).astype(np.int64))


def _outputs(model: Model) -> list[str]:
    place = head(model)
    floating = [p.name for p in model.outputs if p.dtype.kind == "f"]
    return [model.outputs[place].name] if place is not None else floating or [p.name for p in model.outputs]


def _types(model: Model, slicer: Slicer, feeds: Sequence[Mapping[str, Array]], device: str) -> dict[str, int]:
    """Element types of all tensors; behind an operator that shape inference does not know, a run tells."""
    types = element_types(model.proto, model.dtypes)
    unknown = [o for node in slicer.nodes for o in node.output if o and o not in types]
    if unknown and feeds:
        session = Session(slicer.model(slicer.needed(unknown, ()), unknown, types), device)
        found = session.run({n: feeds[0][n] for n in session.inputs}, unknown)
        types.update((n, int(helper.np_dtype_to_tensor_dtype(v.dtype))) for n, v in zip(unknown, found, strict=True))
    return types


def _group(
    model: Model,
    coupling: Coupling,
    grams: Mapping[str, Gram],
    order: Floats,
    feeds: Sequence[Mapping[str, Array]],
    reference: Sequence[list[Array]],
    wanted: list[str],
    slicer: Slicer,
    types: Mapping[str, int],
    device: str,
    group: int,
) -> Sensitivity:
    units = coupling.groups[group].units
    removal = np.argsort(order[units], kind="stable")
    widths = levels(len(units))
    part = _Part(model, coupling, slicer, types, group, problems(model, coupling, grams, group), wanted, device)
    loss = np.zeros(len(widths))
    if not part.reaches:
        return Sensitivity(widths, loss)
    settings = [part.level(removal[: len(units) - w]) for w in widths[:-1]]
    samples = 0
    for feed, truth in zip(feeds, reference, strict=True):
        boundary = part.boundary(feed)
        weight = len(truth[0]) if truth[0].ndim else 1
        samples += weight
        for i, setting in enumerate(settings):
            loss[i] += weight * divergence(model, truth, part.run(boundary, setting))
    loss /= max(samples, 1)
    # More units never hurt: noise in the measurement must not make the program prefer fewer.
    return Sensitivity(widths, np.maximum.accumulate(loss[::-1])[::-1])


def divergence(model: Model, truth: Sequence[Array], found: Sequence[Array]) -> float:
    """Mean KL divergence of class probabilities, or relative squared error of the outputs."""
    if head(model) is not None:
        p, q = _log_probabilities(truth[0]), _log_probabilities(found[0])
        return float((np.exp(p) * (p - q)).sum(axis=1).mean())
    error = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(truth, found, strict=True))
    energy = sum(float(np.square(a.astype(np.float64)).sum()) for a in truth)
    return error / energy if energy else error


def _log_probabilities(values: Array) -> Floats:
    found = values.astype(np.float64)
    if (found >= 0).all() and np.allclose(found.sum(axis=1), 1, atol=1e-3):
        return np.log(np.maximum(found, 1e-12))  # the model ends in a softmax of its own
    shifted = found - found.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


class _Part:
    """The graph behind a group's consumers, with the numbers a level changes as inputs."""

    def __init__(
        self,
        model: Model,
        coupling: Coupling,
        slicer: Slicer,
        types: Mapping[str, int],
        group: int,
        found: list[Problem],
        wanted: list[str],
        device: str,
    ) -> None:
        self.model, self.found = model, found
        self.units = coupling.groups[group].units
        self.linear = {p.consumer.node: p.consumer for p in found}
        self.wanted = wanted
        self.masked: dict[str, tuple[Consumer, Ints]] = {}
        consumers = []
        for c in coupling.consumers:
            labels = coupling.axes[c.data, c.axis]
            if np.isin(labels, self.units).any():
                consumers.append(c)
                if c.node not in self.linear:
                    self.masked[c.node] = (c, labels)
        names = {c.node for c in consumers}
        sources = [o for node in slicer.nodes if node.name in names for o in node.output if o]
        behind = slicer.descendants(sources) | {i for i, n in enumerate(slicer.nodes) if n.name in names}
        behind &= set(slicer.needed(wanted, ()))
        self.reaches = bool(behind)  # else nobody reads these units, or only other outputs depend on them
        if not behind:
            return
        made = {o for i in behind for o in slicer.nodes[i].output if o}
        inputs = {n for i in behind for n in slicer.reads[i] if n not in made and n not in slicer.constants}
        # A wanted output in front of the group does not depend on it.
        self.before = sorted(inputs | {w for w in wanted if w not in made})
        prefix = slicer.needed(self.before, ())
        graph_inputs = {p.name for p in model.inputs}
        computed = [n for n in self.before if n not in graph_inputs]
        self.prefix = Session(slicer.model(prefix, computed, types), device, 1) if computed else None
        self.computed = computed
        proto = slicer.model(sorted(behind), [w for w in wanted if w in made], types)
        self._open(proto, types)
        self.suffix = Session(proto, device, 1, what="a part of the model")
        self.made = made

    def _open(self, proto: onnx.ModelProto, types: Mapping[str, int]) -> None:
        """Turn weights into inputs, add bias shifts behind and masks before the consumers."""
        nodes = []
        for node in proto.graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            place = None
            if copy.name in self.linear:
                place = site(next(n for n in self.model.nodes if n.name == copy.name), self.model.constants)
                assert place is not None
                kind = types[place.weight]
                copy.input[place.weight_slot] = f"oamip_weight_{copy.name}"
                proto.graph.input.append(helper.make_tensor_value_info(copy.input[place.weight_slot], kind, None))
                proto.graph.input.append(helper.make_tensor_value_info(f"oamip_shift_{copy.name}", kind, None))
                inner, out = f"oamip_inner_{copy.name}", copy.output[0]
                copy.output[0] = inner
                nodes.append(copy)
                nodes.append(helper.make_node("Add", [inner, f"oamip_shift_{copy.name}"], [out]))
                continue
            if copy.name in self.masked:
                consumer, _ = self.masked[copy.name]
                kind = types[consumer.data]
                proto.graph.input.append(helper.make_tensor_value_info(f"oamip_mask_{copy.name}", kind, None))
                masked = f"oamip_masked_{copy.name}"
                nodes.append(helper.make_node("Mul", [consumer.data, f"oamip_mask_{copy.name}"], [masked]))
                copy.input[consumer.slot] = masked
            nodes.append(copy)
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        read = {n for node in proto.graph.node for n in reads(node)}
        kept = [t for t in proto.graph.initializer if t.name in read]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)

    def boundary(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Tensors that cross from the original front into this part."""
        values: dict[str, Array] = {}
        if self.prefix:
            given = {n: feed[n] for n in self.prefix.inputs}
            values = dict(zip(self.computed, self.prefix.run(given, self.computed), strict=True))
        return {name: values[name] if name in values else feed[name] for name in self.before}

    def level(self, removed: Ints) -> dict[str, Array]:
        """Inputs that take away the units at positions ``removed`` of the group and repair the consumers."""
        result: dict[str, Array] = {}
        repaired: dict[str, list[tuple[Floats, Floats]]] = {}
        for problem in self.found:
            repaired.setdefault(problem.consumer.node, []).append(problem.unfold(*compensate(problem, removed)))
        for name, blocks in repaired.items():
            node = next(n for n in self.model.nodes if n.name == name)
            place = site(node, self.model.constants)
            assert place is not None
            like = self.model.constants[place.weight]
            weight = np.stack([w for w, _ in blocks]).reshape(matrix_shape(place, like))
            shift = np.concatenate([s for _, s in blocks])
            result[f"oamip_weight_{name}"] = unmatrix(place, weight / place.factor, like)
            view = [1] * len(self.model.shapes[node.outputs[0]])
            view[place.output_axis] = -1
            result[f"oamip_shift_{name}"] = shift.reshape(view).astype(like.dtype)
        gone = self.units[removed]
        for name, (consumer, labels) in self.masked.items():
            view = [1] * len(self.model.shapes[consumer.data])
            view[consumer.axis] = -1
            keep = ~np.isin(labels, gone)
            result[f"oamip_mask_{name}"] = keep.reshape(view).astype(self.model.dtypes[consumer.data])
        return result

    def run(self, boundary: Mapping[str, Array], setting: Mapping[str, Array]) -> list[Array]:
        """The wanted outputs at one level."""
        feed = {n: v for n, v in {**boundary, **setting}.items() if n in self.suffix.inputs}
        names = [w for w in self.wanted if w in self.made]
        found = dict(zip(names, self.suffix.run(feed, names), strict=True))
        return [found[w] if w in found else boundary[w] for w in self.wanted]
