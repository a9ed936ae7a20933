"""The accountant: the reference's values, other accountants as oracles, and the laws that epsilon obeys."""

import subprocess
import sys
from math import erfc, exp, inf, isfinite, sqrt
from time import perf_counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import SpecError
from fedcore.privacy.accounting import (
    CLOSE,
    ORDERS,
    accountant_for,
    curve,
    epsilon,
    rdp,
    rdp_epsilon,
    smallest_noise,
)
from fedcore.privacy.discrete import DiscreteGaussian, Skellam
from fedcore.privacy.events import Accountant, Event, Gaussian, Laplace

Steps = tuple[float, float, int]
MIXED: list[Steps] = [(1.0, 0.01, 200), (1.2, 0.02, 200), (1.0, 0.01, 300)]
TABLE = [  # history, delta, Opacus RDP, Opacus PRV, dp-accounting PLD
    ([(1.0, 0.01, 1000)], 1e-5, 2.1014, 1.8384, 1.8282),
    ([(1.1, 256 / 60000, 14040)], 1e-5, 2.5944, 2.3897, 2.3796),
    ([(0.7, 0.02, 500)], 1e-5, 7.6641, 6.6643, 6.6538),
    ([(4.0, 0.1, 1000)], 1e-6, 4.1487, 3.8790, 3.8688),
    ([(10.0, 1.0, 100)], 1e-5, 4.7285, 4.3874, 4.3772),
    (MIXED, 1e-5, 2.0500, 1.8016, 1.7914),
]


def noise_multiplier(
    target: float, delta: float, rate: float, steps: int, accountant: Accountant | None = None
) -> float:
    return smallest_noise(lambda z: [(z, rate, steps)], target, delta, accountant)


GRID = 1e-3  # relative: two histories may be rounded up to different grids

noises, rates = st.floats(0.5, 20.0), st.floats(0.001, 1.0)
steps, deltas = st.integers(1, 2000), st.floats(1e-9, 1e-3)
some = settings(max_examples=15, deadline=None)


@pytest.mark.parametrize(("history", "delta", "by_rdp", "by_prv", "by_pld"), TABLE)
def test_the_values_of_the_reference(
    history: list[Steps], delta: float, by_rdp: float, by_prv: float, by_pld: float
) -> None:
    assert epsilon(history, delta, "rdp") == pytest.approx(by_rdp, abs=0.01)
    assert epsilon(history, delta) == pytest.approx(by_pld, abs=1e-3)
    assert 0 <= by_prv - epsilon(history, delta) <= 0.02


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha:UserWarning")  # both inside Opacus
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning")  # at q = 1
@pytest.mark.parametrize(("history", "delta"), [row[:2] for row in TABLE])
def test_opacus_says_the_same(history: list[Steps], delta: float) -> None:
    from opacus.accountants import create_accountant

    def by(name: str) -> float:
        oracle = create_accountant(name)
        oracle.history = history
        return float(oracle.get_epsilon(delta))

    assert epsilon(history, delta, "rdp") == pytest.approx(by("rdp"), abs=0.01)
    assert 0 <= by("prv") - epsilon(history, delta) <= 0.02


@pytest.mark.parametrize(("history", "delta"), [row[:2] for row in TABLE])
def test_dp_accounting_on_a_fine_grid_says_the_same(history: list[Steps], delta: float) -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    oracle = PLDAccountant(value_discretization_interval=1e-4)
    for noise, rate, number in history:
        oracle.compose(
            dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), number
        )
    assert oracle.get_epsilon(delta) == pytest.approx(epsilon(history, delta), rel=GRID)


@some
@given(noises, st.integers(1, 50), deltas)
def test_a_gaussian_of_all_data_is_the_analytic_one(noise: float, number: int, delta: float) -> None:
    """Balle and Wang 2018, theorem 8: the delta of an epsilon, in closed form."""
    mu, spent = sqrt(number) / noise, epsilon([(noise, 1.0, number)], delta)
    upper, lower = (erfc((spent / mu - side * mu / 2) / sqrt(2)) / 2 for side in (1, -1))
    exact = upper - exp(spent) * lower
    assert exact <= delta * (1 + 1e-6)
    assert spent == 0 or exact >= delta * (1 - 0.01)


def test_laplace_noise_is_pure() -> None:
    for delta in (1e-9, 1e-15, 1e-100):
        assert epsilon([Laplace(0.5)], delta) == pytest.approx(2.0, abs=2 * delta + 1e-12)
        assert epsilon([Laplace(0.5, steps=3)], delta) <= 6.0
        assert epsilon([Laplace(0.5, steps=3)], delta, "rdp") <= 6.0
    assert epsilon([Laplace(10.0, steps=100)], 1e-5) < 0.6 * 100 / 10  # advanced composition


def test_what_cannot_be_convolved_is_left_to_divergences() -> None:
    started = perf_counter()
    for long in ((10.0, 0.01, 10**7), (0.75, 0.75, 1109)):
        assert epsilon([long], 1e-5) == epsilon([long], 1e-5, "rdp")
    assert perf_counter() - started < 10


