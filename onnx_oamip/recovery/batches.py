"""Batches of training: samples that are changed at random, with the answers of the original.

Where the answers to a fixed number of changed versions of all samples fit into memory, they are computed once and used
again; otherwise every batch is changed and answered anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnx_oamip.core.records import Array, Ints, Model
from onnx_oamip.data.augmentation import Augment
from onnx_oamip.data.dataset import Samples
from onnx_oamip.graph.outputs import with_outputs
from onnx_oamip.graph.runtime import Session
from onnx_oamip.recovery import parts
from onnx_oamip.recovery.engine import Engine, as_input, as_tensor, is_supported
from onnx_oamip.recovery.features import Feature
from onnx_oamip.recovery.losses import kept_channels
from onnx_oamip.recovery.operators.calls import Tensor

Given: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]

VERSIONS = 8
"""Changed versions of every sample that are held with their answers."""
LEAST_VERSIONS = 4
"""Fewest of them; with fewer, a model would learn the changes by heart, so that none are held."""


@dataclass(frozen=True)
class Batch:
    """Samples of one step.

    Attributes:
        fed: Graph inputs, and tensors that ONNX Runtime computes, by name.
        truth: Tensors of the original by name; of features, the channels that the pruned model has.
    """

    fed: Mapping[str, Tensor]
    truth: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for side in (self.fed, self.truth) for value in side.values())


class Teacher:
    """Answers of the original: tensors of the objective and features.

    On a GPU torch computes them, where it can; elsewhere ONNX Runtime does.
    """

    def __init__(
        self,
        original: Model,
        tensors: Sequence[str],
        features: Sequence[Feature],
        *,
        device: str,
        runtime_device: str,
    ) -> None:
        """Prepare the original.

        Args:
            original: The original.
            tensors: Tensors to compute.
            features: Those of them of which the pruned model may have fewer channels.
            device: Device of torch.
            runtime_device: Device of ONNX Runtime.
        """
        self._device = device
        self._tensors = list(tensors)
        self._features = {feature.tensor: feature for feature in features}
        nodes = parts.ancestors(original, tensors)
        self._engine = None
        self._session = None
        if device != "cpu" and all(is_supported(node) for node in nodes):
            self._engine = Engine(original, self._tensors, device=device)
        else:
            proto = with_outputs(original, self._tensors)
            self._session = Session(proto, runtime_device, what="the original")

    def answers(self, feed: Mapping[str, Array]) -> dict[str, Tensor]:
        """Compute the tensors of the original.

        Args:
            feed: Graph inputs by name.

        Returns:
            Tensors by name, without the channels that the pruned model lacks.
        """
        if self._engine is not None:
            found = self._engine.run(fed(feed, self._device))  # no leaves, so no graph of gradients
        else:
            assert self._session is not None
            values = self._session.run(feed, self._tensors)
            found = [as_tensor(value, self._device) for value in values]
        answers = dict(zip(self._tensors, found, strict=True))
        for name, feature in self._features.items():
            answers[name] = kept_channels(feature, answers[name])
        return answers


class Batches:
    """Endless batches of samples in random order.

    Attributes:
        held_bytes: Bytes of batches that are held to be used again, 0 where none are.
    """

    def __init__(
        self,
        samples: Samples,
        teacher: Teacher,
        given: Given | None,
        *,
        size: int,
        augment: Augment | None,
        device: str,
        memory: int,
        seed: int,
    ) -> None:
        """Prepare the batches, and decide from the size of one whether they are held.

        Args:
            samples: Samples to train on.
            teacher: The original.
            given: Computes the tensors that are fed besides the graph inputs, None where there are none.
            size: Samples of a batch.
            augment: Changes of feeds, or None.
            device: Device of torch.
            memory: Upper bound on the bytes of batches that are held.
            seed: Seed of the order of samples and of their changes.
        """
        self._samples = samples
        self._teacher = teacher
        self._given = given
        self._size = 1 if samples.whole else min(size, samples.count)
        self._augment = augment
        self._device = device
        self._rng = np.random.default_rng(seed)
        self._held: list[Batch] = []
        count = samples.count // self._size
        each = next(self.unchanged()).nbytes
        rounds = _rounds_held(count * each, memory, is_changed=augment is not None)
        self.held_bytes = rounds * count * each
        self._stream = self._endless(rounds * count)

    def __next__(self) -> Batch:
        """The next batch."""
        return next(self._stream)

    def unchanged(self) -> Iterator[Batch]:
        """Make batches of the samples in order and as they are.

        Yields:
            The batches of one round.
        """
        for _, feed in self._samples.batches(self._size):
            yield self._answered(feed)

    def _endless(self, held: int) -> Iterator[Batch]:
        """Batches of new changes; after ``held`` of them, if any are, these again in random order."""
        for index in self._indices():
            if held and len(self._held) == held:
                break
            feed: Mapping[str, Array] = self._samples.feed(index)
            if self._augment is not None:
                feed = self._augment(feed, self._rng)
            batch = self._answered(feed)
            if held:
                self._held.append(batch)
            yield batch
        while True:
            for place in self._rng.permutation(held):
                yield self._held[place]

    def _indices(self) -> Iterator[Ints]:
        """Indices of batches, in another random order in every round over the samples."""
        count = self._samples.count
        while True:
            order = self._rng.permutation(count)
            for first in range(0, count - self._size + 1, self._size):
                yield order[first : first + self._size]

    def _answered(self, feed: Mapping[str, Array]) -> Batch:
        more = {} if self._given is None else self._given(feed)
        return Batch(fed({**feed, **more}, self._device), self._teacher.answers(feed))


def _rounds_held(each: int, memory: int, *, is_changed: bool) -> int:
    """Rounds over the samples, of so many bytes each, that are held; 0 if too few fit."""
    wanted, least = (VERSIONS, LEAST_VERSIONS) if is_changed else (1, 1)
    rounds = min(wanted, memory // max(each, 1))
    return rounds if rounds >= least else 0


def fed(feed: Mapping[str, Array], device: str) -> dict[str, Tensor]:
    """Copy arrays to torch.

    Args:
        feed: Arrays by name.
        device: Device of torch.

    Returns:
        Tensors by name.
    """
    return {name: as_input(value, device) for name, value in feed.items()}
