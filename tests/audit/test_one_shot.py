"""The estimate from one-shot canaries."""

import numpy as np
import pytest

from fedcore.audit.one_shot import cosines, directions, epsilon_estimate, gaussian_epsilon
from fedcore.privacy.accounting import epsilon
from fedcore.privacy.events import Gaussian


@pytest.mark.parametrize("mu", [0.1, 0.5, 2.0, 6.0])
def test_equal_deviations_are_the_gaussian_mechanism(mu: float) -> None:
    assert gaussian_epsilon(mu, 1.0, 1e-5) == pytest.approx(
        epsilon([Gaussian(1 / mu)], 1e-5), rel=2e-3, abs=1e-3
    )


def test_the_same_distribution_has_no_epsilon_and_another_spread_has() -> None:
    assert gaussian_epsilon(0.0, 1.0, 1e-5) == 0.0
    assert gaussian_epsilon(0.0, 2.0, 1e-5) > gaussian_epsilon(0.0, 1.1, 1e-5) > 0.0


def test_a_gaussian_sum_of_canaries_is_estimated() -> None:
    """The sum of k unit vectors with noise z: cosines have mean 1/|sum|, so epsilon is that of 1/z, about."""
    rng, d, k, z = np.random.default_rng(0), 20_000, 400, 0.5
    drawn = directions(k, d, rng)
    assert np.linalg.norm(drawn, axis=1) == pytest.approx(np.ones(k))
    moved = drawn.sum(0) + z * rng.normal(size=d)
    estimate = epsilon_estimate(cosines(drawn, moved), d, 1e-5)
    truth = epsilon([Gaussian(z)], 1e-5)
    assert 0.5 * truth < estimate < 1.5 * truth
    left_out = epsilon_estimate(cosines(directions(k, d, rng), moved), d, 1e-5)
    assert left_out < truth / 4


def test_a_model_that_did_not_move_is_like_nothing() -> None:
    assert cosines(np.eye(3), np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
