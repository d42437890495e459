"""Records of what a run learns: statistics of the calibration data, scores, and losses by width."""

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
    """Streaming moments of one tensor along one axis: per-channel mean and mean square, and the values seen."""

    mean: Floats
    mean_square: Floats
    count: int


@dataclass(frozen=True)
class Gram:
    """Covariance of what one linear node reads, per block: ``matrix`` (groups, d, d), ``mean`` (groups, d).

    ``columns`` (d, fold): the inputs (channel * taps + tap, within a block) that each of the d columns stands for. With
    a fold above 1 the covariance is that of equal places of a channel, averaged, and places count as outputs.
    """

    matrix: Floats
    mean: Floats
    columns: Ints
    taps: int
    rows: int


@dataclass(frozen=True)
class Images:
    """A few chosen samples and all they do: ``activations`` maps a tensor to (feeds, *its shape for one feed).

    ``labels`` (feeds, rows): the class of every row of the ``logits`` tensor, -1 where a row does not count.
    """

    feeds: tuple[Mapping[str, Array], ...]
    labels: Ints
    logits: str
    activations: Mapping[str, Array]
    notes: tuple[str, ...] = ()


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
    """One importance per unit: larger means keep. ``method`` names where they come from.

    ``programs``: one record for every program solved for them; ``notes``: what a reader should know about them;
    ``others``: scores by name whose orders are worth a measurement beside this one (see ``sensitivity.choose``).
    """

    method: str
    values: Floats
    programs: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    others: Mapping[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Sensitivity:
    """``widths`` (levels,) ascending, last the full width; ``loss`` (levels,), never rising with width."""

    widths: Ints
    loss: Floats
