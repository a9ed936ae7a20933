"""`fedcore privacy plan`: what is printed, and what is refused, before anything runs."""

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedcore.cli import app
from fedcore.privacy.accounting import epsilon
from fedcore.privacy.discrete import Skellam

EXAMPLE = """
[run]
name = "ward"
rounds = 20
[evaluation]
where = "holdout"
[privacy]
level = "example"
noise_multiplier = 1.1
sampling_rate = 0.05
"""
CLIENT = """
[run]
rounds = 100
[cohort]
size = 50
[evaluation]
where = "holdout"
[privacy]
level = "client"
target_epsilon = 3.0
population = 1000
"""
DISTRIBUTED = """
[run]
rounds = 10
[cohort]
size = 20
[evaluation]
where = "holdout"
[privacy]
level = "distributed"
target_epsilon = 3.0
"""


def plan(folder: Path, text: str, *options: str) -> Result:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return CliRunner().invoke(app, ["privacy", "plan", str(path), *options])


def planned(folder: Path, text: str, *options: str) -> dict[str, Any]:
    done = plan(folder, text, "--json", *options)
    assert done.exit_code == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def lines(done: Result) -> list[str]:
    assert done.exit_code == 0, done.stderr
    return [" ".join(line.split()) for line in done.stdout.splitlines()]


def test_a_plan_says_for_whom_against_whom_and_what_else_it_could_be(tmp_path: Path) -> None:
    started = perf_counter()
    printed = lines(plan(tmp_path, EXAMPLE))
    assert perf_counter() - started < 10  # 3 s where nothing else runs
    assert printed[0] == "ward: example level, 20 rounds"
    for line in (
        "protects one example of one client",
        "made on the device (enforced)",
        "releases 400 × Gaussian noise 1.1 over samples at rate 0.05",
        "whoever receives the model 5.597 1e-05",
        "the coordinator 5.597 1e-05",
        "add/remove adjacency, PLD accountant",
        "one more round costs 0.144",
    ):
        assert line in printed
    assert printed[-2].startswith("epsilon 3 needs noise_multiplier 1.62")


def test_the_figures_as_json(tmp_path: Path) -> None:
    content = planned(tmp_path, EXAMPLE)
    receiver, coordinator = content["guarantees"]
    spent = epsilon([(1.1, 0.05, 400)], 1e-5)
    assert receiver["epsilon"] == coordinator["epsilon"] == spent
    assert (receiver["unit"], receiver["adjacency"], receiver["accountant"]) == (
        "example",
        "add/remove",
        "pld",
    )
    assert content["one_more_round"] == epsilon([(1.1, 0.05, 420)], 1e-5) - spent
    assert set(content["noise_for"]) == {"1", "3", "8"}
    for target, noise in content["noise_for"].items():
        assert 0.99 * float(target) < epsilon([(noise, 0.05, 400)], 1e-5) <= float(target)


def test_a_target_is_planned_with_the_noise_that_it_needs(tmp_path: Path) -> None:
    content = planned(tmp_path, CLIENT)
    receiver, coordinator = content["guarantees"]
    assert 2.99 < receiver["epsilon"] <= 3.0 == content["target_epsilon"]
    assert coordinator["epsilon"] is None and coordinator["trust"] == "trusted"
    assert content["noise_for"] == {}
    printed = lines(plan(tmp_path, CLIENT))
    noise = f"{content['noise_multiplier']:g}"
    assert f"noise {noise} × clip norm 1, the least within target_epsilon = 3" in printed
    assert "the coordinator infinite" in printed
    assert "made by the coordinator (trusted)" in printed
    assert any("no receiver learns who took part" in line for line in printed)


def test_noise_of_many_clients_is_planned_by_renyi_divergences(tmp_path: Path) -> None:
    content = planned(tmp_path, DISTRIBUTED)
    receiver, coordinator = content["guarantees"]
    assert (
        receiver["epsilon"]
        == coordinator["epsilon"]
        == epsilon([Skellam(content["noise_multiplier"], 10)], 1e-5)
    )
    assert 2.99 < receiver["epsilon"] <= 3.0
    assert content["releases"] == [
        {"event": "Skellam", "noise_multiplier": content["noise_multiplier"], "steps": 10}
    ]
    printed = lines(plan(tmp_path, DISTRIBUTED))
    assert "made by the honest clients together (distributed)" in printed
    assert "zero-out adjacency, RDP accountant" in printed
    assert any(
        line.startswith("assumes At least 10 clients of every sum make their part") for line in printed
    )
    refused = plan(tmp_path, DISTRIBUTED, "--set", "cohort.size=3")
    assert refused.exit_code == 2 and "expected at least 3" in refused.stderr


def test_everybody_under_secure_aggregation_is_no_sample(tmp_path: Path) -> None:
    """Client level at rate 1 is masked by default, so that the members of a cohort know each other."""
    options = ("--set", "privacy.population=50", "--set", "privacy.target_epsilon=50.0")
    assert planned(tmp_path, CLIENT, *options)["guarantees"][0]["adjacency"] == "zero-out"
    assert planned(tmp_path, CLIENT)["guarantees"][0]["adjacency"] == "add/remove"


def test_a_target_out_of_reach_of_metrics_is_said_to_be(tmp_path: Path) -> None:
    text = EXAMPLE.replace('"holdout"', '"clients"') + "metric_noise = 5.0\n"
    content = planned(tmp_path, text)
    assert [event["noise_multiplier"] for event in content["releases"]] == [1.1, 5.0]
    assert content["noise_for"]["1"] is None
    assert "epsilon 1 is out of reach" in lines(plan(tmp_path, text))


def test_a_delta_that_promises_nothing_is_warned_of(tmp_path: Path) -> None:
    assert planned(tmp_path, CLIENT)["warnings"] == []
    done = lines(plan(tmp_path, CLIENT, "--set", "privacy.delta=1e-3"))
    assert any(line.startswith("warning: delta = 0.001 is not below 1/population = 0.001") for line in done)


def test_no_privacy_is_called_that(tmp_path: Path) -> None:
    assert "no differential privacy" in lines(plan(tmp_path, ""))[0]
    assert planned(tmp_path, "")["guarantees"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["privacy.noise_multiplier=0.0"], "give either noise_multiplier or target_epsilon"),
        (["privacy.noise_multiplier=-1.0"], "privacy.noise_multiplier"),
        (["evaluation.where=clients"], "give metrics noise of their own"),
        (["strategy.sampler={name='power_of_choice', candidates=20}"], 'use sampler = "uniform"'),
    ],
)
def test_what_cannot_be_private_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    done = plan(tmp_path, EXAMPLE, *(part for option in options for part in ("--set", option)))
    assert done.exit_code == 2
    assert message in done.stderr
