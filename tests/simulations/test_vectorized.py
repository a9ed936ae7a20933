"""The vectorised engine agrees with the sequential one, and says where it cannot be used."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedcore
from fedcore.client.algorithms import Half
from fedcore.client.trainer import TorchTrainer
from fedcore.errors import SpecError
from fedcore.simulations.answers import ClientStates
from fedcore.simulations.engine import choose
from fedcore.simulations.population import Population
from fedcore.simulations.run import Simulation
from fedcore.simulations.vectorized import Vectorized, obstacle
from fedcore.strategies import LocalSGD, Strategy
from fedcore.strategies.rounds import Round, State, receive_rows, train_plan
from tests.simulations import ragged

SIZES = (1, 3, 4, 7, 8, 12, 20)  # of the clients: below, at and above a batch of 4


class Mixer(nn.Module):
    """Embedding, attention, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed((x.abs() * 5).long().clamp(max=10))
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        output: Tensor = self.head(self.norm(mixed).mean(1))
        return output


MODELS = {**ragged.MODELS, "attention": Mixer}


class Ragged(ragged.Ragged):
    sizes, models = SIZES, MODELS


def spec(*overrides: str) -> fedcore.RunSpec:
    base = ("run.rounds=3", "cohort.size=14", "client.batch_size=4", "simulation.clients=14")
    return fedcore.RunSpec().with_(*base, *overrides)


def trained(task: fedcore.Task, *overrides: str) -> tuple[np.ndarray[Any, Any], list[dict[str, Any]]]:
    """Return the model after three rounds and the rows of metrics."""
    result = fedcore.simulate(task, spec(*overrides))
    return result.parameters.shared, [dict(row) for row in result.metrics]


def distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(a.astype(float) - b) / np.linalg.norm(a))


@pytest.mark.parametrize("chunk", [1, 5, 14])
@pytest.mark.parametrize(
    "optimizer",
    [
        '{name="sgd", lr=0.2}',
        '{name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01}',
        '{name="sgd", lr=0.1, momentum=0.9, nesterov=true}',
        '{name="adam", lr=0.01, weight_decay=0.01}',
        '{name="adamw", lr=0.01, weight_decay=0.1}',
    ],
)
def test_every_optimizer_agrees_with_the_sequential_engine(optimizer: str, chunk: int) -> None:
    options = (f"client.optimizer={optimizer}", "client.epochs=2")
    expected, rows = trained(Ragged(), "simulation.engine=sequential", *options)
    model, ours = trained(Ragged(), "simulation.engine=vectorized", f"simulation.chunk={chunk}", *options)
    assert distance(expected, model) <= 1e-5
    assert [row["folded"] for row in ours] == [14, 14, 14]
    for name in ("train_loss", "loss", "accuracy"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in rows], rel=1e-5)


@pytest.mark.parametrize("shuffle", ["true", "false"])
@pytest.mark.parametrize("model", list(MODELS))
def test_every_family_of_models_agrees(model: str, shuffle: str) -> None:
    options = (f"client.shuffle={shuffle}", "simulation.chunk=4")
    expected, _ = trained(Ragged(model), "simulation.engine=sequential", *options)
    got, _ = trained(Ragged(model), "simulation.engine=vectorized", *options)
    assert distance(expected, got) <= (1e-10 if model == "float64" else 1e-5)


@pytest.mark.parametrize(
    ("cohort", "room", "kept"), [(14, 1 << 20, 4), (14, 500, 1), (14, 0, 0), (13, 1 << 20, 0)]
)
def test_chunks_that_come_again_are_kept_while_there_is_room(cohort: int, room: int, kept: int) -> None:
    options = spec(f"cohort.size={cohort}", "simulation.engine=vectorized", "simulation.chunk=4")
    expected = fedcore.simulate(Ragged(), options).parameters.shared
    simulation = Simulation(Ragged(), options)
    simulation.population.room.left = room
    rows = list(simulation.rounds(lambda _: None))
    assert isinstance(simulation.engine, Vectorized) and len(rows) == 3
    assert len(simulation.engine.stacks.values) == kept
    np.testing.assert_array_equal(simulation.state.parameters.shared, expected)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("model", ["perceptron", "float64", "convolution"])
