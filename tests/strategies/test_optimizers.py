"""Server optimisers: by hand, against the papers' algorithms written out plainly, and by law."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcore.errors import SpecError
from fedcore.plugins import build
from fedcore.strategies.optimizers import OPTIMIZERS, SGD, Adagrad, Adam, FedExP, ServerOptimizer, Yogi

f32 = partial(np.array, dtype=np.float32)

PARTS: tuple[ServerOptimizer, ...] = (
    SGD(0.7),
    SGD(0.7, momentum=0.9),
    Adagrad(),
    Adagrad(beta1=0.9),
    Adam(),
    Adam(beta1=0.0),
    Adam(v0=0.0, bias_correction=True),
    Yogi(),
    FedExP(),
)
every_part = pytest.mark.parametrize("part", PARTS, ids=str)


class Reported:
    """What so many clients reported, as one sum."""

    def __init__(self, clients: int, square: float, round: int = 1) -> None:
        self.clients, self.square, self.round = clients, square, round

    def scalar(self, name: str) -> float:
        return {"square": self.square}[name]


def first_state(part: ServerOptimizer, size: int, dtype: Any = np.float64) -> dict[str, NDArray[Any]]:
    return {name: np.full(size, value, dtype) for name, value in part.state.items()}


def advance(
    part: ServerOptimizer, x: NDArray[Any], direction: NDArray[np.float64], state: Mapping[str, NDArray[Any]]
) -> None:
    """Take the step of a round in which three clients reported a squared norm of 8 each."""
    rate = part.rate(Reported(3, 24.0), lambda: 2.0)
    part.step(x, direction, rate, state)


def model_after(part: ServerOptimizer, directions: Sequence[float]) -> float:
    """Return what one float64 parameter has become after these directions, from zero."""
    x, state = np.zeros(1), first_state(part, 1)
    for direction in directions:
        advance(part, x, np.array([direction]), state)
    return float(x[0])


def test_plain_sgd_with_a_step_of_one_adds_the_direction() -> None:
    x = f32([1.0, -2.0])
    advance(SGD(), x, np.array([0.5, 0.25]), {})
    assert x.tolist() == [1.5, -1.75] and not SGD().state


def test_momentum_over_two_rounds_by_hand() -> None:
    """v1 = 1, x1 = 10 + 0.5 * 1; v2 = 0.5 * 1 + 3 = 3.5, x2 = 10.5 + 0.5 * 3.5."""
    optimizer = SGD(lr=0.5, momentum=0.5)
    x, state = f32([10.0]), {"velocity": f32([0.0])}
    assert optimizer.state == {"velocity": 0.0}
    advance(optimizer, x, np.array([1.0]), state)
    assert (x[0], state["velocity"][0]) == (10.5, 1.0)
    advance(optimizer, x, np.array([3.0]), state)
    assert (x[0], state["velocity"][0]) == (12.25, 3.5)


def test_adagrad_over_two_rounds_by_hand() -> None:
    """tau = 1, so v0 = 1; v1 = 1 + 3 = 4, x1 = √3 / (2 + 1); v2 = 4 + 5 = 9, x2 = x1 + √5 / (3 + 1)."""
    optimizer = Adagrad(lr=1.0, tau=1.0)
    assert optimizer.state == {"v": 1.0}
    assert model_after(optimizer, [sqrt(3), sqrt(5)]) == pytest.approx(sqrt(3) / 3 + sqrt(5) / 4, rel=1e-14)


def test_adam_over_two_rounds_by_hand() -> None:
    """beta1 = beta2 = 1/2, tau = 1.

    m1 = 1, v1 = (1 + 4) / 2 = 2.5; m2 = (1 + 4) / 2 = 2.5, v2 = (2.5 + 16) / 2 = 9.25.
    """
    expected = 1 / (sqrt(2.5) + 1) + 2.5 / (sqrt(9.25) + 1)
    assert model_after(Adam(1.0, 0.5, 0.5, 1.0), [2, 4]) == pytest.approx(expected, rel=1e-14)


def test_yogi_over_two_rounds_by_hand() -> None:
    """beta1 = beta2 = 1/2, tau = 1: v grows by half of D² = 4, then falls by half of D² = 1.

    m1 = 1, v1 = 1 + 2 = 3; m2 = (1 + 1) / 2 = 1, v2 = 3 - 1/2 = 2.5.
    """
    expected = 1 / (sqrt(3) + 1) + 1 / (sqrt(2.5) + 1)
    assert model_after(Yogi(1.0, 0.5, 0.5, 1.0), [2, 1]) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("part", [Adam(lr=1.0), Yogi(lr=1.0)], ids=str)
def test_the_first_step_is_not_corrected_for_bias_and_v_starts_at_tau_squared(part: Adam | Yogi) -> None:
    """With the paper's values m = 0.1 D. Adam's own correction would give a first step of nearly 1."""
    assert part.state == {"m": 0.0, "v": 1e-6}
    v = 0.99e-6 + 0.01 if type(part) is Adam else 1e-6 + 0.01
    assert model_after(part, [1.0]) == pytest.approx(0.1 / (sqrt(v) + 1e-3), rel=1e-13)
    # D = 0 makes the initial v visible: Adam decays it, Yogi leaves it alone, neither moves x.
    x, state = np.zeros(1), first_state(part, 1)
    advance(part, x, np.zeros(1), state)
    assert x[0] == 0 and state["v"][0] == pytest.approx(0.99e-6 if type(part) is Adam else 1e-6)


def test_corrected_for_bias_and_from_zero_the_first_steps_are_flowers_adam() -> None:
    """v starts at 0, and round t takes lr sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)), here beta = 1/2, 3/4."""
    part = Adam(lr=2.0, beta1=0.5, beta2=0.75, v0=0.0, bias_correction=True)
    assert part.state == {"m": 0.0, "v": 0.0} and Adagrad(v0=4.0).state == {"v": 4.0}
    rates = [part.rate(Reported(3, 0.0, round), lambda: 0.0) for round in (1, 2)]
    assert rates == pytest.approx(
        [2 * sqrt(1 - 0.75**2) / (1 - 0.5**2), 2 * sqrt(1 - 0.75**3) / (1 - 0.5**3)]
    )
    assert Adam(lr=2.0).rate(Reported(3, 0.0, 2), lambda: 0.0) == 2.0


Rule = Callable[[float, float, float], float]  # v before, delta², beta2 -> v


def adagrad(v: float, square: float, _: float) -> float:
    return v + square


def adam(v: float, square: float, beta2: float) -> float:
    return beta2 * v + (1 - beta2) * square


def yogi(v: float, square: float, beta2: float) -> float:
    return v - (1 - beta2) * square * ((v > square) - (v < square))


def algorithm_2(
    rule: Rule, deltas: Sequence[float], eta: float, beta: tuple[float, float], tau: float
) -> float:
    """Algorithm 2 of Reddi et al. 2021 for one parameter."""
    x, m, v = 0.0, 0.0, tau**2
    for delta in deltas:
        m = beta[0] * m + (1 - beta[0]) * delta
        v = rule(v, delta**2, beta[1])
        x = x + eta * m / (sqrt(v) + tau)
    return x


deltas = st.lists(st.floats(-10, 10), min_size=1, max_size=12)
betas = st.floats(0, 0.999)


@given(deltas, st.floats(1e-3, 10), betas, betas, st.floats(1e-6, 1))
def test_the_adaptive_optimisers_are_algorithm_2(
    deltas: list[float], lr: float, beta1: float, beta2: float, tau: float
) -> None:
    parts: tuple[tuple[Rule, ServerOptimizer], ...] = (
        (adagrad, Adagrad(lr, beta1, tau)),
        (adam, Adam(lr, beta1, beta2, tau)),
        (yogi, Yogi(lr, beta1, beta2, tau)),
    )
    for rule, part in parts:
        expected = algorithm_2(rule, deltas, lr, (beta1, beta2), tau)
        assert model_after(part, deltas) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(deltas, betas)
def test_yogis_v_stays_positive(deltas: list[float], beta2: float) -> None:
    part = Yogi(beta2=beta2)
    state = first_state(part, 1, np.float32)
    for direction in deltas:
        advance(part, f32([0.0]), np.array([direction]), state)
        assert state["v"][0] >= 0


def test_fedexp_over_two_rounds_by_hand() -> None:
    """Two clients: (2, 0) and (0, 2), D = (1, 1): max(1, 8 / (2 * 2 * (2 + 2))) = 1 at eps = 2.

    At eps = 1/4: (4, 0) and (0, 0), D = (2, 0): 16 / (4 * 4.25) < 1, hence 1; (4, 0) and (-3, 0),
    D = (1/2, 0): 25 / (4 * (1/4 + 1/4)) = 12.5.
    """
    assert FedExP(eps=2.0).rate(Reported(2, 8.0), lambda: 2.0) == 1
    part, x = FedExP(eps=0.25), np.zeros(2)
    for square, direction, rate in ((16.0, np.array([2.0, 0.0]), 1.0), (25.0, np.array([0.5, 0.0]), 12.5)):
        assert part.rate(Reported(2, square), lambda d=direction: float(d @ d)) == rate  # type: ignore[misc]
        part.step(x, direction, rate, {})
    assert x.tolist() == [2 + 6.25, 0] and not part.state and part.scalars == ("square",)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=8))
def test_fedexp_is_its_definition_and_never_steps_short_of_the_mean(rows: list[list[float]]) -> None:
    updates = np.array(rows)
    mean = updates.mean(axis=0)
    squares = [float(np.dot(row, row)) for row in updates]
    rate = FedExP(0.1).rate(Reported(len(rows), sum(squares)), lambda: float(mean @ mean))
    definition = sum(squares) / (2 * len(rows) * (float(mean @ mean) + 0.1))
    assert rate == pytest.approx(max(1.0, definition)) and rate >= 1


def test_fedexp_of_orthogonal_clients_extrapolates_to_half_their_number() -> None:
    """D_i = e_i for M clients: sum ‖D_i‖² = M and ‖D‖² = 1/M, so the rate is M/2 as eps goes to 0."""
    assert FedExP(1e-12).rate(Reported(10, 10.0), lambda: 0.1) == pytest.approx(5)


def test_a_round_without_clients_has_a_rate() -> None:
    assert FedExP().rate(Reported(0, 0.0), lambda: 0.0) == 1


@pytest.mark.parametrize("part", [part for part in PARTS if not isinstance(part, FedExP)], ids=str)
def test_only_fedexp_pays_for_a_norm(part: SGD | Adagrad | Adam | Yogi) -> None:
    def unasked() -> float:
        raise AssertionError("a pass over the direction for nothing")

    assert part.rate(Reported(3, 1.0), unasked) > 0 and part.scalars == ()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_rate_meets_the_direction_in_float64(momentum: float) -> None:
    """In float32, 0.1 * (1 + 2^-30) loses the small part before it meets x."""
    x, state = f32([-0.1]), {"velocity": f32([0.0])}
    start = float(x[0])
    advance(SGD(lr=0.1, momentum=momentum), x, np.array([1 + 2.0**-30]), state)
    assert x[0] == np.float32(start + 0.1 * (1 + 2.0**-30))


@every_part
def test_a_step_is_formed_in_float64_and_rounded_once(part: ServerOptimizer) -> None:
    """With float32 vectors a step gives what float64 vectors of the same values give, rounded."""
    rng = np.random.default_rng(0)
    x, direction = f32(rng.normal(size=200)), rng.normal(size=200)
    state = {name: f32(rng.uniform(0.1, 1, 200)) for name in part.state}
    exact, wide = x.astype(np.float64), {name: vector.astype(np.float64) for name, vector in state.items()}
    advance(part, x, direction, state)
    advance(part, exact, direction, wide)
    assert np.array_equal(x, exact.astype(np.float32)) and x.dtype == np.float32
    for name, vector in state.items():
        assert np.array_equal(vector, wide[name].astype(np.float32)), name


@every_part
@given(cut=st.integers(0, 20), dtype=st.sampled_from([np.float32, np.float64]))
def test_a_step_is_elementwise_and_leaves_the_direction_alone(
    part: ServerOptimizer, cut: int, dtype: type[Any]
) -> None:
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=20).astype(dtype), rng.normal(size=20)
    state, before = first_state(part, 20, dtype), direction.copy()
    whole, kept = x.copy(), {name: vector.copy() for name, vector in state.items()}
    for _ in range(3):
        advance(part, whole, direction, kept)
        for block in (slice(0, cut), slice(cut, 20)):
            advance(part, x[block], direction[block], {name: v[block] for name, v in state.items()})
    assert np.array_equal(x, whole) and np.array_equal(direction, before)
    assert all(np.array_equal(state[name], kept[name]) for name in part.state)


@every_part
def test_saved_and_loaded_between_rounds_it_goes_on_with_the_same_bits(part: ServerOptimizer) -> None:
    directions = np.random.default_rng(1).normal(size=(6, 30))
    x, state = f32(np.zeros(30)), first_state(part, 30, np.float32)
    y, other = x.copy(), first_state(part, 30, np.float32)
    for i, direction in enumerate(directions):
        advance(part, x, direction, state)
        if i == 3:
            other = {name: np.frombuffer(v.tobytes(), np.float32).copy() for name, v in other.items()}
        advance(part, y, direction, other)
    assert x.tobytes() == y.tobytes()
    assert all(state[name].tobytes() == other[name].tobytes() for name in part.state)


@pytest.mark.parametrize(
    ("lr", "momentum"), [(0.0, 0.0), (-1.0, 0.0), (float("nan"), 0.0), (1.0, 1.0), (1.0, -0.1)]
)
def test_sgd_that_cannot_work_is_refused(lr: float, momentum: float) -> None:
    with pytest.raises(SpecError, match="expected finite lr > 0 and 0 <= momentum < 1"):
        SGD(lr, momentum)


@pytest.mark.parametrize("part", [Adagrad, Adam, Yogi])
@pytest.mark.parametrize(
    "field", [{"lr": 0.0}, {"lr": float("inf")}, {"beta1": 1.0}, {"tau": 0.0}, {"v0": -1.0}], ids=str
)
def test_an_adaptive_optimiser_that_cannot_work_is_refused(
    part: type[Adagrad | Adam | Yogi], field: dict[str, Any]
) -> None:
    name, value = next(iter(field.items()))
    with pytest.raises(
        SpecError, match=rf"^{part.__name__}\(.*{name}={value}.* expected finite lr > 0, finite tau > 0"
    ):
        part(**field)


@pytest.mark.parametrize("part", [Adam, Yogi])
def test_a_beta2_that_cannot_work_is_refused(part: type[Adam | Yogi]) -> None:
    with pytest.raises(SpecError, match="0 <= beta < 1"):
        part(beta2=1.0)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_fedexp_that_could_divide_by_zero_is_refused(eps: float) -> None:
    with pytest.raises(SpecError, match="expected finite eps > 0"):
        FedExP(eps)


def test_a_table_names_every_optimiser() -> None:
    parts = {name: build(OPTIMIZERS, {"name": name}, "strategy.optimizer") for name in OPTIMIZERS}
    assert parts == {"sgd": SGD(), "adagrad": Adagrad(), "adam": Adam(), "yogi": Yogi(), "fedexp": FedExP()}
    table = {"name": "adam", "lr": 0.1, "beta1": 0.0}
    assert build(OPTIMIZERS, table, "strategy.optimizer") == Adam(0.1, 0.0)
