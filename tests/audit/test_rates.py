"""Rates of an attack and their bounds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.audit.rates import Counts, at_false_rate, auc, clopper_pearson, counts


def test_clopper_pearson_by_hand() -> None:
    assert clopper_pearson(0, 10, 0.05) == pytest.approx((0.0, 1 - 0.05**0.1))
    assert clopper_pearson(10, 10, 0.05) == pytest.approx((0.05**0.1, 1.0))
    assert clopper_pearson(0, 0, 0.05) == (0.0, 1.0)


@given(st.integers(1, 60), st.floats(0.01, 0.2), st.data())
def test_clopper_pearson_solves_its_equations(trials: int, alpha: float, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, trials))
    low, high = clopper_pearson(hits, trials, alpha)

    def at_least(p: float, k: int) -> float:
        return sum(math.comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(k, trials + 1))

    assert not hits or at_least(low, hits) == pytest.approx(alpha, abs=1e-9)
    assert hits == trials or 1 - at_least(high, hits + 1) == pytest.approx(alpha, abs=1e-9)


def test_epsilon_of_repeated_runs_by_hand() -> None:
    found = Counts(true=90, members=100, false=5, others=100)
    low, high = clopper_pearson(90, 100, 0.0125)[0], clopper_pearson(5, 100, 0.0125)[1]
    assert found.epsilon(1e-5) == pytest.approx(math.log((low - 1e-5) / high))
    assert Counts(50, 100, 50, 100).epsilon(1e-5) == 0.0
    other_way = Counts(true=95, members=100, false=10, others=100)  # few misses rather than few false alarms
    assert other_way.epsilon(1e-5) == pytest.approx(found.epsilon(1e-5))


def test_auc_by_hand() -> None:
    scores, included = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True])
    assert auc(scores, included) == (1 + 0.5 + 1 + 1) / 4
    assert math.isnan(auc(scores, np.ones(4, bool)))


@given(st.integers(0, 2**32 - 1))
def test_auc_is_the_share_of_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, included = rng.integers(0, 8, 40).astype(np.float64), rng.random(40) < 0.5
    included[:2] = True, False
    pairs = np.sign(scores[included][:, None] - scores[~included][None, :])
    assert auc(scores, included) == pytest.approx(float((pairs.mean() + 1) / 2))
    assert auc(-scores, included) == pytest.approx(1 - auc(scores, included))


def test_a_threshold_is_judged_where_it_was_not_chosen() -> None:
    """Scores that say nothing have the false positive rate that was asked for, on the other half too."""
    rng = np.random.default_rng(0)
    scores, included = rng.normal(size=40_000), rng.random(40_000) < 0.5
    found = at_false_rate(scores, included, 0.01, rng)
    assert found.members + found.others == 20_000
    assert found.false / found.others == pytest.approx(0.01, abs=0.004)  # four standard deviations
    assert found.true / found.members == pytest.approx(0.01, abs=0.004)
    apart = at_false_rate(scores + 10 * included, included, 0.001, rng)
    assert apart.true == apart.members and apart.false < 40


def test_counts_by_hand() -> None:
    found = counts(np.array([1.0, 2.0, 3.0]), np.array([True, False, True]), 1.5)
    assert found == Counts(true=1, members=2, false=1, others=1)
