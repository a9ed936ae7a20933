"""A coordinator that is killed amid secure aggregation goes on to the same bits, with real agents."""

from pathlib import Path

import pytest

from fedcore.task import client_name
from tests.integration.conftest import SPEC, made, shown, simulated, start_dying, submit, watch

FIVE = [client_name(i) for i in range(5)]
SETS = ("encryption.encoding=q32", "limits.norm=20.0", "run.rounds=5")
DYING = """
from fedcore.server.secure import SecureRound
turn = SecureRound._turn
def dying(self, *arguments):
    report, ref = turn(self, *arguments), self.plan.ref
    if (ref.round, ref.kind, str(report.step)) == {moment}:
        die()  # the step has begun and is recorded, and nobody has been told
    return report
SecureRound._turn = dying
"""
MOMENTS = [
    (1, "train", "share"),
    (2, "train", "mask"),
    (2, "evaluate", "receive"),
    (3, "train", "agree"),
    (4, "train", "reveal"),
    (5, "train", "done"),
]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_coordinator_that_is_killed_at_every_step_resumes_the_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPEC.replace("size = 3\nminimum = 2", "size = 5\nminimum = 5").replace(
        "clients = 3", "clients = 5"
    )
    with made(tmp_path, monkeypatch, spec, FIVE) as five:
        five.stop("coordinator")
        start_dying(five, "coordinator", DYING.format(moment=MOMENTS[0]))
        five.wait_for("coordinator", "(?s)listening.*listening")
        for name in FIVE:
            five.start(name)
        run = submit(five, "encryption.updates=secagg", *SETS)
        for moment in MOMENTS[1:]:
            assert five.processes["coordinator"].wait(60) == -9
            start_dying(five, "coordinator", DYING.format(moment=moment))
        assert five.processes["coordinator"].wait(60) == -9
        five.start("coordinator")
        five.wait_for("coordinator", "(?s)" + ".*".join(["listening"] * (len(MOMENTS) + 2)))
        rows = watch(five, run)
        simulation, expected = simulated(five, SETS)
        assert shown(five, run)["model_sha256"] == simulation.state.parameters.digest
        same = ("round", "folded", "train_loss", "loss", "accuracy")
        assert [[row[k] for k in same] for row in rows] == [[row[k] for k in same] for row in expected]
        assert "round skipped" not in five.log("coordinator").read_text(encoding="utf-8")
