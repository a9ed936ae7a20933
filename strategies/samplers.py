"""Who takes part in a round."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import SpecError, expect

Sees = Literal["none", "participation", "scalars"]

Memory = Mapping[str, Mapping[str, float]]
"""Client -> what the server remembers of it; a client that was never asked is missing.

`round` is the last round in which it was asked and `rounds` how often it was. Its last folded update gave
`weight`, its number of examples, `loss`, their mean training loss, and `seconds`, how long it took; these are
missing for a client that was asked in vain.
"""

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

SMALLEST_WEIGHT = 1e-100  # stands for zero: drawn after everybody else, in random order


class Sampler(Protocol):
    """Draws a cohort from the population, which is given in the order of stable names.

    sees: what it must know of single clients: nothing, the rounds in which they were asked, or the scalars
    that they reported, which secure aggregation would hide.
    """

    sees: ClassVar[Sees]

    def sample(
        self, population: Sequence[str], size: int, rng: np.random.Generator, memory: Memory, *, round: int
    ) -> tuple[str, ...]:
        """Return distinct names in the population's order for the round of this number, from 1."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Every subset of the size asked is equally likely; everybody where the population is no larger."""

    sees: ClassVar[Sees] = "none"

    def sample(
        self, population: Sequence[str], size: int, rng: np.random.Generator, memory: Memory, *, round: int
    ) -> tuple[str, ...]:
        """Return `size` distinct names in the population's order."""
        if size >= len(population):
            return tuple(population)
        return _cohort(population, rng.choice(len(population), size, replace=False, shuffle=False))


@dataclass(frozen=True)
class Poisson:
    """Every client takes part with probability q = size / N, independently of all others.

    The cohort has `size` members on average and may be empty. This is the sampling for which the privacy of
    subsampled mechanisms is accounted (Abadi et al. 2016): the amplification assumes that who took part stays
    hidden from whoever the guarantee is against, and nothing else may choose or replace clients.

    rate: a fixed q in place of size / N, where N, the number of those who are there now, is not public; 0 is
    size / N. Raises SpecError unless 0 <= rate <= 1.
    """

    rate: float = 0.0
    sees: ClassVar[Sees] = "none"

    def __post_init__(self) -> None:
        expect(0 <= self.rate <= 1, self, "0 to 1")

    def sample(
        self, population: Sequence[str], size: int, rng: np.random.Generator, memory: Memory, *, round: int
    ) -> tuple[str, ...]:
        """Return the names that were drawn, in the population's order."""
        count = len(population)
        rate = self.rate or (size / count if count else 0.0)
        return _cohort(population, np.flatnonzero(rng.random(count) < rate))


@dataclass(frozen=True)
class Weighted:
    """Clients are drawn one by one, each with probability proportional to its examples among those left.

    A client whose number of examples is not known yet counts as the mean of the known; one without examples
    comes last. A mean that weighs by examples then counts large clients twice: an unbiased estimate of the
    global objective takes the plain mean (scheme II of Li et al. 2020, who draw with replacement).
    """

    sees: ClassVar[Sees] = "scalars"

    def sample(
        self, population: Sequence[str], size: int, rng: np.random.Generator, memory: Memory, *, round: int
    ) -> tuple[str, ...]:
        """Return `size` distinct names in the population's order."""
        return _cohort(population, _draw(_known_or_mean(population, memory, "weight"), size, rng))


@dataclass(frozen=True)
class PowerOfChoice:
    """Of `candidates` clients, drawn in proportion to their examples, the `size` with the highest loss.

    The variant rpow-d of Cho et al. 2022, which asks no extra question: a client's loss is the one that it
    reported last, so clients never asked go first, and ties are broken at random. A client asked in vain
    counts as the mean of the known. More candidates converge faster to a more biased model; `candidates` =
    `size` is `Weighted`. Raises SpecError where there are fewer candidates than places.
    """

    candidates: int
    sees: ClassVar[Sees] = "scalars"

    def __post_init__(self) -> None:
        expect(self.candidates >= 1, self, "at least 1")

    def sample(
        self, population: Sequence[str], size: int, rng: np.random.Generator, memory: Memory, *, round: int
    ) -> tuple[str, ...]:
        """Return `size` distinct names in the population's order."""
        if self.candidates < min(size, len(population)):
            raise SpecError(
                f"PowerOfChoice(candidates={self.candidates}): cannot fill a cohort of {size}; expected "
                f"candidates >= {size}, such as {2 * size}"
            )
        drawn = _draw(_known_or_mean(population, memory, "weight"), self.candidates, rng)
        asked = np.array([name in memory for name in population], bool)
        loss = np.where(asked, _known_or_mean(population, memory, "loss"), np.inf)[drawn]
        highest_first = np.lexsort((rng.random(len(drawn)), -loss))
        return _cohort(population, drawn[highest_first[:size]])


