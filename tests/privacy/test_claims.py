"""What a spec promises: the history of each level, and the guarantees that follow from it."""

from math import inf, isclose
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import SpecError
from fedcore.privacy.accounting import epsilon
from fedcore.privacy.claims import (
    assumption,
    evaluations,
    guarantees,
    history,
    honest,
    resolved,
    schedule,
    spent,
    steps,
)
from fedcore.privacy.discrete import DiscreteGaussian, Skellam
from fedcore.privacy.events import Gaussian, Laplace
from fedcore.privacy.levels import Off
from fedcore.privacy.tree import sensitivity
from fedcore.spec import RunSpec

LEVELS: dict[str, dict[str, Any]] = {
    "example": {"sampling_rate": 0.05},
    "client": {"population": 200},
    "tree": {"separation": 4},
    "local": {},
    "distributed": {},
}


def spec(level: str, **fields: Any) -> RunSpec:
    noise = {} if "target_epsilon" in fields else {"noise_multiplier": 2.0}
    privacy = {"level": level} | LEVELS[level] | noise | fields
    tables = {"run": {"rounds": 10}, "cohort": {"size": 20}, "evaluation": {"every": 3}}
    return RunSpec.parse(tables | {"privacy": privacy})


def test_what_training_does_at_each_level() -> None:
    assert history(spec("example"), 7) == (Gaussian(2.0, 0.05, 7 * 20),)
    assert history(spec("client"), 7) == (Gaussian(2.0, 0.1, 7),)
    assert history(spec("client", population=5), 7) == (Gaussian(2.0, 1.0, 7),)
    assert history(spec("tree"), 7) == (Gaussian(2.0 / sensitivity(7, 4)),)
    assert history(spec("local"), 7) == (Gaussian(2.0, steps=7),)
    assert history(spec("local", noise="laplace"), 7) == (Laplace(2.0, steps=7),)
    assert history(spec("distributed"), 7) == (Skellam(2.0, 7),)
    assert history(spec("distributed", noise="discrete_gaussian"), 7) == (DiscreteGaussian(2.0, 7),)
    assert history(RunSpec(), 7) == ()


@pytest.mark.parametrize(
    ("client", "expected"), [({}, 20), ({"epochs": 3}, 60), ({"steps": 5}, 5), ({"epochs": 2}, 40)]
)
def test_steps_are_the_same_for_every_client(client: dict[str, int], expected: int) -> None:
    assert steps(RunSpec.parse(spec("example").model_dump() | {"client": client})) == expected


@pytest.mark.parametrize(
    ("every", "counts"), [(3, [0, 0, 1, 1, 1, 2, 2, 2, 3, 4]), (5, [0] * 4 + [1] * 5 + [2])]
)
def test_metrics_are_asked_for_after_the_last_round_too(every: int, counts: list[int]) -> None:
    measured = spec("example", metric_noise=9.0).with_(f"evaluation.every={every}")
    assert [evaluations(measured, rounds) for rounds in range(1, 11)] == counts
    assert evaluations(measured.with_("evaluation.every=0"), 10) == 1
    assert evaluations(measured.with_("evaluation.where=holdout"), 10) == 0
    assert evaluations(spec("example"), 10) == 0


def test_metrics_have_a_line_of_their_own() -> None:
    asked = Gaussian(9.0, 1.0, 4)
    assert history(spec("example", metric_noise=9.0), 10)[1:] == (asked,)
    assert history(spec("tree", metric_noise=9.0), 10)[1:] == (asked,)
    assert history(spec("client", metric_noise=9.0), 10)[1:] == (Gaussian(9.0, 0.1, 4),)


@pytest.mark.parametrize(
    ("level", "unit", "trust", "adjacency", "coordinator"),
    [
        ("example", "example", "enforced", "add/remove", True),
        ("client", "client", "trusted", "add/remove", False),
        ("tree", "client", "trusted", "zero-out", False),
        ("local", "client", "enforced", "zero-out", True),
        ("distributed", "client", "distributed", "zero-out", True),
    ],
)
def test_for_whom_and_against_whom(
    level: str, unit: str, trust: str, adjacency: str, coordinator: bool
) -> None:
    promised = spec(level)
    receiver, other = guarantees(promised, 10)
    assert (receiver.adversary, other.adversary) == ("receiver", "coordinator")
    assert receiver.epsilon == epsilon(history(promised, 10), 1e-5)
    assert other.epsilon == (receiver.epsilon if coordinator else inf)
    for guarantee in (receiver, other):
        assert (guarantee.unit, guarantee.trust, guarantee.delta) == (unit, trust, 1e-5)
        assert guarantee.accountant == ("rdp" if level == "distributed" else "pld")
        assert guarantee.adjacency == adjacency
    assert ("coordinator" in assumption(promised)) is not coordinator


