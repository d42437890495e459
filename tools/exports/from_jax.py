"""JAX: a Flax network by jax2onnx. Flax keeps the channels last."""

from __future__ import annotations

from pathlib import Path

import jax
import jax2onnx
import numpy as np
import optax
from flax import nnx

from . import digits

PACKAGES = ("jax", "flax", "jax2onnx")
MADE_BY = {"flax-jax2onnx": "jax2onnx.to_onnx"}


class _Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, rngs=rngs)
        self.conv2 = nnx.Conv(16, 24, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(24, rngs=rngs)
        self.dense1 = nnx.Linear(96, 40, rngs=rngs)
        self.dense2 = nnx.Linear(40, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), window_shape=(2, 2), strides=(2, 2))
        x = nnx.max_pool(self.norm2(nnx.relu(self.conv2(x))), window_shape=(2, 2), strides=(2, 2))
        return self.dense2(nnx.relu(self.dense1(x.reshape(x.shape[0], -1))))


def write(folder: Path) -> None:
    """Train a network and export it."""
    network = _Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(network, optax.adam(3e-3), wrt=nnx.Param)
    images, labels = digits.training(folder, 8, 8, 1)

    def loss(network: _Network, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(network(x), y).mean()

    @nnx.jit
    def step(network: _Network, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        optimizer.update(network, nnx.grad(loss)(network, x, y))

    network.train()
    random = np.random.default_rng(0)
    for _ in range(20):
        order = random.permutation(len(images))
        for index in order[: len(order) // 64 * 64].reshape(-1, 64):
            step(network, optimizer, images[index], labels[index])
    network.eval()
    jax2onnx.to_onnx(
        network,
        [("B", 8, 8, 1)],
        return_mode="file",
        output_path=str(folder / "flax-jax2onnx.onnx"),
        input_names=["image"],
        output_names=["logits"],
        opset=21,
    )
