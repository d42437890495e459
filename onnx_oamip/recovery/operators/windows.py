"""Strides, dilations and padding of operators that slide a window."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812

from onnx_oamip.recovery.operators.calls import Call, Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """A sliding window; ``begin`` and ``end``: padding, every list has one number per spatial axis.

    ``extra``: positions behind the padding that the last window of ``ceil_mode`` reaches.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    extra: list[int]

    @property
    def is_symmetric(self) -> bool:
        """True if torch's own padding describes it."""
        return self.begin == self.end and not any(self.extra)

    def padded(self, x: Tensor, value: float = 0.0, *, ends: list[int] | None = None) -> Tensor:
        """Pad the spatial axes.

        Args:
            x: Tensor (samples, channels, ...).
            value: Value of the padding.
            ends: Padding behind; by default that of the window with what ``ceil_mode`` reaches.

        Returns:
            The padded tensor.
        """
        behind = ends or [end + extra for end, extra in zip(self.end, self.extra, strict=True)]
        sizes: list[int] = []
        for before, after in zip(reversed(self.begin), reversed(behind), strict=True):
            sizes += [before, after]
        return F.pad(x, sizes, value=value) if any(sizes) else x


def window(call: Call, x: Tensor, kernel: list[int]) -> Window:
    """Read the window of a node.

    Args:
        call: The node.
        x: Its data (samples, channels, ...).
        kernel: Lengths of the window.

    Returns:
        The window with explicit padding.
    """
    rank = len(kernel)
    strides = [int(n) for n in call.attr("strides", [1] * rank)]
    dilations = [int(n) for n in call.attr("dilations", [1] * rank)]
    pads = [int(n) for n in call.attr("pads", [0] * 2 * rank)]
    begin, end = pads[:rank], pads[rank:]
    mode = call.attr("auto_pad", "NOTSET")
    extra = [0] * rank
    for axis in range(rank):
        length = int(x.shape[2 + axis])
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        if mode.startswith("SAME"):
            steps = -(-length // strides[axis])
            total = max((steps - 1) * strides[axis] + reach - length, 0)
            smaller, larger = total // 2, total - total // 2
            begin[axis], end[axis] = (
                (smaller, larger) if mode == "SAME_UPPER" else (larger, smaller)
            )
        elif mode == "VALID":
            begin[axis] = end[axis] = 0
        if call.attr("ceil_mode", 0):
            whole = length + begin[axis] + end[axis]
            steps = -(-(whole - reach) // strides[axis]) + 1
            if (steps - 1) * strides[axis] >= length + begin[axis]:
                steps -= 1  # a window that would start in the padding behind
            extra[axis] = max((steps - 1) * strides[axis] + reach - whole, 0)
    return Window(kernel, strides, dilations, begin, end, extra)
