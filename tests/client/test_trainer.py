"""One client's local work: repeatable, independent of who trained before, and right by hand."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore.client.examples import Examples, examples_from
from fedcore.client.trainer import TorchTrainer, clipped, device_of
from fedcore.errors import SpecError, TaskError, UpdateRefused
from fedcore.layout import Parameters
from fedcore.messages import Ref, Update
from fedcore.metrics import EXAMPLE_BOUND, means, names
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.strategies.rounds import evaluate_plan, train_plan
from fedcore.strategies.terms import check
from fedcore.task import Task

f32 = partial(np.array, dtype=np.float32)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 0.1},
    "momentum": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    "adam": {"name": "adam", "lr": 0.01, "betas": [0.8, 0.9]},
    "adamw": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1},
}

Metrics = dict[str, Callable[[Tensor, Tensor], Tensor]]
ERROR: Metrics = {"error": lambda output, target: (output - target).abs().squeeze(1)}
NAN: Metrics = {"nan": lambda output, target: output.squeeze(1) * float("nan")}
MANY: Metrics = {f"error_{i}": ERROR["error"] for i in range(33)}


class Noisy(Task):
    """All that could leak from one client to the next: dropout, running statistics, a count of batches."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


class Line(Task):
    """y = w x from w = 0, without a bias, by squared error: small enough for paper."""

    metrics = ERROR

    def model(self) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, target)


class Broken(Line):
    metrics = NAN

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return output.mean() * float("nan")


def spec(seed: int = 0, limits: dict[str, Any] | None = None, **client: Any) -> RunSpec:
    return RunSpec.parse(
        {"run": {"seed": seed}, "client": {"batch_size": 4, **client}, "limits": limits or {}}
    )


def examples(seed: int, count: int = 10) -> Examples:
    rng = np.random.default_rng(seed)
    return examples_from((rng.normal(size=(count, 5)).astype(np.float32), rng.integers(0, 3, count)))


def points(*pairs: tuple[float, float]) -> Examples:
    x, y = f32(pairs).T[..., None]
    return examples_from((x, y))


def ref(round: int = 1, attempt: int = 0, run: str = "r") -> Ref:
    return Ref(run, round, attempt, "train")


def train(trainer: TorchTrainer, ref: Ref, client: str, data: Examples) -> Update:
    update, kept = trainer.train(ref, client, data, {})
    assert kept == {}
    return update


def bits(update: Update) -> dict[str, Any]:
    return {**{n: v.tobytes() for n, v in update.vectors.items()}, **update.scalars}


def accept(task: Task, run: RunSpec, trainer: TorchTrainer, update: Update) -> None:
    kind = train_plan(Strategy(), run, trainer.layout, ref(), ("a",), 1)
    if not update.vectors:
        kind = evaluate_plan(run, ref(), ("a",), names(task.metrics))
    check(kind, update)


optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


@optimizers
def test_who_trained_before_does_not_matter(optimizer: dict[str, Any]) -> None:
    run = spec(epochs=2, optimizer=optimizer)

    def trained(*clients: str) -> dict[str, Any]:
        trainer = TorchTrainer(Noisy(), run)
        return {c: bits(train(trainer, ref(), c, examples(ord(c)))) for c in clients}

    alone = {client: trained(client)[client] for client in "abc"}
    assert trained("a", "b", "c") == trained("c", "a", "b") == alone
    assert len({row["delta"] for row in alone.values()}) == 3


def test_an_evaluation_between_does_not_matter() -> None:
    trainer = TorchTrainer(Noisy(), spec())
    first, tested = bits(train(trainer, ref(), "a", examples(1))), bits(trainer.evaluate(examples(2), {}))
    torch.rand(7)
    assert bits(train(trainer, ref(), "a", examples(1))) == first
    assert bits(trainer.evaluate(examples(2), {})) == tested


