"""The geometric median."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedcore.errors import expect
from fedcore.strategies.aggregators.base import GramRule
from fedcore.strategies.passes import Vector


@dataclass(frozen=True)
class GeometricMedian(GramRule):
    """The point z with the smallest sum_i p_i ||x_i - z||, by smoothed Weiszfeld iterations from the mean.

    z <- sum_i b_i x_i / sum_i b_i with b_i = p_i / max(nu, ||x_i - z||), nu the smoothing. Tolerates
    Byzantine rows of less than half the weight. z stays a combination of the rows, so an iteration costs
    O(n^2) whatever d is. Cost: all inner products, O(n^2 d). Source: Pillutla, Kakade, Harchaoui 2022,
    "Robust aggregation for federated learning" (RFA), Algorithm 2.
    """

    iterations: int = 32
    smoothing: float = 1e-6

    weighted: ClassVar[bool] = True

    def __post_init__(self) -> None:
        sound = self.iterations >= 1 and 0 < self.smoothing < np.inf
        expect(sound, self, "iterations >= 1 and a smoothing nu above 0")

    def coefficients(self, gram: Vector, weights: Vector) -> Vector:
        """Return b_i / sum_j b_j after the last iteration."""
        squares, a = np.diagonal(gram), weights
        for _ in range(self.iterations):
            products = gram @ a
            distances = np.sqrt(np.maximum(squares - 2.0 * products + a @ products, 0.0))
            b = weights / np.maximum(distances, self.smoothing)
            a = b / b.sum()
        return a