def test_the_central_limit_is_never_reported() -> None:
    """It says 1.17 here, where the truth is 2.75."""
    for accountant in ("pld", "rdp"):
        assert epsilon([(0.6, 0.001, 5000)], 1e-6, accountant) > 2.748


@pytest.mark.slow
@some
@given(noises, rates, steps, deltas, st.floats(1.05, 3.0))
def test_epsilon_is_monotone(noise: float, rate: float, number: int, delta: float, more: float) -> None:
    spent = epsilon([(noise, rate, number)], delta)
    slack = spent * (1 + GRID) + 1e-6
    assert epsilon([(noise * more, rate, number)], delta) <= slack
    assert epsilon([(noise, rate / more, number)], delta) <= slack
    assert epsilon([(noise, rate, max(1, int(number / more)))], delta) <= slack
    assert epsilon([(noise, rate, number)], delta * more) <= slack
    assert spent <= epsilon([(noise, rate, number), Laplace(5.0)], delta) * (1 + GRID) + 1e-6


@some
@given(noises, rates, steps, deltas)
def test_divergences_bound_the_loss_distribution(
    noise: float, rate: float, number: int, delta: float
) -> None:
    history = [(noise, rate, number)]
    assert epsilon(history, delta) <= epsilon(history, delta, "rdp") * (1 + GRID)


@some
@given(st.permutations([*MIXED, (3.0, 1.0, 4), Laplace(7.0, steps=2)]), st.integers(1, 199))
def test_neither_the_order_nor_the_way_of_counting_matters(history: list[Any], cut: int) -> None:
    whole = epsilon([*MIXED, (3.0, 1.0, 4), Laplace(7.0, steps=2)], 1e-6)
    assert epsilon(history, 1e-6) == whole
    first, *others = [Gaussian(*event) if isinstance(event, tuple) else event for event in history]
    if first.steps > cut:
        parts = [type(first)(**{**vars(first), "steps": n}) for n in (cut, first.steps - cut)]
        assert epsilon([*others, *parts], 1e-6) == pytest.approx(whole, rel=1e-12)


def test_nothing_costs_nothing() -> None:
    for accountant in ("pld", "rdp"):
        assert epsilon([], 1e-5, accountant) == 0.0
        assert epsilon([(1.0, 0.1, 0), Laplace(1.0, steps=0)], 1e-5, accountant) == 0.0


@pytest.mark.parametrize("noise", [1e-300, 1e-9])
def test_noise_that_is_none_has_no_finite_epsilon(noise: float) -> None:
    for rate in (0.5, 1.0):
        assert epsilon([(noise, rate, 3)], 1e-5) == epsilon([(noise, rate, 3)], 1e-5, "rdp") == inf


@pytest.mark.parametrize("noise", [2.0**20, 1e300])
def test_very_much_noise_costs_nothing(noise: float) -> None:
    assert epsilon([(noise, 0.5, 3), Laplace(noise)], 1e-5) < 1e-6


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 4.0), st.sampled_from([0.004, 0.02, 0.1, 1.0]), st.integers(1, 500))
def test_the_smallest_noise_is_within_the_target_and_no_larger_than_needed(
    target: float, rate: float, number: int
) -> None:
    noise = noise_multiplier(target, 1e-5, rate, number)
    assert epsilon([(noise, rate, number)], 1e-5) <= target
    assert epsilon([(noise / (1 + 3 * CLOSE), rate, number)], 1e-5) > target
    assert noise == float(f"{noise:.5g}")


def test_the_smallest_noise_by_divergences() -> None:
    noise = noise_multiplier(2.0, 1e-5, 0.01, 1000, "rdp")
    assert 1.99 < epsilon([(noise, 0.01, 1000)], 1e-5, "rdp") <= 2.0
    assert noise > noise_multiplier(2.0, 1e-5, 0.01, 1000)


def test_the_smallest_noise_beside_other_releases() -> None:
    noise = smallest_noise(lambda z: [Laplace(z, steps=5), Gaussian(10.0, steps=20)], 4.0, 1e-5)
    assert 3.98 < epsilon([Laplace(noise, steps=5), Gaussian(10.0, steps=20)], 1e-5) <= 4.0
    message = "target_epsilon 1 is out of reach.*epsilon is 1.76.*more noise on metrics"
    with pytest.raises(SpecError, match=message):
        smallest_noise(lambda z: [Gaussian(z), Gaussian(10.0, steps=20)], 1.0, 1e-5)


@pytest.mark.parametrize("target", [0.0, -1.0, inf, float("nan")])
def test_a_target_is_positive_and_finite(target: float) -> None:
    with pytest.raises(SpecError, match="expected more than 0, such as"):
        noise_multiplier(target, 1e-5, 0.1, 10)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_a_delta_is_a_probability(delta: float) -> None:
    refused = pytest.raises(SpecError, match="expected more than 0 and less than 1")
    with refused:
        epsilon([(1.0, 0.1, 1)], delta)
    with refused:
        noise_multiplier(1.0, delta, 0.1, 10)
    with refused:
        rdp_epsilon(rdp(Gaussian(1.0)), delta)


