"""Options of the objective: the terms by which a pruned model is judged."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from onnx_oamip.core.options.validation import Options
from onnx_oamip.core.options.values import Name, Shown, Statements, kind_and_weight


class ObjectiveOptions(Options):
    """Statements about the outputs, where the structure of a model does not say what they hold."""

    heading: ClassVar[str] = "What must be kept"

    task: Literal["classes", "binary", "values", "embedding"] | None = Field(
        None,
        description="What the model's output holds: scores of classes, independent decisions, values (regression, "
        "boxes, images, audio), or vectors that are compared by their angle. Default: as the structure and the labels "
        "say; what they leave open is named on stderr.",
    )
    outputs: Statements = Field(
        {},
        description="What single outputs hold: a kind as for `task`, or ignore, and its weight in the objective, 1 by "
        "default.",
    )
    metric: Annotated[Name, Shown(metavar="MODULE:FUNCTION")] | None = Field(
        None,
        description="Your own number, larger for a better model: a function of the outputs by name and the labels, or "
        "of the path of a model file if its only parameter is called path. `max_drop` is then in its units.",
    )

    @property
    def kinds(self) -> dict[str, tuple[str, float]]:
        """(kind, weight) by output or term, as ``outputs`` says."""
        return {name: kind_and_weight(text) for name, text in self.outputs.items()}
