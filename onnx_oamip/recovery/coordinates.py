"""Coordinates of weights: changes are written in directions along which the inputs of the layer vary equally.

Inputs of a layer vary much along a few directions and little along most. Steps of one size in all elements of the
weight change the output almost only along the few, in which the refit left no error: the loss rises first, and the
other directions hardly move. With W = W0 + U R, where R is the inverse square root of the second moments of the inputs,
a step of U changes the output by the same amount along all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from onnx_oamip.core.records import Array, Floats, Ints, Model
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.im2col import data_rows, pick
from onnx_oamip.graph.linear_layers import site
from onnx_oamip.graph.ops import Site
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.recovery.operators.calls import Tensor

MOST_COLUMNS = 2048
"""Most columns of a matrix whose moments are found; the weight of a wider layer is changed element by element."""
BATCHES = 8
"""Batches on which the moments are found."""
ROWS_PER_COLUMN = 4
"""Rows of inputs per column, over all batches."""
LEAST_ROWS = 1024
"""Fewest of them."""
DAMPING = 0.03
"""Share of the mean moment that is added to all, so that directions without inputs do not move without bound."""


@dataclass(frozen=True)
class Coordinates:
    """Coordinates of the change of one weight.

    Attributes:
        places: Flat indices of the elements of the weight as a matrix (groups, outputs, columns).
        root: Inverse square root of the second moments of the columns (groups, columns, columns).
    """

    places: Tensor
    root: Tensor

    def gradient(self, gradient: Tensor) -> Tensor:
        """Compute the gradient with respect to the coordinates.

        Args:
            gradient: Gradient with respect to the weight.

        Returns:
            (groups, outputs, columns).
        """
        return gradient.reshape(-1)[self.places] @ self.root

    def change(self, coordinates: Tensor, like: Tensor) -> Tensor:
        """Compute the change of the weight.

        Args:
            coordinates: (groups, outputs, columns).
            like: A tensor of the shape of the weight.

        Returns:
            The change, in the shape of the weight.
        """
        flat = torch.empty_like(like).reshape(-1)
        flat[self.places] = coordinates @ self.root
        return flat.reshape(like.shape)

    def coordinates(self, change: Tensor) -> Tensor:
        """Compute the coordinates of a change: the inverse of :meth:`change`.

        Args:
            change: Change of the weight.

        Returns:
            (groups, outputs, columns).
        """
        matrix = change.reshape(-1)[self.places]
        return torch.linalg.solve(self.root, matrix, left=False)


def find(
    model: Model,
    weights: Collection[str],
    samples: Samples,
    *,
    batch: int,
    device: str,
    runtime_device: str,
    seed: int,
) -> dict[str, Coordinates]:
    """Find the coordinates of the weights of linear layers.

    Args:
        model: The pruned model.
        weights: Initialisers that are trained.
        samples: Samples to train on.
        batch: Samples of one run.
        device: Device of torch.
        runtime_device: Device of ONNX Runtime.
        seed: Seed of the choice of rows.

    Returns:
        Coordinates by initialiser. Weights of more than ``MOST_COLUMNS`` columns, weights that a node transposes or
        reshapes, and those that two layers read in different forms have none.
    """
    layers = _layers(model, weights)
    moments = _moments(
        model, layers, samples, batch=batch, runtime_device=runtime_device, seed=seed
    )
    return {
        name: Coordinates(
            places=torch.from_numpy(_places(uses[0], model)).to(device),
            root=torch.from_numpy(_inverse_root(moments[name]).astype(_computed(model, name))).to(
                device
            ),
        )
        for name, uses in layers.items()
        if name in moments
    }


def _computed(model: Model, weight: str) -> np.dtype[Any]:
    """Type in which a weight is trained: float32, or float64 where it is stored in that."""
    return np.promote_types(np.float32, model.dtypes[weight])


def _layers(model: Model, weights: Collection[str]) -> dict[str, list[Site]]:
    """Linear layers by the initialiser of their weight."""
    found: dict[str, list[Site]] = defaultdict(list)
    for node in model.nodes:
        here = site(node, model.constants)
        if here is not None and here.weight in weights:
            found[here.weight].append(here)
    return {
        name: uses
        for name, uses in found.items()
        if _columns(uses[0], model) <= MOST_COLUMNS
        and all(np.array_equal(_places(uses[0], model), _places(use, model)) for use in uses[1:])
    }


def _columns(layer: Site, model: Model) -> int:
    _, _, inputs, taps = layer.rules.matrix_shape(layer, model.shapes[layer.weight])
    return inputs * taps


def _places(layer: Site, model: Model) -> Ints:
    """Flat indices of the elements of a weight as a matrix (groups, outputs, columns)."""
    shape = model.shapes[layer.weight]
    index = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)  # exact up to 2^53
    matrix = layer.rules.matrix(layer, index)
    return matrix.reshape(*matrix.shape[:2], -1).astype(np.int64)


def _moments(
    model: Model,
    layers: Mapping[str, Sequence[Site]],
    samples: Samples,
    *,
    batch: int,
    runtime_device: str,
    seed: int,
) -> dict[str, Floats]:
    """Second moments of the columns of every weight (groups, columns, columns); none where they are not finite."""
    ports = {port.name for port in model.inputs}
    every = {use.data: None for uses in layers.values() for use in uses}
    outputs = {use.node.outputs[0]: None for uses in layers.values() for use in uses if use.spatial}
    names = [name for name in {**every, **outputs} if name not in ports]
    session = None
    if names:
        session = Session(with_outputs(model, names), runtime_device, what="the pruned model")
    rng = np.random.default_rng(seed)
    sums: dict[str, Floats] = {}
    for _, feed in islice(samples.batches(batch), BATCHES):
        values = dict(feed)
        if session is not None:
            values.update(zip(names, session.run(feed, names), strict=True))
        for name, uses in layers.items():
            wanted = max(ROWS_PER_COLUMN * _columns(uses[0], model), LEAST_ROWS)
            for use in uses:
                rows = _rows(use, values, -(-wanted // (BATCHES * len(uses))), rng)
                sums[name] = sums.get(name, 0.0) + rows.transpose(1, 2, 0) @ rows.transpose(1, 0, 2)
    return {name: total for name, total in sums.items() if np.isfinite(total).all()}


def _rows(
    layer: Site, values: Mapping[str, Array], wanted: int, rng: np.random.Generator
) -> Floats:
    """Some inputs of a layer (rows, groups, columns)."""
    data = values[layer.data]
    if layer.spatial:
        output = values[layer.node.outputs[0]].shape
        count = len(data) * int(np.prod(output[2:]))
    else:
        output = ()
        count = data.size // data.shape[layer.data_axis]
    return data_rows(layer, data, pick(count, wanted, rng), output)


def _inverse_root(moments: Floats) -> Floats:
    """Inverse square root of damped moments (groups, columns, columns), in units of their mean."""
    values, vectors = np.linalg.eigh(moments)
    mean = values.mean(axis=1, keepdims=True)
    mean[mean <= 0] = 1.0
    damped = np.maximum(values, 0) / mean + DAMPING
    root: Floats = (vectors / np.sqrt(damped)[:, None, :]) @ vectors.transpose(0, 2, 1)
    return root
