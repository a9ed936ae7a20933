"""Divide and conquer."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedcore.errors import SpecError
from fedcore.strategies.aggregators.base import Aggregator, Needs
from fedcore.strategies.geometry import average
from fedcore.strategies.matrix import Matrix
from fedcore.strategies.passes import Vector
from fedcore.strategies.tolerance import Tolerant


@dataclass(frozen=True)
class DnC(Tolerant, Aggregator):
    """Drop the rows that stand out along the principal direction of a random sample of coordinates.

    An iteration centres `sample` coordinates drawn without replacement, scores each row by <x_i - mu, v>^2
    with v their top right singular vector, and drops the floor(c f) highest scores. The result is the mean of
    the rows that no iteration dropped. Tolerates f with iterations * floor(c f) < n. Cost: O(n^2 sample) an
    iteration and a pass. Source: Shejwalkar, Houmansadr 2021, "Manipulating the Byzantine", Algorithm 2.
    """

    needs: ClassVar[Needs] = "rows"

    iterations: int = 1
    sample: int = 10_000
    c: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or self.sample < 1 or not self.c > 0:
            raise SpecError(f"{self}: expected iterations >= 1, sample >= 1 and c > 0")

    def most(self, n: int) -> int:
        """Return the largest f < n/2 that leaves a row whatever the iterations drop."""
        fits = (f for f in range((n - 1) // 2, -1, -1) if self.iterations * int(self.c * f) < n)
        return next(fits, -1)

    def evaluate(self, matrix: Matrix, weights: Vector, rng: np.random.Generator) -> Vector:
        """Return the mean of the rows that were never dropped."""
        rows = matrix.whole()
        n, d = rows.shape
        dropped = int(self.c * self.faults(n))
        good = np.ones(n, bool)
        for _ in range(self.iterations):
            sample = np.sort(rng.choice(d, min(self.sample, d), replace=False))
            part = rows[:, sample].astype(np.float64)
            part -= part.mean(axis=0)
            # The left singular vector, scaled, holds the rows' components along the right one.
            scores = np.linalg.eigh(part @ part.T)[1][:, -1] ** 2
            good[np.argsort(scores, kind="stable")[n - dropped :]] = False
        return matrix.combine(average(np.flatnonzero(good), n))
