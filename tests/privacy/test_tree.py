"""Tree aggregation: the nodes of prefixes, and what one client can change in them."""

from collections import Counter
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.privacy.tree import increment, nodes, sensitivity


def covered(level: int, index: int) -> range:
    return range((index << level) + 1, (index + 1 << level) + 1)


def worst_change(rounds: int, separation: int) -> float:
    """Try every pattern of participation."""
    used = [covered(*node) for node in {node for t in range(1, rounds + 1) for node in nodes(t)}]

    def largest(taken: tuple[int, ...], first: int) -> int:
        here = sum(sum(r in node for r in taken) ** 2 for node in used)
        return max([here, *(largest((*taken, r), r + separation) for r in range(first, rounds + 1))])

    return sqrt(largest((), 1))


@given(st.integers(0, 10**6))
def test_nodes_of_a_prefix_tile_it(t: int) -> None:
    upto = 0
    for level, index in reversed(nodes(t)):
        assert covered(level, index)[0] == upto + 1
        upto = covered(level, index)[-1]
    assert upto == t
    assert len(nodes(t)) == t.bit_count()


@given(st.integers(1, 300))
def test_increments_telescope_to_the_prefix(rounds: int) -> None:
    total: Counter[tuple[int, int]] = Counter()
    for t in range(1, rounds + 1):
        added, removed = increment(t)
        total.update(added)
        total.subtract(removed)
        assert +total == Counter(nodes(t))
        assert set(total.values()) <= {0, 1}


@given(st.integers(1, 10**9))
def test_a_round_adds_the_one_node_that_ends_with_it(t: int) -> None:
    added, removed = increment(t)
    assert [covered(*node)[-1] for node in added] == [t]
    assert set(removed) <= set(nodes(t - 1))


@pytest.mark.parametrize("rounds", range(15))
def test_sensitivity_is_the_worst_of_all_patterns(rounds: int) -> None:
    for separation in range(1, rounds + 2):
        assert sensitivity(rounds, separation) == pytest.approx(worst_change(rounds, separation), abs=1e-12)


@given(st.integers(1, 10_000), st.integers(0, 1000))
def test_one_participation_counts_once_a_level(rounds: int, more: int) -> None:
    assert sensitivity(rounds, rounds + more) == pytest.approx(sqrt(rounds.bit_length()))


@given(st.integers(1, 400), st.integers(1, 20))
def test_sensitivity_grows_with_rounds_and_falls_with_separation(rounds: int, separation: int) -> None:
    assert sensitivity(rounds, separation) <= sensitivity(rounds + 1, separation)
    assert sensitivity(rounds, separation + 1) <= sensitivity(rounds, separation)


@pytest.mark.parametrize(
    ("rounds", "separation", "exact"),
    [(1000, 33, 24.1247), (1000, 100, 10.3441), (2000, 300, 8.6023), (10_000, 100, 103.8653)],
)
def test_the_bound_for_long_separations_is_tight(rounds: int, separation: int, exact: float) -> None:
    """The exact values took the same search up to a minute, with no pattern left out."""
    assert exact - 1e-4 <= sensitivity(rounds, separation) <= 1.02 * exact


@given(st.integers(1, 2000), st.integers(1, 300), st.data())
def test_no_pattern_exceeds_the_bound(rounds: int, separation: int, data: st.DataObject) -> None:
    used = {node for t in range(1, rounds + 1) for node in nodes(t)}
    taken, r = [], data.draw(st.integers(1, rounds))
    while r <= rounds:
        taken.append(r)
        r += separation + data.draw(st.integers(0, 2))
    change = Counter((level, (r - 1) >> level) for r in taken for level in range(rounds.bit_length()))
    assert (
        sqrt(sum(m**2 for node, m in change.items() if node in used))
        <= sensitivity(rounds, separation) + 1e-9
    )
