"""Products of axis lengths as linear rows over level binaries, exact at integer points.

Every group takes one of a few widths: ``w_g = sum_l width_l x_l`` with one binary x per level, one of them 1. A cost is
a sum of ``factor * product of axis lengths``, an axis length ``fixed + sum_g per_unit_g w_g``. ``reduce_costs``
rewrites costs as polynomials in few *directions* (``sum_g c_g w_g`` with coprime c), so that axes that grow together
become one;
``linearise`` turns each distinct monomial into linear expressions, once for all costs:

- a group's own powers are linear in its binaries: ``w_g^2 = sum_l width_l^2 x_l``;
- an expression E in [low, high] times a binary x is ``low x + (high - low) v`` with ``v = x u``, ``u`` E scaled to
  [0, 1]. Over the levels of one group ``sum_l v_l = u``, ``0 <= v_l <= x_l`` is the convex hull of the products;
- in a product of two directions the one with more groups is E, and the other one contributes the binaries; a product of
  three or more takes the outcome as the next E.

Source: Adams and Sherali, "A Tight Linearization and an Algorithm for Zero-One Quadratic Programming Problems",
Management Science 32, 1986.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array, vstack

from onnx_oamip.core.records import Floats, Ints
from onnx_oamip.programs.program import Builder


@dataclass(frozen=True, eq=False)
class Levels:
    """The widths that every group may take, flat. Groups, and the widths of one group, ascend.

    Attributes:
        group: Group of each level (levels,).
        width: Width of each level (levels,).
    """

    group: Ints
    width: Ints

    @property
    def first(self) -> Ints:
        """Index of every group's narrowest level, with the number of levels at the end (groups + 1,)."""
        if not len(self.group):
            return np.zeros(1, np.int64)
        return np.searchsorted(self.group, np.arange(self.group[-1] + 2))


@dataclass(frozen=True, eq=False)
class Polynomials:
    """Costs as polynomials: ``value[b] = sum_m coefficients[b, m] * product_j lengths[monomials[m, j]]``.

    Attributes:
        directions: Length of each direction per unit of width (directions, groups).
        monomials: Directions of each monomial (monomials, degree), descending; -1 stands for a factor of 1.
        coefficients: Coefficient of each monomial in each cost (costs, monomials).
    """

    directions: csr_array
    monomials: Ints
    coefficients: csr_array

    def values(self, widths: Ints) -> Floats:
        """Evaluate every cost.

        Args:
            widths: Width of each group (groups,).

        Returns:
            Value of each cost (costs,).
        """
        result: Floats = self.coefficients @ self._lengths(widths).prod(axis=1)
        return result

    def gradient(self, widths: Ints) -> Floats:
        """Differentiate every cost by the widths.

        Args:
            widths: Width of each group (groups,).

        Returns:
            Derivatives (costs, groups).
        """
        lengths = self._lengths(widths)
        # The last column collects the derivatives by the factor 1, which -1 stands for.
        columns = self.directions.shape[0] + 1
        costs = self.coefficients.shape[0]
        cost = np.repeat(np.arange(costs), np.diff(self.coefficients.indptr))
        term = self.coefficients.indices
        partial = np.zeros((costs, columns))
        for j in range(self.monomials.shape[1]):
            others = np.delete(lengths, j, axis=1).prod(axis=1)
            # Sums by cost and direction: a product of sparse matrices would take ten times as long to set up.
            position = cost * columns + self.monomials[term, j] % columns
            derivatives = self.coefficients.data * others[term]
            sums = np.bincount(position, derivatives, minlength=costs * columns)
            partial += sums.reshape(costs, columns)
        result: Floats = partial[:, :-1] @ self.directions
        return result

    def _lengths(self, widths: Ints) -> Floats:
        """Length of every factor of every monomial (monomials, degree)."""
        lengths = np.append(self.directions @ widths.astype(np.float64), 1.0)
        return lengths[self.monomials]


class _Terms(NamedTuple):
    """Monomials of one cost with their coefficients."""

    cost: int
    monomials: Ints
    coefficients: Floats


