"""The accountant: what a history of events comes to, as one epsilon.

Add/remove adjacency throughout, and zero-out where nothing is sampled, by dp-accounting. "pld" composes
privacy loss distributions, rounded up to a grid (Doroshenko et al. 2022, connect the dots): tight, and never
below the truth. "rdp" adds Rényi divergences (Mironov et al. 2019) and converts once (Canonne et al. 2020,
proposition 12): looser, but a sum of vectors, which is what a ledger keeps, and all that is known of integer
noise. The figure of the central limit theorem (Gaussian DP) can lie far below the truth, and is nowhere here.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache, reduce
from heapq import heappop, heappush
from math import frexp, inf, ldexp, log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import SpecError
from fedcore.privacy.discrete import DiscreteGaussian, Skellam
from fedcore.privacy.events import Accountant, Event, Gaussian, Laplace

ORDERS: tuple[float, ...] = (
    2.0,  # from here to 3, dp-accounting's series does not converge for some rates
    *np.arange(3.0, 11.0, 0.25).tolist(),
    *np.arange(11.0, 33.0).tolist(),
    *(40.0, 48.0, 64.0, 96.0, 128.0, 256.0, 512.0, 1024.0),
)
"""The orders of all Rényi divergences here; part of a ledger's format."""

ROUGH = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0, 256.0)
"""Few and cheap orders, for an upper bound on epsilon to start from."""

ROUNDING = 1e-13  # of a Rényi divergence, in float64: what is smaller counts as this much
CONVOLVED = 1e-11  # of a delta, after the convolutions' FFTs
COARSEST = 2.0**-10  # of the grid of privacy losses
CELLS = 2.0**17  # of that grid, up to epsilon
MEANINGLESS = 500.0  # epsilons above are left to Rényi divergences; e^710 is no float64
MOST_STEPS = 10**6  # more are, too: their convolution takes minutes, and its rounding grows with them
LEAST_NOISE = 2.0**-10  # less counts as none
MOST_NOISE = 2.0**20  # more counts as this much; as in [privacy] noise_multiplier
CLOSE = 1e-3  # relative, of a noise multiplier
POINTS = 64  # of a curve, each of which is some milliseconds of work


Spent = Iterable[Event | tuple[float, float, int]]
"""A history; a tuple is the (noise_multiplier, sampling_rate, steps) of a Gaussian."""


def accountant_for(history: Spent) -> Accountant:
    """Return the tightest accountant that knows all events: "pld", but for integer noise."""
    return "rdp" if any(isinstance(event, DiscreteGaussian | Skellam) for event in history) else "pld"


def epsilon(history: Spent, delta: float, accountant: Accountant | None = None) -> float:
    """Return the smallest epsilon known for which a history is (epsilon, delta)-DP; 0.0 if nothing was done.

    accountant: None takes `accountant_for` the history. The order of events does not matter. Raises SpecError
    for an unknown event or a delta outside (0, 1), and under "pld" for integer noise.
    """
    history = tuple(history)
    return _epsilon(_merged(history), _checked(delta), accountant or accountant_for(history))


def smallest_noise(
    history_of: Callable[[float], Spent],
    target_epsilon: float,
    delta: float,
    accountant: Accountant | None = None,
) -> float:
    """Return a noise multiplier of five digits within target_epsilon; one that is smaller by 1/500 is not.

    history_of: noise multiplier -> history, whose epsilon falls with the noise. Raises SpecError where no
    noise up to 2^20 reaches the target.
    """
    if not 0 < target_epsilon < inf:
        raise SpecError(f"target_epsilon {target_epsilon}: expected more than 0, such as 3.0")
    _checked(delta)

    def spent(noise: float) -> float:
        return epsilon(history_of(noise), delta, accountant)

    def rough(noise: float) -> float:
        return _rough(_merged(history_of(noise)), delta)

    if rough(MOST_NOISE) > target_epsilon and (least := spent(MOST_NOISE)) > target_epsilon:
        raise SpecError(
            f"target_epsilon {target_epsilon:g} is out of reach: even with noise_multiplier {MOST_NOISE:g}, "
            f"epsilon is {least:.3g}; expected a larger target, fewer rounds, or more noise on metrics"
        )
    _, high = _bracket(lambda noise: rough(noise) <= target_epsilon, LEAST_NOISE, MOST_NOISE)
    over = rough(high) / max(spent(high), 1e-9)  # how much too high the quick bound is, about here
    low, _ = _bracket(lambda noise: rough(noise) <= over * target_epsilon, LEAST_NOISE, high)
    while low > LEAST_NOISE and spent(low) <= target_epsilon:
        low, high = _five_digits(low / 1.02), low
    return _crossing(spent, target_epsilon, low, high)


