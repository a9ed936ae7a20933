"""Integer noise: drawn from the right distribution, and its Renyi bounds hold."""

from collections.abc import Callable
from math import exp, inf, isqrt, lgamma, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcore.errors import SpecError
from fedcore.privacy.discrete import (
    LEAST_VARIANCE,
    MAX_VARIANCE,
    DiscreteGaussian,
    Skellam,
    discrete_gaussian,
    skellam,
)
from fedcore.seeds import generator

Draw = Callable[[int, int, np.random.Generator], NDArray[np.int64]]

ORDERS = np.array([1.25, 2, 3, 4, 8, 16, 32])


def gaussian_pmf(variance: int, reach: int) -> NDArray[np.float64]:
    """Return P(-reach..reach) of the discrete Gaussian."""
    weights: NDArray[np.float64] = np.exp(-(np.arange(-reach, reach + 1.0) ** 2) / (2 * variance))
    weights /= weights.sum()
    return weights


def skellam_pmf(variance: float, reach: int) -> NDArray[np.float64]:
    """Return P(-reach..reach) as the convolution of two Poisson distributions."""
    mean = variance / 2
    poisson = np.array([exp(k * log(mean) - mean - lgamma(k + 1)) for k in range(int(mean) + reach + 1)])
    middle = len(poisson) - 1
    return np.convolve(poisson, poisson[::-1])[middle - reach : middle + reach + 1]


def check_against(pmf: NDArray[np.float64], draws: NDArray[np.int64]) -> None:
    """Compare counts to probabilities; rare values are lumped. Fails a right sampler once in 10^8."""
    reach = len(pmf) // 2
    counts = np.bincount(np.clip(draws, -reach, reach) + reach, minlength=len(pmf))
    common = pmf * len(draws) > 10
    expected = np.append(pmf[common], 1 - pmf[common].sum()) * len(draws)
    seen = np.append(counts[common], counts[~common].sum())
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < len(seen) + 8 * sqrt(2 * len(seen))


def renyi(pmf: NDArray[np.float64], shift: int, order: float) -> float:
    """Return the divergence of a distribution on a long enough range from itself shifted."""
    logs = np.log(pmf)
    terms = order * logs[shift:] + (1 - order) * logs[: len(pmf) - shift]
    largest = float(terms.max())
    return (largest + log(np.exp(terms - largest).sum())) / (order - 1)


@pytest.mark.parametrize("variance", [1, 2, 3, 10, 100, 1234])
def test_discrete_gaussian_has_its_distribution(variance: int) -> None:
    draws = discrete_gaussian(variance, 200_000, generator("test", variance))
    check_against(gaussian_pmf(variance, 12 * variance), draws)


@pytest.mark.parametrize("variance", [1, 2, 10, 100])
def test_skellam_has_its_distribution(variance: int) -> None:
    draws = skellam(variance, 200_000, generator("test", variance))
    check_against(skellam_pmf(variance, 10 + 10 * variance), draws)


@pytest.mark.parametrize("variance", [1, 50, 10**4, MAX_VARIANCE])
@pytest.mark.parametrize("draw", [discrete_gaussian, skellam])
def test_noise_has_the_variance_that_was_asked_for(draw: Draw, variance: int) -> None:
    noise = draw(variance, 200_000, generator("variance", variance))
    assert noise.dtype == np.int64
    assert noise.var() == pytest.approx(variance, rel=0.02)
    assert abs(noise.mean()) < 5 * sqrt(variance / len(noise))
    lag = np.mean(noise[1:] * noise[:-1]) / variance
    assert abs(lag) < 5 / sqrt(len(noise))


@pytest.mark.parametrize("variance", [0, -1, MAX_VARIANCE + 1])
def test_variance_beyond_the_exact_sampler_is_refused(variance: int) -> None:
    with pytest.raises(SpecError, match="expected 1"):
        discrete_gaussian(variance, 10, generator("x"))


@pytest.mark.parametrize("size", [0, 1, 5])
def test_sizes(size: int) -> None:
    assert discrete_gaussian(4, size, generator("x")).shape == (size,)
    assert skellam(4, size, generator("x")).shape == (size,)


