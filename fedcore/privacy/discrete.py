"""Integer noise for sums modulo 2^b: how it is drawn, and what a sum with it reveals.

Each of several clients adds noise of the same integer variance to every coordinate of its integer vector, and
an observer sees the sum only. Adjacency: one client's vector replaced by zeros, the public cohort and the
noise unchanged. The guarantee assumes that so many of them as the noise was made for survived in the sum,
drew their noise as told and keep it to themselves. Who takes part is known, so there is no amplification by
sampling.

The samplers take any np.random.Generator. None of NumPy's is cryptographic, also when it is seeded from OS
entropy, as in a deployment: whoever could predict its stream could subtract the noise.
"""

from dataclasses import dataclass
from math import inf, isqrt

import numpy as np
from numpy.typing import NDArray

from fedcore.encoding import BLOCK, Integers
from fedcore.errors import SpecError, expect

LEAST_VARIANCE = 1 << 10  # of one client's noise, where the noise of the honest has its bounds below
MAX_VARIANCE = 1 << 26  # up to here the exact sampler stays within 64-bit integers
_FAR = 40  # scales; a draw from further out is accepted with probability below 2^-1000, so never


@dataclass(frozen=True)
class _IntegerNoise:
    """`steps` integer sums with noise that honest clients make together, each with LEAST_VARIANCE or more.

    noise_multiplier: z = sqrt(honest variance) / norm, where no client's integer vector exceeds that L2 norm.
    The bounds hold in any dimension, so that they follow from a run's spec alone. Raises SpecError unless
    noise_multiplier > 0 and steps >= 0.
    """

    noise_multiplier: float
    steps: int = 1

    def __post_init__(self) -> None:
        sound = 0 < self.noise_multiplier < inf and self.steps >= 0
        expect(sound, self, "finite noise_multiplier > 0 and steps >= 0")


class DiscreteGaussian(_IntegerNoise):
    """The noise is N_Z(0, variance), whose probability at k is proportional to exp(-k^2 / (2 variance))."""

    def rdp(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return an upper bound on the Renyi divergence of each order > 1; shape kept.

        order ε^2 / 2 a step with ε = 1/z + τ sqrt(dimension), where
        τ = 10 sum over k < honest of exp(-2 π^2 variance k / (k + 1)) bounds how far a sum of discrete
        Gaussians is from being one (Kairouz, Liu and Steinke 2021, arXiv 2102.06387, Theorem 1). From
        LEAST_VARIANCE on, τ is below 10^-4000 per client, and the bound is that of the continuous Gaussian.
        """
        bound: NDArray[np.float64] = self.steps * orders / (2 * self.noise_multiplier**2)
        return bound


class Skellam(_IntegerNoise):
    """The noise is the difference of two Poisson variables of mean variance / 2."""

    def rdp(self, orders: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return an upper bound on the Renyi divergence of each order > 1; shape kept.

        With μ = honest variance a step has order Δ2^2 / (2 μ) + ((2 order - 1) Δ2^2 + 6 Δ1) / (4 μ^2) or less
        (Agarwal, Kairouz and Liu 2021, arXiv 2110.04995, Corollary 3.6). Of integers Δ1 <= Δ2^2 = μ / z^2, so
        that is (order + (2 order + 5) / (2 μ)) / (2 z^2), and largest where μ is LEAST_VARIANCE. It holds for
        integer orders; the divergence grows with the order, so the next integer bounds those between.
        """
        whole = np.ceil(orders)
        more = (2 * whole + 5) / (2 * LEAST_VARIANCE)
        bound: NDArray[np.float64] = self.steps * (whole + more) / (2 * self.noise_multiplier**2)
        return bound


def skellam(variance: int, size: int, rng: np.random.Generator) -> Integers:
    """Return the differences of two Poisson draws of mean variance / 2; shape (size,), int64.

    NumPy draws Poisson in floating point: right up to about its rounding, not exactly.
    """
    return rng.poisson(variance / 2, size) - rng.poisson(variance / 2, size)


def discrete_gaussian(variance: int, size: int, rng: np.random.Generator) -> Integers:
    """Return draws with P(x) proportional to exp(-x^2 / (2 variance)); shape (size,), int64.

    Exact, given uniform bits: integers only, no floating point (Canonne, Kamath and Steinke 2020, arXiv
    2004.00010, Algorithms 1 to 3). Raises SpecError unless 1 <= variance <= MAX_VARIANCE.
    """
    if not 1 <= variance <= MAX_VARIANCE:
        raise SpecError(f"a discrete Gaussian of variance {variance}; expected 1..{MAX_VARIANCE}")
    scale = isqrt(variance) + 1
    drawn, need = [np.empty(0, np.int64)], size
    while need:
        y = _discrete_laplace(scale, min(2 * need + 16, BLOCK), rng)
        y = y[np.abs(y) <= _FAR * scale]
        exponent = (np.abs(y) * scale - variance) ** 2, 2 * variance * scale**2
        drawn.append(y[_bernoulli_exp(*exponent, rng)][:need])
        need -= len(drawn[-1])
    return np.concatenate(drawn)


def _discrete_laplace(scale: int, tries: int, rng: np.random.Generator) -> Integers:
    """Return some of `tries` draws, those accepted, with P(x) proportional to exp(-|x| / scale)."""
    low = rng.integers(0, scale, tries)
    low = low[_bernoulli_exp_fraction(low, scale, rng)]
    magnitude = low + scale * _runs(len(low), rng)
    sign = 1 - 2 * rng.integers(0, 2, len(low))
    drawn: Integers = (sign * magnitude)[
        (sign > 0) | (magnitude > 0)
    ]  # zero has one sign, or would count twice
    return drawn


def _bernoulli_exp(numerators: Integers, denominator: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return True with probability exp(-numerator / denominator) each, for any numerator >= 0."""
    whole, rest = np.divmod(numerators, denominator)
    return (_runs(len(whole), rng) >= whole) & _bernoulli_exp_fraction(rest, denominator, rng)


def _runs(size: int, rng: np.random.Generator) -> Integers:
    """Return how many draws of probability exp(-1) came true in a row, each."""
    runs = np.zeros(size, np.int64)
    going = np.arange(size)
    while len(going):
        going = going[_bernoulli_exp_fraction(np.ones(len(going), np.int64), 1, rng)]
        runs[going] += 1
    return runs


def _bernoulli_exp_fraction(
    numerators: Integers, denominator: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Return True with probability exp(-numerator / denominator) each, for fractions within 0..1.

    Draw with probability fraction / k for k = 1, 2, ... until one fails: k is odd with that probability.
    """
    odd = np.zeros(len(numerators), np.bool_)
    going, k = np.arange(len(numerators)), 1
    while len(going):
        hit = rng.integers(0, denominator * k, len(going)) < numerators[going]
        odd[going[~hit]] = k % 2 == 1
        going, k = going[hit], k + 1
    return odd
