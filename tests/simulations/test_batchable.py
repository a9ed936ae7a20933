"""Recurrent layers and batch norms train side by side as they do one by one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.utils.rnn import pack_padded_sequence

from fedcore import ArrayDataset, RunSpec, Split, Task
from fedcore.client.algorithms import half_of
from fedcore.client.module import Resident
from fedcore.models import char_lstm
from fedcore.simulations.batchable import Batchable, unbatchable
from fedcore.simulations.run import Simulation
from fedcore.simulations.vectorized import Vectorized
from fedcore.strategies import from_table
from fedcore.task import Client

pytestmark = pytest.mark.slow  # together more than ten seconds

SIZES = (0, 2, 3, 4, 7, 8, 13)  # of the clients; with batches of 5 none of them has one of a single example
WIDTH = 6


class Last(nn.Module):
    """A recurrent layer's last output, and a linear one."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (1 + layer.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.layer(x.unsqueeze(2))
        logits: Tensor = self.head(outputs[:, -1])
        return logits


class Packed(Last):
    """Sequences as torch packs them."""

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.layer(pack_padded_sequence(x.unsqueeze(2), [WIDTH] * len(x), batch_first=True))
        logits: Tensor = self.head(last[-1])
        return logits


class Own(nn.GRU):
    """A user's own layer, whose forward is anybody's guess."""


def perceptron(**options: Any) -> nn.Module:
    """A bias before a norm has a gradient of rounding errors, of which Adam would make steps of full size."""
    return nn.Sequential(
        nn.Linear(WIDTH, 8, bias=False), nn.BatchNorm1d(8, **options), nn.Tanh(), nn.Linear(8, 3)
    )


