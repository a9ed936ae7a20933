"""DP-SGD: each step by hand, Opacus's own engine beside it, and what must be random, hidden or refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import sqrt
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import PrivacyEngine
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from fedcore.client.algorithms import End, Half, Sent, Start
from fedcore.client.dpsgd import noise_generator
from fedcore.client.examples import DatasetExamples, Examples, examples_from
from fedcore.client.module import build
from fedcore.client.trainer import TorchTrainer, initial_seed, make_optimizer
from fedcore.client.worker import Job
from fedcore.errors import TaskError
from fedcore.layout import Parameters
from fedcore.messages import Ref, Update
from fedcore.seeds import generator
from fedcore.simulations.run import simulate
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.strategies.algorithms import LocalSGD
from fedcore.task import Task

SILENT = 1e-12  # a noise multiplier that leaves the arithmetic to be seen
CLIP, EXPECTED, COUNT = 0.6, 4, 7  # some of the gradients below are longer than this, some shorter


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = DPLSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.lstm(x)[0][:, -1])
        return output


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def frozen_body() -> nn.Module:
    """A body at rest beside a small trained adapter, as LoRA has it."""
    body, down, up = nn.Linear(4, 4), nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False)
    body.requires_grad_(False)

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.down, self.up, self.head = body, down, up, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(self.body(x) + self.up(self.down(x)))
            return output

    return Adapted()


HEAD = partial(nn.Linear, 6, 3)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)), (1, 4, 4)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(6, 4), Mean(), nn.Linear(4, 3)), (5,)),
    "lstm": (Lstm, (5, 4)),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.GroupNorm(2, 6), HEAD()), (4,)),
    "frozen body": (frozen_body, (4,)),
}  # fmt: skip
models = pytest.mark.parametrize("model", MODELS)
clippings = pytest.mark.parametrize("clipping", ["hooks", "ghost"])


@dataclass(frozen=True)
class Net(Task):
    make: str = "linear"

    def model(self) -> nn.Module:
        return MODELS[self.make][0]().double()

    def examples(self, count: int = COUNT, seed: int = 0) -> Examples:
        rng, shape = np.random.default_rng(seed), (count, *MODELS[self.make][1])
        x = rng.integers(0, 6, shape) if self.make == "embedding" else rng.normal(size=shape)
        return examples_from((x, rng.integers(0, 3, count)))


class Weighted(Net):
    """Its loss is divided by the weights of the whole batch."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target, torch.tensor([1.0, 10.0, 0.1], dtype=output.dtype))


def spec(
    noise: float = SILENT, rate: float = 1.0, *, seed: int = 0, algorithm: Any = "fedavg", **of: Any
) -> RunSpec:
    """A run of one step, or [client] `steps`, with batches of all examples unless a `rate` is given."""
    privacy = {name: of.pop(name) for name in ("clipping", "at_once", "clip_norm") if name in of}
    return RunSpec.parse(
        {
            "run": {"seed": seed},
            "client": {"batch_size": EXPECTED, "steps": 1, **of},
            "strategy": algorithm,
            "privacy": {
                "level": "example",
                "noise_multiplier": noise,
                "sampling_rate": rate,
                "clip_norm": CLIP,
                **privacy,
            },
        }
    )


def ref(round: int = 1, attempt: int = 0) -> Ref:
    return Ref("r", round, attempt, "train")


def train(trainer: TorchTrainer, data: Examples, of: Ref | None = None, client: str = "a") -> Update:
    return trainer.train(of or ref(), client, data, {})[0]


def delta(task: Task, run: RunSpec, data: Examples, **of: Any) -> Any:
    return train(TorchTrainer(task, run), data, **of).vectors["delta"]