@dataclass(frozen=True)
class Oort:
    """Clients that are useful and fast, with a share of the cohort for clients never asked (Lai et al. 2021).

    In round R the share exploration * decay^(R-1), at least `floor`, goes to clients never asked, uniformly;
    the paper prefers fast ones, but of these nothing is known yet. The other places go to known clients of
    high utility (their Algorithm 1),

        u_i = (w_i l_i / max_j w_j l_j + sqrt(0.1 ln R / L_i)) * (duration / t_i)^alpha,

    where w_i are client i's examples, l_i its loss, L_i the last round in which it was asked and t_i the
    seconds that it took; the last factor applies to clients slower than `duration`. Who reaches `cutoff`
    times the utility of the last place is admitted, and the admitted are drawn in proportion to u_i.

    Departures: the paper's l_i is the root mean square of the losses of single examples, of which we know
    only the mean, so clients with a few hard examples rank lower here. Products w_i l_i above their 95th
    percentile are clipped to it, as in the paper, and scaled to at most 1, as the authors' code scales them:
    beside hundreds of examples the bonus for staleness would vanish. `duration` is fixed, no pacer moves it;
    at infinity nothing depends on time. A client asked in vain has the mean w_i and l_i of the others.

    Raises SpecError unless duration > 0, alpha >= 0 and the shares lie in 0..1.
    """

    duration: float = np.inf
    alpha: float = 2.0
    exploration: float = 0.9
    decay: float = 0.98
    floor: float = 0.2
    cutoff: float = 0.95
    sees: ClassVar[Sees] = "scalars"

    def __post_init__(self) -> None:
        shares = (self.exploration, self.decay, self.floor, self.cutoff)
        expect(self.duration > 0 and self.alpha >= 0, self, "duration > 0 seconds and alpha >= 0")
        inside = all(0 <= share <= 1 for share in shares)
        expect(inside, self, "exploration, decay, floor and cutoff in 0..1")

    def sample(
        self, population: Sequence[str], size: int, rng: np.random.Generator, memory: Memory, *, round: int
    ) -> tuple[str, ...]:
        """Return `size` distinct names in the population's order."""
        size = min(size, len(population))
        asked = np.array([name in memory for name in population], bool)
        known, new = np.flatnonzero(asked), np.flatnonzero(~asked)
        explored = min(len(new), ceil(self.share(round) * size))
        exploited = min(len(known), size - explored)
        explored = size - exploited
        utility = self.utility([population[i] for i in known.tolist()], memory, round)
        useful = known[_draw_useful(utility, exploited, self.cutoff, rng)]
        return _cohort(population, np.concatenate([useful, rng.choice(new, explored, replace=False)]))

    def share(self, round: int) -> float:
        """Return the share of the cohort that explores."""
        return max(self.floor, self.exploration * self.decay ** (round - 1))

    def utility(self, names: Sequence[str], memory: Memory, round: int) -> Floats:
        """Return u_i of clients that have been asked before, shape (n,), not negative."""
        if not names:
            return np.zeros(0)
        product = _known_or_mean(names, memory, "weight") * _known_or_mean(names, memory, "loss").clip(0)
        product = np.minimum(product, np.quantile(product, 0.95, method="higher"))
        bonus = np.sqrt(0.1 * np.log(round) / _known(names, memory, "round"))
        utility: Floats = product / max(product.max(), SMALLEST_WEIGHT) + bonus
        seconds = _known(names, memory, "seconds")
        slow = np.flatnonzero(seconds > self.duration)
        utility[slow] *= (self.duration / seconds[slow]) ** self.alpha
        return utility


@dataclass(frozen=True)
class MinimumSeparation:
    """Uniform among the clients that have rested: two participations lie at least `rounds` rounds apart.

    A client asked in round R is asked again in R + rounds at the earliest; where fewer than `size` have
    rested, only those take part. To have taken part means to have been asked, whether or not an update came.
    Matrix mechanisms count on this when they bound what a client adds over a run (b-min-sep participation,
    Choquette-Choo et al. 2023). Raises SpecError unless rounds >= 1; 1 is `Uniform`.
    """

    rounds: int
    sees: ClassVar[Sees] = "participation"

    def __post_init__(self) -> None:
        expect(self.rounds >= 1, self, "at least 1")

    def sample(
        self, population: Sequence[str], size: int, rng: np.random.Generator, memory: Memory, *, round: int
    ) -> tuple[str, ...]:
        """Return at most `size` distinct names in the population's order."""
        last = _known(population, memory, "round")
        rested = np.flatnonzero(np.isnan(last) | (round - last >= self.rounds))
        return Uniform().sample([population[i] for i in rested.tolist()], size, rng, memory, round=round)


def _cohort(population: Sequence[str], chosen: Indices) -> tuple[str, ...]:
    """Return the names at these places, in the population's order."""
    return tuple(population[i] for i in np.sort(chosen).tolist())


def _known(names: Iterable[str], memory: Memory, key: str) -> Floats:
    """Return what is remembered under a key, a number for each client; NaN where there is none."""
    return np.array([memory[name].get(key, np.nan) if name in memory else np.nan for name in names])


def _known_or_mean(names: Iterable[str], memory: Memory, key: str) -> Floats:
    """Return what is remembered under a key, else the mean of what is; one where nothing is at all."""
    values = _known(names, memory, key)
    known = ~np.isnan(values)
    return np.where(known, values, values[known].mean() if known.any() else 1.0)


def _draw(weights: Floats, size: int, rng: np.random.Generator) -> Indices:
    """Draw `size` distinct places one by one, each in proportion to its weight among those left.

    The first arrivals of independent exponential clocks with these weights for rates are such draws
    (Efraimidis and Spirakis 2006).
    """
    arrivals = rng.standard_exponential(len(weights)) / np.maximum(weights, SMALLEST_WEIGHT)
    return np.argsort(arrivals)[:size]


def _draw_useful(utility: Floats, size: int, cutoff: float, rng: np.random.Generator) -> Indices:
    """Draw among those who reach `cutoff` times the utility of the last place, in proportion to theirs."""
    if not size:
        return np.zeros(0, np.intp)
    admitted = np.flatnonzero(utility >= cutoff * np.sort(utility)[-size])
    return admitted[_draw(utility[admitted], size, rng)]


SAMPLERS: Mapping[str, type[Sampler]] = {
    "uniform": Uniform,
    "poisson": Poisson,
    "weighted": Weighted,
    "power_of_choice": PowerOfChoice,
    "oort": Oort,
    "minimum_separation": MinimumSeparation,
}
