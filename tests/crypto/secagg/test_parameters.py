"""The graph: the reference's table, the bounds against chance itself, and attacks that must not fit."""

from itertools import combinations
from math import comb, exp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto.secagg.parameters import COMPLETE, FAILURE, Graph, failure, graph, quorum
from fedcore.errors import SpecError
from fedcore.seeds import generator

SHARES = st.floats(0, 0.3)


@pytest.mark.parametrize(
    ("degree", "threshold", "corrupt", "recovery", "exposure"),
    [
        (20, 11, 0.20, 1.2e-6, 0.0071),
        (20, 11, 0.33, 1.2e-6, 1.52),  # 78 % that anybody is: 1 - exp(-1.52)
        (30, 19, 0.20, 0, 7.1e-10),
        (30, 19, 0.33, 0, 0.0033),
        (40, 27, 0.33, 0, 1.94e-7),
    ],
)
def test_agrees_with_the_published_orientation(
    degree: int, threshold: int, corrupt: float, recovery: float, exposure: float
) -> None:
    """One round of 100 clients, 10 lost."""
    found = failure(100, Graph(degree, threshold), corrupt, 0.1)
    assert found == pytest.approx((recovery, exposure), rel=0.02)


@given(st.integers(8, 60), st.floats(0.1, 0.5), st.floats(0.1, 0.5), st.data())
def test_failure_is_the_hypergeometric_tail(n: int, corrupt: float, lost: float, data: st.DataObject) -> None:
    """By exact integers, where the tail is one: a threshold above what is expected."""
    degree = data.draw(st.integers(2, n - 1))
    threshold = data.draw(st.integers(1, degree))
    bad, gone = int(n * corrupt + 1e-9), int(n * lost + 1e-9)
    recovery, exposure = failure(n, Graph(degree, threshold), corrupt, lost)

    def tail(red: int, least: int) -> float:
        if least * (n - 1) <= red * degree:
            return 1
        ways = sum(comb(red, i) * comb(n - 1 - red, degree - i) for i in range(least, degree + 1))
        return ways / comb(n - 1, degree)

    assert recovery == pytest.approx(n * tail(gone, degree - threshold + 1), rel=1e-9)
    assert exposure == pytest.approx((n - bad) * tail(bad, threshold), rel=1e-9)


def test_bounds_hold_in_a_thousand_draws() -> None:
    """At odds that can be seen: the counted failures of one round, averaged, within 5 standard errors."""
    n, chosen, trials = 100, Graph(10, 6), 1000
    rng = generator("draws")
    counts = np.zeros((trials, 2))
    for counted in counts:
        for i in range(n):
            draw = rng.choice(n - 1, chosen.degree, replace=False)
            counted += (
                (draw < 40).sum() > chosen.degree - chosen.threshold,
                (draw < 25).sum() >= chosen.threshold and i >= 25,
            )
    means, errors = counts.mean(axis=0), counts.std(axis=0) / np.sqrt(trials)
    expected = failure(n, chosen, 0.25, 0.40)
    assert np.all(np.abs(means - expected) < 5 * errors)


@given(st.integers(3, COMPLETE), SHARES, SHARES)
def test_small_cohorts_are_complete_and_cannot_fail(n: int, corrupt: float, lost: float) -> None:
    chosen = graph(n, corrupt, lost, 10**6)
    bad, gone = int(n * corrupt + 1e-9), int(n * lost + 1e-9)
    assert chosen.degree == n - 1
    assert chosen.threshold >= 2
    assert failure(n, chosen, corrupt, lost) == (0, 0)
    assert bad < chosen.threshold <= n - 1 - gone
    assert 2 * (chosen.threshold + 1) > n + bad  # two groups, each with its threshold, would not fit
    assert quorum(n) <= n - gone
    assert 2 * quorum(n) - n > bad  # two quorums share an honest client


@given(st.integers(COMPLETE + 1, 2000), st.floats(0, 0.25), st.floats(0, 0.25), st.integers(1, 1000))
def test_large_cohorts_stay_below_the_promised_odds(n: int, corrupt: float, lost: float, rounds: int) -> None:
    chosen = graph(n, corrupt, lost, rounds)
    recovery, exposure = failure(n, chosen, corrupt, lost)
    assert 2 <= chosen.threshold <= chosen.degree < n
    assert rounds * max(recovery, exposure) <= FAILURE


@pytest.mark.parametrize("rounds", [1, 10_000])
def test_the_degree_is_the_smallest(rounds: int) -> None:
    """One peer fewer, at any threshold, breaks one of the two bounds or lets two clients be parted."""
    chosen = graph(1000, 0.2, 0.1, rounds)
    for threshold in range(1, chosen.degree):
        recovery, exposure = failure(1000, Graph(chosen.degree - 1, threshold), 0.2, 0.1)
        assert rounds * max(recovery, 2 * exposure) > FAILURE


def test_the_degree_grows_with_what_is_declared() -> None:
    degrees = [graph(1000, corrupt, 0.1, 100).degree for corrupt in (0.05, 0.1, 0.2, 0.3)]
    assert degrees == sorted(degrees)
    assert degrees[0] < 60 < degrees[-1]
    assert graph(1000, 0.2, 0.2, 100).degree > graph(1000, 0.2, 0.1, 100).degree
    assert graph(1000, 0.2, 0.1, 10**6).degree > graph(1000, 0.2, 0.1, 1).degree


def test_small_groups_cannot_be_parted() -> None:
    """The union bound over all groups of 2 to n / 5 clients, written out again with exact integers."""
    n, bad, rounds = 100, 20, 100
    chosen = graph(n, 0.2, 0.1, rounds)
    total = 0.0
    for size in range(2, n // 5 + 1):
        red = bad + size - 1
        ways = sum(
            comb(red, i) * comb(n - 1 - red, chosen.degree - i)
            for i in range(chosen.threshold, chosen.degree + 1)
        )
        total += comb(n - bad, size) * (ways / comb(n - 1, chosen.degree)) ** size
    assert rounds * total <= FAILURE


def test_no_group_of_a_small_complete_graph_can_be_parted() -> None:
    """Every way to part 7 clients with 2 corrupt: somebody lacks the neighbours that it insists on."""
    chosen = graph(7, 0.3, 0, 1)
    for size in range(1, 5):
        for group in combinations(range(2, 7), size):
            inside, outside = len(group) + 2 - 1, 7 - len(group) - 1
            assert min(inside, outside) < chosen.threshold


@pytest.mark.parametrize("n", [65, 100, 1000, 10_000])
def test_honest_draws_stay_below_the_incoming_cap(n: int) -> None:
    """Chernoff: P(X >= a) <= exp(a - m) (m / a)^a for a sum of independent draws with mean m."""
    chosen = graph(n, 0.2, 0.1, 100)
    mean, cap = float(chosen.degree), float(chosen.incoming)
    assert cap >= n or exp(cap - mean) * (mean / cap) ** cap < 2**-100


@pytest.mark.parametrize(
    ("n", "corrupt", "lost"), [(2, 0, 0), (3, 0.34, 0), (100, 0.34, 0.1), (100, 0.1, 0.4)]
)
def test_what_cannot_work_is_refused(n: int, corrupt: float, lost: float) -> None:
    with pytest.raises(
        SpecError, match=r"lower encryption.corrupt = .* or encryption.lost = .*, or ask more clients"
    ):
        graph(n, corrupt, lost, 100)


def test_quorums_share_an_honest_client() -> None:
    assert [quorum(n) for n in (3, 4, 5, 6, 8, 100)] == [3, 3, 4, 5, 6, 67]
