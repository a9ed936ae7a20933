"""What result.json says of privacy."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import fedcore
from fedcore.layout import Entry, Layout, Parameters
from fedcore.privacy.claims import promise, spent
from fedcore.simulations.result import Result, metrics_of
from fedcore.spec import RunSpec

SPEC = RunSpec.parse(
    {
        "run": {"rounds": 4},
        "cohort": {"size": 10},
        "privacy": {"level": "client", "noise_multiplier": 1.0, "population": 100},
    }
)


def row(number: int, epsilon: float) -> dict[str, Any]:
    measured = {"epsilon": epsilon, "loss": 1.0, "accuracy": 0.5}
    return {"round": number, "seconds": 0.5, "expected": 10.0} | measured


@pytest.fixture
def result() -> Result:
    layout = Layout((Entry("w", (2,), "float32", "shared"),))
    parameters = Parameters(np.zeros(2, np.float32), np.zeros(0, np.float32))
    rows = [row(number, epsilon) for number, epsilon in enumerate(spent(SPEC), 1)]
    return Result(fedcore.Task(), SPEC, layout, parameters, [*rows], "sequential", "", 1)


def test_epsilon_is_a_metric_and_the_last() -> None:
    assert list(metrics_of(row(1, 2.0))) == ["accuracy", "loss", "epsilon"]


def test_what_was_promised_and_spent(result: Result) -> None:
    said = result.summary()["privacy"]
    assert said["epsilon_per_round"] == spent(SPEC)
    assert said["guarantees"][0]["epsilon"] == said["epsilon_per_round"][-1] == result.final["epsilon"]
    assert said == promise(SPEC, 4) | {"epsilon_per_round": spent(SPEC)}


def test_a_run_that_was_stopped_has_spent_less(result: Result) -> None:
    said = replace(result, metrics=result.metrics[:2]).summary()["privacy"]
    assert said["guarantees"][0]["epsilon"] == said["epsilon_per_round"][-1] == spent(SPEC)[1]


def test_no_privacy_is_said_too(result: Result) -> None:
    assert replace(result, spec=RunSpec()).summary()["privacy"] == {"level": "none", "guarantees": []}
