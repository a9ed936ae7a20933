"""Distributed differential privacy: every client adds a share of the noise, and only the sum is seen.

Kairouz, Liu and Steinke 2021 (discrete Gaussian, arXiv 2102.06387) and Agarwal, Kairouz and Liu 2021
(Skellam, arXiv 2110.04995): clip, rotate, scale, round at random to integers, add integer noise, sum modulo
2^bits; then wrap to signed, unscale, rotate back. The noise of the smallest surviving honest cohort is enough
by itself: nobody has to be trusted with adding it, and secure aggregation keeps all but the sum from sight.
What the sum then reveals, and under which assumption: `fedcore.privacy.discrete`.
"""

from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedcore.encoding import WRAP, Integers, Narrow, signed
from fedcore.errors import SpecError, UpdateRefused
from fedcore.layout import Vector
from fedcore.privacy.discrete import LEAST_VARIANCE, MAX_VARIANCE, discrete_gaussian, skellam
from fedcore.privacy.rotation import flatness, rotate, unrotated

Noise = Literal["discrete_gaussian", "skellam"]

_RETRY = 2.0**-20  # probability that a rounding is drawn again, which bounds its bias too


@dataclass(frozen=True)
class Parameters:
    """How a cohort encodes; public, the same for all clients of a round. Made by `parameters_for`.

    scale: integers per unit. norm: the L2 norm that no rounded vector exceeds, in integers. variance: of each
    client's noise on each integer coordinate. clients: the most in a sum. honest: the fewest whose noise
    counts. seed: of the rotation, fresh in each round.
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
    seed: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the words of which shares and their sums are made, uint16 or uint32."""
        return np.dtype(f"uint{self.bits}")


def parameters_for(
    noise: Noise,
    clip_norm: float,
    noise_multiplier: float,
    *,
    dimension: int,
    clients: int,
    honest: int,
    bits: int,
    seed: int = 0,
) -> Parameters:
    """Return the parameters with the finest grid on which no sum wraps, but with probability 2^-40 a round.

    noise_multiplier: standard deviation of the noise of the honest together, relative to the norm of a
    rounded vector, so that the guarantee is that of the central Gaussian mechanism of the same multiplier,
    nearly. The bound on wrapping is for honest clients, whose vectors do not depend on the round's seed.

    Raises SpecError where rounding would add more to a vector than its clip norm, or the noise of a client
    is so coarse that what a sum reveals is not known.
    """
    if not (clip_norm > 0 and noise_multiplier > 0 and dimension > 0 and 1 <= honest <= clients):
        raise SpecError(
            f"clip_norm {clip_norm:g}, noise_multiplier {noise_multiplier:g}, dimension {dimension}, "
            f"{honest} honest of {clients} clients: expected positive numbers and honest <= clients"
        )
    if bits not in (16, 32):
        raise SpecError(f"sums modulo 2^{bits}; expected 16 or 32 bits")

    def variance(scale: float) -> int:
        return ceil((noise_multiplier * _rounded_norm(clip_norm * scale, dimension)) ** 2 / honest)

    def fits(scale: float) -> bool:
        odds = log(4 * dimension / WRAP)  # two tails in every coordinate, and as much again for the signal
        signal = clients * clip_norm * scale * flatness(dimension, WRAP / 2)
        noise_sum = sqrt(2 * clients * variance(scale) * odds) + odds / 3
        return variance(scale) <= MAX_VARIANCE and signal + clients + noise_sum < 2 ** (bits - 1)

    scale, too_fine = 0.0, 2.0**bits / clip_norm
    for _ in range(60):
        middle = (scale + too_fine) / 2
        scale, too_fine = (middle, too_fine) if fits(middle) else (scale, middle)
    norm = _rounded_norm(clip_norm * scale, dimension)
    summed = (
        f"sums of {clients} vectors of {dimension} coordinates in {bits} bits, noise_multiplier "
        f"{noise_multiplier:g}"
    )
    if norm > 2 * clip_norm * scale:
        raise SpecError(
            f"{summed}: rounding would add more than the clip norm itself; take more bits, fewer clients or "
            "less noise, or count on more honest clients"
        )
    if variance(scale) < LEAST_VARIANCE:
        raise SpecError(
            f"{summed}: each client would add noise of variance {variance(scale)} to its integers, expected "
            f"at least {LEAST_VARIANCE}; take more bits, fewer clients or more noise"
        )
    return Parameters(noise, clip_norm, dimension, clients, honest, bits, scale, norm, variance(scale), seed)


def _rounded_norm(norm: float, dimension: int) -> float:
    """Return the L2 norm that a vector's random rounding keeps to, but with probability _RETRY.

    Kairouz, Liu and Steinke 2021, Theorem 1: the smaller of sqrt(c^2 + d/4 + sqrt(2 ln(1/β)) (c + sqrt(d)/2))
    and c + sqrt(d).
    """
    likely = norm**2 + dimension / 4 + sqrt(-2 * log(_RETRY)) * (norm + sqrt(dimension) / 2)
    return min(sqrt(likely), norm + sqrt(dimension))


def encode(vector: Vector, parameters: Parameters, rng: np.random.Generator) -> Narrow:
    """Return a client's share of the sum, with its noise; shape (dimension,), of the parameters' dtype.

    vector: shape (dimension,), float. rng: for rounding and noise, the client's secret. Raises UpdateRefused
    unless the vector is finite.
    """
    exact = vector.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    if not np.isfinite(norm):
        raise UpdateRefused("the update is not finite, expected finite numbers; lower the learning rate")
    clipped = exact * (parameters.scale * parameters.clip_norm / max(norm, parameters.clip_norm))
    integers = rounded(rotate(clipped, parameters.seed), parameters.norm, rng)
    draw = discrete_gaussian if parameters.noise == "discrete_gaussian" else skellam
    integers += draw(parameters.variance, parameters.dimension, rng)
    return integers.astype(parameters.dtype)  # modulo 2^bits


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


def decode(total: Narrow, parameters: Parameters, vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Write to `vector` the sum of the clipped vectors plus noise, of shares that were summed in any order.

    total, vector: shape (dimension,), `total` of the parameters' dtype. The noise of n clients has variance
    n (variance + at most 1/4) / scale^2 per coordinate.
    """
    for place, piece in unrotated(signed(total)[None], parameters.seed):
        np.divide(piece[0], parameters.scale, out=vector[place])
    return vector


def largest_norm(parameters: Parameters, clients: int) -> float:
    """Return what the L2 norm of the signed words of a sum over so many exceeds with probability 2^-40 only.

    By that of a Gaussian vector of d coordinates, which exceeds sqrt(d) + t with probability exp(-t^2 / 2).
    """
    noise = sqrt(parameters.dimension) + sqrt(-2 * log(WRAP))
    return clients * parameters.norm + sqrt(clients * parameters.variance) * noise
