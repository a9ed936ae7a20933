"""Distributed differential privacy: every client adds a share of the noise, and only the sum is seen.

Kairouz, Liu and Steinke 2021 (discrete Gaussian, arXiv 2102.06387) and Agarwal, Kairouz and Liu 2021
(Skellam, arXiv 2110.04995): clip, rotate, scale, round at random to integers, add integer noise, sum modulo
2^bits; then wrap to signed, unscale, rotate back. The noise of the smallest surviving honest cohort is enough
by itself: nobody has to be trusted with adding it, and secure aggregation keeps all but the sum from sight.
What the sum then reveals, and under which assumption: `fedcore.privacy.discrete`.
"""

from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedcore.encoding import Integers
from fedcore.errors import SpecError, UpdateRefused
from fedcore.layout import Vector
from fedcore.privacy.discrete import MAX_VARIANCE, DiscreteGaussian, Skellam, discrete_gaussian, skellam
from fedcore.privacy.rotation import rotate, unrotate, width

Noise = Literal["discrete_gaussian", "skellam"]

_WRAP = 2.0**-40  # probability that any coordinate of a sum wraps around
_RETRY = 2.0**-20  # probability that a rounding is drawn again, which bounds its bias too


@dataclass(frozen=True)
class Parameters:
    """How a cohort encodes; public, the same for all clients of a run. Made by `parameters_for`.

    scale: integers per unit. norm: the L2 norm that no rounded vector exceeds, in integers. variance: of each
    client's noise on each integer coordinate. clients: the most in a sum. honest: the fewest whose noise
    counts.
    """

    noise: Noise
    clip_norm: float
    dimension: int
    clients: int
    honest: int
    bits: int
    scale: float
    norm: float
    variance: int

    def event(self, steps: int = 1) -> DiscreteGaussian | Skellam:
        """Return what so many rounds do to the data of a client that is in all of them."""
        kind = DiscreteGaussian if self.noise == "discrete_gaussian" else Skellam
        return kind(self.variance, self.honest, self.norm, self.dimension, steps)


def parameters_for(
    noise: Noise,
    clip_norm: float,
    noise_multiplier: float,
    *,
    dimension: int,
    clients: int,
    honest: int,
    bits: int,
) -> Parameters:
    """Return the parameters with the finest grid on which no sum wraps, but with probability 2^-40 a round.

    noise_multiplier: standard deviation of the noise of the honest together, relative to the norm of a
    rounded vector, so that the guarantee is that of the central Gaussian mechanism of the same multiplier,
    nearly. The bound on wrapping is for honest clients, whose vectors do not depend on the round's seed.

    Raises SpecError where rounding would add more to a vector than its clip norm.
    """
    if not (clip_norm > 0 and noise_multiplier > 0 and dimension > 0 and 1 <= honest <= clients):
        raise SpecError(
            f"clip_norm {clip_norm:g}, noise_multiplier {noise_multiplier:g}, dimension {dimension}, "
            f"{honest} honest of {clients} clients: expected positive numbers and honest <= clients"
        )
    if not 2 <= bits <= 62:
        raise SpecError(f"sums modulo 2^{bits}; expected 2..62 bits")

    def variance(scale: float) -> int:
        return ceil((noise_multiplier * _rounded_norm(clip_norm * scale, dimension)) ** 2 / honest)

    def fits(scale: float) -> bool:
        odds = log(4 * dimension / _WRAP)  # two tails, of the signal and of the noise, in every coordinate
        signal = clients * clip_norm * scale * min(1.0, sqrt(2 * odds / width(dimension)))
        noise_sum = sqrt(2 * clients * variance(scale) * odds) + odds / 3
        return variance(scale) <= MAX_VARIANCE and signal + clients + noise_sum < 2 ** (bits - 1)

    scale, too_fine = 0.0, 2.0**bits / clip_norm
    for _ in range(60):
        middle = (scale + too_fine) / 2
        scale, too_fine = (middle, too_fine) if fits(middle) else (scale, middle)
    norm = _rounded_norm(clip_norm * scale, dimension)
    if norm > 2 * clip_norm * scale:
        raise SpecError(
            f"sums of {clients} vectors of {dimension} coordinates in {bits} bits, noise_multiplier "
            f"{noise_multiplier:g}: rounding would add more than the clip norm itself; take more bits, "
            "fewer clients or less noise, or count on more honest clients"
        )
    return Parameters(noise, clip_norm, dimension, clients, honest, bits, scale, norm, variance(scale))


def _rounded_norm(norm: float, dimension: int) -> float:
    """Return the L2 norm that a vector's random rounding keeps to, but with probability _RETRY.

    Kairouz, Liu and Steinke 2021, Theorem 1: the smaller of sqrt(c^2 + d/4 + sqrt(2 ln(1/β)) (c + sqrt(d)/2))
    and c + sqrt(d).
    """
    likely = norm**2 + dimension / 4 + sqrt(-2 * log(_RETRY)) * (norm + sqrt(dimension) / 2)
    return min(sqrt(likely), norm + sqrt(dimension))


def encode(vector: Vector, parameters: Parameters, seed: int, rng: np.random.Generator) -> Integers:
    """Return a client's share of the sum, with its noise; shape (dimension,), int64 in 0..2^bits - 1.

    vector: shape (dimension,), float. seed: of the rotation, public, the same for all clients of a round and
    fresh in each. rng: for rounding and noise, the client's secret. Raises UpdateRefused unless the vector is
    finite.
    """
    exact = vector.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    if not np.isfinite(norm):
        raise UpdateRefused("the update is not finite, expected finite numbers; lower the learning rate")
    clipped = exact * (parameters.scale * parameters.clip_norm / max(norm, parameters.clip_norm))
    integers = rounded(rotate(clipped, seed), parameters.norm, rng)
    draw = discrete_gaussian if parameters.noise == "discrete_gaussian" else skellam
    integers += draw(parameters.variance, parameters.dimension, rng)
    integers &= 2**parameters.bits - 1
    return integers


def rounded(vector: Vector, norm: float, rng: np.random.Generator) -> Integers:
    """Return the vector rounded up or down at random, without bias, drawn again until its L2 norm is <= norm.

    The sensitivity of a sum thus holds always, not with high probability.
    """
    below = np.floor(vector)
    while True:
        up = rng.random(len(vector)) < vector - below
        integers: Integers = below.astype(np.int64) + up
        if integers @ integers <= norm**2:
            return integers


def decode(total: Integers, parameters: Parameters, seed: int) -> NDArray[np.float64]:
    """Return the sum of the clipped vectors plus noise, of shares summed modulo 2^bits in any way.

    total: shape (dimension,), int64. The noise of n clients has variance n (variance + at most 1/4) / scale^2
    per coordinate.
    """
    half = 2 ** (parameters.bits - 1)
    signed = ((total + half) & (2 * half - 1)) - half
    return unrotate(signed / parameters.scale, seed).astype(np.float64)
