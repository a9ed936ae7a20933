"""Sealed and masked updates between real processes: the bits of the simulation, whoever is lost."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.client.kept import load_kept
from fedcore.loopback import Loopback
from fedcore.task import client_name
from tests.integration.conftest import (
    NAMES,
    SPEC,
    Rows,
    evaluator,
    made,
    shown,
    simulated,
    start_dying,
    submit,
    watch,
)

FIVE = [client_name(i) for i in range(5)]
SECAGG = ("encryption.updates=secagg", "encryption.encoding=exact")
Q32 = ("encryption.updates=secagg", "encryption.encoding=q32", "limits.norm=20.0")
SAME = ("round", "folded", "train_loss", "loss", "accuracy")


@pytest.fixture
def five(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    """A federation with five agents, who are not started; four are enough for a round."""
    spec = SPEC.replace("size = 3\nminimum = 2", "size = 5\nminimum = 4")
    spec = spec.replace("clients = 3", "clients = 5")
    with made(tmp_path, monkeypatch, spec, FIVE) as running:
        yield running


def assert_as_simulated(loopback: Loopback, run: str, rows: Rows, sets: tuple[str, ...]) -> None:
    """Compare the model and the rows, and what every client keeps."""
    plain = tuple(item for item in sets if item != "encryption.updates=secagg")  # the same words, not masked
    simulation, expected = simulated(loopback, plain)
    assert shown(loopback, run)["model_sha256"] == simulation.state.parameters.digest
    assert [[row.get(k) for k in SAME] for row in rows] == [[row.get(k) for k in SAME] for row in expected]
    for name in simulation.population.names:
        kept = load_kept(loopback.folder / name / "state" / "kept" / run / "current")
        assert {key: vector.tobytes() for key, vector in kept.items()} == {
            key: vector.tobytes() for key, vector in simulation.states[name].items()
        }


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_strategies_under_secure_aggregation_have_the_bits_of_their_simulation(five: Loopback) -> None:
    for name in FIVE:
        five.start(name)
    scaffold = ("strategy=scaffold", "client.optimizer.momentum=0.0", "cohort.minimum=5", "run.rounds=4")
    for sets in (Q32, (*SECAGG, *scaffold), (*Q32, "strategy=fedadam", "evaluation.every=2")):
        run = submit(five, *sets)
        assert_as_simulated(five, run, watch(five, run), sets)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_evaluator_seals_and_masks_nothing(loopback: Loopback) -> None:
    """Its data are the operator's: of a trusted update under FLTrust, and of a test on Task.holdout()."""
    for name in NAMES:
        loopback.start(name)
    evaluator(loopback)
    trusted = ("encryption.updates=sealed", "strategy=fltrust", "cohort.minimum=3")
    run = submit(loopback, *trusted)
    assert_as_simulated(loopback, run, watch(loopback, run), trusted)
    run = submit(loopback, *SECAGG, "cohort.minimum=3", "evaluation.where=holdout")
    assert all(0.2 < row["accuracy"] <= 1 for row in watch(loopback, run))


SHARED = """
from fedcore.client.secure import Attempt
mask = Attempt._mask
def dying(self):
    if (self.ref.round, self.ref.kind) == (2, "train"):
        die()
    return mask(self)
Attempt._mask = dying
"""
UPLOADED = """
from fedcore.client.session import Session
upload = Session.upload
async def dying(self, head, *rest):
    await upload(self, head, *rest)
    if (head.ref.round, head.ref.kind) == (2, "train"):
        die()
Session.upload = dying
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("code", "folded"), [(SHARED, 4), (UPLOADED, 5)])
def test_an_agent_that_dies_amid_the_protocol_does_not_lose_the_round(
    five: Loopback, code: str, folded: int
) -> None:
    """Its share of the keys is enough for the others; it is in a later round when it is back."""
    for name in FIVE[1:]:
        five.start(name)
    start_dying(five, FIVE[0], code)
    run = submit(five, *SECAGG, "run.rounds=100000", "evaluation.every=0", "cohort.deadline=40.0")
    assert five.processes[FIVE[0]].wait(60) == -9
    five.wait_for("coordinator", rf"round committed [^\n]*round=2 [^\n]*folded={folded}")
    five.wait_for("coordinator", r"round committed [^\n]*round=[3-9] [^\n]*folded=4")
    five.start(FIVE[0])
    five.wait_for("coordinator", r"(?s)round=[3-9] [^\n]*folded=4.*round committed [^\n]*folded=5")
    five.fedcore("run", "stop", run)
    rows = watch(five, run)
    assert all("skipped" not in row for row in rows) and rows[-1]["train_loss"] < rows[0]["train_loss"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_agent_that_is_started_again_amid_an_attempt_is_missing_in_it_alone(five: Loopback) -> None:
    for name in FIVE[1:]:
        five.start(name)
    start_dying(five, FIVE[0], SHARED)
    run = submit(five, *SECAGG, "run.rounds=100000", "evaluation.every=0", "cohort.deadline=120.0")
    assert five.processes[FIVE[0]].wait(60) == -9
    five.start(FIVE[0])  # within the grace: the coordinator repeats the edges, for which it has no keys
    five.wait_for(FIVE[0], r"declined .*ref=[^ ]*/2.0/train .*it was started again")
    five.wait_for("coordinator", r"(?s)round committed [^\n]*round=2 [^\n]*folded=4")
    five.wait_for("coordinator", r"(?s)round committed [^\n]*round=3 [^\n]*folded=5")
    five.fedcore("run", "stop", run)
