"""Clients at their own speed, and a model that moves on arrivals."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.data import ArrayDataset
from fedcore.errors import RunFailed, SpecError
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Plan
from fedcore.simulations.answers import Answers
from fedcore.simulations.buffered import Step, Workers
from fedcore.simulations.run import Progress, Simulation, simulate
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.strategies.modes import Asynchronous, Buffered, OnArrival
from fedcore.strategies.rounds import advance, initial_state
from fedcore.strategies.samplers import Memory, Sees
from fedcore.strategies.terms import Rows
from fedcore.task import Task, client_name
from fedcore.tasks import Digits

LAYOUT = Layout((Entry("weight", (1,), "float32", "shared"),))


@dataclass(frozen=True)
class Foremost:
    """Draws the first of the population, so that a schedule can be written down."""

    sees: ClassVar[Sees] = "none"

    def sample(
        self, population: Sequence[str], size: int, rng: np.random.Generator, memory: Memory, *, round: int
    ) -> tuple[str, ...]:
        return tuple(population[:size])


class Shop:
    """Workers whose updates are all ones but for the clients in `broken`, with a log of who trained when."""

    def __init__(
        self, seconds: Mapping[str, float], mode: OnArrival, size: int, broken: str = "", **parts: Any
    ) -> None:
        self.strategy = Strategy(mode=mode, **parts)
        self.broken = broken
        self.trained: list[tuple[int, tuple[str, ...], float]] = []
        spec = RunSpec.parse({"cohort": {"size": size}})
        self.workers = Workers(self.strategy, spec, LAYOUT, list(seconds), seconds.__getitem__, self.answer)
        zero = np.zeros(1, np.float32)
        self.state = initial_state(self.strategy, Parameters(zero, np.zeros(0, np.float32)))

    def answer(self, plan: Plan, parameters: Parameters) -> Iterator[Answers]:
        self.trained.append((plan.ref.round, plan.cohort, float(parameters.shared[0])))
        for client in plan.cohort:
            delta = np.full((1, 1), np.nan if client in self.broken else 1.0, np.float32)
            one = np.ones(1)
            rows = Rows({"delta": delta}, {"weight": one, "loss": one, "count": one})
            yield Answers((client,), rows, ({},))

    def step(self) -> Step:
        step = self.workers.step(self.state, lambda _: None)
        self.state = advance(self.strategy, step.round, self.state, 0)
        return step


SECONDS = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 10.0}


def test_five_clients_by_hand() -> None:
    """Three places, two arrivals a step; a place goes to the first client that neither works nor has arrived.

    second 0: a b c get version 0.  1: a arrives, d gets version 0.  2: b arrives, step 1; a gets version 1.
    second 3: a and c arrive, step 2; a and b get version 2.         4: a arrives, c gets version 2.
    second 5: b arrives, step 3; then d, of version 0, at staleness 3; a and b get version 3.
    second 6: a arrives, step 4.
    """
    shop = Shop(SECONDS, Buffered(k=2), size=3, sampler=Foremost())
    steps = [shop.step() for _ in range(4)]
    assert [dict(step.staleness) for step in steps] == [
        {"a": 0, "b": 0},
        {"a": 0, "c": 1},
        {"a": 0, "b": 0},
        {"d": 3, "a": 0},
    ]
    assert list(accumulate(step.seconds for step in steps)) == [2.0, 3.0, 5.0, 6.0]
    assert [step.row["staleness"] for step in steps] == [0.0, 0.5, 0.0, 1.5]
    assert [step.round.folded for step in steps] == [["a", "b"], ["a", "c"], ["a", "b"], ["d", "a"]]
    assert steps[3].round.seconds == {"d": 4.0, "a": 1.0}
    moves = [1.0, (1 + 2**-0.5) / 2, 1.0, (1 + 4**-0.5) / 2]
    assert float(shop.state.parameters.shared[0]) == pytest.approx(sum(moves), abs=1e-6)


def test_who_starts_from_a_version_trains_together_once_the_first_is_due() -> None:
    """The first three do; d, who also starts from version 0, is drawn when these have trained already."""
    shop = Shop(SECONDS, Buffered(k=2), size=3, sampler=Foremost())
    for _ in range(4):
        shop.step()
    assert [(round, clients) for round, clients, _ in shop.trained] == [
        (1, ("a", "b", "c")),
        (2, ("a",)),
        (3, ("a", "b")),
        (1, ("d",)),
        (4, ("a", "b")),
    ]
    received = [x for _, _, x in shop.trained]
    assert received[0] == received[3] == 0.0, "d trains from the model that it was given"
    assert set(shop.workers.now.versions) == {2, 3}, "models that nobody works on are dropped"


def test_a_client_that_has_arrived_rests_until_the_model_has_moved() -> None:
    """Two clients, one of them ten times as fast: without the rest both updates would be its own."""
    shop = Shop({"a": 1.0, "b": 10.0}, Buffered(k=2), size=2)
    steps = [shop.step() for _ in range(3)]
    assert [set(step.staleness.items()) for step in steps] == [{("a", 0), ("b", 0)}] * 3
    assert [step.seconds for step in steps] == [10.0] * 3


def test_a_refused_update_does_not_count_as_an_arrival() -> None:
    shop = Shop(SECONDS, Buffered(k=2), size=3, broken="a", sampler=Foremost())
    step = shop.step()
    assert step.round.folded == ["b", "c"] and step.round.sufficient
    assert {c: v.status for c, v in step.round.verdicts.items()} == {
        "a": "refused",
        "b": "folded",
        "c": "folded",
    }
    assert float(shop.state.parameters.shared[0]) == pytest.approx(1.0)


def test_a_step_without_enough_clients_is_not_sufficient() -> None:
    shop = Shop(SECONDS, Buffered(k=3), size=3, broken="abc")
    step = shop.workers.step(shop.state, lambda _: None)
    assert not step.round.sufficient and sorted(step.round.folded) == ["d", "e"]
    with pytest.raises(
        SpecError, match=r"a step takes 6 different clients and there are 5; set strategy\.mode\.k"
    ):
        Shop(SECONDS, Buffered(k=6), size=3)


def test_faster_clients_take_part_more_often() -> None:
    """Seconds 1, 2, ..., 40: over 600 steps the faster half gives most of the updates, and everybody some."""
    seconds = {client_name(i): 1.0 + i for i in range(40)}
    shop = Shop(seconds, Buffered(k=4), size=30)
    counts = Counter(client for _ in range(600) for client in shop.step().round.folded)
    times = np.array([counts[client] for client in seconds])
    assert times[:20].sum() > 1.4 * times[20:].sum() and times.min() > 0
    assert np.corrcoef(times, list(seconds.values()))[0, 1] < -0.8


def test_every_draw_has_a_stream_of_its_own() -> None:
    """Two of 1000 are at work: eighteen draws of two clients, all before the model moves."""
    names = [client_name(i) for i in range(1000)]
    shop = Shop(dict.fromkeys(names, 1.0), Buffered(k=36), size=2)
    shop.step()
    drawn = [int(client[-6:]) for _, clients, _ in shop.trained for client in clients]
    pairs = np.diff(np.array(drawn).reshape(18, 2), axis=0)
    assert len(shop.trained) == 18 and np.abs(pairs).min(axis=1).max() > 100


def test_fedasync_moves_on_every_arrival() -> None:
    """Both clients send x_start + 1; with a = 0.5 and no discount for staleness.

    second 1: a, x = 0.5. second 2: a and b, by name: x = 0.5 * 0.5 + 0.5 * 1.5 = 1, then with b's 0 + 1 it
    stays at 1. second 3: a, 0.5 * 1 + 0.5 * 2.
    """
    shop = Shop({"a": 1.0, "b": 2.0}, Asynchronous(mixing=0.5, exponent=0.0), size=2)
    xs, staleness = [], []
    for _ in range(4):
        staleness.append(dict(shop.step().staleness))
        xs.append(float(shop.state.parameters.shared[0]))
    assert xs == pytest.approx([0.5, 1.0, 1.0, 1.5], abs=1e-6)
    assert staleness == [{"a": 0}, {"a": 0}, {"b": 2}, {"a": 0}]


class Blobs(Task):
    """Two clouds in the plane, as many examples for each of up to 16 clients; running statistics if asked."""

    def model(self) -> nn.Module:
        return nn.Linear(2, 2)

    def dataset(self) -> ArrayDataset:
        y = np.arange(160) % 2
        x = np.random.default_rng(0).normal(size=(160, 2)) + 3 * y[:, None]
        return ArrayDataset(x.astype(np.float32), y)


class Normed(Blobs):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))


class Hopeless(Blobs):
    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.sum() * float("inf")


def spec(strategy: dict[str, Any], size: int = 4, clients: int = 16, **simulation: Any) -> RunSpec:
    chosen = {"clients": clients, "engine": "sequential", "test_fraction": 0.0} | simulation
    return RunSpec.parse(
        {
            "run": {"rounds": 5},
            "cohort": {"size": size, "minimum": 1},
            "client": {"batch_size": 4},
            "simulation": chosen,
            "evaluation": {"every": 0},
            "strategy": strategy,
        }
    )


EQUAL = '''
"""FedAvg's client, where every client counts once."""

