"""Certificates of a deployed federation: renewed while a run goes on, revoked while it goes on."""

import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from fedcore.crypto.identity import Certified, utc_now
from fedcore.errors import RunFailed
from fedcore.loopback import Loopback
from fedcore.server.authority import Authority
from fedcore.simulations.run import simulate
from fedcore.spec import RunSpec
from tests.integration.conftest import NAMES, shown, submit, wait_for_detail

LONG = ["run.rounds=100000", "client.epochs=8"]


def shortened(folder: Path, loopback: Loopback, seconds: int) -> Certified:
    """Replace the identity in a folder by one of a brief life, and return it."""
    authority = Authority.load(loopback.folder / "authority")
    name = Certified.load(loopback.folder / folder).name
    identity = replace(authority, lifetime=timedelta(seconds=seconds)).new_identity(name)
    identity.save(loopback.folder / folder)
    return identity


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("updates", ["tls", "secagg"])
def test_certificates_are_renewed_in_a_run_and_its_bits_are_those_without(
    loopback: Loopback, updates: str
) -> None:
    """Coordinator, agents and operator each get another key and certificate amid the rounds."""
    processes = {name: Path(name) / "state" / "identity" for name in NAMES}
    folders = {
        "coordinator": Path("coordinator/identity"),
        "operator": Path("operator/identity"),
        **processes,
    }
    assert loopback.stop("coordinator") == 0
    before = {name: shortened(folder, loopback, 20) for name, folder in folders.items()}
    for name in ["coordinator", *NAMES]:
        loopback.start(name)
    loopback.wait_for("coordinator", r"(?s)listening.*listening")
    sets = [*LONG, f"encryption.updates={updates}", "cohort.minimum=3"]
    run = submit(loopback, *sets)
    for name in ["coordinator", *NAMES]:
        loopback.wait_for(name, "certificate renewed")
    shown(loopback, run)  # the operator's is due as well, unless the first command came late and renewed it
    time.sleep(max(0.0, (max(each.not_after for each in before.values()) - utc_now()).total_seconds()))
    committed = shown(loopback, run)["round"]  # every old certificate has expired by now
    loopback.wait_for("coordinator", f"round committed .*round={committed + 3} ")
    loopback.fedcore("run", "stop", run)

    assert ("step ended" in loopback.log("coordinator").read_text()) == (updates == "secagg")
    last = shown(loopback, run)
    spec = RunSpec.load(loopback.folder / "run.toml", [*sets, f"run.rounds={last['round']}"])
    assert all(row["folded"] == 3 for row in last["metrics"])
    assert last["model_sha256"] == simulate(spec=spec).parameters.digest
    for name, folder in folders.items():
        renewed = Certified.load(loopback.folder / folder)
        assert renewed.name == before[name].name and renewed.not_after > before[name].not_after
    for name in NAMES:
        assert "connection lost" not in loopback.log(name).read_text()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_revoked_agent_is_out_of_the_run_within_a_moment(loopback: Loopback) -> None:
    for name in NAMES:
        loopback.start(name)
    run = submit(loopback, *LONG, "cohort.minimum=2", "cohort.deadline=10")
    loopback.wait_for("coordinator", "round committed .*folded=3")
    thief = NAMES[0]
    began = time.monotonic()
    assert "1 certificate" in loopback.fedcore("authority", "revoke", "--dir", "authority", thief)
    assert loopback.processes[thief].wait(10) == 1
    assert time.monotonic() - began < 2 + command_seconds(loopback)
    assert "turned this agent away: the certificate of" in loopback.log(thief).read_text()
    loopback.wait_for("coordinator", r"(?s)revoked .*round committed [^\n]*folded=2")

    loopback.start(thief)  # nor does it come back, whatever becomes of the authority
    assert loopback.processes[thief].wait(60) == 1
    assert loopback.stop("authority") == 0
    assert loopback.stop("coordinator", signal.SIGKILL) == -signal.SIGKILL
    loopback.start("coordinator")
    loopback.wait_for("coordinator", r"(?s)listening.*listening")
    loopback.wait_for("coordinator", "the last list holds")
    loopback.start(thief)
    assert loopback.processes[thief].wait(60) == 1
    wait_for_detail(loopback, run, "")
    assert shown(loopback, run)["state"] == "running"


def test_a_revoked_operator_can_do_nothing(loopback: Loopback) -> None:
    loopback.fedcore("run", "list")
    loopback.fedcore("authority", "revoke", "--dir", "authority", "--role", "operator", "operator")
    loopback.wait_for("coordinator", "revoked .*operator/operator")
    with pytest.raises(RunFailed, match=r"operator/operator was revoked; enrol with a token"):
        loopback.fedcore("run", "list")


def command_seconds(loopback: Loopback) -> float:
    """Return how long a command takes that does next to nothing."""
    began = time.monotonic()
    loopback.fedcore("authority", "list", "--dir", "authority")
    return time.monotonic() - began
