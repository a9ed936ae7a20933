"""FedBuff over the wire with real agents: killed and restarted, with the simulation's bits."""

import re
from pathlib import Path

import pytest

from tests.integration.conftest import NAMES, SPEC, made, shown, simulated, start_dying, submit, watch

SETS = (
    "run.rounds=5",
    'strategy={name="fedbuff", k=3, algorithm="client_momentum"}',
    "encryption.updates=sealed",
)
DYING = """
from fedcore.server.buffered import Workers
hear = Workers.hear
def dying(self, draw):
    hear(self, draw)
    if (draw.ref.round, len(self.arrived)) == {moment}:
        die()
Workers.hear = dying
"""
MOMENTS = [(1, 1), (2, 2), (4, 3)]  # so many of three updates are in, and acknowledged


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_coordinator_that_is_killed_goes_on_with_the_arrivals_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three are at work all the time, so their speeds decide nothing, and a simulation is the same."""
    with made(tmp_path, monkeypatch, SPEC, NAMES) as three:
        three.stop("coordinator")
        start_dying(three, "coordinator", DYING.format(moment=MOMENTS[0]))
        three.wait_for("coordinator", "(?s)listening.*listening")
        for name in NAMES:
            three.start(name)
        run = submit(three, *SETS)
        for moment in MOMENTS[1:]:
            assert three.processes["coordinator"].wait(60) == -9
            start_dying(three, "coordinator", DYING.format(moment=moment))
        assert three.processes["coordinator"].wait(60) == -9
        three.start("coordinator")
        three.wait_for("coordinator", "(?s)" + ".*".join(["listening"] * (len(MOMENTS) + 2)))
        rows = watch(three, run)
        simulation, expected = simulated(three, SETS)
        assert shown(three, run)["model_sha256"] == simulation.state.parameters.digest
        same = ("round", "folded", "train_loss", "loss", "accuracy", "staleness")
        assert [[row[k] for k in same] for row in rows] == [[row[k] for k in same] for row in expected]
        logs = [three.log(name).read_text(encoding="utf-8") for name in NAMES]
        done = [[line for line in log.splitlines() if re.search("work done.*/train", line)] for log in logs]
        assert [len(lines) for lines in done] == [5, 5, 5], "nothing is trained twice"