from dataclasses import dataclass, replace

from fedcore.strategies import LocalSGD


@dataclass(frozen=True)
class Equal(LocalSGD):
    def vectors(self, layout, spec):
        return {n: replace(v, factor=None) for n, v in super().vectors(layout, spec).items()}
'''


@pytest.mark.parametrize("task", [Blobs, Normed])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"optimizer": "adam"},
        {"aggregator": "median"},
        {"aggregator": {"name": "centered_clipping", "radius": 1.0}},
    ],
)
@pytest.mark.parametrize(
    ("clients", "speed"),
    [(16, "constant"), (4, "lognormal")],
    ids=["equal speeds", "everybody, at any speed"],
)
def test_it_is_a_synchronous_run_where_nobody_is_late(
    clients: int, speed: str, parts: dict[str, Any], task: type[Task], tmp_path: Path
) -> None:
    """K = concurrency = cohort and no discount: the same bits as FedAvg where every client counts once."""
    (tmp_path / "equal_weights.py").write_text(EQUAL)
    together = spec({"algorithm": "equal_weights:Equal"} | parts, clients=clients, speed=speed)
    late = spec({"mode": {"name": "buffered", "k": 4, "exponent": 0.0}} | parts, clients=clients, speed=speed)
    states, seconds = [], []
    for one in (together, late):
        simulation = Simulation(task(), one, tmp_path)
        rows = list(simulation.rounds(lambda _: None))
        kept = {name: vector.tobytes() for name, vector in simulation.state.vectors.items()}
        states.append((simulation.state.parameters.digest, kept, [row["train_loss"] for row in rows]))
        seconds.append([row["virtual_seconds"] for row in rows])
        assert {row.get("staleness", 0.0) for row in rows} == {0.0}
    assert states[0] == states[1]
    assert seconds[0] == pytest.approx(seconds[1])


LATE = {"name": "fedbuff", "k": 2}


def test_the_same_spec_gives_the_same_bits_in_both_engines_the_same_model() -> None:
    one, same, other = (
        simulate(Blobs(), spec(LATE, speed="lognormal").with_(f"run.seed={seed}")) for seed in (1, 1, 2)
    )
    assert one.parameters.digest == same.parameters.digest != other.parameters.digest
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.metrics] for r in (one, same)]
    assert rows[0] == rows[1]
    assert any(row["staleness"] > 0 for row in one.metrics)
    fast = spec(LATE, speed="lognormal", engine="vectorized", chunk=3).with_("run.seed=1")
    vectorized = simulate(Blobs(), fast)
    assert vectorized.parameters.shared == pytest.approx(one.parameters.shared, abs=1e-5)
    assert [row["staleness"] for row in vectorized.metrics] == [row["staleness"] for row in one.metrics]


def test_clients_that_keep_something_take_part() -> None:
    run = spec({**LATE, "algorithm": "client_momentum"}, speed="lognormal")
    simulation = Simulation(Blobs(), run)
    folded = {c for _ in simulation.rounds(lambda _: None) for c in simulation.states.states}
    assert folded and all(v.any() for c in folded for v in simulation.states[c].values())


def test_progress_counts_the_arrivals_of_a_step() -> None:
    seen: list[Progress] = []
    simulate(Blobs(), spec(LATE).with_("run.rounds=2"), progress=seen.append)
    assert [(at.round, at.done, at.asked, at.row is not None) for at in seen] == [
        *((number, done, 2, False) for number in (1,) for done in (1, 2)),
        (1, 2, 2, True),
        *((number, done, 2, False) for number in (2,) for done in (1, 2)),
        (2, 2, 2, True),
    ]


def test_a_run_in_which_nobody_has_an_update_ends_with_the_reason() -> None:
    with pytest.raises(
        RunFailed, match="round 1 had 0 of at least 2 updates; refused: delta has a coordinate"
    ):
        simulate(Hopeless(), spec(LATE))


@pytest.mark.parametrize("attack", ["sign_flip", "non_finite", "optimised_alie", "label_flip"])
def test_attackers_come_late_too(attack: str) -> None:
    robust = {"mode": {"name": "buffered", "k": 5}, "aggregator": {"name": "trimmed_mean", "f": 2}}
    fields = {"classes": 2} if attack == "label_flip" else {}
    table = {"name": attack, "fraction": 0.25} | fields
    run = spec(robust, speed="lognormal").model_copy(update={"attack": table})
    result = simulate(Blobs(), run)
    assert len(result.metrics) == 5 and np.isfinite(result.parameters.shared).all()
    assert all(row["folded"] == 5 for row in result.metrics)
    assert any(row["refused"] for row in result.metrics) == (attack == "non_finite")


def test_it_is_sooner_at_an_accuracy_than_rounds_that_wait() -> None:
    """Digits to 85 % at lognormal speeds, 20 of 100 clients at work; three seeds, in virtual seconds."""

    def seconds(seed: int, strategy: dict[str, Any], rounds: int) -> float:
        run = RunSpec.parse(
            {
                "run": {"rounds": rounds, "seed": seed},
                "cohort": {"size": 20},
                "client": {"optimizer": {"name": "sgd", "lr": 0.5}},
                "simulation": {"clients": 100, "engine": "sequential", "speed": "lognormal"},
                "evaluation": {"where": "holdout"},
                "strategy": strategy,
            }
        )
        clock = 0.0
        for row in Simulation(Digits(), run).rounds(lambda _: None):
            clock += row["virtual_seconds"]
            if row["accuracy"] >= 0.85:
                break
        return clock

    gains = [
        seconds(s, {"name": "fedavg"}, 30) / seconds(s, {"name": "fedbuff", "k": 5}, 120) for s in range(3)
    ]
    assert min(gains) > 2