def _bracket(enough: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """Return two noises 1 % apart, of which the larger is enough; bisection."""
    while high / low > 1.01:
        middle = _five_digits(sqrt(low * high))
        low, high = (low, middle) if enough(middle) else (middle, high)
    return low, high


def _crossing(spent: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Return the noise in (low, high] from which on no more than a target is spent, up to about CLOSE.

    False position, as log(epsilon) over log(noise) is almost a line; each guess is a little above the line,
    so that both ends move, and away from the ends.
    """
    above, below = spent(high), spent(low)
    while high / low > 1 + 2 * CLOSE:
        straight = 0 < above < below < inf
        share = log(below / target) / log(below / above) if straight else 0.5
        root = low * (high / low) ** share
        if straight and high <= root * (1 + CLOSE):
            break
        noise = _five_digits(min(max(root, low) * (1 + CLOSE / 2), high / (1 + CLOSE / 2)))
        if (value := spent(noise)) <= target:
            high, above = noise, value
        else:
            low, below = noise, value
    return high


def _five_digits(noise: float) -> float:
    return float(f"{noise:.5g}")


def curve(history_of: Callable[[int], Spent], rounds: int, delta: float) -> list[float]:
    """Return the epsilon spent after each of rounds 1..rounds; the last one is `epsilon`'s.

    history_of: number of rounds -> history, whose epsilon grows with the rounds. It is exact for up to 64
    rounds; of more, 64 are computed where they matter most, and those in between are given the next one's:
    a few percent above, and never below.
    """
    known = {0: 0.0, rounds: epsilon(history_of(rounds), delta)}
    spans = [(-inf, 0, rounds)]
    while spans and len(known) <= POINTS:
        _, first, last = heappop(spans)  # where epsilon grows most
        if last - first < 2:
            continue
        middle = max(first + 1, int(sqrt(first * last)))
        known[middle] = epsilon(history_of(middle), delta)
        for left, right in ((first, middle), (middle, last)):
            growth = known[right] / known[left] if known[left] else inf
            heappush(spans, (-growth, left, right))
    least = known[rounds]
    values = [least := min(least, known.get(number, inf)) for number in range(rounds, 0, -1)]
    return values[::-1]


def rdp(event: Event) -> NDArray[np.float64]:
    """Return the Rényi divergences of an event, all its steps, at ORDERS: float64 of shape (len(ORDERS),)."""
    return _rdp(_merged([event]), ORDERS)


def rdp_epsilon(total: NDArray[np.float64], delta: float) -> float:
    """Return the epsilon at `delta` of a sum of vectors that `rdp` returned."""
    from dp_accounting.rdp import compute_epsilon

    return float(compute_epsilon(ORDERS, total, _checked(delta))[0])


Merged = tuple[tuple[Event, int], ...]
"""Events of one step each, how often each happened, in an order of their own."""


def _merged(history: Spent) -> Merged:
    """Return equal events as one; full-batch Gaussians are one Gaussian, of their summed precision."""
    counts: Counter[Any] = Counter()
    precision = 0.0
    for item in history:
        event = Gaussian(*item) if isinstance(item, tuple) else item
        match event:
            case Gaussian(noise, 1.0, steps):
                precision += steps / noise / noise
            case Gaussian() | Laplace() | DiscreteGaussian() | Skellam():
                noise = min(event.noise_multiplier, MOST_NOISE)
                counts[replace(event, noise_multiplier=noise, steps=1)] += event.steps
            case _:
                raise SpecError(f"{event!r}: no event that can be accounted for")
    if precision:
        counts[Gaussian(max(precision**-0.5, LEAST_NOISE / 2))] = 1
    return tuple(sorted(((event, n) for event, n in counts.items() if n), key=repr))


def _checked(delta: float) -> float:
    """Return a delta between 0 and 1, or raise SpecError."""
    if not 0 < delta < 1:
        raise SpecError(f"delta {delta}: expected more than 0 and less than 1, such as 1e-5")
    return delta


@lru_cache(4096)
def _epsilon(merged: Merged, delta: float, accountant: Accountant) -> float:
    """Return the epsilon of merged events; with "pld", the smaller of two upper bounds."""
    if not merged:
        return 0.0
    if accountant not in ("pld", "rdp"):
        raise SpecError(f"accountant {accountant!r}: expected 'pld' or 'rdp'")
    if accountant == "rdp":
        return min(_pure(merged), rdp_epsilon(_rdp(merged, ORDERS), delta))
    rough = _rough(merged, delta)
    countable = rough < MEANINGLESS and sum(n for _, n in merged) <= MOST_STEPS
    tight = _pld_epsilon(merged, delta, _interval(merged, rough)) if countable else inf
    return tight if tight <= rough else min(rough, rdp_epsilon(_rdp(merged, ORDERS), delta))


def _pure(merged: Merged) -> float:
    """Return the epsilon at delta 0, which is finite for Laplace noise alone: the sum of 1/noise."""
    return sum(n / event.noise_multiplier if isinstance(event, Laplace) else inf for event, n in merged)


def _rough(merged: Merged, delta: float) -> float:
    """Return a quick upper bound on epsilon."""
    from dp_accounting.rdp import compute_epsilon

    return min(_pure(merged), float(compute_epsilon(ROUGH, _rdp(merged, ROUGH), delta)[0]))


def _rdp(merged: Merged, orders: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the summed Rényi divergences of merged events."""
    total = np.zeros(len(orders))
    for event, steps in merged:
        total += steps * _rdp_of_step(event, orders)
    return total


@lru_cache(4096)
def _rdp_of_step(event: Event, orders: tuple[float, ...]) -> NDArray[np.float64]:
    """Return the Rényi divergences of a merged event."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    match event:
        case Gaussian(noise) | Laplace(noise) if noise < LEAST_NOISE:
            return np.full(len(orders), inf)
        case Gaussian(noise, rate):
            gaussian = dp_accounting.GaussianDpEvent(noise)
            known = dp_accounting.PoissonSampledDpEvent(rate, gaussian) if rate < 1 else gaussian
        case Laplace(noise):
            known = dp_accounting.LaplaceDpEvent(noise)
        case DiscreteGaussian() | Skellam():
            return event.rdp(np.array(orders))
    values: NDArray[np.float64] = RdpAccountant(orders).compose(known).rdp
    return np.maximum(values, ROUNDING)


def _interval(merged: Merged, rough: float) -> float:
    """Return the interval of the grid of losses: a power of two, so that histories of one run share theirs.

    Rounding a loss to the grid adds at most interval^2/4 to its variance, which is about its divergence of
    order 2. Where that adds 1/1000 to the variance of the sum, epsilon is too large by 1/2000.
    """
    steps = sum(n for _, n in merged)
    variance = _rdp(merged, ROUGH)[0]
    wanted = max(min(sqrt(variance / steps) / 16, COARSEST), rough / CELLS)
    return ldexp(0.5, frexp(wanted)[1])


def _pld_epsilon(merged: Merged, delta: float, interval: float) -> float:
    """Return epsilon by composing privacy loss distributions on a grid."""
    convolved = len(merged) > 1 or merged[0][1] > 1
    known = delta - CONVOLVED if convolved else delta
    return float(_composed(merged, interval).get_epsilon_for_delta(known))


def losses(history: Spent, interval: float) -> Any:
    """Return the privacy loss distribution of a history of one event at least, as dp-accounting has them.

    interval: of the grid of losses, which are rounded up. Raises SpecError for integer noise.
    """
    return _composed(_merged(history), interval)


def _composed(merged: Merged, interval: float) -> Any:
    steps = [(_pld_of_step(event, interval), n) for event, n in merged]
    return reduce(lambda a, b: a.compose(b), [step.self_compose(n) if n > 1 else step for step, n in steps])


@lru_cache(32)
def _pld_of_step(event: Event, interval: float) -> Any:
    """Return the privacy loss distribution of a merged event, rounded up to a grid."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    match event:
        case Gaussian(noise, rate):
            return pld.from_gaussian_mechanism(
                noise, sampling_prob=rate, value_discretization_interval=interval
            )
        case Laplace(noise):
            return pld.from_laplace_mechanism(noise, value_discretization_interval=interval)
        case _:
            raise SpecError(
                f"{event!r}: its privacy loss distribution is not known; expected accountant 'rdp'"
            )
