"""True and false positive rates of a membership attack, with bounds, and what they say of epsilon.

An attack gives each canary a score, higher for those that look included; a positive is a score above a
threshold. A threshold is chosen on some canaries and judged on others, since the best one of many thresholds
looks better than it is (Carlini et al. 2022, section III).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.audit.one_run import SIGNIFICANCE

Scores = NDArray[np.float64]
Included = NDArray[np.bool_]


def clopper_pearson(hits: int, trials: int, alpha: float) -> tuple[float, float]:
    """Return a lower and an upper bound on a probability, each wrong with probability at most alpha.

    (0, 1) where there were no trials. Clopper and Pearson 1934.
    """
    from scipy.stats import beta

    low = float(beta.ppf(alpha, hits, trials - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - alpha, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high


@dataclass(frozen=True)
class Counts:
    """How a threshold did: true positives among `members` included, false ones among `others`."""

    true: int
    members: int
    false: int
    others: int

    def tpr(self, alpha: float) -> tuple[float, float]:
        """Return bounds on the true positive rate, each wrong with probability at most alpha."""
        return clopper_pearson(self.true, self.members, alpha)

    def fpr(self, alpha: float) -> tuple[float, float]:
        """Return bounds on the false positive rate, each wrong with probability at most alpha."""
        return clopper_pearson(self.false, self.others, alpha)

    def epsilon(self, delta: float, significance: float = SIGNIFICANCE) -> float:
        """Return a lower bound on epsilon from independent trials: repeated runs, a canary in each.

        The maximum over both directions of ln((rate_low - delta) / rate_high), at least 0; four bounds, each
        at significance / 4 (Jagielski, Ullman, Oprea 2020; Nasr et al. 2021).
        """
        low, high = self.tpr(significance / 4)[0], self.fpr(significance / 4)[1]
        directions = ((low, high), (1 - high, 1 - low))
        found = [math.log((often - delta) / seldom) for often, seldom in directions if often > delta]
        return max(0.0, *found)


def counts(scores: Scores, included: Included, threshold: float) -> Counts:
    """Return how a threshold does on canaries; scores and included are of shape (m,)."""
    positive = scores > threshold
    members = int(included.sum())
    true, all_positive = int(positive[included].sum()), int(positive.sum())
    return Counts(true, members, all_positive - true, len(scores) - members)


def halves(count: int, rng: np.random.Generator) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the places of canaries to choose a threshold on, and those of the others to judge it on."""
    order = rng.permutation(count)
    return order[: count // 2], order[count // 2 :]


def at_false_rate(scores: Scores, included: Included, rate: float, rng: np.random.Generator) -> Counts:
    """Return how the lowest threshold does that has at most so many false positives on other canaries.

    rate: of false positives, such as 0.001. What is counted is the half on which it was not chosen.
    """
    chosen, judged = halves(len(scores), rng)
    others = np.sort(scores[chosen][~included[chosen]])[::-1]
    threshold = float(others[int(rate * len(others))]) if len(others) else math.inf
    return counts(scores[judged], included[judged], threshold)


def auc(scores: Scores, included: Included) -> float:
    """Return the probability that an included canary scores above another; ties count half.

    NaN unless there are both. Hanley and McNeil 1982.
    """
    members, others = scores[included], np.sort(scores[~included])
    if not len(members) or not len(others):
        return math.nan
    below = np.searchsorted(others, members, "left") + np.searchsorted(others, members, "right")
    return float(below.mean() / (2 * len(others)))