def by_hand(
    task: Task, run: RunSpec, data: Examples, batches: Sequence[Sequence[int]], correct: Any = None
) -> Any:
    """Clip each example's gradient in a plain loop, add up, divide, correct, step: no noise, no Opacus."""
    model = build(task, initial_seed(run.run.seed))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(run.client, trained)
    begin = nn.utils.parameters_to_vector(trained).detach()
    for batch in batches:
        total = torch.zeros_like(begin)
        for i in batch:
            x, y = data.batch(slice(i, i + 1))
            gradients = torch.autograd.grad(task.loss(model(x), y), trained)
            gradient = torch.cat([g.flatten() for g in gradients])
            total += gradient * min(1.0, CLIP / float(gradient.norm()))
        mean = total / EXPECTED
        if correct:
            mean += correct(nn.utils.parameters_to_vector(trained).detach() - begin)
        for p, part in zip(trained, torch.split(mean, [p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()
    return (nn.utils.parameters_to_vector(trained).detach() - begin).numpy()


close = partial(pytest.approx, rel=1e-5, abs=1e-7)  # Opacus divides by norm + 1e-6


@models
@clippings
@pytest.mark.parametrize("at_once", [0, 1, 3, COUNT])
def test_a_step_by_hand(model: str, clipping: str, at_once: int) -> None:
    task, run = Net(model), spec(clipping=clipping, at_once=at_once)
    data = task.examples()
    expected = by_hand(task, run, data, [range(COUNT)])
    assert delta(task, run, data) == close(expected)
    loose = by_hand(task, spec(), data, [range(COUNT)]) / 0.1 * EXPECTED
    assert 0 < np.linalg.norm(loose) < CLIP * COUNT, "some gradients are clipped"


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adam": {"name": "adam", "lr": 0.01, "betas": [0.8, 0.9]},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
}


@clippings
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_steps_along_the_private_gradient(clipping: str, optimizer: dict[str, Any]) -> None:
    task, run = Net(), spec(clipping=clipping, optimizer=optimizer, steps=3, at_once=2)
    data, trainer = task.examples(), TorchTrainer(task, run)
    expected = by_hand(task, run, data, [range(COUNT)] * 3)
    for client in "ab":  # the second finds no moments of the first
        assert train(trainer, data, client=client).vectors["delta"] == pytest.approx(expected, rel=1e-4)


@clippings
def test_fedprox_pulls_after_the_clip(clipping: str) -> None:
    """Clipped along with the gradients, this pull would be shorter than the clip norm."""
    mu, task = 9.0, Net()
    run, data = spec(clipping=clipping, steps=3, algorithm={"name": "fedprox", "mu": mu}), task.examples()
    batches = [range(COUNT)] * 3
    expected = by_hand(task, run, data, batches, lambda moved: mu * moved)
    assert np.linalg.norm(expected - by_hand(task, run, data, batches)) > 0.05
    assert delta(task, run, data) == close(expected)


@clippings
def test_scaffolds_control_variate_is_not_clipped(clipping: str) -> None:
    task, run = Net(), spec(clipping=clipping, steps=2, algorithm="scaffold")
    data, trainer = task.examples(), TorchTrainer(task, run)
    control = np.full(trainer.layout.shared_size, 5.0)  # far longer than the clip norm
    start = trainer.parameters()
    trainer.receive(Parameters(start.shared, start.buffers, {"control": control}))
    update = train(trainer, data)
    expected = by_hand(task, run, data, [range(COUNT)] * 2, lambda _: torch.from_numpy(control))
    assert update.vectors["delta"] == close(expected)
    assert update.vectors["control_delta"] == close(-control - update.vectors["delta"] / (2 * 0.1))


def test_opacus_engine_does_the_same() -> None:
    """The same batches and the same noise through make_private; B and q are then its loader's."""
    task, count, size = Net("conv"), 12, EXPECTED
    run, data = spec(1.3, rate=size / count, steps=6), task.examples(count)
    model = build(task, initial_seed(0))
    begin = nn.utils.parameters_to_vector(model.parameters()).detach()
    x, y = data.batch(slice(0, count))
    with pytest.warns(UserWarning, match="Secure RNG turned off"):
        engine = PrivacyEngine()
    place = (0, "dp noise", 1, 0, "a")
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=size),
        noise_multiplier=1.3,
        max_grad_norm=CLIP,
        noise_generator=noise_generator(torch.device("cpu"), generator(*place)),
    )
    assert loader.sample_rate == run.privacy.sampling_rate  # type: ignore[union-attr]
    trainer = TorchTrainer(task, run)
    assert trainer.private
    trainer.private.begin(ref(), "a")
    batches = list(trainer.private.batches(data))
    assert len({len(x) for x, _ in batches}) > 1, "batches of several sizes"
    for x, y in batches:
        optimizer.zero_grad()
        with pytest.warns(UserWarning, match="Full backward hook is firing"):
            cross_entropy(private(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    expected = (nn.utils.parameters_to_vector(model.parameters()).detach() - begin).numpy()
    assert train(trainer, data).vectors["delta"] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@clippings
@pytest.mark.parametrize("steps", [1, 4])
def test_the_noise_has_its_deviation_and_is_there_without_examples(clipping: str, steps: int) -> None:
    """z C / B a step. Five deviations of a sum of squares: a false alarm once in a million seeds."""

    class Wide(Net):
        def model(self) -> nn.Module:
            return nn.Linear(4, 5000)

    run = spec(2.0, 0.5, clipping=clipping, steps=steps, optimizer={"lr": 1.0})
    trainer = TorchTrainer(Wide(), run)
    update = train(trainer, examples_from(None))
    noise = update.vectors["delta"].astype(np.float64) / (2.0 * CLIP / EXPECTED * sqrt(steps))
    size = len(noise)
    assert abs(np.square(noise).sum() - size) < 5 * sqrt(2 * size)
    assert abs(noise.sum()) < 5 * sqrt(size)
    assert update.scalars == {"weight": 0.0, "loss": 0.0, "count": 0.0}


@clippings
@pytest.mark.parametrize("at_once", [0, 2])
def test_empty_batches_are_steps_too(clipping: str, at_once: int) -> None:
    """Rarely drawn examples: most steps have none, and all of them move the model."""
    task, run = (
        Net("conv"),
        spec(1.0, 0.05, clipping=clipping, steps=20, at_once=at_once, algorithm="scaffold"),
    )
    trainer = TorchTrainer(task, run)
    assert trainer.private
    trainer.private.begin(ref(), "a")
    sizes = [len(x) for x, _ in trainer.private.batches(task.examples())]
    assert len(sizes) == 20 and sizes.count(0) > 10 and sum(sizes) > 0
    places = [trainer.model.flat["shared"].read().clone()]
    trainer.optimizer.register_step_post_hook(
        lambda *_: places.append(trainer.model.flat["shared"].read().clone())
    )
    update = train(trainer, task.examples())
    assert len(places) == 21 and not any(torch.equal(a, b) for a, b in pairwise(places))
    assert update.scalars["count"] == sum(sizes)


def test_poisson_batches() -> None:
    """Sizes are binomial, and an example's place, the others and the past do not matter.

    Each bound is five standard deviations: all together raise a false alarm once in ten thousand seeds.
    """
    count, rate, steps = 40, 0.3, 4000
    data = examples_from((np.arange(count), np.zeros(count)))
    trainer = TorchTrainer(Net(), spec(rate=rate, steps=steps))
    assert trainer.private
    trainer.private.begin(ref(), "a")
    member = np.zeros((steps, count))
    for row, (x, _) in zip(member, trainer.private.batches(data), strict=True):
        row[x.long().numpy()] = 1
    spread = rate * (1 - rate)
    sizes = member.sum(1)
    assert abs(sizes.mean() - count * rate) < 5 * sqrt(count * spread / steps)
    assert abs(sizes.var() / (count * spread) - 1) < 5 * sqrt(2 / steps)
    assert np.abs(member.mean(0) - rate).max() < 5 * sqrt(spread / steps)
    free = member - rate
    for together in (free[:, :-1] * free[:, 1:], free[:-1] * free[1:]):
        assert abs(together.mean()) < 5 * spread / sqrt(together.size)


@clippings
@pytest.mark.parametrize("task", [Net(), Net("conv"), Weighted()])
@settings(max_examples=15)
@given(seed=st.integers(0, 999), left_out=st.integers(0, COUNT - 1), scale=st.sampled_from([0.1, 1.0, 1e6]))
def test_one_example_moves_a_step_by_the_clip_norm_at_most(
    clipping: str, task: Net, seed: int, left_out: int, scale: float
) -> None:
    """The sensitivity that the noise is made for, whatever the loss divides by."""
    x, y = task.examples(COUNT, seed).batch(slice(0, COUNT))
    x[left_out] *= scale
    rest = [i for i in range(COUNT) if i != left_out]
    run = spec(clipping=clipping, optimizer={"lr": 1.0})
    both = [delta(task, run, examples_from(pair)) for pair in ((x, y), (x[rest], y[rest]))]
    assert np.linalg.norm(both[0] - both[1]) <= CLIP / EXPECTED * (1 + 1e-9)


@clippings
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_an_example_without_a_finite_gradient_does_not_show(clipping: str, bad: float) -> None:
    task, run = Net("conv"), spec(1.0, clipping=clipping)
    x, y = task.examples().batch(slice(0, COUNT))
    x[-1, 0, 0] = bad
    ours = train(TorchTrainer(task, run), examples_from((x, y)))
    without = train(TorchTrainer(task, run), examples_from((x[:-1], y[:-1])))
    moved = ours.vectors["delta"] - without.vectors["delta"]
    assert np.isfinite(moved).all()
    if bad != 1e200:  # that one has a gradient, which is clipped
        assert moved == pytest.approx(0, abs=1e-9)
    assert np.linalg.norm(moved) <= 0.1 * CLIP / EXPECTED * (1 + 1e-9)


def state_of(generator: torch.Generator) -> Tensor:
    return generator.get_state().view(torch.int64)[3:627]


def test_noise_comes_from_all_of_the_generators_key() -> None:
    """Its state is none of the 2^32 that torch makes of a seed, whose first word is the seed."""
    cpu = torch.device("cpu")
    words = [state_of(noise_generator(cpu, generator("x", i))) for i in range(2)]
    assert (words[0] != words[1]).float().mean() > 0.99
    of_seed = [state_of(torch.Generator().manual_seed(seed)) for seed in (5, 2**32 + 5, int(words[0][0]))]
    assert torch.equal(of_seed[0], of_seed[1]) and of_seed[2][0] == words[0][0]
    assert not torch.equal(of_seed[2], words[0])
    size = 10**6
    drawn = torch.randn(size, generator=noise_generator(cpu, generator("y")), dtype=torch.float64)
    assert abs(float(drawn.mean())) < 5 / sqrt(size) and abs(float(drawn.var()) - 1) < 5 * sqrt(2 / size)
    again = torch.randn(size, generator=noise_generator(cpu, generator("y")), dtype=torch.float64)
    assert torch.equal(drawn, again)


def test_seed_round_attempt_and_client_decide_in_a_simulation() -> None:
    task, run = Net(), spec(1.0, 0.5, steps=3)
    data = task.examples()

    def trained(run: RunSpec = run, **of: Any) -> bytes:
        row: bytes = delta(task, run, data, **of).tobytes()
        return row

    assert trained() == trained()
    trainer = TorchTrainer(task, run)
    train(trainer, task.examples(5, 1), client="b")
    assert train(trainer, data).vectors["delta"].tobytes() == trained(), "whoever trained before"
    others = [trained(of=ref(2)), trained(of=ref(1, 1)), trained(client="b")]
    assert len({trained(), *others}) == 4


def test_entropy_decides_in_a_deployment() -> None:
    """Batches and noise both: two with the same entropy agree, two with the same seed alone do not."""
    task, data = Net(), Net().examples(200)

    def drawn(entropy: int | None, noise: float = 1.0, rate: float = 0.5) -> tuple[bytes, list[int]]:
        trainer = TorchTrainer(task, spec(noise, rate, steps=3), entropy=entropy)
        row = train(trainer, data).vectors["delta"].tobytes()
        assert trainer.private
        trainer.private.begin(ref(), "a")
        return row, [len(x) for x, _ in trainer.private.batches(data)]

    assert drawn(7) == drawn(7)
    seen = [drawn(entropy) for entropy in (None, 7, 2**255 + 7)]
    assert len({row for row, _ in seen}) == len({tuple(sizes) for _, sizes in seen}) == 3
    noise_alone = [drawn(entropy, rate=1.0)[0] for entropy in (7, 8)]
    assert noise_alone[0] != noise_alone[1]


def test_entropy_decides_over_dropout_too() -> None:
    """Masks shift from example to example, so who knew them would see more than the noise hides."""

    class Dropped(Net):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 64), nn.Dropout(), nn.Linear(64, 3)).double()

    def trained(entropy: int) -> bytes:
        trainer = TorchTrainer(Dropped(), spec(SILENT), entropy=entropy)
        row: bytes = train(trainer, Net().examples()).vectors["delta"].round(6).tobytes()
        return row

    assert trained(7) == trained(7) != trained(8)


