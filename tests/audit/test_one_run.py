"""The one-run bound: published values, its ceiling, and what it must not exceed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.audit.one_run import ceiling, count_correct, epsilon_lower_bound, guesses_needed, p_value
from fedcore.errors import SpecError

pytestmark = pytest.mark.slow  # together more than five seconds


@pytest.mark.parametrize(
    ("guesses", "correct", "bound"), [(100, 95, 2.1652), (500, 400, 1.1980), (1000, 1000, 5.7823)]
)
def test_the_reference_values(guesses: int, correct: int, bound: float) -> None:
    assert epsilon_lower_bound(1000, guesses, correct, 1e-5) == pytest.approx(bound, abs=5e-5)


@pytest.mark.parametrize(("epsilon", "guesses"), [(1, 10), (2, 24), (3, 62), (4, 166)])
def test_perfect_guesses_that_are_needed(epsilon: float, guesses: int) -> None:
    assert guesses_needed(epsilon, 1e-5) == guesses
    assert ceiling(guesses, guesses, 1e-5) >= epsilon > ceiling(guesses - 1, guesses - 1, 1e-5)


def test_no_number_of_guesses_is_enough_where_delta_is_large() -> None:
    best = guesses_needed(20.0, 1e-3)
    shown = ceiling(best, best, 1e-3)
    assert shown < 20
    assert all(ceiling(n, n, 1e-3) <= shown for n in (best // 2, 2 * best))


@given(st.integers(1, 400), st.data())
def test_the_bound_by_hand(guesses: int, data: st.DataObject) -> None:
    """At delta = 0 it is where P[Bin(r, p) >= v] is 5 %, so a look at the p-value there decides."""
    correct = data.draw(st.integers(0, guesses))
    bound = epsilon_lower_bound(guesses, guesses, correct, 0.0)
    p = 1 / (1 + math.exp(-bound))
    tail = sum(math.comb(guesses, k) * p**k * (1 - p) ** (guesses - k) for k in range(correct, guesses + 1))
    assert tail == pytest.approx(0.05, abs=1e-4) if bound else tail >= 0.05 - 1e-9


@given(st.integers(10, 300), st.data())
def test_more_right_guesses_say_more_and_a_larger_delta_less(guesses: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(1, guesses))
    bound = epsilon_lower_bound(guesses, guesses, correct, 1e-5)
    assert epsilon_lower_bound(guesses, guesses, correct - 1, 1e-5) <= bound
    assert epsilon_lower_bound(guesses, guesses, correct, 1e-3) <= bound
    assert epsilon_lower_bound(2 * guesses, guesses, correct, 1e-5) <= bound
    assert epsilon_lower_bound(guesses, guesses, correct, 1e-5, significance=0.01) <= bound
    assert bound <= ceiling(guesses, guesses, 1e-5)


def test_randomised_response_is_seldom_found_above_its_epsilon() -> None:
    """The bound is tight for it: 200 audits at epsilon 1, of which 5 % may be wrong."""
    rng, truth = np.random.default_rng(0), 1 / (1 + math.exp(-1.0))
    found = [epsilon_lower_bound(200, 200, int(n), 0.0) for n in rng.binomial(200, truth, 200)]
    assert np.mean(np.array(found) > 1.0) < 0.1  # 10 are expected; 20 have probability 0.2 %
    assert 0.6 < np.median(found) < 1.0


def test_the_p_value_without_any_right_guess_is_one() -> None:
    assert p_value(1.0, 10, 5, 0, 1e-5) == 1.0


@pytest.mark.parametrize("wrong", [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_impossible_counts_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(SpecError, match="0 <= correct <= guesses <= canaries"):
        epsilon_lower_bound(*wrong, 1e-5)


def test_guesses_are_the_extremes() -> None:
    scores = np.array([0.1, 5.0, -3.0, 2.0, 0.0])
    included = np.array([False, True, False, False, True])
    assert count_correct(scores, included, 2) == 2  # 5.0 in, -3.0 out
    assert count_correct(scores, included, 4) == 2  # 2.0 in and 0.0 out are wrong
    assert count_correct(scores, included, 0) == 0
