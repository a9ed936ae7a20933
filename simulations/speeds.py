"""How long virtual clients take, in virtual seconds that nobody waits for.

A client works for the examples that it goes over times its pace, in seconds an example. The pace is drawn
once, from (run seed, client), whatever else happens in the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedcore.errors import expect
from fedcore.plugins import build
from fedcore.seeds import generator
from fedcore.simulations.population import Population


class Speed(Protocol):
    """A distribution of paces."""

    def pace(self, rng: np.random.Generator) -> float:
        """Return a client's seconds an example."""
        ...


@dataclass(frozen=True)
class Constant:
    """Everybody takes `seconds` an example."""

    seconds: float = 1.0

    def __post_init__(self) -> None:
        expect(0 < self.seconds < np.inf, self, "finite seconds > 0")

    def pace(self, rng: np.random.Generator) -> float:
        """Return `seconds`."""
        return self.seconds


@dataclass(frozen=True)
class UniformPace:
    """Paces are spread evenly over low..high seconds an example."""

    low: float = 0.5
    high: float = 1.5

    def __post_init__(self) -> None:
        expect(0 < self.low <= self.high < np.inf, self, "0 < low <= high, in seconds")

    def pace(self, rng: np.random.Generator) -> float:
        """Return a draw from low..high."""
        return float(rng.uniform(self.low, self.high))


@dataclass(frozen=True)
class LogNormal:
    """The logarithms of the paces are normal: a few clients are very slow, half take less than `median`.

    The slowest twentieth takes at least exp(1.64 sigma) times the median, 5 times at sigma 1.
    """

    median: float = 1.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        expect(0 < self.median < np.inf, self, "finite median > 0, in seconds")
        expect(0 <= self.sigma < np.inf, self, "finite sigma >= 0")

    def pace(self, rng: np.random.Generator) -> float:
        """Return median * exp(sigma * z), z standard normal."""
        return float(self.median * np.exp(self.sigma * rng.standard_normal()))


SPEEDS: Mapping[str, type[Speed]] = {"constant": Constant, "uniform": UniformPace, "lognormal": LogNormal}


class Stopwatch:
    """Knows how long each client of a population takes for a round of training."""

    def __init__(self, population: Population) -> None:
        """Read `[simulation] speed`; raises SpecError for what does not fit."""
        self.population = population
        self.speed = build(SPEEDS, population.spec.simulation.speed, "simulation.speed")
        self.known: dict[str, float] = {}

    def seconds(self, client: str) -> float:
        """Return the virtual seconds of one client's training, the same in every round."""
        if client not in self.known:
            examples, _ = self.population.examples(client)
            seen = self.population.spec.client.passes(len(examples)) * len(examples)
            pace = self.speed.pace(generator(self.population.spec.run.seed, "speed", client))
            self.known[client] = seen * pace
        return self.known[client]
