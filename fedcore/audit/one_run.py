"""A lower bound on epsilon from a single run with many canaries (Steinke, Nasr, Jagielski 2023, Theorem 5.2).

Each of m canaries is put into the data with probability 1/2, independently. An attacker who sees what the
mechanism released says of r of them whether they were in, and is right v times. An epsilon under which so
many right guesses would be a surprise cannot be true. Nothing is assumed of the mechanism.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import SpecError

SIGNIFICANCE = 0.05  # an audit of a correct mechanism is wrong in one of twenty cases
PRECISION = 1e-6  # of a bound


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, significance: float = SIGNIFICANCE
) -> float:
    """Return the largest epsilon that so many correct guesses refute, 0.0 if they refute none.

    With probability 1 - significance over the draw of the canaries, a mechanism that is (epsilon, delta)-DP
    (add/remove) does not come out above its epsilon. Assumes that the number of guesses was fixed before the
    release was seen. Raises SpecError unless 0 <= correct <= guesses <= canaries, 0 <= delta < 1 and
    0 < significance < 1.
    """
    _check(canaries, guesses, correct, delta, significance)
    high = 1.0
    if p_value(0.0, canaries, guesses, correct, delta) >= significance:
        return 0.0
    while p_value(high, canaries, guesses, correct, delta) < significance:
        high += 1.0
    low = high - 1.0
    while high - low > PRECISION:
        middle = (low + high) / 2
        refuted = p_value(middle, canaries, guesses, correct, delta) < significance
        low, high = (middle, high) if refuted else (low, middle)
    return low


def p_value(epsilon: float, canaries: int, guesses: int, correct: int, delta: float) -> float:
    """Return a bound on the probability of so many correct guesses under (epsilon, delta)-DP.

    P[B >= v] + 2 m delta max over 1 <= i <= v of P[v > B >= v - i] / i, for B ~ Bin(r, e^eps / (1 + e^eps)).
    """
    from scipy.stats import binom

    truth = binom(guesses, 1 / (1 + math.exp(-epsilon)))
    beyond = float(truth.sf(correct - 1))
    if not correct or not delta:
        return beyond
    below: NDArray[np.float64] = np.cumsum(truth.pmf(np.arange(correct - 1, -1, -1)))
    worst = float((below / np.arange(1, correct + 1)).max())
    return beyond + 2 * canaries * delta * worst


def ceiling(canaries: int, guesses: int, delta: float, significance: float = SIGNIFICANCE) -> float:
    """Return the bound that perfect guesses give: the most that such an audit can find."""
    return epsilon_lower_bound(canaries, guesses, guesses, delta, significance)


def guesses_needed(epsilon: float, delta: float, significance: float = SIGNIFICANCE) -> int:
    """Return the smallest number of canaries of which perfect guesses refute epsilon.

    Where delta is too large for any number of them, it is the one with which they refute most, near enough.
    """
    few, many = 0, 1
    while ceiling(many, many, delta, significance) < epsilon:
        few, many = many, 2 * many
        if many > 1 / (delta or math.ulp(0.0)):
            powers = [1 << k for k in range(many.bit_length())]
            return max(powers, key=lambda n: ceiling(n, n, delta, significance))
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (
            (few, middle) if ceiling(middle, middle, delta, significance) >= epsilon else (middle, many)
        )
    return many


def count_correct(scores: NDArray[np.float64], included: NDArray[np.bool_], guesses: int) -> int:
    """Return how many guesses are right: half of them "in" for the highest scores, half "out" for the lowest.

    scores: one a canary, (m,), higher for those that look included. included: (m,). guesses: at most m.
    """
    order = np.argsort(scores, kind="stable")
    out, into = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int((~included[out]).sum() + included[into].sum())


def _check(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> None:
    if not 0 <= correct <= guesses <= canaries or not 0 <= delta < 1 or not 0 < significance < 1:
        raise SpecError(
            f"canaries = {canaries}, guesses = {guesses}, correct = {correct}, delta = {delta:g}, "
            f"significance = {significance:g}: expected 0 <= correct <= guesses <= canaries, 0 <= delta < 1 "
            "and 0 < significance < 1"
        )
