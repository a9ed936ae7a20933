"""How much noise is shown: against Gaussian mechanisms whose noise is known."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from fedcore.audit.likelihood import log_likelihood_ratio
from fedcore.audit.noise import judged, separating_threshold, shown
from fedcore.audit.one_run import count_correct, epsilon_lower_bound
from fedcore.audit.rates import Counts, auc
from fedcore.privacy.accounting import epsilon
from fedcore.privacy.events import Gaussian, Laplace

pytestmark = pytest.mark.slow  # together more than ten seconds

NORMAL = NormalDist()


def test_a_full_gaussian_by_hand() -> None:
    """Rates at their bounds give mu by the trade-off curve, and T rounds of noise z have mu = sqrt(T) / z."""
    found = Counts(true=400, members=500, false=100, others=500)
    alpha = 0.025
    mu = -NORMAL.inv_cdf(found.fpr(alpha)[1]) + NORMAL.inv_cdf(found.tpr(alpha)[0])
    history = [Gaussian(6.0, 1.0, 9)]
    by_hand = (math.sqrt(9) / mu) / 6.0
    assert shown(history, 1e-5, found).noise == pytest.approx(by_hand, rel=0.03)
    assert shown(history, 1e-5, found).epsilon == pytest.approx(epsilon([Gaussian(1 / mu)], 1e-5), rel=0.05)


def test_chance_shows_nothing() -> None:
    nothing = shown([Gaussian(1.0)], 1e-5, Counts(250, 500, 250, 500))
    assert (nothing.noise, nothing.epsilon) == (math.inf, 0.0)
    assert shown([Gaussian(1.0)], 1e-5, Counts(0, 0, 0, 0)).noise == math.inf


def attacked(noise: float, rate: float, truth: float, seed: int) -> tuple[float, float]:
    """Return what an audit shows of 20 sums with noise that claim `noise`, `rate`; truth: times the noise."""
    rng, event = np.random.default_rng(seed), Gaussian(noise, rate, 20)
    included = rng.random(2000) < 0.5
    drawn = (rng.random((20, 2000)) < rate) & included
    records = rng.normal(scale=noise * truth, size=(20, 2000)) + drawn
    scores = log_likelihood_ratio(records, event) if rate < 1 else records.sum(0)
    found = shown([event], 1e-5, judged(scores, included, rng))
    return found.noise, found.epsilon


@pytest.mark.parametrize(("noise", "rate"), [(8.0, 1.0), (1.0, 0.1)])
def test_an_honest_mechanism_is_seldom_refuted_and_half_the_noise_is(noise: float, rate: float) -> None:
    honest = [attacked(noise, rate, 1.0, seed)[0] for seed in range(6)]
    assert sum(factor < 1 for factor in honest) <= 1  # two of six have probability 3 % at most
    for seed in range(3):
        factor, bound = attacked(noise, rate, 0.5, seed)
        assert 0.5 < factor < 1
        claim, truth = (epsilon([Gaussian(z, rate, 20)], 1e-5) for z in (noise, noise / 2))
        assert claim < bound < truth


def test_a_laplace_mechanism() -> None:
    """At epsilon 1/2 a threshold has at most TPR = e^0.5 FPR, and an honest mechanism comes close to it."""
    rng = np.random.default_rng(0)
    included = rng.random(20_000) < 0.5
    scores = rng.laplace(scale=2.0, size=20_000) + included
    found = judged(scores, included, rng)
    honest, halved = (shown([Laplace(scale)], 1e-5, found) for scale in (2.0, 4.0))
    assert 1 < honest.noise < 1.3
    assert halved.noise < 1


def test_the_threshold_lies_between_what_it_separates() -> None:
    included = np.arange(100) < 50
    scores = included * 10.0 + np.linspace(0, 1, 100)
    threshold = separating_threshold(scores, included)
    assert scores[~included].max() <= threshold < scores[included].min()


def test_the_likelihood_of_rounds_sees_rare_draws_that_a_sum_does_not() -> None:
    rng, event = np.random.default_rng(0), Gaussian(0.4, 0.02, 100)
    included = rng.random(2000) < 0.5
    drawn = (rng.random((100, 2000)) < 0.02) & included
    records = 7.0 * (rng.normal(scale=0.4, size=(100, 2000)) + drawn)  # in any unit
    ratio = log_likelihood_ratio(records, event)
    assert auc(ratio, included) > auc(records.sum(0), included) + 0.1
    bounds = [
        epsilon_lower_bound(2000, 400, count_correct(scores, included, 400), 1e-5)
        for scores in (ratio, records.sum(0))
    ]
    assert bounds[0] > bounds[1]


def test_the_likelihood_ratio_by_hand() -> None:
    """Rounds of two steps: 0, 1 or 2 draws. The unit is right where the median |x| is that of the noise."""
    event = Gaussian(1.5, 0.3, 2)
    scale = 1.5 * math.sqrt(2)
    records = np.array([[-0.6745 * scale, 0.6745 * scale, 2.5]])
    draws = (0.49, 0.42, 0.09)
    densities = [
        sum(p * NormalDist(k, scale).pdf(x) for k, p in enumerate(draws)) / NormalDist(0, scale).pdf(x)
        for x in records[0]
    ]
    assert log_likelihood_ratio(records, event) == pytest.approx(np.log(densities), rel=1e-6)