def test_each_worker_process_has_entropy_of_its_own() -> None:
    def trainer(run: RunSpec) -> TorchTrainer:
        made = Job(Net(), run, "a", {}, False).trainer
        assert isinstance(made, TorchTrainer)
        return made

    run = spec(1.0)
    rows = [train(trainer(run), Net().examples()).vectors["delta"] for _ in range(2)]
    assert not np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_simulation_repeats_bit_for_bit(engine: str) -> None:
    class Drawn(Net):
        def dataset(self) -> Any:
            return self.examples(60).batch(slice(0, 60))

        holdout = dataset

    run = spec(1.0, 0.3, epochs=2, steps=0)
    run = run.with_("run.rounds=2", "cohort.size=4", "simulation.clients=6", "evaluation.where=holdout")
    run = run.with_(f"simulation.engine={engine}", "simulation.chunk=3")
    one, same, other = (simulate(Drawn(), run.with_(f"run.seed={seed}")) for seed in (1, 1, 2))
    assert one.engine == engine and one.parameters.digest == same.parameters.digest
    assert one.parameters.digest != other.parameters.digest


def test_a_map_style_data_set_is_fetched_in_parts() -> None:
    x, y = Net().examples().batch(slice(0, COUNT))
    fetched = []

    class Rows(list[Any]):
        def __getitem__(self, i: Any) -> Any:
            fetched.append(i)
            return x[i], y[i]

    data = DatasetExamples(Rows(range(COUNT)), range(COUNT), "cpu")
    run = spec(at_once=3)
    assert delta(Net(), run, data) == close(by_hand(Net(), run, examples_from((x, y)), [range(COUNT)]))
    assert fetched == list(range(COUNT))


