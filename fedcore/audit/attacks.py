"""From scores to bounds: how well an attack tells canaries that were in the data from those that were not."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from fedcore.audit.likelihood import log_likelihood_ratio
from fedcore.audit.noise import judged, shown
from fedcore.audit.one_run import ceiling, count_correct, epsilon_lower_bound, guesses_needed
from fedcore.audit.rates import Counts, Included, Scores, at_false_rate, auc
from fedcore.audit.report import Attack, Bound, Rate
from fedcore.privacy.accounting import epsilon
from fedcore.privacy.claims import training
from fedcore.privacy.events import Event, Gaussian
from fedcore.privacy.levels import Off
from fedcore.spec import RunSpec

Floats = NDArray[np.float64]

SIGNIFICANCE = 0.05  # of all bounds of an audit together
BOUNDS = 6  # in an audit, at most
DELTA = 1e-5  # of bounds on a run that claims nothing
FALSE_RATES = {"0.1 %": 0.001, "1 %": 0.01}


@dataclass(frozen=True)
class Setting:
    """What scores are held against: the history that a run claims for its training, () for none."""

    history: tuple[Event, ...]
    delta: float
    rng: np.random.Generator

    @classmethod
    def of(cls, spec: RunSpec, rng: np.random.Generator) -> "Setting":
        """Return the setting of a run as it is audited."""
        delta = DELTA if isinstance(spec.privacy, Off) else spec.privacy.delta
        return cls(training(spec, spec.run.rounds), delta, rng)

    @property
    def claimed(self) -> float | None:
        """The epsilon of the history."""
        return epsilon(self.history, self.delta) if self.history else None

    def guesses(self, canaries: int) -> int:
        """Return how many guesses to make: enough to refute the claim by 1 if all are right.

        Fewer guesses are better ones, and it is never said of all: not just half of them are in the data. The
        number must not depend on what was released.
        """
        most = canaries * 9 // 10
        if self.claimed is None or self.claimed > 8:
            return most
        return min(most, max(canaries // 10, guesses_needed(self.claimed + 1, self.delta)))

    @property
    def drawn(self) -> float:
        """The probability that a canary in the data is ever drawn: without noise, no more can be told."""
        rates = [(e.sampling_rate, e.steps) if isinstance(e, Gaussian) else (1.0, 1) for e in self.history]
        return 1.0 - prod((1.0 - rate) ** steps for rate, steps in rates)


def dirac_attacks(name: str, records: Floats, included: Included, setting: Setting) -> Iterator[Attack]:
    """Yield the attacks on Dirac canaries, from what rounds show at their coordinates: (rounds, m).

    Their sum over the rounds shows clip norm, noise, and noise that comes again; if units are sampled, the
    likelihood ratio of every round shows more, of rare draws in particular.
    """
    yield attack(f"{name}, by the sum of rounds", records.sum(0), included, setting, noise=True)
    for event in setting.history:
        if isinstance(event, Gaussian) and event.sampling_rate < 1:
            ratio = log_likelihood_ratio(records, event)
            yield attack(f"{name}, by the likelihood of rounds", ratio, included, setting, noise=True)


def attack(name: str, scores: Scores, included: Included, setting: Setting, *, noise: bool = False) -> Attack:
    """Return what an attack's scores come to, higher ones for canaries that look included; both (m,).

    noise: whether the scores are sums of a canary and the mechanism's noise, so that they show how much.
    """
    bounds = [in_one_run(scores, included, setting)]
    if noise and setting.history:
        bounds.append(from_noise(scores, included, setting))
    rates = {
        text: true_rate(at_false_rate(scores, included, rate, setting.rng))
        for text, rate in FALSE_RATES.items()
    }
    return Attack(name, len(scores), auc(scores, included), rates, tuple(bounds))


def in_one_run(scores: Scores, included: Included, setting: Setting) -> Bound:
    """Return the bound that holds for any mechanism."""
    canaries, delta, alpha = len(scores), setting.delta, SIGNIFICANCE / BOUNDS
    guesses = setting.guesses(canaries)
    correct = count_correct(scores, included, guesses)
    found = epsilon_lower_bound(canaries, guesses, correct, delta, alpha)
    return Bound("any mechanism", found, ceiling(canaries, guesses, delta, alpha))


def from_noise(scores: Scores, included: Included, setting: Setting) -> Bound:
    """Return the bound that takes the mechanism at its word but for the noise."""
    found = judged(scores, included, setting.rng)
    perfect = Counts(round(found.members * setting.drawn), found.members, 0, found.others)
    now, most = (shown(setting.history, setting.delta, c, SIGNIFICANCE / BOUNDS) for c in (found, perfect))
    return Bound("this mechanism", now.epsilon, most.epsilon, now.noise)


def true_rate(found: Counts) -> Rate:
    """Return the true positive rate with its bounds, which hold with probability 1 - SIGNIFICANCE."""
    low, high = found.tpr(SIGNIFICANCE / 2)
    return found.true / max(found.members, 1), low, high
