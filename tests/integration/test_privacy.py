"""Private runs over real processes: secrets come from the operating system, and little leaves a device."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fedcore.data import save_split
from fedcore.loopback import Loopback, federation
from fedcore.server.store import Store
from fedcore.simulations.population import Population
from fedcore.spec import RunSpec
from fedcore.task import client_name, resolve
from tests.integration.conftest import shown, submit, watch

TASK = """
from torch import nn

import fedcore
from fedcore.data import digits


class Plain(fedcore.Task):
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def dataset(self):
        return digits().train.take(range(400))

"""
SPEC = """
[run]
name = "plain"
task = "plain:Plain"
rounds = 3
seed = 7
[cohort]
size = 4
deadline = 60.0
[client]
batch_size = 16
[evaluation]
every = 0
where = "clients"
[simulation]
engine = "sequential"
clients = 6
"""
NAMES = [client_name(i) for i in range(6)]
CLIENT = (
    "privacy.level=client",
    "privacy.population=6",
    "privacy.noise_multiplier=2.0",
    "privacy.delta=0.01",
)
MEASURED = ("privacy.metric_noise=2.0",)
EXAMPLE = (
    "privacy.level=example",
    "privacy.sampling_rate=0.2",
    "privacy.noise_multiplier=1.0",
    "client.steps=2",
)
LOCAL = ("privacy.level=local", "privacy.noise_multiplier=1.0")
DISTRIBUTED = ("privacy.level=distributed", "privacy.noise_multiplier=1.0", "encryption.updates=secagg")


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A federation of six devices that are at work; all tests share it, because to start it takes a while."""
    tmp_path = tmp_path_factory.mktemp("devices")
    (tmp_path / "plain.py").write_text(TASK, encoding="utf-8")
    (tmp_path / "run.toml").write_text(SPEC, encoding="utf-8")
    sys.modules.pop("plain", None)
    with pytest.MonkeyPatch.context() as patch, federation(tmp_path) as running:
        patch.syspath_prepend(str(tmp_path))
        population = Population(resolve("plain:Plain"), RunSpec.load(tmp_path / "run.toml"))

        def settings(name: str) -> dict[str, Any]:
            save_split(tmp_path / f"{name}.npz", population.split(name))
            return {"tasks": {"Plain": "plain:Plain"}, "data": {"path": str(tmp_path / f"{name}.npz")}}

        running.make_agents(NAMES, settings)
        for name in NAMES:
            (tmp_path / name / "plain.py").write_text(TASK, encoding="utf-8")
            running.start(name)
        # A first run, so that every device has imported torch: a private round ends at its deadline.
        watch(running, submit(running, "run.rounds=1", "cohort.size=6", "cohort.minimum=6"))
        yield running
    sys.modules.pop("plain", None)


def asked(loopback: Loopback, run: str) -> list[tuple[str, ...]]:
    """Return who was asked to train in each round, by the devices' journals."""
    rounds: dict[str, list[str]] = {}
    for name in NAMES:
        journal = loopback.folder / name / "state" / "rounds.jsonl"
        rows = (
            [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
            if journal.exists()
            else []
        )
        for row in rows:
            if row["ref"].startswith(f"{run}/") and row["event"] == "sent" and row["ref"].endswith("train"):
                rounds.setdefault(row["ref"], []).append(name)
    return [tuple(names) for _, names in sorted(rounds.items())]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_cohorts_and_noise_are_not_the_seeds(devices: Loopback) -> None:
    started = time.monotonic()
    runs = [submit(devices, *CLIENT, *MEASURED, "cohort.deadline=4.0") for _ in range(2)]
    rows = [watch(devices, run) for run in runs]
    # Both share the devices. Three rounds and an evaluation: to close early would tell how many take part.
    assert time.monotonic() - started > 4 * 4.0
    assert [len(each) for each in rows] == [3, 3], shown(devices, runs[0])
    assert len({shown(devices, run)["model_sha256"] for run in runs}) == 2
    # Each of 6 clients is in each of 3 rounds with probability 2/3: all alike has probability below 1e-4.
    assert asked(devices, runs[0]) != asked(devices, runs[1])
    for row in [row for each in rows for row in each]:
        assert row.keys() <= {"round", "expected", "seconds", "accuracy", "epsilon"}
        assert (row["expected"], row["seconds"]) == (4.0, 4.0)
    assert 0.0 <= rows[0][-1]["accuracy"] <= 1.0


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "sets",
    [EXAMPLE, LOCAL, DISTRIBUTED, (*CLIENT, "cohort.deadline=4.0")],
    ids=["example", "local", "distributed", "client"],
)
def test_with_the_same_seed_and_the_same_clients_the_noise_differs(
    devices: Loopback, sets: tuple[str, ...]
) -> None:
    overrides = (
        *sets,
        "cohort.size=6",
        "privacy.delta=0.01",
        "evaluation.where=clients",
        "privacy.metric_noise=2.0",
        "run.rounds=2",
    )
    runs = [submit(devices, *overrides) for _ in range(2)]
    rows = [watch(devices, run) for run in runs]
    assert len({shown(devices, run)["model_sha256"] for run in runs}) == 2, "the same seed, and other noise"
    for row in [row for each in rows for row in each]:
        assert "train_loss" not in row and "loss" not in row
    assert np.isfinite([row["seconds"] for each in rows for row in each]).all()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_tree_noise_goes_on_after_a_restart(devices: Loopback) -> None:
    sets = (
        "privacy.level=tree",
        "privacy.separation=1",
        "privacy.noise_multiplier=1.0",
        "evaluation.where=holdout",
    )
    run = submit(devices, *sets, "run.rounds=6", "cohort.minimum=4")
    for name in NAMES:
        devices.wait_for(name, "folded")
    assert devices.stop("coordinator", 9) == -9
    devices.start("coordinator")
    devices.wait_for("coordinator", r"listening[\s\S]*listening")
    assert [row["round"] for row in watch(devices, run)] == [1, 2, 3, 4, 5, 6]
    store = Store(devices.folder / "coordinator")
    assert len(store.rounds(run)) == 6
    store.close()


LEDGER = """
[ledger]
path = "../{name}.ledger"
dataset = "{name}"
unit = "client"
epsilon = 20.0
delta = 0.01
accept_trusted = {trusted}
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_device_pays_for_a_whole_run_before_it_can_be_drawn(devices: Loopback) -> None:
    trusting, wary = NAMES[:2]
    for name in (trusting, wary):
        devices.stop(name)
        with (devices.folder / name / "agent.toml").open("a", encoding="utf-8") as settings:
            settings.write(LEDGER.format(name=name, trusted=str(name == trusting).lower()))
        devices.start(name)
        devices.wait_for(name, r"connected[\s\S]*connected")
    sets = ("evaluation.where=holdout", "cohort.size=2", "cohort.deadline=4.0")
    run = submit(devices, *CLIENT, *sets)
    assert len(watch(devices, run)) == 3
    entries = json.loads(devices.fedcore("client", "ledger", "show", "--dir", trusting, "--json"))["entries"]
    (event,) = entries[0]["history"]
    assert len(entries) == 1, "one entry for all rounds, however often it was asked"
    assert (event["steps"], event["sampling_rate"]) == (3, pytest.approx(2 / 6))
    assert not any(wary in names for names in asked(devices, run))
    assert "run declined" in devices.log("coordinator").read_text(encoding="utf-8")
    assert json.loads(devices.fedcore("client", "ledger", "show", "--dir", wary, "--json"))["entries"] == []
