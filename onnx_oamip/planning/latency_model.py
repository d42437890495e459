"""An additive model of latency for the budget program, fitted to kernel times at a few widths.

The network is cut to a few vectors of widths and run with profiling. Kernels of linear nodes are told apart by name;
each node's time is fitted by ``a + b * MACs + c * activation``, everything else by ``d + e * activations``, all of them
non-negative. So predicted seconds are a constant plus a sum of products of axis lengths, the form that MACs have too.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_oamip.core import atomic_files
from onnx_oamip.core.records import (
    Array,
    Bools,
    Coupling,
    Floats,
    Ints,
    Model,
)
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.cost import (
    Ledger,
    Products,
    full_widths,
    ledger,
)
from onnx_oamip.graph.external_data import size
from onnx_oamip.graph.ops import kinds, lookup
from onnx_oamip.graph.runtime import Session, resolve_device
from onnx_oamip.graph.surgery.rewrite import cut
from onnx_oamip.verification.latency import (
    WARM_RUNS,
    caller,
    feeds_of,
    interleave,
    quiet,
)

SHARES = (1.0, 0.6, 0.3)
"""Shares of the width at which the network is measured; each group takes its nearest width on the ladder."""
MIXED = 3
"""Levels at which each group takes a random width: uniform ones cannot tell what depends on one side of a node only."""
MOST_ROUNDS = 30
PLAIN_BYTES = 1 << 29
_NUMBERED = re.compile(r"_token_\d+$")


@dataclass(frozen=True)
class Table:
    """Predicted seconds of one run: ``constant`` plus the terms of ``products`` over the lengths of a ledger.

    The first terms are those of ``Ledger.macs`` with seconds per MAC as factors; then comes one per linear node over
    its activation (seconds per element). ``widths`` (levels, groups), ``measured`` and ``fitted`` (seconds) are the
    levels behind it, ``error`` is the largest relative error there. ``by_node`` is False where kernels could not be
    told apart and one rate per MAC was fitted for the whole network.
    """

    constant: float
    products: Products
    widths: Ints
    measured: Floats
    fitted: Floats
    error: float
    by_node: bool

    def seconds(self, lengths: Ints) -> float:
        """Predicted seconds at the axis lengths that ``Ledger.lengths(widths)`` gives."""
        return self.constant + float(Ledger.terms(self.products, lengths).sum())

    def scaled(self, ratio: float) -> Table:
        """All times multiplied: corrects the model by a measured over predicted latency."""
        factor: Array = self.products.factor * ratio
        return replace(
            self, constant=self.constant * ratio, products=replace(self.products, factor=factor)
        )


def profile(
    model: Model,
    coupling: Coupling,
    ladder: Sequence[Ints],
    samples: Samples,
    device: str,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 6.0,
    seed: int = 0,
) -> Table:
    """Measure the network at a few levels and fit the additive model.

    ``ladder`` holds the widths each group may take, in units. One run takes a feed of ``batch`` samples. The levels run
    interleaved, in random order, for about ``seconds`` seconds (5 to 30 rounds).
    """
    device = resolve_device(device)
    costs = ledger(model, coupling)
    widths = level_widths(coupling, ladder, seed=seed)
    protos = [cut(model, coupling, first_units(coupling, w)) for w in widths]
    walls, kernels = _run(protos, feeds_of(samples, batch), device, threads, seconds, seed)
    lengths = [costs.lengths(w) for w in widths]
    macs = np.asarray([Ledger.terms(costs.macs, n) for n in lengths], float).reshape(
        len(widths), -1
    )
    carriers = _activations(model, costs)
    activations = np.asarray([Ledger.terms(carriers, n) for n in lengths], float).reshape(
        len(widths), -1
    )
    # The profile of the CUDA provider holds launches, not work.
    shares = (
        None
        if device == "cuda"
        else [assign(p, costs.nodes, k, m) for p, k, m in zip(protos, kernels, macs, strict=True)]
    )
    constant, rates, sizes, by_node = fit(
        walls, None if shares is None else np.asarray(shares), macs, activations
    )
    fitted = constant + macs @ rates + activations @ sizes
    factor: Array = np.concatenate([rates, sizes])
    return Table(
        constant=constant,
        products=Products(factor, np.concatenate([costs.macs.axes, carriers.axes])),
        widths=widths,
        measured=walls,
        fitted=fitted,
        error=float(np.abs(fitted / walls - 1).max()),
        by_node=by_node,
    )


def level_widths(
    coupling: Coupling,
    ladder: Sequence[Ints],
    shares: Sequence[float] = SHARES,
    mixed: int = MIXED,
    seed: int = 0,
) -> Ints:
    """Different width vectors (levels, groups): for each share the nearest rungs of the ladder, then random rungs."""
    full = full_widths(coupling)
    rng = np.random.default_rng(seed)
    rungs = [np.asarray(r, np.int64) for r in ladder]
    levels = [
        [int(r[np.argmin(np.abs(r - s * f))]) for r, f in zip(rungs, full, strict=True)]
        for s in shares
    ]
    levels += [[int(rng.choice(r)) for r in rungs] for _ in range(mixed)]
    different = list(dict.fromkeys(tuple(level) for level in levels))
    return np.asarray(different, np.int64).reshape(len(different), len(full))


def first_units(coupling: Coupling, widths: Ints) -> Bools:
    """The first ``widths[g]`` units of every group: which ones does not matter for time."""
    keep = np.zeros(coupling.n_units, bool)
    for group, width in zip(coupling.groups, widths, strict=True):
        keep[group.units[:width]] = True
    return keep


def fit(
    walls: Floats, nodes: Floats | None, macs: Floats, activations: Floats
) -> tuple[float, Floats, Floats, bool]:
    """Non-negative least squares of relative errors: constant, seconds per MAC and per element of each node, by node?

    ``walls`` (levels,) are seconds of whole runs, ``nodes`` (levels, nodes) those of linear nodes, None if unknown;
    ``macs`` and ``activations`` (levels, nodes) what they depend on.
    """
    ones, size = np.ones(len(walls)), activations.sum(axis=1)
    if nodes is None or not nodes.any():
        constant, rate, other = _solve(walls, walls, ones, macs.sum(axis=1), size)
        return constant, np.full(macs.shape[1], rate), np.full(macs.shape[1], other), False
    each = np.asarray(
        [
            _solve(walls, nodes[:, n], ones, macs[:, n], activations[:, n])
            for n in range(macs.shape[1])
        ]
    )
    rest = np.maximum(walls - nodes.sum(axis=1), 0)
    constant, other = _solve(walls, rest, ones, size)
    return constant + float(each[:, 0].sum()), each[:, 1], each[:, 2] + other, True


def _solve(scale: Floats, target: Floats, *columns: Floats) -> list[float]:
    """Coefficients >= 0 of ``target`` on ``columns``, each row weighted by 1 / ``scale``."""
    from scipy.optimize import nnls  # brings much of scipy, for a latency budget alone

    matrix = np.stack(columns, axis=1) / scale[:, None]
    size = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    found, _ = nnls(matrix / size, target / scale)
    return [float(v) for v in found / size]


def _activations(model: Model, costs: Ledger) -> Products:
    """The activation each linear node makes (or takes), as products of the ledger's axes."""
    nodes = {node.name: node for node in model.every}
    axes = np.full_like(costs.macs.axes, -1)
    for n, name in enumerate(costs.nodes):
        node = nodes[name]
        spec = lookup(node.domain, node.op, node.version)
        assert spec is not None
        assert spec.cost is not None
        row = spec.cost(node, model.shapes)
        held = [i for i, (tensor, _) in enumerate(row) if tensor == row[0][0]]
        axes[n, : len(held)] = costs.macs.axes[n, held]
    return Products(np.ones(len(axes), np.int64), axes)


