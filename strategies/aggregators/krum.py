"""Krum, Multi-Krum and Bulyan: rows are chosen by their distances to their neighbours."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import SpecError, expect
from fedcore.strategies.aggregators.base import Aggregator, GramRule, Needs
from fedcore.strategies.aggregators.coordinatewise import mean_around_median
from fedcore.strategies.geometry import average, squared_distances
from fedcore.strategies.matrix import Matrix, Products
from fedcore.strategies.passes import Rows, Vector
from fedcore.strategies.tolerance import Tolerant


def krum_order(distances: Vector, near: int) -> NDArray[np.intp]:
    """Return the rows by their Krum scores, the best first; squared distances (n, n) -> indices (n,).

    The score is the sum of the `near` smallest squared distances to others. Two rows that are each other's
    nearest have the same score where near = 1; the sum of all distances decides then, not the order of rows.
    """
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    others = np.sort(others, axis=1)[:, :-1]
    return np.lexsort((others.sum(axis=1), others[:, :near].sum(axis=1)))


@dataclass(frozen=True)
class Krum(Tolerant, GramRule):
    """The row with the smallest sum of squared distances to its n - f - 2 nearest others.

    Tolerates 2f + 2 < n. Cost: all inner products, O(n^2 d). Source: Blanchard, El Mhamdi, Guerraoui,
    Stainer 2017, "Machine learning with adversaries", Section 4.
    """

    def most(self, n: int) -> int:
        """Return the largest f with 2f + 2 < n."""
        return (n - 3) // 2

    def coefficients(self, gram: Vector, weights: Vector) -> Vector:
        """Return 1 for the row chosen."""
        n = len(gram)
        order = krum_order(squared_distances(gram), n - self.faults(n) - 2)
        return average(order[:1], n)


@dataclass(frozen=True)
class MultiKrum(Tolerant, GramRule):
    """The plain mean of the m rows with the smallest Krum scores; m = 0 stands for n - f.

    Tolerates 2f + 2 < n. Each row counts once, whatever weight its client claims. Cost: all inner products,
    O(n^2 d). Source: Blanchard, El Mhamdi, Guerraoui, Stainer 2017, "Machine learning with adversaries".
    """

    m: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.m >= 0, self, "m >= 1 rows to average, or 0 for n - f")

    def most(self, n: int) -> int:
        """Return the largest f with 2f + 2 < n."""
        return (n - 3) // 2

    def check(self, n: int) -> None:
        """Raise SpecError unless n rows allow f and m <= n - f."""
        super().check(n)
        if self.m > n - self.faults(n):
            raise SpecError(f"{self}: {n} rows, expected m <= n - f = {n - self.faults(n)}")

    def without(self, lost: int, n: int) -> Self:
        """Return the rule for the n rows that are left; m goes down with them."""
        part = super().without(lost, n)
        return replace(part, m=min(part.m, n - part.faults(n)))

    def coefficients(self, gram: Vector, weights: Vector) -> Vector:
        """Return 1/m for the rows chosen."""
        n = len(gram)
        f = self.faults(n)
        order = krum_order(squared_distances(gram), n - f - 2)
        return average(order[: self.m or n - f], n)


@dataclass(frozen=True)
class Bulyan(Tolerant, Aggregator):
    """Choose theta = n - 2f rows by iterated Krum, then average the theta - 2f values nearest their median.

    Each iteration takes the Krum row of those that are left, r of them, with r - f - 2 neighbours (at least
    one), and puts it aside. Tolerates n >= 4f + 3, and no coordinate is left to a Byzantine row alone. Cost:
    all inner products, O(n^2 d), and a sort of each column of the chosen. Source: El Mhamdi, Guerraoui,
    Rouault 2018, "The hidden vulnerability of distributed learning in Byzantium".
    """

    needs: ClassVar[Needs] = "columns"

    @property
    def products(self) -> Products:
        """All: distances."""
        return "all"

    def most(self, n: int) -> int:
        """Return the largest f with n >= 4f + 3."""
        return (n - 3) // 4

    def chosen(self, gram: Vector) -> NDArray[np.intp]:
        """Return the indices of the theta rows, ascending."""
        n = len(gram)
        f, distances, left = self.faults(n), squared_distances(gram), np.arange(n)
        while len(left) > 2 * f:
            order = krum_order(distances[np.ix_(left, left)], max(1, len(left) - f - 2))
            left = np.delete(left, order[0])
        return np.setdiff1d(np.arange(n), left)

    def evaluate(self, matrix: Matrix, weights: Vector, rng: np.random.Generator) -> Vector:
        """Return the mean around the median of the rows chosen."""
        f = self.faults(matrix.count)
        return matrix.take(self.chosen(matrix.gram)).by_columns(lambda block: self._columns(block, f))

    def _columns(self, block: Rows, f: int) -> Rows:
        block.sort(axis=0)
        return mean_around_median(block, len(block) - 2 * f)