def test_a_loss_of_its_own_is_taken_example_by_example() -> None:
    data, run = Weighted().examples(), spec(steps=2)
    assert delta(Weighted(), run, data) == close(by_hand(Weighted(), run, data, [range(COUNT)] * 2))


@clippings
def test_loss_and_count_are_means_over_what_was_drawn(clipping: str) -> None:
    task, run = Net(), spec(clipping=clipping, steps=2, at_once=2)
    data = task.examples()
    told = train(TorchTrainer(task, run), data).scalars
    plain = RunSpec.parse({"client": {"batch_size": COUNT}})
    first = train(TorchTrainer(task, plain), data).scalars["loss"]
    assert (told["weight"], told["count"]) == (COUNT, 2 * COUNT)
    assert first < told["loss"] < 2 * first, "the second step's is smaller"


def test_a_metric_has_one_value_an_example() -> None:
    class Measured(Net):
        metrics = MappingProxyType({"all": lambda output, target: output})

    with pytest.raises(TaskError, match=r"Measured: metric 'all' returned shape \(7, 3\); .* shape \(7,\)"):
        TorchTrainer(Measured(), spec()).evaluate(Net().examples(), {})


def test_a_kept_head_is_trained_privately_and_stays() -> None:
    """FedPer: one joint clip over body and head, so the whole step is FedAvg's; only the body is sent."""
    task = Net("conv")
    data, run = task.examples(), spec(steps=2, algorithm="fedper")
    trainer = TorchTrainer(task, run)
    update, kept = trainer.train(ref(), "a", data, {})
    both = by_hand(task, run, data, [range(COUNT)] * 2)
    size = trainer.layout.shared_size
    assert set(update.vectors) == {"delta"} and update.vectors["delta"] == close(both[:size])
    head = np.concatenate([trainer.model.fresh[n].flatten() for n in trainer.model.local])
    assert kept["model.local"] - head == close(both[size:])
    _, later = trainer.train(ref(2), "a", data, kept)
    assert not np.array_equal(later["model.local"], kept["model.local"])