@pytest.mark.parametrize("shift", [1, 5, 40])
@pytest.mark.parametrize("honest", [1, 2, 5])
def test_the_bounds_hold_where_the_grid_is_coarsest(honest: int, shift: int) -> None:
    """The sum of the noise of so many, in one dimension, convolved exactly; against the formulas."""
    one = gaussian_pmf(LEAST_VARIANCE, 20 * isqrt(LEAST_VARIANCE))
    sum_of_gaussians = one
    for _ in range(honest - 1):
        sum_of_gaussians = np.convolve(sum_of_gaussians, one)
    total = honest * LEAST_VARIANCE
    skellams = skellam_pmf(total, 20 * isqrt(total))
    noise_multiplier = sqrt(total) / shift
    for kind, pmf in ((DiscreteGaussian, sum_of_gaussians), (Skellam, skellams)):
        kept = pmf[pmf > 1e-80]  # beyond, what is convolved leaves float64
        for order, most in zip(ORDERS, kind(noise_multiplier).rdp(ORDERS), strict=True):
            if order * shift < 5 * sqrt(total):
                exact = renyi(kept, shift, order)
                assert exact <= most * (1 + 1e-6)
                assert exact >= 0.995 * most or order % 1


@pytest.mark.parametrize("z", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("dimension", [1, 100, 10**9])
def test_the_bound_of_any_grid_and_dimension_is_within_that_of_the_spec(z: float, dimension: int) -> None:
    """Agarwal, Kairouz and Liu 2021 as they write it, on finer and finer grids; the norm follows from z."""
    for mu in (LEAST_VARIANCE, 3 * LEAST_VARIANCE, 10**9):
        norm = sqrt(mu) / z
        absolute = min(sqrt(dimension) * norm, norm**2)
        order = np.ceil(ORDERS)
        more = ((2 * order - 1) * norm**2 + 6 * absolute) / (4 * mu**2)
        written = order * norm**2 / (2 * mu) + np.minimum(more, 3 * absolute / (2 * mu))
        assert np.all(written <= Skellam(z).rdp(ORDERS) * (1 + 1e-12))


@pytest.mark.parametrize(
    ("event", "order", "bound"),
    [
        (Skellam(1.0), 2.0, 1 + 9 / 4096),
        (Skellam(0.5), 2.0, 4 + 9 / 1024),
        (Skellam(1.0, steps=7), 2.5, 7 * (3 / 2 + 11 / 4096)),
        (DiscreteGaussian(2.0), 8.0, 1.0),
        (DiscreteGaussian(2.0, 3), 2.5, 3 * 2.5 / 8),
    ],
)
def test_bounds_worked_by_hand(event: DiscreteGaussian | Skellam, order: float, bound: float) -> None:
    assert event.rdp(np.array([order]))[0] == pytest.approx(bound, rel=1e-12)


@given(st.floats(0.01, 100), st.integers(0, 50), st.sampled_from([DiscreteGaussian, Skellam]))
def test_hardly_more_than_the_continuous_gaussian(
    z: float, steps: int, kind: type[DiscreteGaussian] | type[Skellam]
) -> None:
    whole = np.ceil(ORDERS)
    bound = kind(z, steps).rdp(whole)
    assert bound.shape == ORDERS.shape
    continuous = steps * whole / (2 * z**2)
    assert np.all(bound >= continuous) and np.all(bound <= continuous * 1.0035)
    assert np.all(np.diff(kind(z, steps).rdp(ORDERS)) >= 0)
    np.testing.assert_allclose(kind(z, 2 * steps).rdp(ORDERS), 2 * kind(z, steps).rdp(ORDERS))


@pytest.mark.parametrize("fields", [(0.0,), (-1.0,), (inf,), (1.0, -1)])
@pytest.mark.parametrize("kind", [DiscreteGaussian, Skellam])
def test_events_that_make_no_sense_are_refused(
    kind: type[DiscreteGaussian] | type[Skellam], fields: tuple[float, int]
) -> None:
    with pytest.raises(SpecError, match="expected finite noise_multiplier"):
        kind(*fields)
