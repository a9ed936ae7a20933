"""Attacks that need no arithmetic to speak of: flipped, random, broken and copied updates, false weights."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedcore.errors import expect
from fedcore.simulations.attacks.attack import Context, Deltas, Scalars, copies, mean


@dataclass(frozen=True)
class SignFlip:
    """Each attacker sends minus its own update, or all send -mu (`of = "mean"`).

    Source: Li et al. 2019, RSA (arXiv:1811.03761), "sign-flipping".
    """

    of: Literal["own", "mean"] = "own"

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """See `Forges.forge`."""
        return -own if self.of == "own" else copies(-mean(honest), own)


@dataclass(frozen=True)
class Gaussian:
    """Each attacker sends noise from N(0, sigma^2 I).

    Source: Blanchard et al. 2017 (arXiv:1703.02757), with sigma = 200 on gradients.
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        expect(0 < self.sigma < np.inf, self, "sigma > 0, a finite number")

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """See `Forges.forge`."""
        return (self.sigma * context.rng.standard_normal(own.shape)).astype(own.dtype)


@dataclass(frozen=True)
class NonFinite:
    """Every coordinate is NaN, or infinite: one such row ruins any rule without a finite check."""

    value: Literal["nan", "inf"] = "nan"

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """See `Forges.forge`."""
        return np.full_like(own, float(self.value))


@dataclass(frozen=True)
class Sybil:
    """All attackers are one: they send copies of the update that the first of them trained.

    A single client's data then counts m times, and the copies vouch for each other under rules that trust
    what lies close together.

    Source: Fung et al. 2020, FoolsGold (arXiv:1808.04866).
    """

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """See `Forges.forge`."""
        return copies(own[0], own)


@dataclass(frozen=True)
class WeightLiar:
    """Attackers send what they trained and claim that it comes from `weight` examples.

    A mean by reported weights follows whoever reports most; a negative weight turns an update round. The
    default is the largest that a run accepts unless [limits] weight says otherwise.
    """

    weight: float = 1e6

    def __post_init__(self) -> None:
        expect(np.isfinite(self.weight), self, "a finite weight")

    def scalars(self, own: Scalars) -> Scalars:
        """See `Lies.scalars`."""
        return {**own, "weight": np.full_like(own["weight"], self.weight)}