@pytest.mark.parametrize(
    "strategy",
    [
        '{name="fedprox", mu=0.5}',
        '{name="scaffold"}',
        '{name="fednova", optimizer="adam"}',
        '{name="feddyn", alpha=0.1}',
        '{name="qfedavg", q=2.0}',
        '{name="client_momentum", aggregator="median"}',
        '{name="local_sgd", optimizer="fedexp"}',
    ],
)
def test_every_algorithm_agrees_with_some_clients_a_round(strategy: str, model: str, chunk: int) -> None:
    options = (f"strategy={strategy}", "client.epochs=2", "cohort.size=6", f"simulation.chunk={chunk}")
    expected, rows = trained(Ragged(model), "simulation.engine=sequential", *options)
    got, ours = trained(Ragged(model), "simulation.engine=vectorized", *options)
    assert distance(expected, got) <= (1e-10 if model == "float64" else 1e-5)
    assert [row["train_loss"] for row in ours] == pytest.approx([r["train_loss"] for r in rows], rel=1e-5)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "qfedavg"])
def test_a_schedule_agrees(strategy: str) -> None:
    schedule = 'client.schedule={name="step", every=1, gamma=0.5, warmup=1}'
    options = (f"strategy={strategy}", "client.epochs=2", "simulation.chunk=4")
    expected, _ = trained(Ragged("float64"), "simulation.engine=sequential", schedule, *options)
    got, _ = trained(Ragged("float64"), "simulation.engine=vectorized", schedule, *options)
    constant, _ = trained(Ragged("float64"), "simulation.engine=vectorized", *options)
    assert distance(expected, got) <= 1e-10 < 1e-3 < distance(constant, got)


@dataclass(frozen=True)
class Shy(LocalSGD):
    """A plug-in's algorithm that works on one client at a time."""

    def half(self, spec: fedcore.RunSpec) -> Half[Any]:
        class Alone(Half[Shy]):
            alone = "trains in a way of its own"

        return Alone(self, spec)


def test_an_algorithm_that_trains_alone_says_why() -> None:
    trainer = TorchTrainer(Ragged(), spec(), Strategy(Shy()))
    assert obstacle(trainer) == "Shy trains in a way of its own"
    population = Population(Ragged(), spec())
    choice = choose(population, trainer, ClientStates(), population.names)
    assert (choice.engine.name, choice.reason) == (
        "sequential",
        "not vectorised: Shy trains in a way of its own",
    )


@pytest.mark.parametrize("personal", ["0", "2"])
def test_what_is_not_shared_trains_along_and_stays(personal: str) -> None:
    expected, _ = trained(Ragged(personal=personal), "simulation.engine=sequential")
    got, _ = trained(Ragged(personal=personal), "simulation.engine=vectorized", "simulation.chunk=5")
    assert distance(expected, got) <= 1e-5


def engine(task: fedcore.Task, *overrides: str) -> Simulation:
    return Simulation(task, spec(*overrides))


def test_rows_enter_the_sums_as_the_same_integers() -> None:
    simulation = engine(Ragged(), "simulation.engine=vectorized", "simulation.chunk=14")
    assert isinstance(simulation.engine, Vectorized)
    ref, clients = simulation.ref(1, "train"), simulation.cohort(1, "train")
    rows = simulation.engine.train(ref, clients, simulation.engine.stack(clients)).rows
    plan = train_plan(simulation.strategy, simulation.spec, simulation.layout, ref, clients, 14)
    together, apart = Round(plan), Round(plan)
    receive_rows(together, clients, rows)
    for client, update in zip(clients, rows.updates(), strict=True):
        apart.sums.add(update)
        assert client in together.folded
    assert (together.sums.words.wide == apart.sums.words.wide).all() and apart.sums.words.wide.any()


