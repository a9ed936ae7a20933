"""What was done to data, as data: an accountant turns a history of such events into one epsilon.

Two data sets are neighbours if they differ in one unit. Noise multipliers are relative to what one unit can
add to the sum. Epsilons are never added; histories are.
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from fedcore.errors import SpecError
from fedcore.privacy.discrete import DiscreteGaussian, Skellam

Unit = Literal["example", "client"]
Adjacency = Literal["add/remove", "zero-out"]
Adversary = Literal["receiver", "coordinator"]
Trust = Literal["enforced", "distributed", "trusted"]
Accountant = Literal["pld", "rdp"]


@dataclass(frozen=True)
class Gaussian:
    """`steps` sums with noise N(0, (noise_multiplier * sensitivity)^2), over Poisson samples.

    sampling_rate: the probability of each unit to be in a sample, independently; 1: all are. Raises SpecError
    unless noise_multiplier > 0, 0 < sampling_rate <= 1 and steps >= 0.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < inf or not 0 < self.sampling_rate <= 1 or self.steps < 0:
            raise SpecError(
                f"{self}: expected finite noise_multiplier > 0, 0 < sampling_rate <= 1 and steps >= 0; "
                "without noise there is no finite epsilon"
            )


@dataclass(frozen=True)
class Laplace:
    """`steps` sums with Laplace noise of scale noise_multiplier * (L1 sensitivity) on each coordinate."""

    noise_multiplier: float
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < inf or self.steps < 0:
            raise SpecError(f"{self}: expected finite noise_multiplier > 0 and steps >= 0")


Event = Gaussian | Laplace | DiscreteGaussian | Skellam


@dataclass(frozen=True)
class Guarantee:
    """(epsilon, delta) for one unit against one adversary.

    adjacency: what the neighbouring data set lacks. add/remove: the unit. zero-out: what the client sends,
    which is zero there; who is asked stays the same, as it must where cohorts are not drawn independently,
    or where their members see each other.

    trust: who makes the noise. enforced: the device itself. distributed: the honest clients together.
    trusted: the coordinator, whose word it is.
    """

    epsilon: float
    delta: float
    unit: Unit
    adversary: Adversary
    trust: Trust
    accountant: Accountant
    adjacency: Adjacency

    def __str__(self) -> str:
        return (
            f"({self.epsilon:.2f}, {self.delta:g})-DP for one {self.unit} against the {self.adversary} "
            f"({self.trust}; {self.adjacency}, {self.accountant.upper()})"
        )
