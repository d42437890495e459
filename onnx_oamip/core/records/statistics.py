"""Records of what a run learns: statistics of the calibration data, scores, and losses by width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

from onnx_oamip.core.errors import SettingsError
from onnx_oamip.core.records.graph import (
    Array,
    Axis,
    Floats,
    Ints,
)


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


@dataclass(frozen=True)
class Signal:
    """Absolute signal (``signals.collect``): how much of it every channel brings to what reads it.

    ``means``: axis -> (C,) mean of |x| over samples and positions; 0 where a channel never says anything.
    ``kernels``: convolution -> (groups, outputs, inputs) mean over samples of the Frobenius norm of one kernel's
    absolute map, where it was asked for. ``joins``: sum of two branches -> (its channel axis, norms (2, C) of the
    branches' mean absolute maps).
    """

    means: Mapping[Axis, Floats]
    kernels: Mapping[str, Floats]
    joins: Mapping[str, tuple[int, Floats]]


@dataclass(frozen=True)
class Pooled:
    """Activations pooled over positions: ``values`` maps an axis to (samples, channels) float32, rows the same samples.

    ``taps``: by convolution (samples, channels, taps), what every tap of its kernel reads on average over the output's
    positions. ``labels`` (samples,): classes, where they are known.
    """

    values: Mapping[Axis, Array]
    taps: Mapping[str, Array]
    labels: Ints | None
    samples: int


class Request(Enum):
    """A kind of statistic of the calibration samples that an importance method or a stage asks for.

    ``MOMENTS``: mean and mean square of every channel that a consumer reads. ``COVARIANCE``: covariance of the input of
    every linear node. ``CLASS_SAMPLES``: a few correctly classified samples of every class with all activations.
    ``ABSOLUTE_ACTIVATIONS``: mean absolute activation of every channel that a consumer reads, and norms at residual
    sums. ``POOLED_ACTIVATIONS``: activations of many samples, averaged over positions.
    """

    MOMENTS = "moments"
    COVARIANCE = "covariance"
    CLASS_SAMPLES = "class samples"
    ABSOLUTE_ACTIVATIONS = "absolute activations"
    POOLED_ACTIVATIONS = "pooled activations"


@dataclass(frozen=True)
class Statistics:
    """Statistics of the calibration samples, by the request that they answer.

    Reading a statistic that was not requested raises SettingsError: an empty answer would look like a measured one.
    """

    answers: Mapping[Request, Any]
    samples: int
    device: str
    seconds: float = 0.0

    @property
    def moments(self) -> Mapping[Axis, Moments]:
        """Moments by consumed axis."""
        return cast("Mapping[Axis, Moments]", self._answer(Request.MOMENTS))

    @property
    def grams(self) -> Mapping[str, Gram]:
        """Covariance matrices by linear node."""
        return cast("Mapping[str, Gram]", self._answer(Request.COVARIANCE))

    @property
    def images(self) -> Images | None:
        """Samples of every class; None for a model without an output of shape (samples, classes)."""
        return cast("Images | None", self._answer(Request.CLASS_SAMPLES))

    @property
    def signal(self) -> Signal:
        """Mean absolute activations."""
        return cast("Signal", self._answer(Request.ABSOLUTE_ACTIVATIONS))

    @property
    def pooled(self) -> Pooled:
        """Activations averaged over positions."""
        return cast("Pooled", self._answer(Request.POOLED_ACTIVATIONS))

    def _answer(self, request: Request) -> Any:
        if request not in self.answers:
            raise SettingsError(
                f"an importance method reads the statistic '{request.value}' without requesting it; add "
                f"Request.{request.name} to the `requires` of its Method."
            )
        return self.answers[request]


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
