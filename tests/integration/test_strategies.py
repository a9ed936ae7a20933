"""Strategies with state on both sides: deployed, they have the bits of their simulation, whoever dies."""

import numpy as np
import pytest

from fedcore.client.kept import load_kept
from fedcore.layout import Parameters
from fedcore.loopback import Loopback
from fedcore.server.store import Store
from tests.integration.conftest import (
    NAMES,
    Rows,
    died,
    evaluator,
    shown,
    simulated,
    start_dying,
    submit,
    watch,
)

SCAFFOLD = ("strategy=scaffold", "client.optimizer.momentum=0.0", "cohort.minimum=3", "run.rounds=4")
STRATEGIES = {
    "scaffold": SCAFFOLD,
    "robust": (
        'strategy={pre = [{name = "nnm", f = 1}], optimizer = "adam"}',
        'strategy.aggregator={name = "trimmed_mean", f = 1}',
        "cohort.minimum=3",
    ),
    "scheduled": ('client.schedule={name = "step", every = 1, gamma = 0.5, warmup = 1}', "cohort.minimum=3"),
    "trusted": ("strategy=fltrust", "cohort.minimum=3"),
}


def kept_by(loopback: Loopback, run: str) -> dict[str, dict[str, bytes]]:
    """Return what each agent has kept of a run; nothing may be left that waits."""
    kept = {}
    for name in NAMES:
        folder = loopback.folder / name / "state" / "kept" / run
        assert [path.name for path in folder.glob("*")] in ([], ["current"])
        kept[name] = {key: vector.tobytes() for key, vector in load_kept(folder / "current").items()}
    return kept


def broadcast(loopback: Loopback, run: str, extra: tuple[str, ...]) -> Parameters:
    """Return the newest parameters of a run as they lie on the coordinator's disk."""
    folder = loopback.folder / "coordinator"
    store = Store(folder)
    (mine,) = [known for known in store.runs() if known.id == run]
    address = store.rounds(run)[-1].parameters
    store.close()
    flat = np.fromfile(folder / "blobs" / address, mine.layout.dtype)
    return Parameters.of_blob(flat, mine.layout, extra)


def assert_as_simulated(loopback: Loopback, run: str, rows: Rows, sets: tuple[str, ...]) -> None:
    """Compare the model, the rows, what is broadcast, and what every client has kept."""
    simulation, expected = simulated(loopback, sets)
    state = simulation.state
    assert shown(loopback, run)["model_sha256"] == state.parameters.digest
    same = ("round", "folded", "train_loss", "loss", "accuracy")
    assert [[row.get(k) for k in same] for row in rows] == [[row.get(k) for k in same] for row in expected]
    extra = broadcast(loopback, run, tuple(state.parameters.extra)).extra
    assert {n: v.tobytes() for n, v in extra.items()} == {
        n: v.tobytes() for n, v in state.parameters.extra.items()
    }
    kept = {
        name: {key: v.tobytes() for key, v in simulation.states[name].items()}
        for name in simulation.population.names
    }
    assert kept_by(loopback, run) == kept


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_deployed_strategy_has_the_bits_of_its_simulation(loopback: Loopback) -> None:
    for name in NAMES:
        loopback.start(name)
    for strategy, sets in STRATEGIES.items():
        run = submit(loopback, *sets)
        if strategy == "trusted":
            evaluator(loopback)
        assert_as_simulated(loopback, run, watch(loopback, run), sets)


AGENTS = {
    "hearing the verdict": """
from fedcore.client.agent import Agent
from fedcore.messages import Outcome
hear = Agent._hear
async def dying(self, message):
    if isinstance(message, Outcome) and (message.ref.round, message.ref.kind) == (2, "train"):
        die()
    await hear(self, message)
Agent._hear = dying
""",
    "taking over what it kept": """
from fedcore.client.kept import KeptStates
settle = KeptStates.settle
def dying(self, ref, folded):
    if ref.round == 2:
        die()
    settle(self, ref, folded)
KeptStates.settle = dying
""",
    "between what it would keep and the update": """
from fedcore.client.state import State
spool = State.spool
def dying(self, update):
    if (update.head.ref.round, update.head.ref.kind) == (3, "train"):
        die()
    spool(self, update)
State.spool = dying
""",
}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_agents_that_are_killed_keep_what_was_folded_and_nothing_else(loopback: Loopback) -> None:
    """Each dies at another moment and is started again; SCAFFOLD's c stays the mean of the c_i.

    Tested at the end only: an evaluation does not wait for an agent that has just died.
    """
    sets = (*SCAFFOLD, "evaluation.every=0")
    for name, code in zip(NAMES, AGENTS.values(), strict=True):
        start_dying(loopback, name, code)
    run = submit(loopback, *sets)
    for name in NAMES:
        died(loopback, name)
    assert_as_simulated(loopback, run, watch(loopback, run), sets)
    assert_mean(loopback, run)


def assert_mean(loopback: Loopback, run: str) -> None:
    """Hold c = mean c_i over the files of coordinator and agents."""
    control = broadcast(loopback, run, ("control",)).extra["control"]
    own = [np.frombuffer(kept["control"], np.float32) for kept in kept_by(loopback, run).values()]
    assert np.abs(control).max() > 1e-3
    np.testing.assert_allclose(control, np.mean(own, axis=0, dtype=np.float64), rtol=0, atol=1e-6)


COORDINATOR = {
    "after the commit": """
from fedcore.server.live import LiveRound
announce = LiveRound.announce
def dying(self, *counts):
    if (self.plan.ref.round, self.plan.ref.kind) == (2, "train"):
        die()
    announce(self, *counts)
LiveRound.announce = dying
""",
    "before the commit": """
from fedcore.server.store import Store
commit_round = Store.commit_round
def dying(self, run, committed, *rest):
    if committed.round == 4:
        die()
    commit_round(self, run, committed, *rest)
Store.commit_round = dying
""",
}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_coordinator_that_is_killed_around_a_commit_tells_clients_what_the_disk_says(
    loopback: Loopback,
) -> None:
    for name in NAMES:
        loopback.start(name)
    loopback.stop("coordinator")
    start_dying(loopback, "coordinator", COORDINATOR["after the commit"])
    loopback.wait_for("coordinator", r"(?s)listening.*listening")
    run = submit(loopback, *SCAFFOLD)
    assert loopback.processes["coordinator"].wait(60) == -9
    start_dying(loopback, "coordinator", COORDINATOR["before the commit"])
    died(loopback, "coordinator")
    loopback.wait_for("coordinator", r"(?s)listening.*listening.*listening.*listening")
    assert_as_simulated(loopback, run, watch(loopback, run), SCAFFOLD)
    assert_mean(loopback, run)