def test_clients_are_answered_largest_first_whatever_order_they_come_in() -> None:
    simulation = engine(Ragged(), "simulation.engine=vectorized", "simulation.chunk=14", "client.epochs=2")
    assert isinstance(simulation.engine, Vectorized)
    ref, clients = simulation.ref(1, "train"), simulation.cohort(1, "train")
    answers = simulation.engine.train(ref, clients, simulation.engine.stack(clients))
    assert sorted(answers.clients) == sorted(clients)
    assert (np.diff(answers.rows.scalars["weight"]) <= 0).all()
    for client, update in zip(answers.clients, answers.rows.updates(), strict=True):
        alone, _ = simulation.trainer.train(ref, client, simulation.population.training(client), {})
        assert distance(alone.vectors["delta"], update.vectors["delta"]) <= 1e-4
        assert update.scalars == pytest.approx(alone.scalars, rel=1e-5)


def test_a_step_trains_only_those_who_have_examples_left() -> None:
    """Of sizes 20, 12, 8, 7, 4, 3, 1, two clients each, in batches of 4."""
    simulation = engine(Ragged(), "simulation.engine=vectorized", "simulation.chunk=14")
    assert isinstance(simulation.engine, Vectorized)
    examples = simulation.population.training
    clients = tuple(sorted(simulation.population.names, key=lambda name: -len(examples(name))))
    stack = simulation.engine.stack(clients)
    batches = list(simulation.engine.batches(simulation.ref(1, "train"), clients, stack))
    assert [len(x) for x, _, _ in batches] == [14, 8, 4, 2, 2]
    assert sum(int(mask.sum()) for _, _, mask in batches) == 2 * sum(SIZES)


class Squared(Ragged):
    """A loss of the task's own: the vectorised engine takes it example by example."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, nn.functional.one_hot(target, 3).to(output.dtype))


def test_a_loss_of_the_tasks_own_agrees() -> None:
    expected, rows = trained(Squared("float64"), "simulation.engine=sequential", "client.epochs=2")
    got, ours = trained(Squared("float64"), "simulation.engine=vectorized", "client.epochs=2")
    assert distance(expected, got) <= 1e-10
    assert [row["train_loss"] for row in ours] == pytest.approx([row["train_loss"] for row in rows])


def test_one_bad_row_is_refused_and_the_others_are_folded() -> None:
    simulation = engine(Ragged(), "simulation.engine=vectorized", "simulation.chunk=14")
    assert isinstance(simulation.engine, Vectorized)
    ref, clients = simulation.ref(1, "train"), simulation.cohort(1, "train")
    rows = simulation.engine.train(ref, clients, simulation.engine.stack(clients)).rows
    rows.vectors["delta"][3, 7] = np.nan
    round = Round(train_plan(simulation.strategy, simulation.spec, simulation.layout, ref, clients, 14))
    receive_rows(round, clients, rows)
    assert round.verdicts[clients[3]].status == "refused"
    assert len(round.folded) == 13


class Dropped(Ragged):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))


def test_dropout_draws_other_masks_for_every_client_from_the_same_distribution() -> None:
    """In distribution only: the two engines draw from differently seeded streams."""
    deltas = {}
    for name in ("sequential", "vectorized"):
        simulation = engine(Dropped(), f"simulation.engine={name}", "simulation.chunk=14", "run.seed=1")
        plain = []
        for number in range(1, 41):
            simulation.state = State(0, simulation.trainer.parameters())
            simulation.train(number, lambda _: None)
            plain.append(simulation.state.parameters.shared.copy())
        deltas[name] = np.stack(plain)
    a, b = deltas["sequential"], deltas["vectorized"]
    error = np.sqrt((a.var(0) + b.var(0)) / len(a)) + 1e-6
    assert (np.abs(a.mean(0) - b.mean(0)) < 6 * error).all()
    assert b.std(0).max() > 0


class Normed(Ragged):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Unflatten(1, (2, 3)), nn.SyncBatchNorm(2), nn.Flatten(), nn.Linear(6, 3))


def test_what_cannot_be_vectorised_runs_sequentially_and_names_the_module() -> None:
    task = Normed()
    population = Population(task, spec())
    choice = choose(population, TorchTrainer(task, spec()), ClientStates(), population.names)
    assert choice.engine.name == "sequential"
    assert "SyncBatchNorm '1'" in choice.reason
    with pytest.raises(SpecError, match=r'"vectorized" cannot train this task: SyncBatchNorm .* use "auto"'):
        engine(Normed(), "simulation.engine=vectorized")


class Constant(nn.Module):
    """A buffer that never changes, which nobody can tell from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        shifted: Tensor = x + self.get_buffer("shift")
        return shifted


