"""What the aggregator makes of a closed round: means from sums, or a robust rule's word on rows."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.layout import Vector
from fedcore.strategies.algorithms import Aggregate
from fedcore.strategies.matrix import aggregate_rows
from fedcore.strategies.strategy import Strategy
from fedcore.strategies.terms import RowStore, Space
from fedcore.strategies.words import Accumulator


@dataclass(frozen=True)
class Means:
    """Weighted means, read block by block from the sums over so many clients of a population."""

    sums: Accumulator
    clients: int
    population: int

    @property
    def round(self) -> int:
        """The number of the round."""
        return self.sums.plan.ref.round

    def scalar(self, name: str) -> float:
        """Return the sum of a scalar over the clients."""
        return self.sums.scalar(name)

    def vector(self, name: str, block: slice) -> NDArray[np.float64]:
        """Return sum w_i v_i / sum w_i; zero where no client had any weight."""
        factor = self.sums.plan.vectors[name].factor
        weight = self.sums.scalar(factor) if factor else self.clients
        return self.sums.vector(name, block) / weight if weight else np.zeros(block.stop - block.start)


@dataclass(frozen=True)
class Robust(Means):
    """What a rule made of the rows of a round, vectors of shape (d,), float64; scalars are still sums."""

    made: Mapping[str, NDArray[np.float64]]

    def vector(self, name: str, block: slice) -> NDArray[np.float64]:
        """Return a block of the aggregate."""
        return self.made[name][block]


def conclude(
    strategy: Strategy,
    sums: Accumulator,
    rows: RowStore,
    folded: int,
    anchor: Vector | None,
    rng: np.random.Generator,
    space: Space,
) -> Aggregate:
    """Return what the strategy's aggregator makes of a closed round.

    anchor: the vector of shape (d,) that the aggregator asks for, if it asks for one. space: where the result
    lies. Raises SpecError where fewer updates are in than the rule can work with.
    """
    population = sums.plan.population
    if strategy.sums or not folded:
        return Means(sums, folded, population)
    pre, aggregator, made = strategy.pre, strategy.aggregator, {}
    for name, matrix in sorted(rows.packed().items()):
        factor = sums.plan.vectors[name].factor if aggregator.weighted else None
        weights = rows.scalar(factor) if factor else None
        made[name] = aggregate_rows(pre, aggregator, matrix, weights, rng=rng, anchor=anchor, space=space)
    return Robust(sums, folded, population, made)
