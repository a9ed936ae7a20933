"""Comparative gradient elimination."""

from dataclasses import dataclass

import numpy as np

from fedcore.strategies.aggregators.base import GramRule
from fedcore.strategies.geometry import average
from fedcore.strategies.matrix import Products
from fedcore.strategies.passes import Vector
from fedcore.strategies.tolerance import Tolerant


@dataclass(frozen=True)
class CGE(Tolerant, GramRule):
    """The mean of the n - f rows with the smallest norms; of equals the first.

    Tolerates f < n/2 where the honest rows are nearly alike; a Byzantine row that is short passes. Cost: a
    pass for the norms. Source: Gupta, Liu, Vaidya 2021, "Byzantine fault-tolerant distributed machine
    learning using norm-based comparative gradient elimination" (their sum, divided by n - f).
    """

    @property
    def products(self) -> Products:
        """The norms."""
        return "norms"

    def coefficients(self, gram: Vector, weights: Vector) -> Vector:
        """Return 1 / (n - f) for the shortest rows."""
        n = len(gram)
        return average(np.argsort(np.diagonal(gram), kind="stable")[: n - self.faults(n)], n)
