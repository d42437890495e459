"""Latency model: predicts seconds of a run from widths, fitted to kernel times at a few widths.

The network is cut to a few vectors of widths and run with profiling. Kernels of linear nodes are recognised by name.
The time of each linear node is fitted by ``a + b * MACs + c * activation``, all other time by ``d + e * activations``,
with non-negative coefficients. Predicted seconds are then a constant plus a sum of products of axis lengths, the form
that MACs have too, and can be limited in the budget program.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from onnx_oamip.planning.budget_program import LinearisedLimit
from onnx_oamip.verification.latency import (
    WARM_RUNS,
    caller,
    feeds_of,
    interleave,
    quiet,
)

SHARES = (1.0, 0.6, 0.3)
"""Shares of the width at which the network is measured; each group takes its nearest candidate width."""
MIXED = 3
"""Number of measurements at random widths; uniform ones do not show which side of a node its time depends on."""
MAX_ROUNDS = 30
PLAIN_BYTES = 1 << 29
"""Total size of the cut models up to which whole runs are timed in sessions of their own, without profiling."""
_NUMBERED = re.compile(r"_token_\d+$")
"""Suffix that ONNX Runtime appends to the names of some fused nodes."""


@dataclass(frozen=True)
class LatencyModel:
    """Predicted seconds of one run: ``constant`` plus the terms of ``products`` over the axis lengths of a ledger.

    The first terms are those of ``Ledger.macs``, with seconds per MAC as factors; then follows one term per linear node
    over its activation, with seconds per element.

    Attributes:
        constant: Seconds that do not depend on widths.
        products: The terms.
        widths: Measured widths (levels, groups).
        measured: Seconds measured at these widths (levels,).
        fitted: Seconds predicted at these widths (levels,).
        error: Largest relative error among them.
        by_node: False if kernels could not be matched to nodes and one rate per MAC was fitted for the whole network.
        starts: Seconds in ``constant`` that a linear node takes at any width, by its name.
    """

    constant: float
    products: Products
    widths: Ints
    measured: Floats
    fitted: Floats
    error: float
    by_node: bool
    starts: Mapping[str, float] = field(default_factory=dict)

    def limit(self, seconds: float) -> LinearisedLimit:
        """Make the latency row of the budget program.

        Args:
            seconds: Upper bound on the predicted seconds.

        Returns:
            The row.
        """
        return LinearisedLimit("latency", self.products, self.constant, seconds, self.starts)

    def seconds(self, lengths: Ints) -> float:
        """Predicts the seconds of one run.

        Args:
            lengths: Axis lengths as ``Ledger.lengths(widths)`` returns them.

        Returns:
            Seconds.
        """
        return self.constant + float(Ledger.terms(self.products, lengths).sum())

    def scaled(self, ratio: float) -> LatencyModel:
        """Multiplies all times, to correct the model.

        Args:
            ratio: Measured over predicted latency.

        Returns:
            The corrected model.
        """
        factor: Array = self.products.factor * ratio
        products = replace(self.products, factor=factor)
        starts = {name: seconds * ratio for name, seconds in self.starts.items()}
        return replace(self, constant=self.constant * ratio, products=products, starts=starts)


def profile(
    model: Model,
    coupling: Coupling,
    ladder: Sequence[Ints],
    samples: Samples,
    *,
    device: str,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 6.0,
    seed: int = 0,
) -> LatencyModel:
    """Measures the network at a few vectors of widths and fits the latency model.

    The cut models run interleaved, in random order.

    Args:
        model: The whole model.
        coupling: Its coupling.
        ladder: Candidate widths of each group, in units.
        samples: Samples to run on.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch: Samples per run.
        threads: Threads within an operator. Default: the choice of ONNX Runtime.
        seconds: Approximate time of the measurement (5 to 30 rounds).
        seed: Seed of the widths and of the order.

    Returns:
        The fitted model.
    """
    measured = measure(
        model,
        coupling,
        ladder,
        samples,
        device=device,
        batch=batch,
        threads=threads,
        seconds=seconds,
        seed=seed,
    )
    return fitted(model, coupling, measured)


class Measurement(NamedTuple):
    """Times of a network at several vectors of widths, the widest first.

    Attributes:
        widths: Units of every group (levels, groups).
        walls: Seconds of whole runs (levels,).
        nodes: Seconds of the linear nodes of the ledger (levels, nodes); None if unknown.
    """

    widths: Ints
    walls: Floats
    nodes: Floats | None


def measure(
    model: Model,
    coupling: Coupling,
    ladder: Sequence[Ints],
    samples: Samples,
    *,
    device: str,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 6.0,
    seed: int = 0,
) -> Measurement:
    """Measures the network at a few vectors of widths, as :func:`profile` does before it fits the model.

    Args:
        model: The whole model.
        coupling: Its coupling.
        ladder: Candidate widths of each group, in units.
        samples: Samples to run on.
        device: ``cpu``, ``cuda`` or ``auto``.
        batch: Samples per run.
        threads: Threads within an operator. Default: the choice of ONNX Runtime.
        seconds: Approximate time of the measurement (5 to 30 rounds).
        seed: Seed of the widths and of the order.

    Returns:
        The times.
    """
    device = resolve_device(device)
    costs = ledger(model, coupling)
    widths = level_widths(coupling, ladder, seed=seed)
    protos = [cut(model, coupling, first_units(coupling, w)) for w in widths]
    walls, kernels = _run(
        protos,
        feeds_of(samples, batch),
        device,
        threads=threads,
        seconds=seconds,
        seed=seed,
    )
    if device == "cuda":  # the profile of the CUDA provider records kernel launches, not their work
        return Measurement(widths, walls, None)
    macs = _terms_at(costs.macs, [costs.lengths(w) for w in widths])
    nodes = [
        assign(proto, costs.nodes, times, node_macs)
        for proto, times, node_macs in zip(protos, kernels, macs, strict=True)
    ]
    return Measurement(widths, walls, np.asarray(nodes))


def fitted(model: Model, coupling: Coupling, measured: Measurement) -> LatencyModel:
    """Fits the latency model to measured times.

    Args:
        model: The whole model.
        coupling: Its coupling.
        measured: Times at some widths. Times at a single vector of widths are taken as proportional to the work.

    Returns:
        The fitted model.
    """
    costs = ledger(model, coupling)
    carriers = _activations(model, costs)
    lengths = [costs.lengths(w) for w in measured.widths]
    macs = _terms_at(costs.macs, lengths)
    activations = _terms_at(carriers, lengths)
    fit_rates = fit if len(measured.walls) > 1 else _proportional
    constant, per_mac, per_element, by_node, starts = fit_rates(
        measured.walls, measured.nodes, macs, activations
    )
    predicted = constant + macs @ per_mac + activations @ per_element
    factor: Array = np.concatenate([per_mac, per_element])
    return LatencyModel(
        constant=constant,
        products=Products(factor, np.concatenate([costs.macs.axes, carriers.axes])),
        widths=measured.widths,
        measured=measured.walls,
        fitted=predicted,
        error=float(np.abs(predicted / measured.walls - 1).max()),
        by_node=by_node,
        starts=dict(zip(costs.nodes, starts.tolist(), strict=True)),
    )


def _terms_at(products: Products, lengths: Sequence[Ints]) -> Floats:
    """Values of the terms (levels, terms) at several vectors of axis lengths."""
    values = np.asarray([Ledger.terms(products, n) for n in lengths], float)
    return values.reshape(len(lengths), -1)


def level_widths(
    coupling: Coupling,
    ladder: Sequence[Ints],
    *,
    shares: Sequence[float] = SHARES,
    mixed: int = MIXED,
    seed: int = 0,
) -> Ints:
    """Chooses the widths to measure: for each share the nearest candidates, then random candidates.

    Args:
        coupling: The coupling of the model.
        ladder: Candidate widths of each group.
        shares: Shares of the full widths.
        mixed: Number of random vectors.
        seed: Seed of these.

    Returns:
        Different vectors of widths (levels, groups).
    """
    full = full_widths(coupling)
    rng = np.random.default_rng(seed)
    candidates = [np.asarray(widths, np.int64) for widths in ladder]
    levels: list[tuple[int, ...]] = []
    for share in shares:
        nearest = [
            widths[np.argmin(np.abs(widths - share * whole))]
            for widths, whole in zip(candidates, full, strict=True)
        ]
        levels.append(tuple(int(width) for width in nearest))
    for _ in range(mixed):
        levels.append(tuple(int(rng.choice(widths)) for widths in candidates))
    different = list(dict.fromkeys(levels))
    return np.asarray(different, np.int64).reshape(len(different), len(full))


def first_units(coupling: Coupling, widths: Ints) -> Bools:
    """Keep mask of the first units of every group; the choice of units does not matter for time.

    Args:
        coupling: The coupling of the model.
        widths: Number of units to keep in each group (groups,).

    Returns:
        A keep mask (n_units,).
    """
    keep = np.zeros(coupling.n_units, bool)
    for group, width in zip(coupling.groups, widths, strict=True):
        keep[group.units[:width]] = True
    return keep


class Rates(NamedTuple):
    """Coefficients of the latency model.

    Attributes:
        constant: Seconds that do not depend on widths.
        per_mac: Seconds per MAC of each linear node (nodes,).
        per_element: Seconds per element of each node's activation (nodes,).
        by_node: False if all nodes share one rate.
        starts: Seconds in ``constant`` of each linear node (nodes,).
    """

    constant: float
    per_mac: Floats
    per_element: Floats
    by_node: bool
    starts: Floats


def fit(
    walls: Floats,
    nodes: Floats | None,
    macs: Floats,
    activations: Floats,
) -> Rates:
    """Fits the coefficients by non-negative least squares of relative errors.

    Args:
        walls: Seconds of whole runs (levels,).
        nodes: Seconds of the linear nodes (levels, nodes); None if unknown.
        macs: MACs of the linear nodes (levels, nodes).
        activations: Elements of their activations (levels, nodes).

    Returns:
        The coefficients.
    """
    n_nodes = macs.shape[1]
    ones = np.ones(len(walls))
    total_activation = activations.sum(axis=1)
    if nodes is None or not nodes.any():
        constant, per_mac, per_element = _solve(
            walls,
            walls,
            ones,
            macs.sum(axis=1),
            total_activation,
        )
        rates = np.full(n_nodes, per_mac), np.full(n_nodes, per_element)
        return Rates(constant, *rates, False, np.zeros(n_nodes))
    coefficients = np.asarray(
        [_solve(walls, nodes[:, n], ones, macs[:, n], activations[:, n]) for n in range(n_nodes)]
    )
    other_time = np.maximum(walls - nodes.sum(axis=1), 0)
    constant, per_element = _solve(walls, other_time, ones, total_activation)
    return Rates(
        constant=constant + float(coefficients[:, 0].sum()),
        per_mac=coefficients[:, 1],
        per_element=coefficients[:, 2] + per_element,
        by_node=True,
        starts=coefficients[:, 0],
    )


def _proportional(
    walls: Floats,
    nodes: Floats | None,
    macs: Floats,
    activations: Floats,
) -> Rates:
    """Coefficients from times at one vector of widths: linear nodes by MACs, all other time by activations."""
    if nodes is None or not nodes.any():
        rate = float(walls[0] / max(macs[0].sum(), 1))
        none = np.zeros(macs.shape[1])
        return Rates(0.0, np.full(macs.shape[1], rate), none, False, none)
    per_mac: Floats = nodes[0] / np.maximum(macs[0], 1)
    rest = max(float(walls[0] - nodes[0].sum()), 0.0)
    rate = rest / max(float(activations[0].sum()), 1.0)
    return Rates(0.0, per_mac, np.full(macs.shape[1], rate), True, np.zeros(macs.shape[1]))


def _solve(scale: Floats, target: Floats, *columns: Floats) -> list[float]:
    """Non-negative coefficients of ``target`` on ``columns``, each row weighted by 1 / ``scale``."""
    from scipy.optimize import nnls  # imports much of scipy, which only latency budgets need

    matrix = np.stack(columns, axis=1) / scale[:, None]
    column_scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    scaled, _ = nnls(matrix / column_scale, target / scale)
    return [float(value) for value in scaled / column_scale]


def _activations(model: Model, costs: Ledger) -> Products:
    """Output (or input) of each linear node, as products of the axes of the ledger."""
    nodes = {node.name: node for node in model.every}
    axes = np.full_like(costs.macs.axes, -1)
    for n, name in enumerate(costs.nodes):
        node = nodes[name]
        spec = lookup(node.domain, node.op, node.version)
        assert spec is not None
        assert spec.cost is not None
        factors = spec.cost(node, model.shapes)
        # The factors of the MACs that are axes of the first tensor among them.
        tensor = factors[0][0]
        own = [i for i, (other, _) in enumerate(factors) if other == tensor]
        axes[n, : len(own)] = costs.macs.axes[n, own]
    return Products(np.ones(len(axes), np.int64), axes)


# ------------------------------------------------------------------------------------------------------- kernels

Kernels = dict[str, tuple[str, float]]
"""Operator and seconds of one run, by kernel name."""


def _run(
    protos: Sequence[onnx.ModelProto],
    feeds: Sequence[Mapping[str, Array]],
    device: str,
    *,
    threads: int | None,
    seconds: float,
    seed: int,
) -> tuple[Floats, list[Kernels]]:
    """Seconds of a whole run, and kernel times, of every model.

    Whole runs are timed in sessions without profiling. Models that are too large to load twice are timed with it: their
    runs take so long that profiling does not matter.
    """
    load_twice = sum(size(proto) for proto in protos) < PLAIN_BYTES
    with atomic_files.scratch() as folder:
        profiled = [
            Session(proto, device, threads, profile=f"{folder}/{i}", spin=True)
            for i, proto in enumerate(protos)
        ]
        sessions = list(profiled)
        if load_twice:
            sessions += [Session(proto, device, threads, spin=True) for proto in protos]
        calls = [caller(session, feeds) for session in sessions]
        runs, _ = interleave(calls, seconds, MAX_ROUNDS, seed)
        events = [json.loads(Path(session.end_profile()).read_text()) for session in profiled]
    walls = np.asarray([quiet(times) for times in runs[-len(protos) :]])
    kernels = [_scaled_to(parse(e), wall) for e, wall in zip(events, walls, strict=True)]
    return walls, kernels


def _scaled_to(kernels: Kernels, wall: float) -> Kernels:
    """Scales kernel times down to the run without profiling: recording adds some microseconds to each."""
    total = sum(spent for _, spent in kernels.values())
    factor = min(1.0, wall / total) if total else 1.0
    return {name: (op, spent * factor) for name, (op, spent) in kernels.items()}


def parse(events: Sequence[Mapping[str, Any]], skip: int = WARM_RUNS) -> Kernels:
    """Reads kernel times from a profile of ONNX Runtime.

    Args:
        events: The recorded events.
        skip: Number of leading runs to leave out.

    Returns:
        Operator and seconds of each kernel, as ``quiet`` over the other runs; empty if there are none.
    """
    runs: list[dict[str, float]] = []
    current: dict[str, float] = defaultdict(float)
    operators: dict[str, str] = {}
    for event in events:
        name = str(event["name"])
        if event["cat"] == "Node" and name.endswith("_kernel_time"):
            kernel = name.removesuffix("_kernel_time")
            operators[kernel] = str(event.get("args", {}).get("op_name", ""))
            current[kernel] += float(event["dur"]) * 1e-6
        elif event["cat"] == "Session" and name == "model_run":
            runs.append(dict(current))
            current.clear()
    counted = runs[skip:]
    if not counted:
        return {}
    result: Kernels = {}
    for kernel, operator in operators.items():
        times = [run.get(kernel, 0.0) for run in counted]
        result[kernel] = (operator, float(quiet(times)))
    return result


def assign(
    proto: onnx.ModelProto,
    names: Sequence[str],
    kernels: Kernels,
    macs: Floats,
) -> Floats:
    """Distributes kernel times over linear nodes.

    A kernel is named after a node, or after the output of the last node that was fused into it. From there the search
    goes backwards to linear nodes that no kernel names. Nodes that share a kernel share its time by MACs. The kernels
    of linear operators that match no node are distributed over the nodes without a kernel in the same way.

    Args:
        proto: The model that ran.
        names: Names of its linear nodes.
        kernels: Operator and seconds of each kernel.
        macs: MACs of the linear nodes (nodes,).

    Returns:
        Seconds of the linear nodes (nodes,).
    """
    graph = _KernelGraph(proto, names)
    times = np.zeros(len(names))
    anchors: dict[int, float] = defaultdict(float)
    unmatched = 0.0
    for kernel, (operator, spent) in kernels.items():
        if not any(part in operator for part in kinds.LINEAR_KERNELS):
            continue
        anchor = graph.anchor(kernel)
        if anchor is None:
            unmatched += spent
        else:
            anchors[anchor] += spent
    free = set(graph.linear) - set(anchors)
    for anchor, spent in sorted(anchors.items()):
        if anchor in graph.linear:
            owners = [anchor]
        else:
            owners = graph.behind(anchor, set(anchors), free)
        free -= set(owners)
        if owners:
            _share(times, [graph.linear[i] for i in owners], spent, macs)
        else:
            unmatched += spent
    _share(times, [graph.linear[i] for i in sorted(free)], unmatched, macs)
    return times


def _share(
    times: Floats,
    nodes: Sequence[int],
    spent: float,
    macs: Floats,
) -> None:
    """Adds a time to several nodes, in proportion to their MACs."""
    if nodes and spent:
        weights = np.asarray(macs[list(nodes)], float)
        times[list(nodes)] += spent * weights / max(weights.sum(), 1e-300)


class _KernelGraph:
    """A graph, searched for the linear nodes behind a kernel.

    Attributes:
        linear: Index among the linear nodes, by the position of a node.
    """

    def __init__(self, proto: onnx.ModelProto, names: Sequence[str]) -> None:
        self._nodes = proto.graph.node
        self._producer: dict[str, int] = {}
        for i, node in enumerate(self._nodes):
            self._producer.update((tensor, i) for tensor in node.output if tensor)
        self._by_name = {node.name: i for i, node in enumerate(self._nodes)}
        self.linear: dict[int, int] = {}
        for k, name in enumerate(names):
            if name in self._by_name:
                self.linear[self._by_name[name]] = k

    def anchor(self, kernel: str) -> int | None:
        """Position of the node that a kernel is named after.

        The name is that of a node, that of a tensor which a node computes, or begins with the name of a node.
        """
        label = _NUMBERED.sub("", kernel)
        unfused = label.removeprefix("fused ")
        for text in (label, unfused, label.removesuffix("_nchwc")):
            for positions in (self._by_name, self._producer):
                if text in positions:
                    return positions[text]
        ends = [
            i for i, c in enumerate(unfused) if c in "/_" and i and unfused[:i] in self._by_name
        ]
        if ends:
            return self._by_name[unfused[: ends[-1]]]
        return None

    def behind(
        self,
        start: int,
        anchors: Set[int],
        free: Set[int],
    ) -> list[int]:
        """Finds the free linear nodes whose results reach a node without passing another kernel.

        Args:
            start: Position of the node.
            anchors: Positions that kernels are named after.
            free: Linear nodes without a kernel so far.
        """
        result: list[int] = []
        seen = {start}
        pending = [start]
        while pending:
            for name in self._nodes[pending.pop()].input:
                i = self._producer.get(name)
                if i is None or i in seen or i in anchors:
                    continue
                seen.add(i)
                if i not in self.linear:
                    pending.append(i)
                elif i in free:
                    result.append(i)
        return result