class Shifted(Ragged):
    def model(self) -> nn.Module:
        return nn.Sequential(Constant(), nn.Linear(6, 3))


def test_buffers_are_averaged_and_so_keep_a_model_sequential() -> None:
    simulation = engine(Shifted())
    assert simulation.engine.name == "sequential"
    assert "buffer '0.shift'" in simulation.choice.reason
    assert simulation.train(1, lambda _: None)["folded"] == 14


def test_auto_measures_chooses_and_writes_down_what_it_chose() -> None:
    simulation = engine(Ragged())
    resolved = simulation.spec.simulation
    assert resolved.engine in ("sequential", "vectorized")
    assert resolved.chunk >= 1
    assert "x sequential" in simulation.choice.reason
    again = Simulation(Ragged(), simulation.spec)
    assert (again.engine.name, again.engine.chunk) == (resolved.engine, resolved.chunk)


def test_measuring_leaves_no_trace() -> None:
    before = torch.random.get_rng_state()
    measured, _ = trained(Ragged(), "simulation.engine=vectorized")
    told, _ = trained(Ragged(), "simulation.engine=vectorized", "simulation.chunk=8")
    assert distance(measured, told) <= 1e-6
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("model", ["perceptron", "convolution"])
def test_autocast_computes_in_bfloat16_in_both_engines(model: str) -> None:
    """Each rounds where it computes, so they agree to a few of bfloat16's 2^-9."""
    options = ("client.autocast=true", "simulation.chunk=4", "client.optimizer.lr=0.2")
    whole, _ = trained(Ragged(model), "simulation.engine=sequential", *options[1:])
    alone, _ = trained(Ragged(model), "simulation.engine=sequential", *options)
    chunk, _ = trained(Ragged(model), "simulation.engine=vectorized", *options)
    assert distance(whole, alone) > 1e-5 and distance(whole, chunk) > 1e-5
    assert distance(alone, chunk) < 0.03


OUT_OF_MEMORY = """
import resource
import fedcore
from fedcore.simulations.run import Simulation
from torch import nn
import torch

class Wide(fedcore.Task):
    def model(self):
        return nn.Sequential(nn.Linear(6, 60_000), nn.ReLU(), nn.Linear(60_000, 3))

    def data(self, client):
        part = client.rng.normal(size=(2, 6)).astype("float32"), client.rng.integers(0, 3, 2)
        return fedcore.Split(part, part)

def run(engine, chunk):
    spec = fedcore.RunSpec().with_("run.rounds=2", "cohort.size=64", "simulation.clients=64",
        f"simulation.engine={engine}", f"simulation.chunk={chunk}", "evaluation.every=0")
    simulation = Simulation(Wide(), spec)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 250 * 2**20, hard))  # 64 rows and gradients take 308
    list(simulation.rounds(lambda _: None))
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return simulation

with torch.random.fork_rng([]):
    halved, alone = run("vectorized", 64), run("sequential", 0)
a, b = halved.state.parameters.shared, alone.state.parameters.shared
print(halved.spec.simulation.chunk, float(((a - b) ** 2).sum() ** 0.5 / (b ** 2).sum() ** 0.5) < 1e-5)
"""


@pytest.mark.slow
def test_out_of_memory_halves_the_chunk_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(OUT_OF_MEMORY)
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert not done.returncode, done.stderr
    chunk, close = done.stdout.split()
    assert int(chunk) < 64 and close == "True"
    assert "out of memory with chunk 64; going on with 32" in done.stderr
