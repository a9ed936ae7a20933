"""Integer noise: drawn from the right distribution, and its Renyi bounds hold."""

from collections.abc import Callable
from math import exp, lgamma, log, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcore.errors import SpecError
from fedcore.privacy.discrete import MAX_VARIANCE, DiscreteGaussian, Skellam, discrete_gaussian, skellam
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


@pytest.mark.parametrize("shift", [1, 2, 5])
@pytest.mark.parametrize("honest", [1, 2, 3, 10])
@pytest.mark.parametrize("variance", [1, 2, 5, 20])
def test_the_bounds_hold_in_one_dimension(variance: int, honest: int, shift: int) -> None:
    """The sum of the noise, convolved exactly, against the formulas."""
    one = gaussian_pmf(variance, 14 * variance + 10)
    sum_of_gaussians = one
    for _ in range(honest - 1):
        sum_of_gaussians = np.convolve(sum_of_gaussians, one)
    gaussian = DiscreteGaussian(variance, honest, shift, 1).rdp(ORDERS)
    skellams = Skellam(variance, honest, shift, 1).rdp(ORDERS)
    for order, most, most_skellam in zip(ORDERS, gaussian, skellams, strict=True):
        if order * shift < 10 * sqrt(variance * honest):  # beyond, probabilities leave float64
            kept = sum_of_gaussians[sum_of_gaussians > 1e-280]
            assert renyi(kept, shift, order) <= most * (1 + 1e-9)
            pmf = skellam_pmf(variance * honest, 30 + 12 * variance * honest)
            assert renyi(pmf[pmf > 1e-280], shift, order) <= most_skellam * (1 + 1e-9)


@pytest.mark.parametrize(
    ("event", "order", "bound"),
    [
        (Skellam(10, 1, 1.0, 1), 2.0, 2 / 20 + 9 / 400),
        (Skellam(5, 2, 1.0, 1), 2.0, 2 / 20 + 9 / 400),
        (Skellam(10, 1, 3.0, 4), 2.0, 18 / 20 + (27 + 36) / 400),
        (Skellam(1, 1, 1.0, 1), 32.0, 16 + 3 / 2),
        (Skellam(10, 1, 1.0, 1, steps=7), 2.5, 7 * (3 / 20 + 11 / 400)),
        (DiscreteGaussian(25, 4, 3.0, 10**6), 8.0, 4 * 9 / 100),
    ],
)
def test_bounds_worked_by_hand(event: DiscreteGaussian | Skellam, order: float, bound: float) -> None:
    assert event.rdp(np.array([order]))[0] == pytest.approx(bound, rel=1e-12)


EVENTS = st.tuples(
    st.integers(1, 10**6),
    st.integers(1, 1000),
    st.floats(0.5, 1e5),
    st.integers(1, 10**7),
    st.integers(0, 50),
)


@given(EVENTS, st.sampled_from([DiscreteGaussian, Skellam]))
def test_never_below_the_continuous_gaussian(
    fields: tuple[int, int, float, int, int], kind: type[DiscreteGaussian] | type[Skellam]
) -> None:
    variance, honest, norm, _, steps = fields
    continuous = steps * ORDERS * norm**2 / (2 * honest * variance)
    bound = kind(*fields).rdp(ORDERS)
    assert bound.shape == ORDERS.shape
    assert np.all(bound >= continuous * (1 - 1e-12))
    assert np.all(np.diff(bound) >= -1e-12 * bound[1:])


@given(EVENTS, st.sampled_from([DiscreteGaussian, Skellam]))
def test_more_noise_costs_less_and_rounds_add_up(
    fields: tuple[int, int, float, int, int], kind: type[DiscreteGaussian] | type[Skellam]
) -> None:
    variance, honest, norm, dimension, steps = fields
    bound = kind(*fields).rdp(ORDERS)
    assert np.all(kind(2 * variance, honest, norm, dimension, steps).rdp(ORDERS) <= bound)
    np.testing.assert_allclose(kind(variance, honest, norm, dimension, 2 * steps).rdp(ORDERS), 2 * bound)


@pytest.mark.parametrize("kind", [DiscreteGaussian, Skellam])
def test_a_fine_grid_costs_what_the_continuous_gaussian_does(
    kind: type[DiscreteGaussian] | type[Skellam],
) -> None:
    """The same noise multiplier, 2, on finer and finer grids."""
    orders = np.array([2.0, 4, 8, 16, 32])
    gaps = []
    for scale in (4, 64, 1024):
        bound = kind(4 * scale**2 // 16, 16, scale, 10_000).rdp(orders)
        gaps.append(float(np.max(bound / (orders / 8) - 1)))
    assert sorted(gaps, reverse=True) == gaps
    assert gaps[-1] < 1e-3


@pytest.mark.parametrize(
    "fields", [(0, 1, 1.0, 1), (1, 0, 1.0, 1), (1, 1, 0.0, 1), (1, 1, 1.0, 0), (1, 1, 1.0, 1, -1)]
)
@pytest.mark.parametrize("kind", [DiscreteGaussian, Skellam])
def test_events_that_make_no_sense_are_refused(
    kind: type[DiscreteGaussian] | type[Skellam], fields: tuple[int, int, float, int]
) -> None:
    with pytest.raises(SpecError, match="expected variance"):
        kind(*fields)
