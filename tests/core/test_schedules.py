"""The learning rate of a round, by hand."""

from typing import Any

import pytest

from fedcore.errors import SpecError
from fedcore.spec import RunSpec


def spec(schedule: Any, rounds: int = 4, lr: float = 0.1) -> RunSpec:
    client = {"optimizer": {"name": "adam", "lr": lr}, "schedule": schedule}
    return RunSpec.parse({"run": {"rounds": rounds}, "client": client})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ({"warmup": 3}, [0.25, 0.5, 0.75, 1]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
        ({"name": "cosine", "floor": 0.2}, [1, 0.882843, 0.6, 0.317157]),
        ({"name": "cosine", "warmup": 2}, [1 / 3, 2 / 3, 1, 0.5]),
        ({"name": "cosine", "warmup": 9}, [0.1, 0.2, 0.3, 0.4]),
        ({"name": "step", "every": 2, "gamma": 0.5}, [1, 1, 0.5, 0.5]),
        ({"name": "step", "every": 1, "warmup": 1}, [0.5, 1, 0.1, 0.01]),
    ],
)
def test_rates(schedule: Any, expected: list[float]) -> None:
    made = spec(schedule)
    rates = [made.at(round).client.optimizer.lr for round in range(1, 5)]
    assert rates == pytest.approx([0.1 * share for share in expected], rel=1e-5)
    assert RunSpec.parse(made.model_dump()) == made


def test_nothing_else_changes_and_a_constant_rate_keeps_its_bits() -> None:
    run = spec("cosine")
    same = run.at(2).client.optimizer.model_copy(update={"lr": 0.1})
    assert run.at(2).client.model_copy(update={"optimizer": same}) == run.client
    assert RunSpec().at(5) == RunSpec()


def test_after_the_last_round_the_floor_stays() -> None:
    run = spec({"name": "cosine", "floor": 0.25})
    assert run.at(5).client.optimizer.lr == run.at(50).client.optimizer.lr == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("cosinus", "client.schedule.name: 'cosinus' is not known; did you mean 'cosine'"),
        ({"name": "step"}, "client.schedule.*every"),
        ({"name": "cosine", "gamma": 0.1}, "client.schedule.gamma: no such key"),
        ({"name": "cosine", "floor": 1.0}, "client.schedule.floor: 1.0: expected less than 1"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(schedule: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec(schedule)
