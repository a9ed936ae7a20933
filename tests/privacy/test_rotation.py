"""The randomised Hadamard transform: a rotation, undone by its inverse, that flattens."""

from math import log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.privacy.rotation import WIDEST, rotate, unrotate, width
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


def test_seeds_differ_and_repeat() -> None:
    vector = np.ones(1000)
    assert np.array_equal(rotate(vector, 1), rotate(vector, 1))
    assert not np.allclose(rotate(vector, 1), rotate(vector, 2))
    assert np.array_equal(vector, np.ones(1000))


def test_nothing_is_nothing() -> None:
    assert rotate(np.empty(0, "float32"), 1).shape == unrotate(np.empty(0, "float32"), 1).shape == (0,)