def test_unknown_events_and_accountants_are_refused_by_name() -> None:
    mystery: Any = complex(3)
    for accountant in ("pld", "rdp"):
        with pytest.raises(SpecError, match=r"\(3\+0j\): no event that can be accounted for"):
            epsilon([Gaussian(1.0), mystery], 1e-5, accountant)
    central: Any = "gdp"
    with pytest.raises(SpecError, match="accountant 'gdp': expected 'pld' or 'rdp'"):
        epsilon([Gaussian(1.0)], 1e-5, central)


@pytest.mark.parametrize("kind", [DiscreteGaussian, Skellam])
@pytest.mark.parametrize(("z", "rounds"), [(0.7, 1), (1.0, 50), (8.0, 200)])
def test_integer_noise_costs_what_the_central_gaussian_does(
    kind: type[DiscreteGaussian] | type[Skellam], z: float, rounds: int
) -> None:
    """Beside dp-accounting's figures for a Gaussian: by RDP, and the exact one."""
    spent = epsilon([kind(z, rounds)], 1e-5)
    central = [Gaussian(z, steps=rounds)]
    assert epsilon(central, 1e-5, "rdp") * (1 - 1e-9) <= spent <= 1.02 * epsilon(central, 1e-5, "rdp")
    assert epsilon(central, 1e-5) <= spent <= 1.15 * epsilon(central, 1e-5)


def test_integer_noise_is_known_by_its_divergences_only() -> None:
    history: list[Event] = [Skellam(4.0), Skellam(4.0), Gaussian(1.0, 0.01, 10)]
    assert accountant_for(history) == "rdp" and accountant_for([Gaussian(1.0), (1.0, 0.1, 1)]) == "pld"
    known: list[Event] = [Skellam(4.0, 2), Gaussian(1.0, 0.01, 10)]
    assert epsilon(history, 1e-5) == epsilon(known, 1e-5, "rdp") > 0
    with pytest.raises(SpecError, match=r"Skellam\(noise_multiplier=4.0, steps=1\): .*accountant 'rdp'"):
        epsilon(history, 1e-5, "pld")


@some
@given(st.lists(st.tuples(noises, rates, steps), min_size=1, max_size=3), deltas)
def test_vectors_of_divergences_add_up(history: list[Steps], delta: float) -> None:
    vectors = [rdp(Gaussian(*event)) for event in history]
    assert all(v.shape == (len(ORDERS),) and v.dtype == np.float64 and (v > 0).all() for v in vectors)
    total = rdp_epsilon(np.sum(vectors, axis=0), delta)
    assert total == pytest.approx(epsilon(history, delta, "rdp"), rel=1e-9)


def test_a_vector_is_the_callers_own() -> None:
    rdp(Gaussian(3.0, 0.2))[:] = 0
    assert (rdp(Gaussian(3.0, 0.2)) > 0).all()


def test_a_ledger_can_reserve_in_no_time() -> None:
    rdp_epsilon(rdp(Gaussian(1.0, 0.01, 7)), 1e-5)
    started = perf_counter()
    for number in range(1, 101):
        rdp_epsilon(rdp(Gaussian(1.0, 0.01, number)), 1e-5)
    assert (perf_counter() - started) / 100 < 0.010


def with_metrics(rounds: int) -> list[Gaussian]:
    return [Gaussian(1.0, 0.05, rounds), Gaussian(20.0, 1.0, rounds // 5)]


def shrinking(rounds: int) -> list[Gaussian]:
    return [Gaussian(10.0 / sqrt(1 + rounds))]


@pytest.mark.parametrize("history_of", [with_metrics, shrinking])
def test_a_curve_is_tight_and_never_below(history_of: Any) -> None:
    values = curve(history_of, 150, 1e-5)
    assert len(values) == 150 and values == sorted(values) and all(map(isfinite, values))
    assert values[-1] == epsilon(history_of(150), 1e-5)
    for number in (1, 2, 3, 7, 20, 50, 99, 123, 149):
        exact = epsilon(history_of(number), 1e-5)
        assert exact <= values[number - 1] * (1 + 1e-9) <= exact * 1.05


def test_short_curves_are_exact() -> None:
    def of(rounds: int) -> list[Gaussian]:
        return [Gaussian(2.0, 0.5, rounds)]

    assert curve(of, 1, 1e-5) == [epsilon(of(1), 1e-5)]
    for rounds in (2, 3, 10, 30):
        assert curve(of, rounds, 1e-5) == [epsilon(of(n), 1e-5) for n in range(1, rounds + 1)]
    assert curve(lambda rounds: [], 3, 1e-5) == [0.0, 0.0, 0.0]


def test_the_import_is_cheap() -> None:
    """dp-accounting and its scipy take most of a second, and no coordinator has torch."""
    code = "import sys, fedcore.privacy.accounting; print({'torch', 'scipy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
