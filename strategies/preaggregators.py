"""Pre-aggregators: the rows of a round become linear mixtures of rows, before an aggregator sees them.

Each returns a mixing matrix W, shape (m, n), from the rows' inner products alone. So they compose with each
other and with every aggregator without a second copy of the updates.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Self

import numpy as np

from fedcore.errors import SpecError, expect
from fedcore.strategies.geometry import squared_distances
from fedcore.strategies.matrix import Products, mix_rows
from fedcore.strategies.passes import Rows, Vector
from fedcore.strategies.tolerance import Tolerant


class PreAggregator(ABC):
    """Base of all pre-aggregators: a subclass is a frozen dataclass with `mix`.

    products: which inner products of the rows `mix` reads; `norms` are those with itself. scales: whether
    each row is only rescaled, so that W is diagonal.
    """

    products: ClassVar[Products] = "all"
    scales: ClassVar[bool] = False

    def check(self, n: int) -> None:
        """Raise SpecError unless the part can work on n rows; any part needs one."""
        if n < 1:
            raise SpecError(f"{self}: no row to aggregate, expected at least 1")

    def without(self, lost: int, n: int) -> Self:
        """Return the part for the n rows that are left when `lost` others were not finite."""
        return self

    def count(self, n: int) -> int:
        """Return how many rows come out of n."""
        return n

    @abstractmethod
    def mix(self, gram: Vector, rng: np.random.Generator) -> Vector:
        """Return W, shape (m, n), such that the rows become W X.

        gram: float64 inner products of the rows, shape (n, n); zero where `products` does not ask for them.
        """

    def apply(self, rows: Rows, *, rng: np.random.Generator | None = None) -> Rows:
        """Return W X of finite rows (n, d): a new array (m, d) in their dtype."""
        self.check(len(rows))
        return mix_rows((self,), rows, rng=rng)


@dataclass(frozen=True)
class FiniteCheck(PreAggregator):
    """Drop the rows with a value that is NaN or infinite, or whose squared norm overflows float64.

    Every aggregation begins with this check, so that a single bad row never turns a median, Krum or the
    geometric median into NaN; naming it in a strategy only says so. It costs nothing: what the rules compute
    anyway tells whether all rows were finite.
    """

    products: ClassVar[Products] = "none"
    scales: ClassVar[bool] = True

    def mix(self, gram: Vector, rng: np.random.Generator) -> Vector:
        """Return the identity: what is not finite has been dropped already."""
        return np.eye(len(gram))


@dataclass(frozen=True)
class Clip(PreAggregator):
    """Scale rows down to a norm: x_i min(1, norm / ||x_i||); a zero row stays zero.

    Bounds what one client can add to a mean, and is no robust rule by itself. Cost: a pass for the norms.
    """

    norm: float

    products: ClassVar[Products] = "norms"
    scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        expect(0 < self.norm < np.inf, self, "a finite norm above 0")

    def mix(self, gram: Vector, rng: np.random.Generator) -> Vector:
        """Return the diagonal matrix of the factors."""
        return _clipping(np.sqrt(np.diagonal(gram)), self.norm)


@dataclass(frozen=True)
class ARC(Tolerant, PreAggregator):
    """Adaptive robust clipping: clip the k = floor(2 (f/n) (n - f)) longest rows to the next longest norm.

    Made for f < n/2, in front of a robust rule; the threshold follows the data, so there is nothing to tune.
    Cost: a pass for the norms. Source: Allouah, Guerraoui, Gupta, Jellouli, Rizk, Stephan 2025, "Adaptive
    gradient clipping for robust federated learning".
    """

    products: ClassVar[Products] = "norms"
    scales: ClassVar[bool] = True

    def mix(self, gram: Vector, rng: np.random.Generator) -> Vector:
        """Return the diagonal matrix of the factors."""
        n, norms = len(gram), np.sqrt(np.diagonal(gram))
        f = self.faults(n)
        clipped = 2 * f * (n - f) // n  # below n, as f < n/2
        return _clipping(norms, np.sort(norms)[n - clipped - 1])


def _clipping(norms: Vector, limit: float) -> Vector:
    longer = norms > limit
    return np.diag(np.where(longer, limit / np.where(longer, norms, 1.0), 1.0))


@dataclass(frozen=True)
class Bucketing(PreAggregator):
    """Shuffle the rows and average groups of s, the last group being what is left over.

    m = ceil(n / s) rows come out, up to f of them touched by a Byzantine row, and the honest ones are closer
    to each other: their variance is divided by s. The rule behind must stand f among m, so s is small, mostly
    2. Cost: none of its own. Source: Karimireddy, He, Jaggi 2022, "Byzantine-robust learning on heterogeneous
    datasets via bucketing", Algorithm 1.
    """

    s: int = 2

    products: ClassVar[Products] = "none"

    def __post_init__(self) -> None:
        expect(self.s >= 1, self, "s >= 1, the rows in a bucket")

    def count(self, n: int) -> int:
        """Return ceil(n / s)."""
        return ceil(n / self.s)

    def mix(self, gram: Vector, rng: np.random.Generator) -> Vector:
        """Return the matrix that averages each bucket."""
        n = len(gram)
        mixing = np.zeros((self.count(n), n))
        mixing[np.arange(n) // self.s, rng.permutation(n)] = 1.0
        mixing /= mixing.sum(axis=1, keepdims=True)
        return mixing


@dataclass(frozen=True)
class NearestNeighborMixing(Tolerant, PreAggregator):
    """NNM: every row becomes the mean of its n - f nearest rows, itself among them.

    Made for f < n/2. In front of Krum, the median, the trimmed mean or the geometric median it gives
    robustness of optimal order under heterogeneous data. Cost: all inner products, O(n^2 d); the mixed rows
    are made block by block where a rule wants them. Source: Allouah, Farhadkhani, Guerraoui, Gupta, Pinot,
    Stephan 2023, "Fixing by mixing: a recipe for optimal Byzantine ML under heterogeneity".
    """

    def mix(self, gram: Vector, rng: np.random.Generator) -> Vector:
        """Return the matrix that averages each row's neighbours; of equally near rows the first."""
        n = len(gram)
        near = n - self.faults(n)
        neighbours = np.argsort(squared_distances(gram), axis=1, kind="stable")[:, :near]
        mixing = np.zeros((n, n))
        np.put_along_axis(mixing, neighbours, 1.0 / near, axis=1)
        return mixing


PREAGGREGATORS: Mapping[str, type[PreAggregator]] = {
    "finite_check": FiniteCheck,
    "clip": Clip,
    "arc": ARC,
    "bucketing": Bucketing,
    "nnm": NearestNeighborMixing,
}