class Replacing(nn.Module):
    """Replaces its buffers rather than changing them in place, as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        self.mean: Tensor
        self.batches: Tensor
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches = self.batches + 1
            self.mean = self.mean + (x.detach().mean() - self.mean) / self.batches
        output: Tensor = self.line(x - self.mean)
        return output


def test_replaced_buffers_travel_and_do_not_leak() -> None:
    class Running(Line):
        def model(self) -> nn.Module:
            return Replacing()

    data = {"a": points((1, 0), (3, 0)), "b": points((7, 0), (9, 0))}

    def trained(*clients: str) -> dict[str, Any]:
        trainer = TorchTrainer(Running(), spec(batch_size=1))
        return {client: train(trainer, ref(), client, data[client]) for client in clients}

    one, other = trained("a", "b"), trained("b", "a")
    assert {client: update.vectors["buffers"].tolist() for client, update in one.items()} == {
        "a": [2.0],
        "b": [8.0],
    }
    assert all(bits(one[client]) == bits(other[client]) for client in data)


def test_seed_round_and_client_decide_and_nothing_else() -> None:
    def trained(seed: int = 0, client: str = "a", start: Parameters | None = None, **of: Any) -> bytes:
        trainer = TorchTrainer(Noisy(), spec(seed))
        trainer.receive(start or TorchTrainer(Noisy(), spec(0)).parameters())
        delta: bytes = bits(train(trainer, ref(**of), client, examples(1)))["delta"]
        return delta

    assert trained() == trained(attempt=1) == trained(run="another")
    assert len({trained(), trained(seed=1), trained(client="b"), trained(round=2)}) == 4


def test_batches_cover_every_epoch_and_change_with_round_and_client() -> None:
    x = np.arange(10, dtype=np.float32)[:, None]
    data = examples_from((x, x))
    trainer = TorchTrainer(Line(), spec(epochs=2))

    def drawn(round: int, client: str) -> list[list[float]]:
        return [batch.squeeze(1).tolist() for batch, _ in trainer.batches(ref(round), client, data)]

    batches = drawn(1, "a")
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = list(chain(*batches[:3])), list(chain(*batches[3:]))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert drawn(1, "a") == batches
    assert batches not in (drawn(2, "a"), drawn(1, "b"))
    plain = TorchTrainer(Line(), spec(shuffle=False)).batches(ref(), "a", data)
    assert [batch.squeeze(1).tolist() for batch, _ in plain] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_two_steps_of_sgd_by_hand() -> None:
    """Squared error of y = w x at w = 0, lr 0.1, batches of one: (1, 2) moves w to 0.4, (2, 2) on to 0.88."""
    run = spec(batch_size=1, shuffle=False)
    trainer = TorchTrainer(Line(), run)
    update = train(trainer, ref(), "a", points((1, 2), (2, 2)))
    assert update.vectors["delta"].tolist() == pytest.approx([0.88], abs=1e-6)
    assert update.scalars == pytest.approx({"weight": 2.0, "count": 2.0, "loss": 4.0 + 1.2**2}, abs=1e-5)
    trainer.receive(Parameters(f32([0.5]), np.zeros(0, np.float32)))
    tested = trainer.evaluate(points((1, 2), (2, 0)), {})
    assert tested.scalars == pytest.approx({"loss": 1.5**2 + 1.0, "error": 2.5, "count": 2.0})
    for one in (update, tested):
        accept(Line(), run, trainer, one)


@optimizers
def test_every_optimizer_does_what_torchs_does(optimizer: dict[str, Any]) -> None:
    trainer = TorchTrainer(Line(), spec(batch_size=3, shuffle=False, epochs=3, optimizer=optimizer))
    data = points((1, 2), (2, 2), (3, 5), (-1, 4))
    model = Line().model()
    options = {k: v for k, v in optimizer.items() if k != "name"}
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer["name"]]
    stepper = made(model.parameters(), **options)
    for place in [slice(0, 3), slice(3, 4)] * 3:
        x, y = data.batch(place)
        stepper.zero_grad()
        Line().loss(model(x), y).backward()  # type: ignore[no-untyped-call]
        stepper.step()
    expected = model.get_parameter("weight").item()
    for client in "ab":  # the second finds no moments of the first
        assert train(trainer, ref(), client, data).vectors["delta"].tolist() == [
            pytest.approx(expected, abs=1e-6)
        ]


@pytest.mark.parametrize(
    ("name", "chosen"), [*(("fedavg", name) for name in OPTIMIZERS), ("scaffold", "sgd"), ("qfedavg", "sgd")]
)
def test_a_round_has_its_learning_rate(name: str, chosen: str) -> None:
    """Also where the algorithm computes with it: the same bits as under a constant rate of that size."""
    optimizer = OPTIMIZERS[chosen]
    data = points((1, 2), (2, 2), (3, 5))

    def trained(round: int, client: dict[str, Any]) -> dict[str, Any]:
        run = RunSpec.parse({"run": {"rounds": 9}, "client": client, "strategy": name})
        trainer = TorchTrainer(Line(), run)
        trainer.train(ref(1), "a", data, {})  # at the rate of another round
        return bits(trainer.train(ref(round), "a", data, {})[0])

    scheduled = {"optimizer": optimizer, "schedule": {"name": "step", "every": 2, "gamma": 0.5}}
    slower = {"optimizer": {**optimizer, "lr": optimizer["lr"] * 0.5}}
    assert trained(3, scheduled) == trained(3, slower) != trained(2, scheduled)


@pytest.mark.parametrize("data", [None, (np.zeros((0, 5), np.float32), np.zeros(0, np.int64))])
def test_a_client_without_examples_weighs_nothing(data: Any) -> None:
    run = spec()
    trainer = TorchTrainer(Noisy(), run)
    update, tested = (
        train(trainer, ref(), "a", examples_from(data)),
        trainer.evaluate(examples_from(data), {}),
    )
    assert update.scalars == {"weight": 0.0, "loss": 0.0, "count": 0.0}
    assert not update.vectors["delta"].any()
    assert np.array_equal(update.vectors["buffers"], trainer.parameters().buffers)
    assert tested.scalars == {"loss": 0.0, "accuracy": 0.0, "count": 0.0}
    for one in (update, tested):
        accept(Noisy(), run, trainer, one)


def test_a_loss_that_is_no_number_is_reported_in_bounds_and_its_update_refused() -> None:
    run = spec()
    trainer = TorchTrainer(Broken(), run)
    update, tested = (
        train(trainer, ref(), "a", points((1, 2), (2, 2))),
        trainer.evaluate(points((1, 2), (2, 2)), {}),
    )
    assert np.isnan(update.vectors["delta"]).all()
    assert update.scalars == {"weight": 2.0, "loss": 2 * EXAMPLE_BOUND, "count": 2.0}
    with pytest.raises(UpdateRefused, match="delta has a coordinate that is not finite"):
        accept(Broken(), run, trainer, update)
    assert tested.scalars == {"loss": 2 * EXAMPLE_BOUND, "nan": 2 * EXAMPLE_BOUND, "count": 2.0}
    accept(Broken(), run, trainer, tested)
    healthy = TorchTrainer(Line(), run)
    assert np.isfinite(train(healthy, ref(), "b", points((1, 2))).vectors["delta"]).all()


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(5.0, 2, 5.0), (1e9, 2, 2048.0), (-1e9, 2, -2048.0), (float("inf"), 1, 1024.0),
     (float("-inf"), 1, -1024.0), (float("nan"), 3, 3072.0), (0.0, 0, 0.0)],
)  # fmt: skip
def test_sums_are_clipped_to_what_is_accepted(total: float, count: int, expected: float) -> None:
    assert clipped(total, count) == expected


@pytest.mark.parametrize("task", [Line, Broken])
@pytest.mark.parametrize("limit", [1.0, 3.0, 1.1, 7.7])
def test_a_client_beyond_the_weight_limit_counts_as_if_at_it(task: type[Task], limit: float) -> None:
    """Its update and its metrics are accepted, and their means are those of all its examples."""
    data = points(*[(1.0, float(i % 3)) for i in range(7)])
    free, run = spec(epochs=3), spec(epochs=3, limits={"weight": limit})
    trainer, plain = TorchTrainer(task(), run), TorchTrainer(task(), free)
    update, tested = train(trainer, ref(), "a", data), trainer.evaluate(data, {})
    assert (update.scalars["weight"], update.scalars["count"]) == (min(limit, 7.0), min(limit, 7.0) * 3)
    accept(task(), run, trainer, tested)
    if task is Line:
        accept(task(), run, trainer, update)
    assert means(tested.scalars) == pytest.approx(means(plain.evaluate(data, {}).scalars))
    loss = update.scalars["loss"] / update.scalars["count"]
    assert loss == pytest.approx(train(plain, ref(), "a", data).scalars["loss"] / 21)


@pytest.mark.parametrize("shift", [4, 1])
def test_where_a_clients_arrays_lie_does_not_matter(shift: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(33, 5)).astype(np.float32), rng.integers(0, 3, 33)
    room = np.empty(x.nbytes + 64, np.uint8)
    moved = room[shift : shift + x.nbytes].view(np.float32).reshape(x.shape)
    moved[...] = x
    trainer = TorchTrainer(Noisy(), spec(batch_size=7))
    aligned, other = examples_from((x, y)), examples_from((moved, y))
    assert bits(train(trainer, ref(), "a", aligned)) == bits(train(trainer, ref(), "a", other))
    assert bits(trainer.evaluate(aligned, {})) == bits(trainer.evaluate(other, {}))


def test_running_statistics_travel_and_the_received_model_is_left_alone() -> None:
    trainer = TorchTrainer(Noisy(), spec(batch_size=10))
    start = trainer.parameters().digest
    update = train(trainer, ref(), "a", examples(1))
    mean, variance = np.split(update.vectors["buffers"], 2)
    x, _ = examples(1).batch(slice(0, 10))
    hidden = TorchTrainer(Noisy(), spec()).model.module[0](x).detach().numpy()  # type: ignore[index]
    assert mean == pytest.approx(0.1 * hidden.mean(0), abs=1e-6)
    assert variance == pytest.approx(0.9 + 0.1 * hidden.var(0, ddof=1), abs=1e-6)
    assert trainer.parameters().digest == start
    del trainer.parameters().__dict__["digest"]
    assert trainer.parameters().digest == start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_train_and_their_deltas_lead_to_what_was_trained(dtype: torch.dtype) -> None:
    class Cast(Noisy):
        def model(self) -> nn.Module:
            return super().model().to(dtype)

    class Data:
        def __len__(self) -> int:
            return 10

        def batch(self, index: Any) -> tuple[Tensor, Tensor]:
            x, y = examples(1).batch(index)
            return x.to(dtype), y

    trainer = TorchTrainer(Cast(), spec())
    start = trainer.parameters()
    update = train(trainer, ref(), "a", Data())
    assert update.vectors["delta"].dtype == trainer.layout.dtype and update.vectors["delta"].any()
    trained = torch.from_numpy(start.shared + update.vectors["delta"])
    assert torch.equal(trained.to(dtype).to(trained.dtype), trained), "exact in the model's own precision"


def test_too_many_metrics_are_refused() -> None:
    class Curious(Line):
        metrics = MANY

    with pytest.raises(TaskError, match="Curious has 33 metrics; at most 32 are taken"):
        TorchTrainer(Curious(), spec())


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("cpu", 0, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_the_device_is_what_the_spec_asks_for(
    device: str, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert device_of(RunSpec().with_(f"client.device={device}").client) == expected


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_that_is_not_there_is_said(device: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    found = f"'{device}', but torch .* finds {gpus or 'no'} CUDA GPUs here; set it to 'auto' or 'cpu'"
    with pytest.raises(SpecError, match=found):
        device_of(RunSpec().with_(f"client.device={device}").client)
