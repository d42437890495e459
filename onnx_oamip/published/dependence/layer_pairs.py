"""Pairs of adjacent layers: pooled activations and weights between the channels that a consumer reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from onnx_oamip.core.records import (
    Array,
    Consumer,
    Coupling,
    Floats,
    Ints,
    Model,
)
from onnx_oamip.graph.linear_layers import linear_consumers, matrix
from onnx_oamip.published.dependence.pooled_activations import outlet
from onnx_oamip.published.dependence.requests import Pooled

CONSTANT = 1e-6
"""Standard deviation, relative to the largest value, up to which a column counts as constant."""


@dataclass(frozen=True)
class Pair:
    """One block of one linear consumer: the channels that it reads (parents) and writes (children).

    Attributes:
        consumer: The consumer.
        block: Index of the block of a grouped convolution.
        parents: Pooled activations (samples, p), float32. Columns of one unit (a flattened map) are averaged into one.
        children: Pooled activations (samples, c), float32.
        weight: Mean absolute weight (c, p).
        parent_units: Units of the parents (p,), -1 for channels without one.
        child_units: Units of the children (c,), -1 for channels without one.
    """

    consumer: Consumer
    block: int
    parents: Array
    children: Array
    weight: Floats
    parent_units: Ints
    child_units: Ints


def pairs(model: Model, coupling: Coupling, pooled: Pooled) -> Iterator[Pair]:
    """Iterate over the pairs of layers.

    Args:
        model: The model.
        coupling: Its units and consumers.
        pooled: Pooled activations of both ends of the consumers.

    Yields:
        One pair per block of every linear consumer with pooled activations, in graph order.
    """
    for consumer, layer in linear_consumers(model, coupling):
        inlet = (consumer.data, consumer.axis)
        end = outlet(model, layer)
        if inlet not in pooled.values or end not in pooled.values:
            continue
        # (groups, outputs, inputs)
        weight = np.abs(matrix(layer, model.constants[layer.weight])).mean(axis=3)
        groups, outs, ins = weight.shape
        input_units = coupling.axes[inlet]
        output_units = coupling.axes.get(end, np.full(groups * outs, -1, np.int64))
        for block in range(groups):
            inputs = slice(block * ins, (block + 1) * ins)
            outputs = slice(block * outs, (block + 1) * outs)
            units, averaging = _parents(input_units[inputs])
            parents = pooled.values[inlet][:, inputs]
            if not _is_identity(averaging):
                parents = parents @ averaging.astype(np.float32)
            yield Pair(
                consumer=consumer,
                block=block,
                parents=parents,
                children=pooled.values[end][:, outputs],
                weight=weight[block] @ averaging,
                parent_units=units,
                child_units=output_units[outputs],
            )


def standardise(values: Array) -> Floats:
    """Scale columns to mean 0 and variance 1.

    Args:
        values: Columns of any type.

    Returns:
        Columns in float64; a constant column becomes zeros.
    """
    values = values.astype(np.float64)
    centred = values - values.mean(axis=0)
    deviation = centred.std(axis=0)
    largest = np.abs(values).max(axis=0, initial=0.0)
    constant = deviation <= CONSTANT * (largest + 1e-30)
    scaled = centred / np.where(constant, 1.0, deviation)
    return np.asarray(np.where(constant, 0.0, scaled))


def _parents(labels: Ints) -> tuple[Ints, csr_array]:
    """The unit of every parent, and the matrix (columns, parents) that averages columns of one unit.

    Every pinned column is a parent of its own.
    """
    free = labels >= 0
    beyond_units = int(labels.max(initial=0)) + 1
    ids = np.where(free, labels, beyond_units + np.arange(len(labels)))
    distinct, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    shares = 1.0 / counts[inverse]
    shape = (len(labels), len(distinct))
    averaging = csr_array((shares, (np.arange(len(labels)), inverse)), shape=shape)
    units = np.where(distinct < beyond_units, distinct, -1)
    return units.astype(np.int64), averaging


def _is_identity(averaging: csr_array) -> bool:
    rows, columns = averaging.shape
    return rows == columns and bool((averaging.indices == np.arange(rows)).all())
