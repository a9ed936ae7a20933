"""Attacks that shift the honest mean: by a little of the spread (ALIE), or against itself (IPM).

Each comes with a fixed factor, and in an optimised form that tries factors on the server's own rule and takes
the one that moves the aggregate farthest from the honest mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from fedcore.errors import expect
from fedcore.layout import Vector
from fedcore.simulations.attacks.attack import Context, Deltas, copies, deviation, mean


@dataclass(frozen=True)
class ALIE:
    """A little is enough: mu + sign z sigma, too close to the honest rows to be told from them.

    z = 0 takes the paper's z = Phi^-1((n - m - s) / (n - m)), s = floor(n/2 + 1) - m: so small that s honest
    rows are expected to lie farther out, which with the attackers are a majority. Where the attackers have
    one by themselves, s is 1; where the formula is negative (a lone attacker), z is 0.

    Source: Baruch et al. 2019 (arXiv:1902.06156).
    """

    z: float = 0.0
    sign: Literal[-1, 1] = -1

    def __post_init__(self) -> None:
        expect(0 <= self.z < np.inf and self.sign in (-1, 1), self, "a finite z >= 0, and sign 1 or -1")

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """See `Forges.forge`."""
        z, mu = self.z or hidden_z(len(honest) + len(own), len(own)), mean(honest)
        return copies(mu + self.sign * z * deviation(honest, mu), own)


def hidden_z(n: int, m: int) -> float:
    """Return ALIE's z for m attackers among n clients."""
    honest, supporters = n - m, max(1, n // 2 + 1 - m)
    if honest <= supporters:
        return 0.0
    return max(0.0, NormalDist().inv_cdf((honest - supporters) / honest))


@dataclass(frozen=True)
class IPM:
    """Inner product manipulation: -eps mu, so that the aggregate points away from the honest mean.

    A small eps survives rules that trust what is short or close; a mean gives way at eps > h/m.

    Source: Xie et al. 2020, Fall of Empires (arXiv:1903.03936), with eps = 0.1.
    """

    eps: float = 0.1

    def __post_init__(self) -> None:
        expect(0 < self.eps < np.inf, self, "eps > 0, a finite number")

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """See `Forges.forge`."""
        return copies(-self.eps * mean(honest), own)


@dataclass(frozen=True)
class OptimisedALIE:
    """ALIE with the z in (0, largest] that maximises ‖aggregate - mu‖, found by a line search.

    Cost: `evaluations` aggregations a round.

    Source: Allouah et al. 2023 (arXiv:2302.01772), who search for the factor anew in every round.
    """

    sign: Literal[-1, 1] = -1
    largest: float = 10.0
    evaluations: int = 16

    def __post_init__(self) -> None:
        _expect_search(self, self.largest, self.evaluations)
        expect(self.sign in (-1, 1), self, "sign 1 or -1")

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """See `Forges.forge`."""
        mu = mean(honest)
        step = self.sign * deviation(honest, mu)
        harm = harm_of(lambda z: mu + z * step, mu, honest, own, context)
        return copies(mu + largest_on_line(harm, self.largest, self.evaluations) * step, own)


@dataclass(frozen=True)
class OptimisedIPM:
    """IPM with the eps in (0, largest] that maximises ‖aggregate - mu‖, found by a line search.

    Cost: `evaluations` aggregations a round.

    Source: Allouah et al. 2023 (arXiv:2302.01772), who call it optimised FOE.
    """

    largest: float = 100.0
    evaluations: int = 16

    def __post_init__(self) -> None:
        _expect_search(self, self.largest, self.evaluations)

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """See `Forges.forge`."""
        mu = mean(honest)
        harm = harm_of(lambda eps: -eps * mu, mu, honest, own, context)
        return copies(-largest_on_line(harm, self.largest, self.evaluations) * mu, own)


def _expect_search(attack: object, largest: float, evaluations: int) -> None:
    expect(0 < largest < np.inf and evaluations >= 2, attack, "a finite largest > 0 and evaluations >= 2")


def harm_of(
    row: Callable[[float], Vector], mu: Vector, honest: Deltas, own: Deltas, context: Context
) -> Callable[[float], float]:
    """Return the function factor -> ‖aggregate(honest rows and m times row(factor)) - mu‖."""
    rows = np.concatenate([honest, own])

    def harm(factor: float) -> float:
        rows[len(honest) :] = row(factor)
        return float(np.linalg.norm(context.aggregate(rows) - mu))

    return harm


def largest_on_line(value: Callable[[float], float], largest: float, evaluations: int) -> float:
    """Return the factor in (0, largest] with the greatest value of so many that are tried.

    Half of them lie evenly on a logarithmic scale over three decades, since a rule may accept factors of any
    size; the others lie evenly between the neighbours of the best. Nothing is assumed of the function: a rule
    that selects rows makes it jump. The first of equal values wins.
    """
    coarse = np.geomspace(largest, largest / 1000, evaluations // 2)
    values = [value(float(factor)) for factor in coarse]
    best = int(np.argmax(values))
    low, high = coarse[min(best + 1, len(coarse) - 1)], coarse[max(best - 1, 0)]
    fine = np.linspace(low, high, evaluations - len(coarse) + 2)[1:-1]
    values += [value(float(factor)) for factor in fine]
    return float(np.concatenate([coarse, fine])[np.argmax(values)])