@pytest.mark.parametrize(
    ("cohort", "corrupt", "least"),
    [
        ({"size": 20}, 0.2, 10),
        ({"size": 20}, 0.0, 14),
        ({"size": 20, "over_select": 1.5}, 0.2, 8),
        ({"size": 20, "minimum": 20}, 0.3, 14),
        ({"size": 5}, 0.19, 4),
    ],
)
def test_the_smallest_sum_with_all_the_corrupt_in_it(
    cohort: dict[str, Any], corrupt: float, least: int
) -> None:
    tables = spec("distributed").model_dump() | {"cohort": cohort, "encryption": {"corrupt": corrupt}}
    parsed = RunSpec.parse(tables)
    assert honest(parsed) == least
    assert f"At least {least} clients of every sum" in assumption(parsed)


def test_a_cohort_that_sees_itself_is_no_sample() -> None:
    """Client level under secure aggregation: who takes part is known to all who do."""
    masked = spec("client", population=20).with_("encryption.updates=secagg")
    receiver, coordinator = guarantees(masked, 10)
    assert (receiver.adjacency, receiver.epsilon) == ("zero-out", epsilon([Gaussian(2.0, steps=10)], 1e-5))
    assert coordinator.epsilon == inf
    assert "who took part is no secret" in assumption(masked)


def test_a_guarantee_as_a_line() -> None:
    receiver, coordinator = map(str, guarantees(spec("client"), 10, "rdp"))
    assert "1e-05)-DP for one client against the receiver (trusted; add/remove, RDP)" in receiver
    assert coordinator.startswith("(inf, ")


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(sorted(LEVELS)), st.integers(1, 9), st.sampled_from([0.0, 15.0]))
def test_more_rounds_cost_more(level: str, rounds: int, metric_noise: float) -> None:
    run = spec(level, metric_noise=metric_noise)
    before, after = (epsilon(history(run, number), 1e-5) for number in (rounds, rounds + 1))
    assert before <= after * (1 + 1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_spent_grows_to_what_is_promised(level: str) -> None:
    run = spec(level, metric_noise=15.0)
    values = spent(run)
    assert len(values) == 10 and values == sorted(values)
    assert values[-1] == next(guarantees(run, 10)).epsilon
    assert spent(RunSpec()) == [] == list(guarantees(RunSpec(), 10))


@pytest.mark.parametrize("level", LEVELS)
def test_a_target_becomes_the_smallest_noise(level: str) -> None:
    aimed = resolved(spec(level, target_epsilon=3.0, metric_noise=20.0))
    assert not isinstance(aimed.privacy, Off)
    assert aimed.privacy.target_epsilon == 0 < aimed.privacy.noise_multiplier
    assert 2.98 < next(guarantees(aimed, 10)).epsilon <= 3.0
    assert RunSpec.parse(aimed.model_dump()) == aimed == resolved(aimed)


def test_a_target_below_what_metrics_spend_is_refused() -> None:
    with pytest.raises(SpecError, match=r"target_epsilon 1 is out of reach.*more noise on metrics"):
        resolved(spec("local", target_epsilon=1.0, metric_noise=2.0))


def test_what_a_device_reserves() -> None:
    assert schedule(RunSpec()) is None
    for level in ("client", "tree"):
        promised = spec(level, metric_noise=9.0)
        whole = schedule(promised)
        assert whole and whole.at_once and whole.whole == history(promised, 10)
        assert whole.train == whole.evaluate == ()
    for level in ("example", "local", "distributed"):
        promised = spec(level, metric_noise=9.0)
        piece = schedule(promised)
        assert piece and not piece.at_once
        assert piece.evaluate == (Gaussian(9.0),)
        together = [*piece.train * 10, *piece.evaluate * evaluations(promised, 10)]
        assert isclose(epsilon(together, 1e-5), epsilon(piece.whole, 1e-5), rel_tol=1e-9)