def images() -> nn.Module:
    """Two norms over images of 2 x 3 pixels, the second of which a single example would not trouble."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4, affine=False),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Last(nn.LSTM(1, 5, 2, batch_first=True)),
    "gru": lambda: Last(nn.GRU(1, 5, bidirectional=True, batch_first=True)),
    "rnn": lambda: Last(nn.RNN(1, 5, bias=False, batch_first=True)),
    "norm": perceptron,
    "cumulative": lambda: perceptron(momentum=None),
    "untracked": lambda: perceptron(track_running_stats=False),
    "images": images,
    "packed": lambda: Packed(nn.GRU(1, 5, batch_first=True)),
    "own": lambda: Last(Own(1, 5, batch_first=True)),
    "folded": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)),
        nn.Flatten(0, 1),
        nn.BatchNorm1d(2),
        nn.Unflatten(0, (-1, 3)),
        nn.Flatten(),
        nn.Linear(6, 3),
    ),
}
GOOD = ("lstm", "gru", "rnn", "norm", "cumulative", "untracked", "images")


class Ragged(Task):
    """Clients of different sizes, with inputs on different scales."""

    def __init__(self, model: str, dtype: str = "float32", sizes: tuple[int, ...] = SIZES) -> None:
        self.kind, self.dtype, self.sizes = model, dtype, sizes

    def model(self) -> nn.Module:
        return MODELS[self.kind]().to(getattr(torch, self.dtype))

    def data(self, client: Client) -> Split[Any]:
        assert client.index is not None
        n = self.sizes[client.index % len(self.sizes)]
        x = client.rng.normal(client.index, 1 + client.index, size=(n, WIDTH)).astype(self.dtype)
        return Split((x, client.rng.integers(0, 3, n)), None)

    def holdout(self) -> ArrayDataset:
        rng = np.random.default_rng(0)
        return ArrayDataset(rng.normal(size=(20, WIDTH)).astype(self.dtype), rng.integers(0, 3, 20))


def spec(*overrides: str) -> RunSpec:
    base = ("run.rounds=3", "cohort.size=7", "client.batch_size=5", "client.epochs=2", "simulation.clients=7")
    return RunSpec().with_(*base, "client.optimizer.lr=0.05", *overrides)


def run(task: Task, engine: str, *overrides: str) -> Simulation:
    """Return a simulation after all its rounds."""
    chunk = ("simulation.chunk=3",) if engine == "vectorized" else ()
    simulation = Simulation(task, spec(f"simulation.engine={engine}", *chunk, *overrides))
    assert simulation.engine.name == engine
    list(simulation.rounds(lambda _: None))
    return simulation


def agree(task: Task, tolerance: float, *overrides: str) -> tuple[Simulation, Simulation]:
    """Run a task in both engines and compare all that was averaged."""
    one, other = run(task, "sequential", *overrides), run(task, "vectorized", *overrides)
    for name, expected in one.state.parameters.vectors().items():
        found = other.state.parameters.vectors()[name]
        assert np.linalg.norm(found - expected.astype(float)) <= tolerance * np.linalg.norm(expected), name
    return one, other


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("model", GOOD)
def test_both_engines_agree(model: str, dtype: str, tolerance: float) -> None:
    one, _ = agree(Ragged(model, dtype), tolerance)
    fresh = one.trainer.parameters().buffers
    assert len(fresh) == {"norm": 16, "cumulative": 16, "images": 16}.get(model, 0)


@pytest.mark.parametrize("model", ["lstm", "cumulative"])
@pytest.mark.parametrize(
    "options",
    [
        ("strategy=scaffold", "cohort.size=4"),
        ('strategy={name="qfedavg", q=2.0}',),
        ('strategy={name="fedprox", mu=0.5}', 'client.optimizer={name="adam", lr=0.01}'),
        ("client.optimizer.momentum=0.9", "client.shuffle=false", "client.epochs=1", "client.steps=2"),
    ],
)
def test_algorithms_and_optimisers_agree(model: str, options: tuple[str, ...]) -> None:
    agree(Ragged(model, "float64"), 1e-10, *options)


@pytest.mark.parametrize("model", ["norm", "cumulative", "images"])
def test_norms_that_stay_on_the_device_keep_their_statistics(model: str) -> None:
    one, other = agree(Ragged(model, "float64"), 1e-10, "strategy=fedbn")
    for client in one.population.names:
        kept = other.states[client]["model.local"]
        np.testing.assert_allclose(kept, one.states[client]["model.local"], rtol=1e-9)
    assert kept[-1] == 3 * 2 * 3, "three rounds, two epochs, three batches of at most five"


def test_the_network_of_shakespeare_agrees() -> None:
    class Letters(Task):
        def model(self) -> nn.Module:
            return char_lstm(20).double()

        def data(self, client: Client) -> Split[Any]:
            n = 2 + (client.index or 0) % 3
            return Split((client.rng.integers(0, 20, (n, 6)), client.rng.integers(0, 20, n)), None)

        def holdout(self) -> ArrayDataset:
            return ArrayDataset(np.zeros((4, 6), np.int64), np.arange(4))

    agree(Letters(), 1e-10, "client.batch_size=2")


def test_engines_share_tensors_and_nothing_else() -> None:
    simulation = run(Ragged("images"), "vectorized")
    module, engine = simulation.trainer.model.module, simulation.engine  # type: ignore[attr-defined]
    assert "forward" not in vars(module[2]) and "present" not in dict(module[2].named_buffers())
    assert "forward" in vars(engine.model.module[2])  # type: ignore[attr-defined]
    ours = dict(engine.model.module.named_parameters())  # type: ignore[attr-defined]
    assert all(ours[name] is parameter for name, parameter in module.named_parameters())


def test_a_model_without_such_layers_is_not_copied() -> None:
    class Plain(Ragged):
        def model(self) -> nn.Module:
            return nn.Linear(WIDTH, 3)

    model = Resident(Plain(""), 1)
    assert Batchable(model).module is model.module


def test_a_batch_of_one_example_is_the_error_that_it_is_one_by_one() -> None:
    simulation = Simulation(Ragged("norm", sizes=(4, 6)), spec("simulation.engine=sequential"))
    together = Vectorized(simulation.population, simulation.trainer, simulation.states, 2)  # type: ignore[arg-type]
    ref, clients = simulation.ref(1, "train"), simulation.cohort(1, "train")
    for work in (
        lambda: simulation.train(1, lambda _: None),
        lambda: together.train(ref, clients, together.stack(clients)),
    ):
        with pytest.raises(ValueError, match=r"(?i)expected more than 1 value per channel when training"):
            work()
    agree(Ragged("images", "float64", sizes=(4, 6)), 1e-10)  # a pixel more, and there is something to compare


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    kind=st.sampled_from([nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]),
    momentum=st.sampled_from([0.1, 0.7, None]),
    steps=st.integers(1, 3),
    padding=st.sampled_from([0.0, -3.0, 1e6]),
)
def test_padding_is_not_counted_by_a_norm(
    counts: list[int], kind: type[Any], momentum: float | None, steps: int, padding: float
) -> None:
    """Every client's norm is one of torch's that saw only its own examples."""
    dims = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[kind]

    class Norm(Task):
        def model(self) -> nn.Module:
            return nn.Sequential(kind(2, momentum=momentum, dtype=torch.float64), nn.Linear(3, 1).double())

    model = Resident(Norm(), 1)
    batchable, begin = Batchable(model), [{} for _ in counts]  # type: ignore[var-annotated]
    batchable.module = batchable.module[0]  # type: ignore[index]
    batchable.masks = [name.removeprefix("0.") for name in batchable.masks]
    received = torch.tensor([0.5, -0.5, 2.0, 3.0], dtype=torch.float64)
    remembered = {n.removeprefix("0."): t for n, t in batchable.statistics(received, begin).items()}
    alone = [kind(2, momentum=momentum, dtype=torch.float64) for _ in counts]
    for norm in alone:
        norm.running_mean.copy_(received[:2])
        norm.running_var.copy_(received[2:])
    torch.manual_seed(0)
    mask = (torch.arange(5) < torch.tensor(counts)[:, None]).double()
    for _ in range(steps):
        x = torch.randn(len(counts), 5, 2, *(3,) * dims, dtype=torch.float64)
        x[mask == 0] = padding
        found = vmap(batchable)(remembered, x, mask)
        for norm, count, rows, output in zip(alone, counts, x, found, strict=True):
            assert not output[count:].any(), "padding stays small, however deep the model"
            torch.testing.assert_close(norm(rows[:count]), output[:count], rtol=1e-9, atol=1e-9)
    for i, norm in enumerate(alone):
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(remembered[name][i], buffer, rtol=1e-9, atol=1e-9)
    batchable.module.eval()
    for norm, rows, output in zip(alone, x, vmap(batchable)(remembered, x, mask), strict=True):
        torch.testing.assert_close(norm.eval()(rows), output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("own", "Own 'layer' is not nn.RNN, nn.GRU or nn.LSTM without projection"),
        ("packed", "a packed sequence has other lengths for every client; pad it instead"),
        ("folded", "a batch norm gets 15 rows of a batch of 5"),
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, where packing fails
def test_what_cannot_be_batched_is_trained_one_by_one(model: str, said: str) -> None:
    simulation = Simulation(Ragged(model), spec())
    assert simulation.engine.name == "sequential"
    assert said in simulation.choice.reason


@pytest.mark.parametrize(
    ("layer", "strategy", "said"),
    [
        (
            nn.LSTM(3, 4, proj_size=2),
            "fedavg",
            "LSTM '1' is not nn.RNN, nn.GRU or nn.LSTM without projection",
        ),
        (nn.SyncBatchNorm(3), "fedavg", "SyncBatchNorm '1' is not nn.BatchNorm1d"),
        (nn.InstanceNorm1d(3, track_running_stats=True), "fedavg", "buffer '1.running_mean' may change"),
        (
            nn.InstanceNorm1d(3, track_running_stats=True),
            "fedbn",
            "each client has buffers of its own, such as",
        ),
        (nn.BatchNorm1d(3, track_running_stats=False), "qfedavg", "has no statistics to test the received"),
        (nn.BatchNorm1d(3, track_running_stats=False), "fedavg", ""),
        (nn.BatchNorm1d(3), "qfedavg", ""),
        (nn.BatchNorm1d(3), "fedbn", ""),
    ],
)
def test_what_is_known_to_be_unbatchable_is_named(layer: nn.Module, strategy: str, said: str) -> None:
    class Two(Task):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(2, 3), layer)

    run = spec(f"strategy={strategy}")
    half = half_of(from_table(run.strategy).algorithm, run)
    problem = unbatchable(Resident(Two(), 1, personal=half.personal), half)
    assert said in problem
    assert bool(said) == bool(problem)
