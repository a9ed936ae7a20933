"""The one evaluation of pre-aggregators and an aggregator on a matrix of updates.

Used by the round, by `Aggregator.aggregate` and by the benchmark. A mixture of rows stays a small matrix W
for as long as it can: a rule that works from inner products sees W G W^T, one that works on columns gets W X
block by block, and one that ends in coefficients a reads X once more for (a W) X.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedcore.encoding import blocks, within
from fedcore.errors import SpecError
from fedcore.seeds import generator
from fedcore.strategies import passes
from fedcore.strategies.passes import NotFinite, Rows, Vector
from fedcore.strategies.terms import Space, in_memory

if TYPE_CHECKING:
    from fedcore.strategies.aggregators import Aggregator
    from fedcore.strategies.preaggregators import PreAggregator

Products = Literal["none", "norms", "all"]
Anchor = Literal["", "previous", "root"]

NO_GRAM = np.zeros((0, 0))


@dataclass(frozen=True)
class Matrix:
    """The m rows that a rule works on: those kept of an (n, d) array, or mixtures W of them.

    gram: float64 inner products of the m rows, as far as the parts asked for them and zero elsewhere; for a
    rule with an anchor one row and column more, the anchor's, which comes last. space: where results lie.
    """

    rows: Rows
    gram: Vector
    keep: NDArray[np.intp] | None = None
    mixing: Vector | None = None
    anchor: Rows | None = None
    space: Space = in_memory

    @property
    def count(self) -> int:
        """The number m of rows."""
        if self.mixing is not None:
            return len(self.mixing)
        return len(self.rows) if self.keep is None else len(self.keep)

    def mixed(self, mixing: Vector) -> "Matrix":
        """Return the matrix whose rows are `mixing`, shape (k, m), times these."""
        inner = mixing if self.mixing is None else mixing @ self.mixing
        (k, m), extra = mixing.shape, max(0, len(self.gram) - self.count)
        wide = np.zeros((k + extra, m + extra))
        wide[:k, :m], wide[k:, m:] = mixing, 1.0
        gram = wide @ self.gram @ wide.T if len(self.gram) else self.gram
        return replace(self, mixing=inner, gram=gram)

    def take(self, chosen: NDArray[np.intp]) -> "Matrix":
        """Return the matrix of the chosen rows, in their order and without inner products."""
        if self.mixing is not None:
            return replace(self, mixing=self.mixing[chosen], gram=NO_GRAM)
        return replace(self, keep=chosen if self.keep is None else self.keep[chosen], gram=NO_GRAM)

    def combine(self, coefficients: Vector) -> Vector:
        """Return sum_i a_i x_i, shape (d,), float64; a coefficient more than rows is the anchor's."""
        rows, own = coefficients[: self.count], np.zeros(len(self.rows))
        own[slice(None) if self.keep is None else self.keep] = (
            rows if self.mixing is None else rows @ self.mixing
        )
        total = passes.combine(own, self.rows, self.nothing())
        if self.anchor is not None and len(coefficients) > self.count:
            for block in blocks(len(total)):
                total[block] += coefficients[-1] * self.anchor[block]
        return total

    def nothing(self) -> Vector:
        """Return zeros, shape (d,), float64, where results lie."""
        return self.space("aggregate", (self.rows.shape[1],), np.dtype(np.float64))

    def by_columns(self, rule: passes.ColumnRule) -> Vector:
        """Return the rule's value of every column, shape (d,), float64."""
        return passes.by_columns(rule, self.rows, self.nothing(), self.keep, self.mixing)

    def whole(self) -> Rows:
        """Return the rows, shape (m, d): the array itself, or a new one where they are mixed or selected."""
        if self.mixing is not None:
            return passes.mix(self.mixing, self.rows, self.keep)
        if self.keep is not None:
            return self.rows[self.keep]
        if not passes.finite(self.rows).all():
            raise NotFinite
        return self.rows


def check_rows(pre: Sequence["PreAggregator"], aggregator: "Aggregator", n: int) -> None:
    """Raise SpecError, with the part and what would do, unless all parts can work on n rows."""
    for part in pre:
        part.check(n)
        n = part.count(n)
    aggregator.check(n)


