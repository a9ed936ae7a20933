"""Noise in the sum: central client-level differential privacy, and the clip norm that follows the median."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import SpecError
from fedcore.layout import Vector
from fedcore.privacy.levels import ClientLevel, Off, Privacy, TreeLevel
from fedcore.privacy.tree import increment
from fedcore.seeds import generator
from fedcore.strategies.algorithms import Aggregate
from fedcore.strategies.privacy.plans import deviation, noisy_in_sum

if TYPE_CHECKING:
    from fedcore.messages import Plan
    from fedcore.strategies.words import Accumulator

CLIP, KEY = "privacy.clip", "privacy.key"  # in the state's vectors
QUANTILE, RATE, COUNT_NOISE = 0.5, 0.2, 1 / 20  # gamma, eta_C and sigma_b / m of Andrew et al. 2021
SMALLEST, LARGEST = 2.0**-20, 2.0**20  # clip norm, as in [privacy]: updates that are all zero shrink it


def clip_norm(privacy: Privacy, vectors: Mapping[str, Vector]) -> float:
    """Return the clip norm of the next round, given what the state keeps; 0 where nothing is private."""
    if isinstance(privacy, Off):
        return 0.0
    return float(vectors[CLIP][0]) if CLIP in vectors else privacy.clip_norm


def update_noise(noise_multiplier: float, expected: float) -> float:
    """Return z_D, the noise multiplier of the update where the indicator b takes its share of z.

    z_D = (z^-2 - (2 sigma_b)^-2)^(-1/2), so that both releases together cost what z costs (Andrew et al.
    2021, Theorem 1); the sensitivity of sum(b_i - 1/2) is 1/2. Raises SpecError where sigma_b <= z / 2.
    """
    sigma = COUNT_NOISE * expected
    if sigma <= noise_multiplier / 2:
        raise SpecError(
            f"privacy.adaptive: with {expected:g} clients expected in a round the clip norm's own noise is "
            f"{sigma:g}, too little for noise_multiplier = {noise_multiplier:g}; raise cohort.size above "
            f"{noise_multiplier / 2 / COUNT_NOISE:g}, or set adaptive = false"
        )
    return float((noise_multiplier**-2 - (2 * sigma) ** -2) ** -0.5)


@dataclass(frozen=True)
class Noised:
    """A sum with noise, divided by the expected size of the cohort: sum_i v_i + N(0, (z C)^2), over m.

    The guarantee is that of `fedcore.privacy.claims` for one client, against whoever sees the models but not
    the sums. It assumes that `entropy` is known to nobody and that every update was clipped to C. At client
    level every client was drawn independently with probability q, and who came stays secret. In tree
    aggregation participations keep their distance; neighbours differ in one client's updates being zero, as
    without that client the sampler would have asked others.

    sums: of the round, clipped. standard: deviation of the noise of one node, z C. nodes: whose noise is
    added or, with sign -1, taken away: one for a round of its own, several for tree aggregation.
    """

    sums: "Accumulator"
    expected: float
    population: int
    standard: float
    entropy: int
    nodes: tuple[tuple[int, str], ...]

    @property
    def round(self) -> int:
        """The number of the round."""
        return self.sums.plan.ref.round

    @property
    def clients(self) -> float:
        """The expected size of the cohort, a public constant, whoever came."""
        return self.expected

    def scalar(self, name: str) -> float:
        """Refuse: no scalar of a round is covered by noise."""
        raise SpecError(f"`{name}` is not in the noised sum of a private round")

    def vector(self, name: str, block: slice) -> NDArray[np.float64]:
        """Return a block of the noised mean, the same however often it is asked for."""
        total = self.sums.vector(name, block)
        for sign, node in self.nodes:
            rng = generator("noise", self.entropy, node, name, block.start)
            noise = rng.standard_normal(len(total))
            noise *= sign * self.standard
            total += noise
        return np.divide(total, self.expected, out=total)


def noised(
    privacy: Privacy, plan: "Plan", sums: "Accumulator", vectors: Mapping[str, Vector], entropy: int
) -> Aggregate | None:
    """Return the noised aggregate of a closed round where the coordinator makes the noise, else None.

    vectors: of the state, where tree aggregation keeps its key: the noise of a node enters several rounds.
    """
    match privacy:
        case ClientLevel():
            z = privacy.noise_multiplier
            z = update_noise(z, plan.expected) if privacy.adaptive else z
            return Noised(sums, plan.expected, plan.population, z * plan.clip, entropy, ((1, "round"),))
        case TreeLevel():
            signed = tuple((sign, f"{level}.{index}") for sign, (level, index) in _nodes(plan.ref.round))
            key, z = _key(vectors, entropy), privacy.noise_multiplier
            return Noised(sums, plan.expected, plan.population, z * plan.clip, key, signed)
    return None


def _nodes(round: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the nodes in which the prefix sums of two rounds differ, with their signs."""
    added, removed = increment(round)
    yield from ((1, node) for node in added)
    yield from ((-1, node) for node in removed)


def _key(vectors: Mapping[str, Vector], entropy: int) -> int:
    """Return the key from which the noise of all nodes of a run is made: the first round's entropy."""
    if KEY not in vectors:
        return entropy
    return sum(int(word) << 32 * place for place, word in enumerate(vectors[KEY]))


def state_after(
    privacy: Privacy, plan: "Plan", sums: "Accumulator", vectors: Mapping[str, Vector], entropy: int
) -> dict[str, Vector]:
    """Return what the next round has to know: tree aggregation's key, and an adaptive clip norm.

    With m clients expected, b = 1/2 + (sum_i (b_i - 1/2) + N(0, sigma_b^2)) / m estimates the share of
    updates within C, and C <- C exp(-eta_C (b - gamma)) (Andrew et al. 2021, Algorithm 1).
    """
    if isinstance(privacy, TreeLevel):
        key = _key(vectors, entropy)
        return {KEY: np.array([key >> 32 * place & 0xFFFFFFFF for place in range(8)], np.float64)}
    if not isinstance(privacy, ClientLevel) or not privacy.adaptive:
        return {}
    m = plan.expected
    noise = generator("noise", entropy, "clip").normal(0.0, COUNT_NOISE * m)
    share = 0.5 + (sums.scalar("fits") + noise) / m
    clip = plan.clip * exp(-RATE * (share - QUANTILE))
    return {CLIP: np.array([min(LARGEST, max(SMALLEST, clip))])}


def noised_sums(privacy: Privacy, sums: Mapping[str, float], entropy: int) -> dict[str, float]:
    """Return the sums of an evaluation with the coordinator's noise, where that is who makes it."""
    if isinstance(privacy, Off) or not noisy_in_sum(privacy):
        return dict(sums)
    rng = generator("noise", entropy, "metrics")
    standard = deviation(privacy, len(sums) - 1)
    return {name: value + float(rng.normal(0.0, standard)) for name, value in sums.items()}


def metric_means(privacy: Privacy, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the means that noised sums stand for, in 0..metric_bound, whatever noise made of the count."""
    assert not isinstance(privacy, Off)
    count, bound = max(1.0, sums["count"]), privacy.metric_bound
    return {name: bound * min(1.0, max(0.0, v / count)) for name, v in sums.items() if name != "count"}
