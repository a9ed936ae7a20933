"""Ledgers in a federation of processes: one without budget, one amid a kill, one that is rolled back."""

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedcore.errors import RunFailed
from fedcore.loopback import Loopback
from tests.integration.conftest import NAMES, submit, watch

TASK = """
from torch import nn

import fedcore
from fedcore.data import digits


class Plain(fedcore.Task):
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def dataset(self):
        return digits().train.take(range(300))
"""
ROUNDS = 3
PRIVATE = (
    "run.task=plain:Plain",
    f"run.rounds={ROUNDS}",
    "evaluation.every=0",
    "client={steps = 5, batch_size = 32}",
    'privacy={level = "example", noise_multiplier = 1.0, sampling_rate = 0.1, metric_noise = 8.0}',
)


def allow(loopback: Loopback, name: str, epsilon: float = 0.0) -> None:
    """Let an agent do the private task, with a ledger where epsilon is given."""
    folder = loopback.folder / name
    (folder / "plain.py").write_text(TASK, encoding="utf-8")
    table: dict[str, Any] = tomllib.loads((folder / "agent.toml").read_text(encoding="utf-8"))
    table["tasks"]["Plain"] = "plain:Plain"
    if epsilon:
        table["ledger"] = {"path": "../data/a.ledger", "dataset": "clinic-a", "epsilon": epsilon}
    (folder / "agent.toml").write_text(tomli_w.dumps(table), encoding="utf-8")


@pytest.fixture
def private(loopback: Loopback) -> Loopback:
    """Let the federation's agents do the private task; none has a ledger."""
    (loopback.folder / "plain.py").write_text(TASK, encoding="utf-8")
    for name in NAMES:
        allow(loopback, name)
    return loopback


def ledger(loopback: Loopback, command: str, *options: str) -> Any:
    return json.loads(loopback.fedcore("client", "ledger", command, "--dir", NAMES[0], "--json", *options))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_device_without_budget_declines_and_the_run_goes_on(private: Loopback) -> None:
    allow(private, NAMES[0], epsilon=0.5)
    for name in NAMES:
        private.start(name)
    rows = watch(private, submit(private, *PRIVATE))
    assert [row["folded"] for row in rows] == [2] * ROUNDS
    seen = private.log("coordinator").read_text(encoding="utf-8")
    assert "declined: budget" in seen and "remains" not in seen
    journal = (private.folder / NAMES[0] / "state" / "rounds.jsonl").read_text(encoding="utf-8")
    assert "0.500 remains; the whole run would bring it to" in journal
    assert ledger(private, "show")["entries"] == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_kill_after_the_reservation_loses_no_accounting_and_a_rollback_is_found(private: Loopback) -> None:
    allow(private, NAMES[0], epsilon=50.0)
    for name in NAMES[1:]:
        private.start(name)
    private.start(NAMES[0], "agent.reserved:2=kill")
    run = submit(private, *PRIVATE, "cohort.minimum=3", "cohort.deadline=200.0")
    assert private.processes[NAMES[0]].wait(60) == -9
    before = ledger(private, "show")
    assert [entry["ref"] for entry in before["entries"]] == [f"{run}/{n}.0/train" for n in (1, 2)]
    path = private.folder / "data" / "a.ledger"
    copy = Path(shutil.copy(path, private.folder / "copy"))
    private.start(NAMES[0])
    rows = watch(private, run)

    assert [row["folded"] for row in rows] == [3] * ROUNDS
    after = ledger(private, "show")
    trained = [entry["ref"] for entry in after["entries"] if entry["ref"].endswith("train")]
    assert trained == [
        f"{run}/{n}.0/train" for n in (1, 2, 2, 3)
    ]  # the start that was killed has cost its part
    assert after["spent"] > before["spent"]
    private.stop(NAMES[0])
    assert "unwitnessed" not in ledger(private, "verify")["witness"]

    shutil.copy(copy, path)
    assert "unwitnessed" in ledger(private, "show")["witness"]  # by itself the old copy looks whole
    with pytest.raises(RunFailed, match="rolled back"):
        ledger(private, "verify")
    private.start(NAMES[0])
    assert private.processes[NAMES[0]].wait(60) == 1
    assert "rolled back" in private.log(NAMES[0]).read_text(encoding="utf-8")
