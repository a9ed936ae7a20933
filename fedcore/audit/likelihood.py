"""The most powerful statistic of a subsampled Gaussian mechanism: the likelihood ratio of every round."""

import numpy as np
from numpy.typing import NDArray

from fedcore.privacy.events import Gaussian

Floats = NDArray[np.float64]
MEDIAN = 0.6745  # of |N(0, 1)|
UNLIKELY = 1e-12  # a number of draws that is left out


def log_likelihood_ratio(shown: Floats, event: Gaussian) -> Floats:
    """Return the log of P[shown | in] / P[shown | out] for each canary: (rounds, m) -> (m,).

    shown: what a round releases at each canary's coordinate, in any unit. event: what all rounds claim, with
    as many steps in each: in units of the clipped canary N(k, s z^2) for k ~ Bin(s, q), or N(0, s z^2). The
    unit is taken from the median |x|, since most canaries were not drawn, and show noise alone.
    """
    steps = event.steps // len(shown)
    variance = steps * event.noise_multiplier**2
    draws, probabilities = _draws(steps, event.sampling_rate)
    ratio = np.zeros(shown.shape[1])
    for row in shown:
        unit = np.median(np.abs(row)) / (MEDIAN * np.sqrt(variance))
        x = row / max(float(unit), 1e-300)
        exponents = np.outer(x, draws / variance) - draws**2 / (2 * variance) + np.log(probabilities)
        top = exponents.max(1)
        ratio += top + np.log(np.exp(exponents - top[:, None]).sum(1))
    return ratio


def _draws(steps: int, rate: float) -> tuple[Floats, Floats]:
    """Return the numbers of draws that a canary may have in a round, and the probability of each."""
    from scipy.stats import binom

    counts = np.arange(steps + 1)
    probabilities: Floats = binom(steps, rate).pmf(counts)
    likely = probabilities > UNLIKELY
    return counts[likely].astype(np.float64), probabilities[likely]
