"""Linear operators seen one way: ``y = factor * (W x) + b`` with W as (groups, outputs, inputs, taps).

Statistics, refits and importance methods read and write weights and biases through this view only, so that none of
them sees the layout of an operator. Every linear operator has a :class:`Linear` as a facet of its entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnx_oamip.core.records import Array, Floats, Node


@dataclass(frozen=True, slots=True)
class BiasInput:
    """The input that holds the bias, and the attribute with a factor of it, where there is one."""

    slot: int
    factor: str | None = None


@dataclass(frozen=True)
class Site:
    """A linear node with a constant weight.

    ``slot``: input index of the data, the weight is the other of the first two inputs; ``weight_axis``: axis of the
    weight that meets the data; ``data_axis`` (from the right for products): axis of the data that is summed over;
    ``output_axis``: axis of the output that counts the weight's outputs; ``groups``: blocks that the channels are
    divided into; ``kernel``: spatial kernel of a convolution, empty for products; ``factor``: multiplies the product.
    """

    node: Node
    rules: Linear
    slot: int
    weight_axis: int
    data_axis: int
    output_axis: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    factor: float = 1.0

    @property
    def data(self) -> str:
        """Name of the data input."""
        return self.node.inputs[self.slot]

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return self.node.inputs[self.weight_slot]

    @property
    def weight_slot(self) -> int:
        """Input index of the weight."""
        return 1 - self.slot

    @property
    def spatial(self) -> bool:
        """A convolution: positions are pixels, a patch has taps."""
        return self.rules.spatial


class Linear:
    """Rules of a linear operator whose weight is a plain matrix; subclasses say where it lies."""

    bias: BiasInput | None = None
    """None for operators without a bias of their own: exporters put an addition behind them."""
    spatial: bool = False
    """True for operators whose kernel slides over an image."""
    scatters: bool = False
    """True for transposed convolutions: an input pixel is spread over several output pixels."""

    def site(self, node: Node, constants: Mapping[str, Array]) -> Site | None:
        """Find the data and the weight of a node.

        Args:
            node: Node of this operator.
            constants: Values of constants by name.

        Returns:
            The site, or None where the node has no single constant weight of a matrix form.
        """
        raise NotImplementedError

    def matrix_shape(self, site: Site, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Return the shape of the matrix of a weight.

        Args:
            site: The node.
            shape: Shape of the weight.

        Returns:
            (groups, outputs per group, inputs per group, taps).
        """
        return 1, shape[1 - site.weight_axis], shape[site.weight_axis], 1

    def matrix(self, site: Site, weight: Floats) -> Floats:
        """Read a weight as a matrix.

        Args:
            site: The node.
            weight: Value of the weight.

        Returns:
            (groups, outputs per group, inputs per group, taps).
        """
        if site.weight_axis == 0:
            outputs_first = weight.T
        else:
            outputs_first = weight
        return outputs_first[None, :, :, None]

    def weight(
        self,
        site: Site,
        matrix: Floats,
        kernel: tuple[int, ...],
    ) -> Floats:
        """Write a matrix as a weight: the inverse of :meth:`matrix`, also for other numbers of channels.

        Args:
            site: The node.
            matrix: (groups, outputs per group, inputs per group, taps).
            kernel: Spatial kernel of a convolution.

        Returns:
            The weight in the layout of the operator.
        """
        del kernel  # a product has none
        plain = matrix[0, :, :, 0]
        if site.weight_axis == 0:
            return plain.T
        return plain

    def position_dependent(self, node: Node, kernel: tuple[int, ...]) -> bool:
        """Check whether the outputs of a node differ by position although its input is equal at all positions.

        Args:
            node: Node of this operator.
            kernel: Spatial kernel of a convolution.

        Returns:
            True if they differ.
        """
        del node, kernel
        return False


