"""Fixed point: exact sums in any order, no overflow at the bounds, and an error of half a step."""

from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore import encoding
from fedcore.encoding import MIN_SHIFT, add_encoded, blocks, decode, narrow_shift_for, shift_for, within
from fedcore.errors import SpecError

f32 = partial(np.array, dtype=np.float32)

BOUND = 64.0
bounds = st.floats(2**-40, 2**40)
near_powers = st.builds(
    lambda e, ulps: 2.0**e * (1 + ulps * 2.0**-52), st.integers(-30, 30), st.integers(-2, 2)
)
cohorts = st.one_of(
    st.integers(1, 10**6), st.builds(lambda e, d: 2**e + d, st.integers(1, 20), st.integers(-1, 1))
)
cohorts = cohorts.filter(lambda n: n >= 1)
vectors = st.lists(st.floats(-BOUND, BOUND, width=32), min_size=3, max_size=3).map(f32)


def add(total: Any, vector: Any, factor: float, shift: int) -> None:
    add_encoded(total, vector[None], np.array([factor]), shift)


def summed(rows: list[Any], shift: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    total = np.zeros(3, np.int64)
    for row in rows:
        add(total, row, 1.0, shift)
    return total


@given(bound=bounds | near_powers, clients=cohorts)
def test_no_sum_of_a_cohort_can_overflow(bound: float, clients: int) -> None:
    """`clients * (bound * 2^shift + 1/2) < 2^63`, in exact arithmetic, and two digits more would break it."""
    try:
        shift = shift_for(bound, clients)
    except SpecError:
        assert clients * Fraction(bound) * 2**MIN_SHIFT >= 2**62 - 2**10
        return
    worst = clients * (Fraction(bound) * Fraction(2) ** shift + Fraction(1, 2))
    assert worst < 2**63
    rounded = 1 + Fraction(1, 2**52)  # 3 * float(1/3) is 1 in float64 and a little less in truth
    assert worst * 4 * rounded >= 2**63, "the grid is coarser than it has to be"


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("clients", [2, 7, 100, 1000])
def test_a_narrow_sum_has_room_for_the_rounding_of_all(bits: int, clients: int) -> None:
    """Values that fit to within a quarter of a step each take a coarser grid than those that fit by half."""
    for left, expected in ((Fraction(1, 4), 3), (Fraction(51, 100), 4)):
        norm = (Fraction(2) ** (bits - 1) / clients - left) / 2**4 / Fraction(encoding.INEXACT)
        assert narrow_shift_for(float(norm), 1.0, 1, clients, bits) == expected


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("bound", [1.0, 64.0, np.nextafter(64.0, 0), np.nextafter(64.0, 99), 1 / 3, 3e5])
@pytest.mark.parametrize("clients", [1, 2, 3, 7, 1023, 1024, 1025])
def test_the_worst_cohort_is_summed_exactly(bound: float, clients: int, sign: float) -> None:
    """Every client sends the largest value, and Python's integers say what int64 should hold."""
    shift = shift_for(bound, clients)
    total = np.zeros(1, np.int64)
    for _ in range(clients):
        add(total, np.array([sign * bound]), 1.0, shift)
    assert int(total[0]) == clients * round(Fraction(sign * bound) * Fraction(2) ** shift)


def test_a_bound_that_leaves_too_few_digits_is_refused_with_a_remedy() -> None:
    with pytest.raises(SpecError, match=r"over 1000000 clients of values up to 1e\+14 .* lower \[limits\]"):
        shift_for(1e14, 10**6)


@given(rows=st.lists(vectors, min_size=1, max_size=12), data=st.data())
def test_any_order_and_any_split_over_workers_give_the_same_integers(
    rows: list[Any], data: st.DataObject
) -> None:
    shift = shift_for(BOUND, len(rows))
    shuffled = data.draw(st.permutations(rows))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    workers = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    parts = [summed(worker, shift) for worker in workers]
    assert np.array_equal(sum(parts, np.zeros(3, np.int64)), summed(rows, shift))


@given(value=st.floats(-BOUND, BOUND), clients=st.integers(1, 10**6))
def test_an_encoded_value_is_off_by_at_most_half_a_step(value: float, clients: int) -> None:
    shift = shift_for(BOUND, clients)
    total = np.zeros(1, np.int64)
    add(total, np.array([value]), 1.0, shift)
    error = abs(Fraction(int(total[0]), 2**shift) - Fraction(value))
    assert error <= Fraction(1, 2 ** (shift + 1))


@given(weight=st.integers(0, 10**6), value=st.floats(-BOUND, BOUND, width=32))
def test_a_product_is_off_by_half_a_step_and_one_rounding(weight: int, value: float) -> None:
    shift = shift_for(BOUND * 10**6, 100)
    total = np.zeros(1, np.int64)
    add(total, f32([value]), float(weight), shift)
    exact = weight * Fraction(value)
    error = abs(Fraction(int(total[0]), 2**shift) - exact)
    assert error <= Fraction(1, 2 ** (shift + 1)) + abs(exact) / 2**53


def test_rounding_is_half_to_even() -> None:
    total = np.zeros(5, np.int64)
    add(total, np.array([0.5, 1.5, 2.5, -0.5, -1.5]), 1.0, 0)
    assert total.tolist() == [0, 2, 2, 0, -2]


def test_decoding_undoes_scaling_and_keeps_the_shape() -> None:
    assert decode(np.array([[-3, 0], [1, 2**60]]), 2).tolist() == [[-0.75, 0.0], [0.25, 2.0**58]]


@given(size=st.integers(0, 30), length=st.integers(1, 12))
def test_blocks_tile(size: int, length: int) -> None:
    places = list(blocks(size, length))
    assert [i for place in places for i in range(place.start, place.stop)] == list(range(size))
    assert all(0 < place.stop - place.start <= length for place in places)


@pytest.mark.parametrize("length", [1, 7, 64, 1000, 1 << 16])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_block_length_does_not_matter(length: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=1001).astype(dtype)
    whole, cut = np.zeros(1001, np.int64), np.zeros(1001, np.int64)
    add(whole, values, 17.0, 40)
    monkeypatch.setattr(encoding, "BLOCK", length)
    add(cut, values, 17.0, 40)
    assert np.array_equal(whole, cut)
    assert within(values, 5.0) and not within(values, 1.0)


@given(
    size=st.integers(1, 40),
    place=st.integers(0, 39),
    bad=st.sampled_from([np.nan, np.inf, -np.inf, 64.001, -64.001, 3e38]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_one_bad_value_anywhere_is_seen(size: int, place: int, bad: float, dtype: Any) -> None:
    values = np.linspace(-BOUND, BOUND, size, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "blocks", partial(blocks, length=8))
        assert within(values, BOUND)
        values[place % size] = bad
        assert not within(values, BOUND)


def test_nothing_is_within_any_bound() -> None:
    assert within(np.zeros(0, np.float32), 1.0)
