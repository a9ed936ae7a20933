"""How much noise a run shows, and the epsilon of that much: a lower bound tight enough to see half the noise.

What `one_run` proves of any mechanism is far below the epsilon of a Gaussian one, whose worst case lies in
tails that no audit samples. So here the mechanism is taken at its word, sampling rate and steps included, but
for the noise: error rates that no attack could have against noise z refute every noise of at least z (Nasr et
al. 2023, "Tight Auditing of Differentially Private Machine Learning"). A mechanism that lies about its
sampling rate is found too: it shows less noise than it claims.

Assumed: what two canaries show is independent, as the noise of different coordinates is.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from fedcore.audit.one_run import SIGNIFICANCE
from fedcore.audit.rates import Counts, Included, Scores, counts, halves
from fedcore.privacy.accounting import epsilon, losses
from fedcore.privacy.events import Event, Gaussian

EPSILONS = np.linspace(0.0, 25.0, 501)  # at which the attack is held against the mechanism
GRID = 2.0**-8  # of privacy losses, which are rounded up: a bound may come out lower, never higher
CHOOSING = 1e-3  # significance of the bounds by which a threshold is chosen
LEAST, MOST, CLOSE = 1 / 32, 64.0, 1.01  # factors that are tried, and how well one is found


def separating_threshold(scores: Scores, included: Included) -> float:
    """Return the threshold with the largest mu = z(1 - FPR) - z(FNR), both rates at their upper bounds.

    The bounds are wide, so that few canaries in a tail do not pass for a good threshold.
    """
    from scipy.special import betaincinv, ndtri

    order = np.argsort(scores, kind="stable")
    members, others = int(included.sum()), int((~included).sum())
    missed = np.cumsum(included[order])  # members at or below each score
    false = others - np.cumsum(~included[order])  # the others above it
    if not members or not others:
        return math.inf
    alpha = CHOOSING / 2
    fnr = np.where(missed < members, betaincinv(missed + 1, np.maximum(members - missed, 1), 1 - alpha), 1.0)
    fpr = np.where(false < others, betaincinv(false + 1, np.maximum(others - false, 1), 1 - alpha), 1.0)
    return float(scores[order[np.argmax(-ndtri(fpr) - ndtri(fnr))]])


def judged(scores: Scores, included: Included, rng: np.random.Generator) -> Counts:
    """Return how the best threshold of half of the canaries does on the other half."""
    chosen, rest = halves(len(scores), rng)
    threshold = separating_threshold(scores[chosen], included[chosen])
    return counts(scores[rest], included[rest], threshold)


@dataclass(frozen=True)
class Shown:
    """What an attack's success says of a mechanism that claims a history.

    noise: at least so many times the claimed noise is refuted; below 1, so is the claim. inf: nothing is.
    epsilon: the least of what is left: of mechanisms with less noise, and, where the claim itself is refuted,
    of those with the claimed noise and a higher sampling rate.
    """

    noise: float
    epsilon: float


def shown(history: Iterable[Event], delta: float, found: Counts, significance: float = SIGNIFICANCE) -> Shown:
    """Return what an attack's success says, wrong with probability at most `significance`.

    Factors are found to 1 %, noise between 1/32 and 64 times what is claimed.
    """
    events = tuple(history)

    def with_noise(factor: float) -> bool:
        return refuted(scaled(events, factor), found, significance)

    high = 1.0
    while not with_noise(high):
        if high >= MOST:
            return Shown(math.inf, 0.0)
        high *= 2
    low = high / 2
    while low > LEAST and with_noise(low):
        low, high = low / 2, low
    _, noise = closest(low, high, lambda factor: not with_noise(factor))
    least = epsilon(scaled(events, noise), delta)
    most = 1 / max((e.sampling_rate for e in events if isinstance(e, Gaussian)), default=1.0)
    if noise < 1 < most and not refuted(sampled(events, most), found, significance):
        rate, _ = closest(1.0, most, lambda factor: refuted(sampled(events, factor), found, significance))
        least = min(least, epsilon(sampled(events, rate), delta))
    return Shown(noise, least)


def refuted(history: tuple[Event, ...], found: Counts, significance: float) -> bool:
    """Tell whether no attack can be so good: TPR > e^eps FPR + delta, or TNR > e^eps FNR + delta."""
    fpr, tpr = found.fpr(significance / 2)[1], found.tpr(significance / 2)[0]
    least = min(event.noise_multiplier for event in history)  # the less noise, the finer the grid
    grid = GRID / 2.0 ** math.floor(math.log2(min(1.0, least)))
    delta = losses(history, grid).get_delta_for_epsilon(EPSILONS)
    ways = ((tpr, fpr), (1 - fpr, 1 - tpr))
    return any(bool((often > np.exp(EPSILONS) * seldom + delta).any()) for often, seldom in ways)


def closest(low: float, high: float, holds: Callable[[float], bool]) -> tuple[float, float]:
    """Return two factors, 1 % apart; something holds at the first and not at the second."""
    while high / low > CLOSE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


def scaled(history: Iterable[Event], factor: float) -> tuple[Event, ...]:
    """Return a history with `factor` times the noise."""
    return tuple(replace(event, noise_multiplier=event.noise_multiplier * factor) for event in history)


def sampled(history: Iterable[Event], factor: float) -> tuple[Event, ...]:
    """Return a history with `factor` times its sampling rates, at most 1."""

    def more(event: Event) -> Event:
        if not isinstance(event, Gaussian):
            return event
        return replace(event, sampling_rate=min(1.0, event.sampling_rate * factor))

    return tuple(map(more, history))
