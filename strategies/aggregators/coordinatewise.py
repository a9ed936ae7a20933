"""Rules that treat every coordinate by itself: median, trimmed mean, mean around the median."""

from dataclasses import dataclass

import numpy as np

from fedcore.strategies.aggregators.base import ColumnRule
from fedcore.strategies.passes import Rows, Vector
from fedcore.strategies.tolerance import Tolerant


@dataclass(frozen=True)
class Median(ColumnRule):
    """The coordinate-wise median; of an even number of values the mean of the middle two.

    Tolerates f < n/2. Cost: a sort of each column, O(d n log n). Source: Yin, Chen, Ramchandran, Bartlett
    2018, "Byzantine-robust distributed learning", Definition 1.
    """

    def columns(self, block: Rows) -> Rows:
        """Return each column's median."""
        block.sort(axis=0)
        return middle(block)


@dataclass(frozen=True)
class TrimmedMean(Tolerant, ColumnRule):
    """The coordinate-wise mean without the f smallest and the f largest values.

    Tolerates f < n/2. Cost: a sort of each column, O(d n log n). Source: Yin, Chen, Ramchandran, Bartlett
    2018, "Byzantine-robust distributed learning", Definition 2 with f = beta n.
    """

    def columns(self, block: Rows) -> Rows:
        """Return each column's trimmed mean."""
        n = len(block)
        f = self.faults(n)
        block.sort(axis=0)
        return column_means(block[f : n - f])


@dataclass(frozen=True)
class MeaMed(Tolerant, ColumnRule):
    """The coordinate-wise mean of the n - f values nearest the median; of equally near ones the smaller.

    Tolerates f < n/2. Cost: a sort of each column, O(d n log n). Source: Xie, Koyejo, Gupta 2018,
    "Generalized Byzantine-tolerant SGD" (mean around median).
    """

    def columns(self, block: Rows) -> Rows:
        """Return each column's mean around its median."""
        block.sort(axis=0)
        return mean_around_median(block, len(block) - self.faults(len(block)))


def middle(block: Rows) -> Vector:
    """Return the median of each column of a sorted block (m, b); shape (b,), float64."""
    m = len(block)
    median: Vector = np.add(block[(m - 1) // 2], block[m // 2], dtype=np.float64)
    median *= 0.5
    return median


def mean_around_median(block: Rows, near: int) -> Rows:
    """Return the mean of the `near` values nearest the median, for each column of a sorted block (m, b).

    In sorted order they are a window, which moves up from 0 while the value that enters is nearer than the
    one that leaves, and takes its place: no sum ever holds a value outside it. Overwrites the block.
    """
    m = len(block)
    # value - median < median - value that leaves
    enters = np.add(block[near:], block[: m - near], dtype=np.float64) < 2.0 * middle(block)
    for start in range(0, m - near, near):
        entering = block[start + near : start + 2 * near]
        np.copyto(block[: len(entering)], entering, where=enters[start : start + len(entering)])
    return column_means(block[:near])


def column_means(block: Rows) -> Vector:
    """Return the mean of each column, added up in float64; shape (b,)."""
    means: Vector = np.einsum("ij->j", block, dtype=np.float64)
    means /= len(block)
    return means
