"""The randomised Hadamard transform: a rotation, undone by its inverse, that flattens."""

from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore import seeds
from fedcore.privacy.rotation import WIDEST, flatness, rotate, rotated, unrotate, unrotated, width
from fedcore.seeds import generator

SIZES = st.one_of(st.integers(1, 300), st.sampled_from([WIDEST - 1, WIDEST, WIDEST + 1, 3 * WIDEST + 777]))


@given(SIZES, st.integers(0, 2**40), st.sampled_from(["float32", "float64"]))
def test_inverse_undoes_it_and_norms_stay(size: int, seed: int, dtype: str) -> None:
    vector = generator("vector", seed).normal(size=size).astype(dtype)
    rotated = rotate(vector, seed)
    tolerance = 50 * float(np.finfo(vector.dtype).eps)
    norm = np.linalg.norm(vector)
    assert rotated.dtype == vector.dtype
    assert abs(np.linalg.norm(rotated) - norm) <= tolerance * norm
    assert np.linalg.norm(unrotate(rotated, seed) - vector) <= tolerance * norm


@given(SIZES, st.integers(1, 9), st.integers(0, 2**40))
def test_rows_have_the_bits_that_each_has_alone(size: int, count: int, seed: int) -> None:
    rows = generator("rows", seed).normal(size=(count, size)).astype("float32")
    together = np.full_like(rows, np.nan)
    for place, piece in rotated(rows, seed):
        together[:, place] = piece
    assert np.array_equal(together, [rotate(row, seed) for row in rows])
    for place, piece in unrotated(together, seed):
        together[:, place] = piece
    assert np.array_equal(together, [unrotate(rotate(row, seed), seed) for row in rows])


def test_integers_are_rotated_in_float64() -> None:
    integers = generator("integers", 1).integers(-(2**31), 2**31, (2, 700), dtype="int32")
    for place, piece in rotated(integers, 1):
        assert np.array_equal(piece, [rotate(row.astype("float64"), 1)[place] for row in integers])


@given(st.integers(1, 10**9), st.floats(2.0**-60, 0.5))
def test_flatness_is_a_probability_that_was_turned_around(size: int, failure: float) -> None:
    t = flatness(size, failure)
    assert t == 1 or size * 2 * np.exp(-(t**2) * width(size) / 2) == pytest.approx(failure)


def test_matches_the_definition_on_one_block() -> None:
    i = np.arange(8)
    matrix = np.array([[(-1) ** (int(a & b)).bit_count() for b in i] for a in i]) / sqrt(8)
    signs = np.sign(rotate(np.eye(8)[0], 5)[0]) * rotate(np.eye(8)[0], 5)[0] * sqrt(8)
    assert signs == pytest.approx(1)
    for column in range(8):
        rotated = rotate(np.eye(8)[column], 5)
        sign = np.sign(rotated[0])
        np.testing.assert_allclose(rotated, sign * matrix[:, column], atol=1e-15)


@given(st.integers(1, 200), st.integers(0, 2**40))
def test_is_linear_and_orthogonal(size: int, seed: int) -> None:
    matrix = np.array([rotate(row, seed) for row in np.eye(size)])
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("size", [100_000, 2 * WIDEST + 1, 20_000, WIDEST, 1000])
def test_no_coordinate_stays_large(size: int) -> None:
    """One unit vector at a time, the last coordinate among them: 2^-20 for the odds that one is too large."""
    bound = sqrt(2 * log(2 * size * 2**20) / width(size))
    for hot in (0, size // 2, size - 2, size - 1):
        vector = np.zeros(size)
        vector[hot] = 1
        assert abs(rotate(vector, hot)).max() <= bound


def test_a_seed_means_the_same_signs_on_every_machine() -> None:
    """Both ends of a sum must agree on them: drawn 32 bits at a time for the block, then for the last one."""
    draws = seeds.generator("rotation", 7)
    first, last = (1.0 - 2 * np.unpackbits(np.frombuffer(draws.bytes(1), np.uint8)) for _ in range(2))
    assert (first[:4].tolist(), last[:4].tolist()) == ([-1, 1, -1, 1], [1, 1, -1, 1])
    hadamard = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    expected = np.array([3.0, 1.0, -4.0, 1.0, 5.0])
    for place, signs in ((slice(0, 4), first), (slice(1, 5), last)):
        expected[place] = hadamard @ (signs[:4] * expected[place])
    np.testing.assert_allclose(rotate(np.array([3.0, 1.0, -4.0, 1.0, 5.0]), 7), expected, atol=1e-15)


def test_seeds_differ_and_repeat() -> None:
    vector = np.ones(1000)
    assert np.array_equal(rotate(vector, 1), rotate(vector, 1))
    assert not np.allclose(rotate(vector, 1), rotate(vector, 2))
    assert np.array_equal(vector, np.ones(1000))


def test_nothing_is_nothing() -> None:
    assert rotate(np.empty(0, "float32"), 1).shape == unrotate(np.empty(0, "float32"), 1).shape == (0,)