@dataclass(frozen=True, eq=False)
class _Axes:
    """Axis lengths ``constant + step * length of a direction``, with an axis of length 1 at index -1.

    Attributes:
        direction: Direction of each axis, -1 for axes of fixed length.
        constant: Fixed part of each length.
        step: Multiple of the direction.
    """

    direction: Ints
    constant: Floats
    step: Floats


def reduce_costs(
    fixed: Ints,
    per_unit: csr_array,
    sums: Sequence[tuple[Floats, Ints]],
) -> Polynomials:
    """Rewrite costs as polynomials in few directions.

    Args:
        fixed: Fixed part of each axis length (axes,).
        per_unit: Length of each axis per unit of width (axes, groups).
        sums: One pair per cost: the factor of each term (terms,), and its axes (terms, n), -1 for a length of 1. The
            cost is the sum over terms of the factor times the lengths of the axes.

    Returns:
        The same costs as polynomials.
    """
    directions, axes = _directions(fixed, per_unit)
    terms: list[_Terms] = []
    for cost, (factor, term_axes) in enumerate(sums):
        terms += _expand(cost, factor, term_axes, axes)
    degree = max((t.monomials.shape[1] for t in terms), default=0)
    # An empty block gives the shape if there are no terms.
    blocks = [np.zeros((0, degree), np.int64)]
    for term in terms:
        missing = degree - term.monomials.shape[1]
        blocks.append(np.pad(term.monomials, ((0, 0), (0, missing)), constant_values=-1))
    descending = -np.sort(-np.concatenate(blocks), axis=1)
    monomials, position = np.unique(descending, axis=0, return_inverse=True)
    counts = [len(t.coefficients) for t in terms]
    owner = np.repeat([t.cost for t in terms], counts).astype(np.int64)
    value = np.concatenate([*(t.coefficients for t in terms), np.zeros(0)])
    entries = (value, (owner, position.reshape(-1)))
    coefficients = coo_array(entries, shape=(len(sums), len(monomials)))
    return Polynomials(csr_array(directions), monomials, csr_array(coefficients))


