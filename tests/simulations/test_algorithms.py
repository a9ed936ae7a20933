"""Client algorithms whole, both halves in a run: by hand, against naive loops, and by the laws they obey."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from fedcore.data import Split
from fedcore.errors import SpecError
from fedcore.layout import Parameters
from fedcore.messages import Plan
from fedcore.simulations.answers import Answers, Engine
from fedcore.simulations.borrowed import threads
from fedcore.simulations.run import Simulation
from fedcore.spec import RunSpec
from fedcore.strategies.rounds import State
from fedcore.task import Client, Task

ENGINES = ("sequential", "vectorized")
PARTS: dict[str, dict[str, Any]] = {
    "fedprox": {"mu": 0.5},
    "scaffold": {},
    "fednova": {},
    "feddyn": {"alpha": 0.5},
    "qfedavg": {"q": 1.5},
}
algorithms = pytest.mark.parametrize("name", PARTS)
engines = pytest.mark.parametrize("engine", ENGINES)


class Points(Task):
    """y = w x from w = 0 by squared error; each client has a few points (x, y)."""

    def __init__(self, *clients: list[tuple[float, float]]) -> None:
        self.clients = clients

    def model(self) -> nn.Module:
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        return model

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return mse_loss(output, target)

    def data(self, client: Client) -> Split[Any]:
        assert client.index is not None
        x, y = np.array(self.clients[client.index], np.float64).reshape(-1, 2).T[..., None]
        return Split((x, y), None)


def simulation(task: Task, name: str, engine: str = "sequential", **tables: dict[str, Any]) -> Simulation:
    given: dict[str, dict[str, Any]] = {
        "run": {"seed": 3},
        "strategy": {"name": name},
        "client": {"batch_size": 4, "shuffle": False},
        "limits": {"weight": 100.0},
        "evaluation": {"every": 0},
        "simulation": {"engine": engine, "chunk": 2},
    }
    merged = {key: {**given.get(key, {}), **tables.get(key, {})} for key in {**given, **tables}}
    return Simulation(task, RunSpec.parse(merged))


def played(run: Simulation, *numbers: int) -> Simulation:
    with threads(1):
        for number in numbers:
            run.train(number, lambda _: None)
    return run


def model(run: Simulation) -> NDArray[np.float64]:
    return run.state.parameters.shared.astype(np.float64)


def two(name: str, engine: str, task: Task, epochs: int, **fields: Any) -> Simulation:
    """Return a run of both clients of a task: batches of one, rate 0.1."""
    return simulation(
        task,
        name,
        engine,
        strategy=fields,
        client={"epochs": epochs, "batch_size": 1, "optimizer": {"name": "sgd", "lr": 0.1}},
        cohort={"size": 2},
        simulation={"clients": 2},
    )


AT_TWO_AND_ZERO = Points([(1, 2)], [(1, 0)])  # losses (w - 2)² and w², gradients 2 (w - 2) and 2 w


@engines
def test_fedprox_by_hand(engine: str) -> None:
    """At mu 1 the first client steps to 0.4, then along -3.2 + 0.4 to 0.68; the second stays."""
    run = played(two("fedprox", engine, AT_TWO_AND_ZERO, 2, mu=1.0), 1)
    assert model(run) == pytest.approx([0.34])


@engines
def test_scaffold_by_hand(engine: str) -> None:
    """First as FedAvg, to 0.72 and 0, whence c_1 = -0.72 / 0.2, c_2 = 0 and c = -1.8.

    Then from 0.36 along -3.28 + 1.8 and -2.984 + 1.8 to 0.6264, and along 0.72 - 1.8 and 0.936 - 1.8 to
    0.5544.
    """
    run = played(two("scaffold", engine, AT_TWO_AND_ZERO, 2), 1)
    assert model(run) == pytest.approx([0.36])
    assert run.state.parameters.extra["control"] == pytest.approx([-1.8])
    played(run, 2)
    assert model(run) == pytest.approx([(0.6264 + 0.5544) / 2])
    assert [float(run.states[client]["control"][0]) for client in run.population.names] == pytest.approx(
        [-3.6 + 1.8 - 0.2664 / 0.2, 0 + 1.8 - 0.1944 / 0.2]
    )
    assert run.state.parameters.extra["control"] == pytest.approx([(-3.132 + 0.828) / 2])


@engines
def test_fednova_by_hand(engine: str) -> None:
    """0.4 in one step with one example, -0.36 in two with two: 5/3 (1/3 0.4 - 2/3 0.18), tau_eff = 5/3."""
    run = played(two("fednova", engine, Points([(1, 2)], [(1, -1), (1, -1)]), 1), 1)
    assert model(run) == pytest.approx([5 / 3 * (0.4 - 2 * 0.18) / 3])


@engines
def test_feddyn_by_hand(engine: str) -> None:
    """At alpha 1 first to 0.68 and 0, hence h = -0.34 and x = 0.34 + 0.34.

    Then from 0.68 along -2.64 + 0.68 and -2.248 + 0.68 + 0.196 to 1.0132, and along 1.36 and 1.088 - 0.136 to
    0.4488, hence h = -0.34 - 0.051.
    """
    run = played(two("feddyn", engine, AT_TWO_AND_ZERO, 2, alpha=1.0), 1)
    assert model(run) == pytest.approx([0.68])
    played(run, 2)
    assert run.state.vectors["algorithm.correction"] == pytest.approx([-0.391])
    assert [float(run.states[client]["correction"][0]) for client in run.population.names] == pytest.approx(
        [-0.68 - 0.3332, 0.2312]
    )
    assert model(run) == pytest.approx([(1.0132 + 0.4488) / 2 + 0.391])


@engines
def test_qfedavg_by_hand(engine: str) -> None:
    """Losses 4 and 1, deltas 0.4 and -0.2, L = 10: (4 0.4 - 1 0.2) / (10 0.16 + 4 + 10 0.04 + 1)."""
    run = played(two("qfedavg", engine, Points([(1, 2)], [(1, -1)]), 1, q=1.0), 1)
    assert model(run) == pytest.approx([1.4 / 7])


# Naive loops over a perceptron 6-8-3 with tanh, its parameters one flat vector, in float64.

SIZES = (3, 8, 21, 14, 1, 0)  # of the clients: ragged, and one without examples
BATCH, EPOCHS, LR, ROUNDS = 5, 2, 0.1, 3
Data = list[tuple[Tensor, Tensor]]


class Perceptron(Task):
    def __init__(self, personal: str = "") -> None:
        self.personal = personal

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def shared(self, name: str) -> bool:
        return not self.personal or not name.startswith(self.personal)

    def data(self, client: Client) -> Split[Any]:
        assert client.index is not None
        rng, size = np.random.default_rng(client.index), SIZES[client.index]
        return Split((rng.normal(client.index / 3, 1, (size, 6)), rng.integers(0, 3, size)), None)


def of_three(name: str, engine: str = "sequential", task: Task | None = None, **client: Any) -> Simulation:
    """Return a run of three clients a round, of six."""
    return simulation(
        task or Perceptron(),
        name,
        engine,
        strategy=PARTS.get(name, {}),
        client={"batch_size": BATCH, "epochs": EPOCHS, "optimizer": {"name": "sgd", "lr": LR}, **client},
        cohort={"size": 3, "minimum": 1},
        simulation={"clients": 6},
    )


def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    hidden = torch.tanh(x @ w[:48].view(8, 6).T + w[48:56])
    return cross_entropy(hidden @ w[56:80].view(3, 8).T + w[80:], y)


def gradient(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    w = w.detach().requires_grad_()
    return torch.autograd.grad(loss(w, x, y), w)[0]


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(EPOCHS):
        yield from zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True) if len(x) else ()


def fedprox(x: Tensor, cohorts: list[list[int]], data: Data) -> Tensor:
    for cohort in cohorts:
        models = []
        for i in cohort:
            w = x.clone()
            for xb, yb in batches(*data[i]):
                w = w - LR * (gradient(w, xb, yb) + 0.5 * (w - x))
            models.append(w)
        x = mean(models, cohort)
    return x


def scaffold(x: Tensor, cohorts: list[list[int]], data: Data) -> Tensor:
    c, own = torch.zeros_like(x), [torch.zeros_like(x) for _ in data]
    for cohort in cohorts:
        models, changes = [], []
        for i in cohort:
            y, steps = x.clone(), 0
            for xb, yb in batches(*data[i]):
                y, steps = y - LR * (gradient(y, xb, yb) - own[i] + c), steps + 1
            new = own[i] - c + (x - y) / (steps * LR) if steps else own[i]
            models.append(y)
            changes.append(new - own[i])
            own[i] = new
        x, c = mean(models, cohort), c + sum(changes, torch.zeros_like(x)) / len(data)
    return x


def fednova(momentum: float, nesterov: bool = False) -> Callable[[Tensor, list[list[int]], Data], Tensor]:
    def run(x: Tensor, cohorts: list[list[int]], data: Data) -> Tensor:
        for cohort in cohorts:
            total, weights = float(sum(SIZES[i] for i in cohort)), [SIZES[i] for i in cohort]
            normalised, taus = [], []
            for i in cohort:
                w, v, steps = x.clone(), torch.zeros_like(x), 0
                for xb, yb in batches(*data[i]):
                    g = gradient(w, xb, yb)
                    v = momentum * v + g
                    w, steps = w - LR * (g + momentum * v if nesterov else v), steps + 1
                taus.append(sum(sum(momentum**k for k in range(j + 1 + nesterov)) for j in range(steps)))
                normalised.append((x - w) / (taus[-1] or 1))
            effective = sum(n * tau for n, tau in zip(weights, taus, strict=True)) / total
            step = sum((n * d for n, d in zip(weights, normalised, strict=True)), torch.zeros_like(x)) / total
            x = x - effective * step
        return x

    return run


def feddyn(x: Tensor, cohorts: list[list[int]], data: Data) -> Tensor:
    alpha, h, own = 0.5, torch.zeros_like(x), [torch.zeros_like(x) for _ in data]
    for cohort in cohorts:
        models = []
        for i in cohort:
            w = x.clone()
            for xb, yb in batches(*data[i]):
                w = w - LR * (gradient(w, xb, yb) - own[i] + alpha * (w - x))
            own[i] = own[i] - alpha * (w - x)
            models.append(w)
        h = h - alpha / len(data) * sum((w - x for w in models), torch.zeros_like(x))
        x = torch.stack(models).mean(0) - h / alpha
    return x


def qfedavg(x: Tensor, cohorts: list[list[int]], data: Data) -> Tensor:
    q, smoothness = 1.5, 1 / LR
    for cohort in cohorts:
        above, below = torch.zeros_like(x), 0.0
        for i in cohort:
            w, f = x.clone(), loss(x, *data[i]) if SIZES[i] else torch.tensor(1e-10)
            for xb, yb in batches(*data[i]):
                w = w - LR * gradient(w, xb, yb)
            step = smoothness * (x - w)
            above = above + f**q * step
            below += float(q * f ** (q - 1) * step.square().sum() + smoothness * f**q)
        x = x - above / below
    return x


def mean(models: list[Tensor], cohort: list[int]) -> Tensor:
    weights = torch.tensor([SIZES[i] for i in cohort], dtype=torch.float64)
    return (torch.stack(models) * weights[:, None]).sum(0) / weights.sum()


MOMENTUM = {"name": "sgd", "lr": LR, "momentum": 0.8}


@engines
@pytest.mark.parametrize(
    ("name", "naive", "client"),
    [
        ("fedprox", fedprox, {}),
        ("scaffold", scaffold, {}),
        ("fednova", fednova(0.0), {}),
        ("fednova", fednova(0.8), {"optimizer": MOMENTUM}),
        ("fednova", fednova(0.8, nesterov=True), {"optimizer": {**MOMENTUM, "nesterov": True}}),
        ("feddyn", feddyn, {}),
        ("qfedavg", qfedavg, {}),
    ],
)
def test_three_rounds_are_those_of_a_naive_loop(
    name: str,
    naive: Callable[[Tensor, list[list[int]], Data], Tensor],
    client: dict[str, Any],
    engine: str,
) -> None:
    run = of_three(name, engine, **client)
    rounds = range(1, ROUNDS + 1)
    cohorts = [[run.population.index[c] for c in run.cohort(number, "train")] for number in rounds]
    assert len({tuple(cohort) for cohort in cohorts}) == ROUNDS and any(5 in cohort for cohort in cohorts)
    splits = [run.population.split(c).train for c in run.population.names]
    data = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in splits]
    expected = naive(torch.from_numpy(model(run)), cohorts, data).numpy()
    got = model(played(run, *rounds))
    assert np.linalg.norm(got - expected) <= 1e-11 * np.linalg.norm(expected)


@pytest.mark.parametrize("personal", ["0", "2"])
@algorithms
def test_the_engines_agree_where_parameters_stay_local(name: str, personal: str) -> None:
    runs = [played(of_three(name, engine, Perceptron(personal)), 1, 2, 3) for engine in ENGINES]
    one, other = map(model, runs)
    assert np.linalg.norm(one - other) <= 1e-10 * np.linalg.norm(one)
    assert runs[0].states.states.keys() == runs[1].states.states.keys()


# Laws.


@engines
def test_fedprox_at_zero_is_fedavg_to_the_bit(engine: str) -> None:
    prox = simulation(Perceptron(), "fedprox", engine, strategy={"mu": 0.0}, simulation={"clients": 6})
    plain = simulation(Perceptron(), "fedavg", engine, simulation={"clients": 6})
    assert (model(played(prox, 1, 2)) == model(played(plain, 1, 2))).all()


class Even(Perceptron):
    """As many examples for everybody."""

    def data(self, client: Client) -> Split[Any]:
        assert client.index is not None
        rng = np.random.default_rng(client.index)
        return Split((rng.normal(client.index / 3, 1, (12, 6)), rng.integers(0, 3, 12)), None)


@pytest.mark.parametrize(
    ("name", "fields", "rounds"), [("fednova", {}, 3), ("qfedavg", {"q": 0.0}, 3), ("scaffold", {}, 1)]
)
def test_with_even_clients_they_are_fedavg(name: str, fields: dict[str, Any], rounds: int) -> None:
    """FedNova as all take as many steps, q-FedAvg at q = 0, SCAFFOLD before there are controls."""
    both = (
        simulation(Even(), name, strategy=fields, simulation={"clients": 4}),
        simulation(Even(), "fedavg", simulation={"clients": 4}),
    )
    one, other = (model(played(run, *range(1, rounds + 1))) for run in both)
    assert one == pytest.approx(other, rel=1e-11)


class Lossy:
    """An engine some of whose updates are damaged on their way."""

    name, chunk, workers = "lossy", 1, 0

    def __init__(self, engine: Engine, share: float) -> None:
        self.engine, self.share, self.rng = engine, share, np.random.default_rng(0)

    def answer(self, plan: Plan, parameters: Parameters) -> Iterator[Answers]:
        for answers in self.engine.answer(plan, parameters):
            assert isinstance(answers, Answers)
            answers.rows.vectors["delta"][self.rng.random(len(answers.clients)) < self.share] = np.nan
            yield answers


@pytest.mark.parametrize("share", [0.0, 0.4])
@engines
def test_scaffolds_control_is_the_mean_over_all_clients_whoever_drops_out(engine: str, share: float) -> None:
    """Those refused have trained, and must keep their old control all the same."""
    run = of_three("scaffold", engine)
    run.engine = Lossy(run.engine, share)
    refused, zeros = 0, np.zeros(run.layout.shared_size)
    for number in range(1, 11):
        with threads(1):
            refused += run.train(number, lambda _: None)["refused"]
        own = [run.states[client].get("control", zeros) for client in run.population.names]
        assert np.abs(run.state.parameters.extra["control"] - np.mean(own, 0)).max() <= 1e-12
    assert (refused > 0) == (share > 0)
    assert np.abs(run.state.parameters.extra["control"]).max() > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_feddyns_correction_is_the_mean_over_all_clients_whoever_drops_out(share: float) -> None:
    run = of_three("feddyn")
    run.engine = Lossy(run.engine, share)
    played(run, *range(1, 11))
    zeros = np.zeros(run.layout.shared_size)
    own = [run.states[client].get("correction", zeros) for client in run.population.names]
    assert np.abs(run.state.vectors["algorithm.correction"] - np.mean(own, 0)).max() <= 1e-12


# Least squares with minima at 3 and 0, the second four times as steep and with three times the examples.
SKEWED = Points([(1, 3)] * 2, [(2, 0)] * 6)


@pytest.mark.parametrize(
    ("name", "fields", "target"),
    [
        ("scaffold", {}, 2 * 3 / (2 + 8)),  # of (w - 3)² + (2 w)²
        ("feddyn", {"alpha": 1.0}, 2 * 3 / (2 + 8)),
        ("fednova", {}, 2 * 3 / (2 + 3 * 8)),  # of 1/4 (w - 3)² + 3/4 (2 w)²
    ],
)
def test_they_reach_the_optimum_that_fedavg_misses(name: str, fields: dict[str, Any], target: float) -> None:
    """Two of them although ten steps bring each client close to its own optimum.

    FedNova normalises the steps and not their drift: it does so only at a small rate.
    """
    rate, epochs, batch = (0.001, 2, 1) if name == "fednova" else (0.1, 10, 8)

    def reached(name: str, **fields: Any) -> float:
        run = simulation(
            SKEWED,
            name,
            strategy=fields,
            client={"batch_size": batch, "epochs": epochs, "optimizer": {"name": "sgd", "lr": rate}},
            cohort={"size": 2},
            simulation={"clients": 2},
        )
        return float(model(played(run, *range(1, 121)))[0])

    assert reached(name, **fields) == pytest.approx(target, rel=0.05)
    assert abs(reached("fedavg") - target) > 0.07


def test_a_higher_q_makes_the_losses_of_clients_more_alike() -> None:
    def worst(q: float) -> float:
        task = Points([(1, 3)], [(1, 0)], [(1, 0)], [(1, 0)])
        run = simulation(task, "qfedavg", strategy={"q": q}, cohort={"size": 4}, simulation={"clients": 4})
        return float((model(played(run, *range(1, 61)))[0] - 3) ** 2)

    losses = [worst(q) for q in (0.0, 1.0, 5.0)]
    assert losses[0] == pytest.approx((0.75 - 3) ** 2, rel=1e-3)  # of the plain mean
    assert losses[0] > 1.3 * losses[1] > 1.3 * losses[2]


@engines
@algorithms
def test_saved_loaded_and_continued_gives_the_same_bits(name: str, engine: str, tmp_path: Any) -> None:
    straight = played(of_three(name, engine), 1, 2, 3, 4)
    first = played(of_three(name, engine), 1, 2)
    state, kept = first.state, first.states.states
    save_file({"shared": state.parameters.shared, **state.parameters.extra}, tmp_path / "parameters")
    save_file(dict(state.vectors), tmp_path / "vectors")
    for client in kept:
        save_file(dict(kept[client]), tmp_path / client)

    second = of_three(name, engine)
    extra = load_file(tmp_path / "parameters")
    parameters = Parameters(extra.pop("shared"), state.parameters.buffers, extra)
    second.state = State(2, parameters, load_file(tmp_path / "vectors"))
    second.states.commit({client: load_file(tmp_path / client) for client in kept})
    played(second, 3, 4)
    assert second.state.parameters.digest == straight.state.parameters.digest
    for vectors, expected in (
        (second.state.parameters.extra, straight.state.parameters.extra),
        (second.state.vectors, straight.state.vectors),
        *((second.states[c], straight.states[c]) for c in straight.population.names),
    ):
        assert {n: v.tobytes() for n, v in vectors.items()} == {n: v.tobytes() for n, v in expected.items()}


def test_what_an_algorithm_cannot_work_with_is_refused_before_anything_runs() -> None:
    with pytest.raises(SpecError, match=r"client.optimizer: momentum = 0.9, but Scaffold .* momentum = 0"):
        of_three("scaffold", optimizer={"name": "sgd", "lr": 0.1, "momentum": 0.9})