def aggregate_rows(
    pre: Sequence["PreAggregator"],
    aggregator: "Aggregator",
    rows: Rows,
    weights: ArrayLike | None = None,
    *,
    rng: np.random.Generator | None = None,
    anchor: Rows | None = None,
    space: Space = in_memory,
) -> Vector:
    """Return the aggregate of rows (n, d), in memory or mapped from a file: shape (d,), float64.

    Rows with a value that is not finite are dropped first, and f is lowered by their number where the rule
    could not work on the others otherwise. weights: shape (n,), not negative; the same for all where None.
    rng: the parts' randomness; the same each time where None. anchor: shape (d,), the last aggregate or the
    server's own update, for a rule that works with one; a last aggregate is zero at first. space: where the
    result lies. `rows` is not written to. Raises SpecError where n rows are too few for a part, for bad
    weights, and for a rule that makes values which are not finite of rows that are.
    """
    rows, weights = _array(rows), _valid(weights, len(rows))
    used = _anchor(aggregator, anchor, rows.shape[1])
    rng = rng or generator("aggregate")
    try:
        return _evaluate(pre, aggregator, Matrix(rows, NO_GRAM, None, None, used, space), weights, rng)
    except NotFinite as error:
        keep = np.flatnonzero(passes.finite(rows))
        if len(keep) == len(rows):
            raise SpecError(f"{aggregator} made values that are not finite of finite rows") from error
        lost = len(rows) - len(keep)
        left, n = [], len(keep)
        for part in pre:
            left.append(part.without(lost, n))
            n = part.count(n)
        matrix = Matrix(rows, NO_GRAM, keep, None, used, space)
        return _evaluate(left, aggregator.without(lost, n), matrix, weights[keep], rng)


def mix_rows(pre: Sequence["PreAggregator"], rows: Rows, *, rng: np.random.Generator | None = None) -> Rows:
    """Return what pre-aggregators make of finite rows (n, d): one new array (m, d) in their dtype."""
    matrix = _measured(pre, "none", Matrix(_array(rows), NO_GRAM), 0)
    return _mixed(pre, matrix, rng or generator("aggregate")).whole()


def _array(rows: Rows) -> Rows:
    """Return the rows, as they are where the passes can read them, else in float64."""
    given = np.asarray(rows)
    if given.ndim != 2 or not given.size:
        raise SpecError(f"rows of shape {given.shape}: expected (n, d), one update a row")
    return given if given.dtype in (np.float32, np.float64) else given.astype(np.float64)


def _valid(weights: ArrayLike | None, n: int) -> Vector:
    if weights is None:
        return np.ones(n)
    given = np.asarray(weights, np.float64)
    if given.shape != (n,) or not np.isfinite(given).all() or (given < 0).any():
        raise SpecError(f"weights {given}: expected {n} finite numbers, none below 0")
    return given


def _anchor(aggregator: "Aggregator", anchor: Rows | None, size: int) -> Rows | None:
    if not aggregator.anchor:
        return None
    if anchor is None:
        if aggregator.anchor == "root":
            raise SpecError(f"{aggregator} needs the server's own update; pass it as `anchor`")
    elif anchor.shape != (size,) or not within(anchor, float(np.finfo(anchor.dtype).max)):
        raise SpecError(f"anchor of shape {anchor.shape}: expected {size} finite numbers")
    return anchor


def _evaluate(
    pre: Sequence["PreAggregator"],
    aggregator: "Aggregator",
    matrix: Matrix,
    weights: Vector,
    rng: np.random.Generator,
) -> Vector:
    check_rows(pre, aggregator, len(weights))
    matrix = _mixed(pre, _measured(pre, aggregator.products, matrix, 1 if aggregator.anchor else 0), rng)
    if not aggregator.weighted:
        weights = np.ones(matrix.count)
    elif matrix.mixing is not None and matrix.count < len(weights):
        weights = (matrix.mixing != 0) @ weights  # a bucket weighs what its members weigh together
    total = weights.sum()
    return aggregator.evaluate(matrix, weights / total, rng) if total else matrix.nothing()


def _mixed(pre: Sequence["PreAggregator"], matrix: Matrix, rng: np.random.Generator) -> Matrix:
    for part in pre:
        n = matrix.count
        matrix = matrix.mixed(part.mix(matrix.gram[:n, :n] if len(matrix.gram) else np.zeros((n, n)), rng))
    return matrix


def _measured(pre: Sequence["PreAggregator"], last: Products, matrix: Matrix, extra: int) -> Matrix:
    """Return the unmixed matrix with the inner products that the parts need, and no others."""
    level, scaled = "none", True
    for products, scales in [*((part.products, part.scales) for part in pre), (last, True)]:
        if products != "none":
            # Norms of mixtures come from all products of the rows that were mixed.
            level = "norms" if products == "norms" and scaled and level != "all" else "all"
        scaled = scaled and scales
    if level == "none":
        return matrix
    gram = np.zeros((matrix.count + extra,) * 2)
    known = matrix.count + (matrix.anchor is not None)
    measure = passes.gram if level == "all" else passes.star
    gram[:known, :known] = measure(matrix.rows, matrix.keep, matrix.anchor)
    return replace(matrix, gram=gram)