# ------------------------------------------------------------------------------------------------------- kernels

Kernels = dict[str, tuple[str, float]]
"""Operator and seconds of one run, by kernel name."""


def _run(
    protos: Sequence[onnx.ModelProto],
    feeds: Sequence[Mapping[str, Array]],
    device: str,
    threads: int | None,
    seconds: float,
    seed: int,
) -> tuple[Floats, list[Kernels]]:
    """Seconds of a whole run and kernel times of every proto.

    Whole runs are timed in sessions without profiling, but for models so large that it does not matter and memory does.
    """
    twice = sum(size(p) for p in protos) < PLAIN_BYTES
    with atomic_files.scratch() as folder:
        sessions = [
            Session(p, device, threads, profile=f"{folder}/{i}", spin=True)
            for i, p in enumerate(protos)
        ]
        if twice:
            sessions += [Session(p, device, threads, spin=True) for p in protos]
        runs, _ = interleave([caller(s, feeds) for s in sessions], seconds, MOST_ROUNDS, seed)
        events = [json.loads(Path(s.end_profile()).read_text()) for s in sessions[: len(protos)]]
    walls = np.asarray([quiet(r) for r in runs[-len(protos) :]])
    return walls, [_within(parse(e), wall) for e, wall in zip(events, walls, strict=True)]


