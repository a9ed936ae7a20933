"""Coordinator and agents are killed at every point that has a name, and the run ends with the same bits.

agent.reserved, which needs a ledger, is in `test_ledger`.
"""

import json
from collections.abc import Iterator
from itertools import cycle

import pytest

from fedcore.bench.chaos import KINDS, ended, pause, remembering, resent, spec_of, submit
from fedcore.faults import AGENT, COORDINATOR
from fedcore.loopback import Loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROUNDS = {"rounds": 6}
AGENTS = [point for point in AGENT if point != "agent.reserved"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A federation of two light agents, for all tests here."""
    with remembering(tmp_path_factory.mktemp("federation"), clients=2) as loopback:
        yield loopback


@pytest.fixture(scope="module")
def expected(two: Loopback) -> dict[str, str]:
    """Return the models of runs that nothing happens to."""
    runs = {kind: submit(two, spec_of(f"quiet-{kind}", 2, run=ROUNDS, **KINDS[kind])) for kind in KINDS}
    return {kind: ended(two, run).parameters.sha256 for kind, run in runs.items()}


def model_after_a_kill(two: Loopback, name: str, fault: str, kind: str) -> str:
    """Have a process die at a fault amid a run, start it again, and return the run's model."""
    two.stop(name)
    two.start(name, f"{fault}=kill")
    deaths = 0

    def revive() -> None:
        nonlocal deaths
        code = two.processes[name].poll()
        if code is not None:
            assert code == -9
            two.start(name)
            deaths += 1
        pause()

    spec = spec_of(fault.replace(":", ".") + f".{kind}", 2, run=ROUNDS, **KINDS[kind])
    run = submit(two, spec, revive)
    info = ended(two, run, revive)
    assert deaths == 1
    assert [json.loads(row)["folded"] for row in info.metrics] == [2] * 6
    return info.parameters.sha256


@pytest.mark.parametrize(("point", "kind"), list(zip(COORDINATOR, cycle(KINDS), strict=False)))
def test_the_coordinator_is_killed(two: Loopback, expected: dict[str, str], point: str, kind: str) -> None:
    count = 4 if point.startswith("store") else 2  # after the submission's
    assert model_after_a_kill(two, "coordinator", f"{point}:{count}", kind) == expected[kind]
    assert resent(two) == []


@pytest.mark.parametrize(
    "fault",
    ["transfer.rename.after:1", "blob.rename.before:1", "store.commit.before:2", "store.commit.after:2"],
)
def test_the_coordinator_is_killed_while_a_run_is_handed_in(
    two: Loopback, expected: dict[str, str], fault: str
) -> None:
    assert model_after_a_kill(two, "coordinator", fault, "tls") == expected["tls"]
    blobs = two.folder / "coordinator" / "blobs"
    assert not list(blobs.glob("new-*"))  # what was half handed in


@pytest.mark.parametrize(("point", "kind"), list(zip(AGENTS, cycle(KINDS), strict=False)))
def test_an_agent_is_killed(two: Loopback, expected: dict[str, str], point: str, kind: str) -> None:
    assert model_after_a_kill(two, "client-000000", f"{point}:2", kind) == expected[kind]
    assert resent(two) == []
