"""What `fedcore client check` finds, and that it asks nobody."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from fedcore.client import check as checking
from fedcore.client.check import MAX_LABELS, check, labels
from fedcore.client.config import Config, Terms
from fedcore.client.examples import PairExamples
from fedcore.data import Split, digits, save_split
from fedcore.errors import ConfigError, DataError, TaskError

Federation = Any  # of conftest, which importlib mode cannot import
# Python's own sockets are refused by an audit hook, those of C libraries show as open files at the end.
ALONE = """
import os, sys

def hook(event, _):
    if event.startswith("socket."):
        os.write(2, event.encode())
        os._exit(9)

sys.addaudithook(hook)
from fedcore.client.cli import app
app(["check", "--dir", sys.argv[1], "--json"], standalone_mode=False)
sockets = [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
           and os.readlink(f"/proc/self/fd/{fd}").startswith("socket")]
assert not sockets
"""


def digits_agent(folder: Path, **settings: Any) -> Path:
    """Make the folder of an agent that holds 70 examples of digits."""
    data = digits().train
    save_split(folder / "digits.npz", Split(data.take(range(50)), data.take(range(50, 70))))
    table = {"tasks": {"Digits": "fedcore.tasks:Digits"}, "data": {"path": "digits.npz"}, **settings}
    (folder / "agent.toml").write_text(tomli_w.dumps(table))
    return folder


def test_it_loads_the_data_trains_a_step_and_contacts_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, str(digits_agent(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)
    assert (report["task"], report["train"], report["test"]) == ("Digits", 50, 20)
    expected = np.bincount(digits().train.y[:50], minlength=10).tolist()
    assert report["labels"] == {str(label): count for label, count in enumerate(expected)}
    assert report["sends"] == [["delta", 4810, 19240]]
    assert report["scalars"]["count"] == 32 and 0 < report["scalars"]["loss"] < 32 * 10
    assert report["seconds_step"] > 0 and report["memory_mb"] > 10


@pytest.mark.parametrize(
    ("policy", "readers"),
    [
        ({}, "the coordinator, which may also keep it"),
        ({"encryption": "sealed"}, "the coordinator, in its memory alone until the round closes"),
        ({"encryption": "secagg"}, "nobody; the coordinator sees sums over 3 clients or more"),
        (
            {"encryption": "secagg", "smallest_cohort": 8},
            "nobody; the coordinator sees sums over 8 clients or more",
        ),
    ],
)
def test_it_says_who_may_read_an_update_at_worst(policy: dict[str, Any], readers: str) -> None:
    assert checking.readers(Terms.model_validate(policy)) == readers


def test_an_evaluator_tests_a_batch_of_its_holdout(federation: Federation) -> None:
    (report,) = check(Config.load(federation.agent_folder(evaluator=True)), None, "judge")
    assert (report.train, report.test, report.sends, report.scalars["count"]) == (0, 7, [], 7.0)


@pytest.mark.parametrize(
    ("settings", "task", "error", "message"),
    [
        (
            {},
            "Mody",
            ConfigError,
            r"^agent.toml:3: tasks: task 'Mody' is not allowed; did you mean 'Moody'\?",
        ),
        ({"tasks": {}}, None, ConfigError, "^agent.toml:3: tasks: no task is allowed"),
        ({"tasks": {"X": "nowhere:X"}}, None, TaskError, "^agent.toml:4: tasks.X: .*no module 'nowhere'"),
        ({"data": {"examples": 0}}, None, DataError, "^agent.toml:6: data: Moody has no examples"),
    ],
)
def test_what_cannot_work_is_told_with_its_line(
    federation: Federation, settings: dict[str, Any], task: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(Config.load(federation.agent_folder(**settings)), task, "client")


def test_data_that_are_missing_are_told_with_their_line(tmp_path: Path) -> None:
    config = Config.load(digits_agent(tmp_path, data={"path": "nothing.npz"}))
    with pytest.raises(DataError, match=r"^agent.toml:4: data: nothing.npz does not exist"):
        check(config, None, "client")


def test_targets_that_are_no_classes_have_no_histogram() -> None:
    def of(y: Any) -> dict[str, int]:
        return labels(PairExamples(np.zeros(len(y)), np.asarray(y)))

    assert of([2, 0, 2]) == {"0": 1, "2": 2}
    assert of([0.5, 1.0]) == of(np.zeros((2, 2), int)) == of(np.arange(MAX_LABELS + 1)) == {}
    assert sum(of(np.arange(5000) % 10).values()) == 5000
