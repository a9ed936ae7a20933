"""One-shot client canaries: an estimate of epsilon from the final model alone (Andrew et al. 2024)."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
REACH, POINTS = 12.0, 40_001  # standard deviations, and points, of an integral
MOST = 100.0  # an epsilon beyond which nobody cares


def directions(count: int, dimension: int, rng: np.random.Generator) -> Floats:
    """Return random vectors of unit length, (count, dimension): nearly orthogonal to everything."""
    drawn = rng.normal(size=(count, dimension))
    unit: Floats = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return unit


def cosines(canaries: Floats, movement: Floats) -> Floats:
    """Return the cosine of each canary, (k, d), with the model's movement over the run, (d,): (k,)."""
    made: Floats = canaries @ movement / max(float(np.linalg.norm(movement)), 1e-300)
    return made


def epsilon_estimate(cosines: Floats, dimension: int, delta: float) -> float:
    """Return the epsilon between N(0, 1/d) and the normal distribution that fits the cosines.

    The first is the cosine of a canary that was left out (Andrew et al. 2024, section 3, Algorithm 1). An
    estimate and no bound: it takes both for normal, and has an error that is not known. At most 100.
    """
    null = dimension**-0.5
    return gaussian_epsilon(float(cosines.mean()) / null, float(cosines.std(ddof=1)) / null, delta)


def gaussian_epsilon(mean: float, deviation: float, delta: float) -> float:
    """Return the least epsilon for which N(0, 1) and N(mean, deviation^2) are (epsilon, delta)-close."""
    reach = REACH * max(1.0, deviation)
    x = np.linspace(min(0.0, mean) - reach, max(0.0, mean) + reach, POINTS)
    out = -(x**2) / 2
    into = -(((x - mean) / deviation) ** 2) / 2 - np.log(deviation)
    cell = (x[1] - x[0]) / np.sqrt(2 * np.pi)

    def apart(epsilon: float) -> float:
        ways = (np.exp(a) - np.exp(np.minimum(epsilon + b, 700.0)) for a, b in ((into, out), (out, into)))
        return max(float(np.maximum(way, 0.0).sum() * cell) for way in ways)

    low, high = 0.0, MOST
    if apart(0.0) <= delta:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if apart(middle) > delta else (low, middle)
    return high