def _within(kernels: Kernels, wall: float) -> Kernels:
    """Kernel times shrunk to what the run without profiling took: recording adds some microseconds to each."""
    total = sum(spent for _, spent in kernels.values())
    part = min(1.0, wall / total) if total else 1.0
    return {name: (op, spent * part) for name, (op, spent) in kernels.items()}


def parse(events: Sequence[Mapping[str, Any]], skip: int = WARM_RUNS) -> Kernels:
    """Seconds of each kernel in ONNX Runtime's profile, as ``quiet`` over all runs but the first ``skip``."""
    runs: list[dict[str, float]] = []
    now: dict[str, float] = defaultdict(float)
    ops: dict[str, str] = {}
    for event in events:
        name = str(event["name"])
        if event["cat"] == "Node" and name.endswith("_kernel_time"):
            kernel = name.removesuffix("_kernel_time")
            ops[kernel] = str(event.get("args", {}).get("op_name", ""))
            now[kernel] += float(event["dur"]) * 1e-6
        elif event["cat"] == "Session" and name == "model_run":
            runs.append(dict(now))
            now.clear()
    kept = runs[skip:]
    return (
        {k: (op, float(quiet([r.get(k, 0.0) for r in kept]))) for k, op in ops.items()}
        if kept
        else {}
    )


def assign(proto: onnx.ModelProto, names: Sequence[str], kernels: Kernels, macs: Floats) -> Floats:
    """Seconds of the linear nodes ``names`` from kernel times, in their order.

    A kernel carries the name of a node, or of the tensor that the last node fused into it makes. From there the search
    goes backwards to linear nodes that no kernel names. Nodes that share a kernel share its time by MACs, and so do
    the nodes and the kernels of linear operators that are left at the end.
    """
    graph = proto.graph.node
    maker = {t: i for i, node in enumerate(graph) for t in node.output if t}
    by_name = {node.name: i for i, node in enumerate(graph)}
    place = {by_name[n]: k for k, n in enumerate(names) if n in by_name}
    times = np.zeros(len(names))
    anchors: dict[int, float] = defaultdict(float)
    lost = 0.0
    for kernel, (op, spent) in kernels.items():
        if not any(part in op for part in kinds.LINEAR_KERNELS):
            continue
        found = _anchor(kernel, maker, by_name)
        if found is None:
            lost += spent
        else:
            anchors[found] += spent
    free = set(place) - set(anchors)
    for found, spent in sorted(anchors.items()):
        owners = [found] if found in place else _behind(found, graph, maker, place, anchors, free)
        free -= set(owners)
        if owners:
            _share(times, [place[i] for i in owners], spent, macs)
        else:
            lost += spent
    _share(times, [place[i] for i in sorted(free)], lost, macs)
    return times


def _share(times: Floats, nodes: Sequence[int], spent: float, macs: Floats) -> None:
    if nodes and spent:
        part = np.asarray(macs[list(nodes)], float)
        times[list(nodes)] += spent * part / max(part.sum(), 1e-300)


def _anchor(kernel: str, maker: Mapping[str, int], by_name: Mapping[str, int]) -> int | None:
    """The node that a kernel's name points to: by its own name, by the tensor it makes, or by the longest beginning."""
    label = _NUMBERED.sub("", kernel)
    for text in (label, label.removeprefix("fused "), label.removesuffix("_nchwc")):
        for known in (by_name, maker):
            if text in known:
                return known[text]
    text = label.removeprefix("fused ")
    cuts = [i for i, c in enumerate(text) if c in "/_" and i and text[:i] in by_name]
    return by_name[text[: cuts[-1]]] if cuts else None


def _behind(
    start: int,
    graph: Sequence[onnx.NodeProto],
    maker: Mapping[str, int],
    place: Mapping[int, int],
    anchors: Mapping[int, float],
    free: set[int],
) -> list[int]:
    """Unclaimed linear nodes whose results reach ``start`` without passing another kernel."""
    found, seen, todo = [], {start}, [start]
    while todo:
        for name in graph[todo.pop()].input:
            i = maker.get(name)
            if i is None or i in seen or i in anchors:
                continue
            seen.add(i)
            if i in place:
                found += [i] if i in free else []
            else:
                todo.append(i)
    return found