def _directions(fixed: Ints, per_unit: csr_array) -> tuple[Ints, _Axes]:
    """The distinct directions of the axes (directions, groups), and the axes in terms of them."""
    variable = np.unique(per_unit.nonzero()[0])
    held = per_unit[variable].toarray()
    if len(variable):
        common = np.gcd.reduce(held, axis=1)
    else:
        common = np.zeros(0, np.int64)
    directions, position = np.unique(held // common[:, None], axis=0, return_inverse=True)
    direction = np.full(len(fixed) + 1, -1, np.int64)
    direction[variable] = position.reshape(-1)
    step = np.ones(len(fixed) + 1)
    step[variable] = common
    constant = np.append(fixed, 1).astype(np.float64)
    return directions, _Axes(direction, constant, step)


def _expand(
    cost: int,
    factor: Floats,
    term_axes: Ints,
    axes: _Axes,
) -> list[_Terms]:
    """Expand the products of ``constant + step * direction`` of one cost."""
    varies = axes.direction[term_axes] >= 0
    fixed_lengths = np.where(varies, 1.0, axes.constant[term_axes])
    base = factor * fixed_lengths.prod(axis=1)
    degree = int(varies.sum(axis=1).max(initial=0))
    # Variable axes first; the rest is in the base already.
    order = np.argsort(~varies, axis=1, kind="stable")[:, :degree]
    term_axes = np.take_along_axis(term_axes, order, 1)
    varies = np.take_along_axis(varies, order, 1)
    result = []
    for subset in range(2**degree):
        taken = (subset >> np.arange(degree) & 1).astype(bool)
        constants = np.where(varies & ~taken, axes.constant[term_axes], 1.0).prod(axis=1)
        steps = np.where(taken, axes.step[term_axes], 1.0).prod(axis=1)
        # A term without an axis at a taken place is counted in a smaller subset.
        complete = varies[:, taken].all(axis=1)
        value = base * constants * steps * complete
        used = value != 0
        monomials = np.where(taken, axes.direction[term_axes], -1)
        result.append(_Terms(cost, monomials[used], value[used]))
    return result


def linearise(
    builder: Builder,
    binaries: Ints,
    levels: Levels,
    polynomials: Polynomials,
    *,
    start: Floats,
) -> tuple[csr_array, Floats]:
    """Linearise costs; adds the variables and rows of the products to the builder.

    Args:
        builder: Builder of the program.
        binaries: Variables of the levels (levels,).
        levels: Widths of the groups, all positive.
        polynomials: Costs.
        start: First point of the binaries (levels,), NaN for none.

    Returns:
        Coefficients of the costs over the builder's variables (costs, variables), and their constants (costs,).
    """
    factors, chain = _factors(levels, polynomials)
    table = _Table.of(factors, binaries, start)
    degree = chain.shape[1]
    if degree:
        expression = chain[:, 0]
    else:
        expression = np.full(len(chain), -1)
    for depth in range(1, degree):
        further = chain[:, depth] >= 0
        products = np.stack([expression[further], chain[further, depth]], axis=1)
        pairs, position = np.unique(products, axis=0, return_inverse=True)
        if len(pairs):
            expression = expression.copy()
            expression[further] = table.count + position.reshape(-1)
            table = table.multiply(builder, binaries, levels, factors, pairs=pairs, start=start)
    varies = expression >= 0
    expressions = table.matrix(builder.n_variables)[expression[varies]]
    matrix = csr_array(polynomials.coefficients[:, varies] @ expressions)
    constant = polynomials.coefficients[:, ~varies].sum(axis=1)
    return matrix, np.asarray(constant, np.float64).reshape(-1)


@dataclass(frozen=True, eq=False)
class _Factors:
    """Factors of monomials as linear forms over levels: a direction, or a power of a single group's.

    Attributes:
        forms: Value of each factor at each level (factors, levels).
        low: Least value of each factor (factors,).
        high: Greatest value of each factor (factors,).
    """

    forms: csr_array
    low: Floats
    high: Floats


def _factors(levels: Levels, polynomials: Polynomials) -> tuple[_Factors, Ints]:
    """The distinct factors, and each monomial as a chain of them: most groups first, -1 at the end."""
    directions = polynomials.directions
    monomials = polynomials.monomials
    n_groups = np.diff(directions.indptr)
    power = _powers(monomials, n_groups)
    # A pair of direction and power as one number.
    base = monomials.shape[1] + 1
    code = np.where(power > 0, monomials * base + power, -1)
    distinct, position = np.unique(code, return_inverse=True)
    absent = int(distinct[:1].tolist() == [-1])
    chain = position.reshape(code.shape) - absent
    direction, exponent = np.divmod(distinct[absent:], base)

    n_levels = len(levels.group)
    width_of_level = csr_array(
        (levels.width.astype(np.float64), (levels.group, np.arange(n_levels))),
        shape=(directions.shape[1], n_levels),
    )
    forms = csr_array(directions @ width_of_level)[direction]
    forms.data **= np.repeat(exponent, np.diff(forms.indptr))
    first = levels.first
    narrowest = levels.width[first[:-1]].astype(np.float64)
    widest = levels.width[first[1:] - 1].astype(np.float64)
    low = (directions @ narrowest)[direction] ** exponent
    high = (directions @ widest)[direction] ** exponent
    groups_of_factor = np.append(n_groups[direction], 0)
    rank = np.where(chain < 0, 1, -groups_of_factor[chain])
    order = np.argsort(rank, axis=1, kind="stable")
    return _Factors(forms, low, high), np.take_along_axis(chain, order, 1)


def _powers(monomials: Ints, n_groups: Ints) -> Ints:
    """Exponent of every factor: repeated directions of a single group become one factor, the others have 0."""
    power = (monomials >= 0).astype(np.int64)
    for j in range(1, monomials.shape[1]):
        current = monomials[:, j]
        previous = monomials[:, j - 1]
        same = (current >= 0) & (current == previous) & (n_groups[current] == 1)
        power[same, j] += power[same, j - 1]
        power[same, j - 1] = 0
    return power


@dataclass(frozen=True, eq=False)
class _Table:
    """Linear expressions over program variables.

    Attributes:
        parts: Coefficients of the expressions, in blocks of rows; later blocks have more columns.
        low: Least value of each expression.
        high: Greatest value of each expression.
        start: Value of each expression at the first point.
    """

    parts: tuple[csr_array, ...]
    low: Floats
    high: Floats
    start: Floats

    @classmethod
    def of(cls, factors: _Factors, binaries: Ints, start: Floats) -> _Table:
        """The factors themselves."""
        forms = factors.forms
        columns = binaries[forms.indices]
        n_columns = int(columns.max(initial=-1)) + 1
        part = csr_array(
            (forms.data, columns, forms.indptr),
            shape=(forms.shape[0], n_columns),
        )
        return cls((part,), factors.low, factors.high, forms @ start)

    @property
    def count(self) -> int:
        """Number of expressions."""
        return len(self.low)

    def matrix(self, columns: int) -> csr_array:
        """All coefficients over a number of variables."""
        wide = []
        for part in self.parts:
            entries = (part.data, part.indices, part.indptr)
            wide.append(csr_array(entries, shape=(part.shape[0], columns)))
        return csr_array(vstack(wide, format="csr"))

    def multiply(
        self,
        builder: Builder,
        binaries: Ints,
        levels: Levels,
        factors: _Factors,
        *,
        pairs: Ints,
        start: Floats,
    ) -> _Table:
        """Table with the products (expression, factor) of ``pairs`` appended."""
        expression, factor = pairs.T
        n_levels = len(binaries)
        spread = np.where(self.high > self.low, self.high - self.low, 1.0)
        forms = factors.forms[factor]
        row = np.repeat(np.arange(len(pairs)), np.diff(forms.indptr))
        # One variable for every distinct (expression, level): their product, scaled to [0, 1].
        code = expression[row] * n_levels + forms.indices
        distinct, position = np.unique(code, return_inverse=True)
        source, level = np.divmod(distinct, n_levels)
        scaled_start = (self.start - self.low) / spread
        product = builder.variables(
            len(distinct),
            0.0,
            1.0,
            start=start[level] * scaled_start[source],
        )
        self._bound_by_binaries(builder, product, binaries[level])
        self._sum_to_expression(
            builder,
            product,
            source=source,
            level=level,
            levels=levels,
            spread=spread,
        )
        # E x = low x + spread v, times the value of the factor at the level.
        times_binary = forms.data * self.low[expression[row]]
        times_product = forms.data * spread[expression[row]]
        column = np.concatenate([binaries[forms.indices], product[position]])
        entries = (
            np.concatenate([times_binary, times_product]),
            (np.concatenate([row, row]), column),
        )
        part = coo_array(entries, shape=(len(pairs), builder.n_variables))
        return _Table(
            parts=(*self.parts, csr_array(part)),
            low=np.append(self.low, self.low[expression] * factors.low[factor]),
            high=np.append(self.high, self.high[expression] * factors.high[factor]),
            start=np.append(self.start, self.start[expression] * (forms @ start)),
        )

    @staticmethod
    def _bound_by_binaries(
        builder: Builder,
        product: Ints,
        binary: Ints,
    ) -> None:
        """Rows ``v_l <= x_l``."""
        row = np.arange(len(product))
        weights = np.array([[1.0], [-1.0]])
        entries = (np.stack([row, row]), np.stack([product, binary]), weights)
        builder.rows(len(product), entries, upper=0.0)

    def _sum_to_expression(
        self,
        builder: Builder,
        product: Ints,
        *,
        source: Ints,
        level: Ints,
        levels: Levels,
        spread: Floats,
    ) -> None:
        """Rows ``sum_l v_l = u``, one per expression (``source``) and group of the products."""
        n_groups = levels.group[-1] + 1
        code = source * n_groups + levels.group[level]
        distinct, block = np.unique(code, return_inverse=True)
        expression = distinct // n_groups
        lines = self.matrix(builder.n_variables)[expression]
        entries_per_line = np.diff(lines.indptr)
        ratio = np.repeat(1 / spread[expression], entries_per_line)
        line = np.repeat(np.arange(len(distinct)), entries_per_line)
        side = -self.low[expression] / spread[expression]
        entries = (
            np.concatenate([block, line]),
            np.concatenate([product, lines.indices]),
            np.concatenate([np.ones(len(product)), -lines.data * ratio]),
        )
        builder.rows(len(distinct), entries, lower=side, upper=side)
