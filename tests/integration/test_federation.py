"""The claim of the product: what was simulated is what is deployed, bit for bit, with real processes."""

import signal
from typing import Any

import pytest

from fedcore.loopback import Loopback
from fedcore.model_files import load_model
from fedcore.simulations.run import simulate
from fedcore.spec import RunSpec
from tests.integration.conftest import NAMES, shown, submit, wait_for_detail, watch


@pytest.mark.timeout(240)
def test_a_federation_of_processes_gives_the_simulations_bits(loopback: Loopback) -> None:
    for name in NAMES:
        loopback.start(name)
    result = simulate(spec=loopback.folder / "run.toml")
    for updates in ("tls", "sealed", "secagg"):
        run = submit(loopback, f"encryption.updates={updates}", "cohort.minimum=3")
        rows = watch(loopback, run)
        assert shown(loopback, run)["model_sha256"] == result.parameters.digest
        assert [row["folded"] for row in rows] == [3, 3, 3]
        same = ("train_loss", "loss", "accuracy")
        assert [[row[k] for k in same] for row in rows] == [[row[k] for k in same] for row in result.metrics]
    for name in NAMES:
        assert loopback.log(name).read_text(encoding="utf-8").count(" masked ") == 6

    loopback.fedcore("run", "download", run, "--out", "model.safetensors")
    layout, parameters = load_model(loopback.folder / "model.safetensors")
    assert layout == result.layout
    assert parameters.digest == result.parameters.digest
    for name in [*NAMES, "coordinator", "authority"]:
        assert loopback.stop(name) == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_agent_that_dies_and_one_that_joins_late(loopback: Loopback) -> None:
    for name in NAMES[:2]:
        loopback.start(name)
    run = submit(loopback, "run.rounds=100000")
    loopback.wait_for(
        "coordinator", "round committed .*round=1 .*folded=2"
    )  # the minimum, as nobody else comes
    loopback.start(NAMES[2])
    loopback.wait_for("coordinator", "round committed .*folded=3")
    assert loopback.stop(NAMES[0], signal.SIGKILL) == -signal.SIGKILL
    loopback.wait_for("coordinator", r"(?s)folded=3 .*round committed [^\n]*folded=2")
    loopback.fedcore("run", "stop", run)
    rows = watch(loopback, run)

    folded = [row["folded"] for row in rows]
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))
    assert folded[0] == folded[-1] == 2
    assert shown(loopback, run)["state"] == "stopped"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_coordinator_goes_on_to_the_same_bits(loopback: Loopback) -> None:
    for name in NAMES:
        loopback.start(name)
    run = submit(loopback, "run.rounds=40", "client.epochs=4")
    loopback.wait_for("coordinator", "round committed .*round=2 .*")
    assert loopback.stop("coordinator", signal.SIGKILL) == -signal.SIGKILL
    loopback.start("coordinator")
    rows = watch_when_up(loopback, run)

    spec = RunSpec.load(loopback.folder / "run.toml", ["run.rounds=40", "client.epochs=4"])
    assert shown(loopback, run)["model_sha256"] == simulate(spec=spec).parameters.digest
    assert [row["round"] for row in rows] == list(range(1, 41))


def watch_when_up(loopback: Loopback, run: str) -> list[dict[str, Any]]:
    """Watch a run at a coordinator that is just starting."""
    loopback.wait_for("coordinator", r"(?s)listening.*listening")
    return watch(loopback, run)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_waits_and_says_for_whom(loopback: Loopback) -> None:
    loopback.start(NAMES[0])
    run = submit(loopback)
    wait_for_detail(loopback, run, "waiting for clients .*: 1 of 3")
    for name in NAMES[1:]:
        loopback.start(name)
    assert [row["folded"] for row in watch(loopback, run)] == [3, 3, 3]
