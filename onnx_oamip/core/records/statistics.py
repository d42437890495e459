"""Records of measurements: statistics of the calibration samples, scores, and losses by width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records.graph import (
    Array,
    Axis,
    Floats,
    Ints,
)

if TYPE_CHECKING:
    from onnx_oamip.statistics.context import Context

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of one tensor along one axis.

    Attributes:
        mean: Mean per channel (C,).
        mean_square: Mean square per channel (C,).
        count: Number of values per channel.
    """

    mean: Floats
    mean_square: Floats
    count: int


@dataclass(frozen=True)
class Gram:
    """Covariance of the input of one linear node, per block of a grouped convolution.

    Each of the d columns stands for ``fold`` inputs. With a fold above 1 the covariance is that of equal places of a
    channel, averaged, and places count as outputs.

    A covariance of n rows has at most rank n, so that of a node with many columns is kept as a factor.

    Attributes:
        matrix: Covariance (groups, d, d); None if it is kept as a factor.
        mean: Mean (groups, d).
        columns: Inputs of each column (d, fold), as channel * taps + tap within a block.
        taps: Taps of the kernel; 1 for products.
        rows: Number of rows that it was computed from.
        factor: F (groups, rows, d) with covariance ``F' F``; None if the matrix is kept.
        uses: Names of the nodes that share their weight, in graph order: the covariance is that of the rows of all of
            them. Empty for a weight of one node.
    """

    matrix: Floats | None
    mean: Floats
    columns: Ints
    taps: int
    rows: int
    factor: Floats | None = None
    uses: tuple[str, ...] = ()

    @property
    def values(self) -> Floats:
        """The matrix, or the factor in its place."""
        if self.factor is None:
            values = self.matrix
        else:
            values = self.factor
        assert values is not None
        return values


@dataclass(frozen=True)
class ClassHead:
    """A classification head on chosen samples.

    Attributes:
        logits: Name of the tensor with the logits.
        labels: Class of every row of the logits (feeds, rows), -1 for rows that do not count.
        weight: Weight of the head's loss beside those of the other heads.
    """

    logits: str
    labels: Ints
    weight: float = 1.0


@dataclass(frozen=True)
class Images:
    """A few samples of every class with all activations.

    Attributes:
        feeds: Inputs of the model.
        labels: Class of every row of the first head's logits (feeds, rows), -1 for rows that do not count.
        logits: Name of the tensor with the logits of the first head.
        activations: By tensor (feeds, *its shape for one feed). Empty if there are too many to keep.
        notes: Remarks for the report.
        others: Further heads.
        weight: Weight of the first head's loss.
    """

    feeds: tuple[Mapping[str, Array], ...]
    labels: Ints
    logits: str
    activations: Mapping[str, Array]
    notes: tuple[str, ...] = ()
    others: tuple[ClassHead, ...] = ()
    weight: float = 1.0

    @property
    def heads(self) -> tuple[ClassHead, ...]:
        """All classification heads."""
        return (ClassHead(self.logits, self.labels, self.weight), *self.others)

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the logits of all heads."""
        return frozenset(head.logits for head in self.heads)


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """A statistic of the calibration samples that an importance method or a stage reads.

    Requests are compared by name: a statistic is collected once in a run, no matter how many requests name it.

    Attributes:
        name: Name of the statistic. A package prefixes its own name, so that names of different packages differ.
        collect: Function that collects the statistic from the context of a run.
    """

    name: str
    collect: Callable[[Context], T] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Statistics:
    """Statistics of the calibration samples, by the request that each answers.

    ``statistics[request]`` is the answer to a request.

    Attributes:
        answers: The statistic of every request.
        samples: Number of calibration samples.
        device: Device that they were collected on.
        seconds: Time that it took.
    """

    answers: Mapping[Request[Any], Any]
    samples: int
    device: str
    seconds: float = 0.0

    def __getitem__(self, request: Request[T]) -> T:
        """Look up the answer to a request.

        Args:
            request: The request.

        Returns:
            The statistic.

        Raises:
            SettingsError: It was not requested; an empty answer would look like a measured one.
        """
        return cast("T", self._named(request.name))

    @property
    def moments(self) -> Mapping[Axis, Moments]:
        """Moments by consumed axis, for a rule that is registered without requests."""
        return cast("Mapping[Axis, Moments]", self._named("moments"))

    def get(self, request: Request[T], default: T) -> T:
        """Look up the answer to a request that a rule can do without.

        Args:
            request: The request.
            default: The answer if it was not requested.

        Returns:
            The statistic.
        """
        return cast("T", self.answers.get(request, default))

    def _named(self, name: str) -> Any:
        for request, answer in self.answers.items():
            if request.name == name:
                return answer
        raise SettingsError(
            f"an importance method reads the statistic '{name}' without requesting it; add its request to the "
            "`requires` of its Method."
        )


@dataclass(frozen=True)
class Scores:
    """Importance of every unit.

    Attributes:
        method: Name of the importance method.
        values: One number per unit (n_units,); larger means keep.
        programs: One record per program that was solved for the scores.
        notes: Remarks for the report.
        others: Further scores by name, whose orders of removal are measured against this one (see
            ``sensitivity.choose``).
        draws: Scores on each draw of the samples (draws, n_units), whose mean are the values; None for a single one.
    """

    method: str
    values: Floats
    programs: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    others: Mapping[str, Floats] = field(default_factory=dict)
    draws: Floats | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Loss of the model as a function of the width of one group.

    Attributes:
        widths: Measured widths (levels,), ascending; the last is the full width.
        loss: Loss at each width (levels,), never rising with width.
    """

    widths: Ints
    loss: Floats