@dataclass(frozen=True)
class Counting(LocalSGD):
    """A plug-in that would send the number of examples in its delta."""

    def half(self, run: RunSpec) -> Half[Any]:
        class Told(Half[Any]):
            def finish(self, start: Start, end: End) -> Sent:
                return Sent({"delta": end.delta * 0 + float(end.weight[0])})

        return Told(self, run)


def test_an_algorithm_is_not_told_the_number_of_examples() -> None:
    trainer = TorchTrainer(Net(), spec(), Strategy(Counting()))
    assert set(train(trainer, Net().examples()).vectors["delta"]) == {1.0}


def test_what_an_interrupted_client_left_does_not_go_on() -> None:
    """The parts of a batch that it had accumulated would otherwise be in the next client's first step."""

    class Failing:
        limit: ClassVar[int] = 3

        def __len__(self) -> int:
            return COUNT

        def batch(self, index: Any) -> Any:
            if int(index[0]) >= self.limit:
                raise OSError("the disk is gone")
            return Net().examples().batch(index)

    run, kept = spec(1.0, at_once=1), dict[str, Any]()
    trainer = TorchTrainer(Net(), run)
    with pytest.raises(OSError, match="gone"):
        trainer.train(ref(), "a", Failing(), kept)
    data = Net().examples(5, 3)
    assert np.array_equal(
        train(trainer, data, client="b").vectors["delta"], delta(Net(), run, data, client="b")
    )