class Convolution(Linear):
    """Conv: the weight is (outputs, inputs per group, *kernel)."""

    bias = BiasInput(2)
    spatial = True
    weight_axis = 1

    def site(self, node: Node, constants: Mapping[str, Array]) -> Site | None:
        """Find the weight; the data is input 0. See :meth:`Linear.site`.

        Args:
            node: Node of this operator.
            constants: Values of constants by name.

        Returns:
            The site, or None where the weight is computed.
        """
        weight = constants.get(node.inputs[1])
        if weight is None:
            return None
        return Site(
            node,
            self,
            slot=0,
            weight_axis=self.weight_axis,
            data_axis=1,
            output_axis=1,
            groups=int(node.attrs.get("group", 1)),
            kernel=tuple(weight.shape[2:]),
        )

    def matrix_shape(self, site: Site, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Return the shape of the matrix, the taps of the kernel in one axis; see :meth:`Linear.matrix_shape`.

        Args:
            site: The node.
            shape: Shape of the weight.

        Returns:
            (groups, outputs per group, inputs per group, taps).
        """
        return site.groups, shape[0] // site.groups, shape[1], int(np.prod(shape[2:]))

    def matrix(self, site: Site, weight: Floats) -> Floats:
        """Divide the outputs of a weight into groups; see :meth:`Linear.matrix`.

        Args:
            site: The node.
            weight: Value of the weight.

        Returns:
            (groups, outputs per group, inputs per group, taps).
        """
        per_group = weight.shape[0] // site.groups
        return weight.reshape(site.groups, per_group, weight.shape[1], -1)

    def weight(
        self,
        site: Site,
        matrix: Floats,
        kernel: tuple[int, ...],
    ) -> Floats:
        """Write a matrix as a weight: the inverse of :meth:`matrix`.

        Args:
            site: The node.
            matrix: (groups, outputs per group, inputs per group, taps).
            kernel: Spatial kernel.

        Returns:
            The weight.
        """
        del site
        groups, outputs, inputs, _ = matrix.shape
        return matrix.reshape(groups * outputs, inputs, *kernel)

    def position_dependent(self, node: Node, kernel: tuple[int, ...]) -> bool:
        """Recognise a convolution with padding: its outputs at the border read zeros.

        Args:
            node: Node of this operator.
            kernel: Spatial kernel.

        Returns:
            True if outputs differ by position.
        """
        del kernel
        automatic = str(node.attrs.get("auto_pad", "")).startswith("SAME")
        return automatic or any(node.attrs.get("pads", ()))


class TransposedConvolution(Convolution):
    """ConvTranspose: the weight is (inputs, outputs per group, *kernel)."""

    scatters = True
    weight_axis = 0

    def matrix_shape(self, site: Site, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Return the shape of the matrix, the taps of the kernel in one axis; see :meth:`Linear.matrix_shape`.

        Args:
            site: The node.
            shape: Shape of the weight.

        Returns:
            (groups, outputs per group, inputs per group, taps).
        """
        return site.groups, shape[1], shape[0] // site.groups, int(np.prod(shape[2:]))

    def matrix(self, site: Site, weight: Floats) -> Floats:
        """Divide the inputs of a weight into groups, and put the outputs first; see :meth:`Linear.matrix`.

        Args:
            site: The node.
            weight: Value of the weight.

        Returns:
            (groups, outputs per group, inputs per group, taps).
        """
        return super().matrix(site, weight).transpose(0, 2, 1, 3)

    def weight(
        self,
        site: Site,
        matrix: Floats,
        kernel: tuple[int, ...],
    ) -> Floats:
        """Write a matrix as a weight: the inverse of :meth:`matrix`.

        Args:
            site: The node.
            matrix: (groups, outputs per group, inputs per group, taps).
            kernel: Spatial kernel.

        Returns:
            The weight.
        """
        return super().weight(site, matrix.transpose(0, 2, 1, 3), kernel)

    def position_dependent(self, node: Node, kernel: tuple[int, ...]) -> bool:
        """Recognise a transposed convolution with several taps: every output pixel is computed by other taps.

        Args:
            node: Node of this operator.
            kernel: Spatial kernel.

        Returns:
            True if outputs differ by position.
        """
        sizes = (*kernel, *node.attrs.get("strides", ()))
        return super().position_dependent(node, kernel) or any(size != 1 for size in sizes)


class Product(Linear):
    """MatMul: either operand may be the weight."""

    def site(self, node: Node, constants: Mapping[str, Array]) -> Site | None:
        """Find the data: the operand that is not constant. See :meth:`Linear.site`.

        Args:
            node: Node of this operator.
            constants: Values of constants by name.

        Returns:
            The site, or None where not exactly one operand is a constant matrix.
        """
        slot = _data_slot(node, constants)
        if slot is None:
            return None
        contracted = -1 if slot == 0 else -2
        return Site(
            node,
            self,
            slot,
            weight_axis=slot,
            data_axis=contracted,
            output_axis=contracted,
        )


class GeneralProduct(Linear):
    """Gemm: a product of two matrices that may be transposed, times ``alpha``, and a bias times ``beta``."""

    bias = BiasInput(2, factor="beta")

    def site(self, node: Node, constants: Mapping[str, Array]) -> Site | None:
        """Find the data: the operand that is not constant. See :meth:`Linear.site`.

        Args:
            node: Node of this operator.
            constants: Values of constants by name.

        Returns:
            The site, or None where not exactly one operand is a constant matrix.
        """
        slot = _data_slot(node, constants)
        if slot is None:
            return None
        flags = ("transA", "transB")
        data_transposed = bool(node.attrs.get(flags[slot], 0))
        weight_transposed = bool(node.attrs.get(flags[1 - slot], 0))
        from_left = slot == 0
        return Site(
            node,
            self,
            slot,
            weight_axis=int(weight_transposed == from_left),
            data_axis=-2 if data_transposed == from_left else -1,
            output_axis=-1 if from_left else -2,
            factor=float(node.attrs.get("alpha", 1.0)),
        )


def _data_slot(node: Node, constants: Mapping[str, Array]) -> int | None:
    """Input index of the data of a product with one constant matrix, else None."""
    fixed = [name in constants for name in node.inputs[:2]]
    if sum(fixed) != 1:
        return None
    slot = 0 if fixed[1] else 1
    if constants[node.inputs[1 - slot]].ndim == 2:
        return slot
    return None
