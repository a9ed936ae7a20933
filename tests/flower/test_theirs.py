"""Flower's strategies as ours: the same models from the same replies, masked and private where asked."""

import gc
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, NeighboringRelation, PrivacyAccountant, PrivacyConfig, SamplingMethod
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray
from torch import nn

from fedcore.data import Split
from fedcore.errors import SpecError
from fedcore.flower import from_flower
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Ref
from fedcore.privacy.levels import OFF, ClientLevel
from fedcore.seeds import generator
from fedcore.simulations.run import Simulation, simulate
from fedcore.spec import RunSpec
from fedcore.strategies import Adam, Strategy, to_table
from fedcore.strategies.catalog import from_table
from fedcore.strategies.privacy import clip_norm, released
from fedcore.strategies.rounds import Round, State, advance, initial_state, receive, train_plan
from fedcore.strategies.terms import Rows
from fedcore.task import Client, Task

CLIENTS, ROUNDS, RATE = 6, 6, 0.1
NAMES = tuple(f"client-00000{i}" for i in range(CLIENTS))
Vector = NDArray[np.float32]
Local = Callable[[int, int, Vector], tuple[Vector, int, float]]  # round, client, x -> y, examples, loss of x

SUMS: dict[str, Callable[[], flower.Strategy]] = {
    "FedAvg": lambda: flower.FedAvg(),
    "FedAvgM": lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    "FedAvgM as FedAvg": lambda: flower.FedAvgM(),
    "FedAdagrad": lambda: flower.FedAdagrad(eta=0.05, tau=1e-2),
    "FedAdam": lambda: flower.FedAdam(eta=0.05, tau=1e-2),
    "FedAdam without momentum": lambda: flower.FedAdam(eta=0.05, beta_1=0.0, beta_2=0.9, tau=1e-2),
    "FedYogi": lambda: flower.FedYogi(eta=0.05, tau=1e-2),
    "FedProx": lambda: flower.FedProx(proximal_mu=0.5),
    "QFedAvg": lambda: flower.QFedAvg(client_learning_rate=RATE, q=0.5),
}
FIXED = (
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyClientSideFixedClipping,
)
ADAPTIVE = (
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
)


@pytest.fixture(autouse=True)
def prepared() -> Iterator[None]:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    gc.freeze()  # Flower's QFedAvg collects garbage after every reply, among all that torch has brought
    yield
    gc.unfreeze()


def begin(size: int = 40) -> Vector:
    return np.linspace(-1, 1, size, dtype=np.float32)


def local(number: int, client: int, x: Vector) -> tuple[Vector, int, float]:
    """Take a step towards a point of the client's own."""
    rng = generator("client", number, client)
    target = np.sin(np.arange(len(x)) * (1 + client / 7))
    y = x + 0.2 * (target - x) + 0.02 * rng.normal(size=len(x))
    return y.astype(np.float32), 3 + 5 * client, float(np.square(target - x).mean())


def alike(number: int, client: int, x: Vector) -> tuple[Vector, int, float]:
    """Do what `local` does, for clients that have as many examples each."""
    y, _, loss = local(number, client, x)
    return y, 8, loss


class Nodes:
    """As many nodes as clients."""

    def get_node_ids(self) -> Iterable[int]:
        return range(100, 100 + CLIENTS)


def theirs(strategy: flower.Strategy, client: Local, x: Vector, rounds: int = ROUNDS) -> list[Vector]:
    """Return the model after every round of Flower's own, configured and aggregated by itself."""
    arrays, models = ArrayRecord({"w": Array(x)}), []
    for number in range(1, rounds + 1):
        messages = strategy.configure_train(number, arrays, ConfigRecord(), cast(Grid, Nodes()))
        made, _ = strategy.aggregate_train(number, [answered(each, number, client) for each in messages])
        assert made is not None
        arrays = made
        models.append(cast(Vector, arrays["w"].numpy()))
    return models


def answered(message: Message, number: int, client: Local) -> Message:
    x = message.content.array_records["arrays"]["w"].numpy()
    y, examples, loss = client(number, message.metadata.dst_node_id - 100, cast(Vector, x))
    metrics = MetricRecord({"num-examples": examples, "train_loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(y)}), "metrics": metrics}), reply_to=message)


def ours(strategy: Strategy, client: Local, x: Vector, rounds: int = ROUNDS, **tables: Any) -> list[Vector]:
    """Return the model after every round of ours, of updates as our clients send them."""
    spec = RunSpec.parse({"cohort": {"size": CLIENTS}, **tables})
    layout = Layout((Entry("w", x.shape, "float32", "shared"),))
    state, models = initial_state(strategy, Parameters(x, np.zeros(0, np.float32))), []
    for number in range(1, rounds + 1):
        ref, clip = Ref("r", number, 0, "train"), clip_norm(strategy.privacy, state.vectors)
        round = Round(train_plan(strategy, spec, layout, ref, NAMES, CLIENTS, clip))
        for i in range(CLIENTS):
            send(strategy, round, i, client, state, clip)
        round.close()
        state = advance(strategy, round, state, 0, entropy=number)
        models.append(cast(Vector, state.parameters.shared))
    return models


def send(strategy: Strategy, round: Round, i: int, client: Local, state: State, clip: float) -> None:
    y, examples, loss = client(round.plan.ref.round, i, cast(Vector, state.parameters.shared))
    delta, scalars = y - state.parameters.shared, {"weight": float(examples), "count": float(examples)}
    scalars["loss"] = loss * examples
    if "h" in round.plan.scalars:  # q-FedAvg's, divided by L = 1 / lr
        q, square = cast(Any, strategy.algorithm).q, float(np.square(delta, dtype=np.float64).sum())
        scalars["h"] = q * loss ** (q - 1) * square / RATE + loss**q
        delta = (loss**q * delta).astype(np.float32)
    columns = {name: np.array([scalars[name]]) for name in round.plan.scalars}
    (update,) = released(strategy, "train", Rows({"delta": delta[None]}, columns), clip, ()).updates()
    assert receive(round, NAMES[i], update).status == "folded"


@pytest.mark.parametrize("name", SUMS)
def test_rounds_of_ours_give_flowers_models(name: str) -> None:
    converted = from_flower(SUMS[name]())
    assert converted.sums and not converted.sees and converted.privacy == OFF
    assert from_table(to_table(converted)) == converted, "a run spec can say it"
    pairs = zip(theirs(SUMS[name](), local, begin()), ours(converted, local, begin()), strict=True)
    for number, (expected, made) in enumerate(pairs, 1):
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=2e-6, err_msg=f"round {number}")


def test_without_flowers_start_and_correction_adam_is_another_rule() -> None:
    """Why `v0` and `bias_correction` are there: the paper's defaults part from Flower's by far more."""
    expected = theirs(flower.FedAdam(eta=0.05, tau=1e-2), local, begin())[-1]
    made = ours(Strategy(optimizer=Adam(0.05, tau=1e-2)), local, begin())[-1]
    assert np.abs(made - expected).max() > 0.01


@pytest.mark.parametrize("wrapper", FIXED)
def test_fixed_clipping_is_the_level_client_with_the_same_clip_and_noise(wrapper: Any) -> None:
    """Of one round, all sampled, all weights alike: the same clipped mean, and noise of one deviation."""
    z, clip, x = 2.0, 0.5, begin(5000)
    client = clipping(alike, clip) if wrapper is FIXED[1] else alike
    converted = from_flower(wrapper(flower.FedAvg(), z, clip, CLIENTS), population=CLIENTS)
    assert converted.privacy == ClientLevel(
        level="client", clip_norm=clip, noise_multiplier=z, population=CLIENTS
    )
    np.random.seed(1)
    noisy = {"theirs": theirs(wrapper(flower.FedAvg(), z, clip, CLIENTS), client, x, 1)}
    noisy["ours"] = ours(converted, alike, x, 1, privacy=converted.privacy.model_dump())
    mean = theirs(wrapper(flower.FedAvg(), 0.0, clip, CLIENTS), client, x, 1)[0]
    assert np.linalg.norm(mean - x) <= clip * 1.001
    for models in noisy.values():
        noise = models[0] - mean
        assert noise.std() == pytest.approx(z * clip / CLIENTS, rel=0.05) and abs(noise.mean()) < 0.01


def clipping(client: Local, clip: float) -> Local:
    """Return a client that clips its update itself, as Flower's fixedclipping_mod does."""

    def clipped(number: int, i: int, x: Vector) -> tuple[Vector, int, float]:
        y, examples, loss = client(number, i, x)
        delta = y - x
        return (x + delta * min(1.0, clip / float(np.linalg.norm(delta)))).astype(np.float32), examples, loss

    return clipped


def test_flowers_noise_does_not_cover_a_heavy_client_and_ours_does() -> None:
    """One client of a great weight: Flower's clipped mean moves by most of the clip norm, ours by C / m."""

    def heavy(number: int, i: int, x: Vector) -> tuple[Vector, int, float]:
        return (x + 10 if i == 0 else x + 1e-6), (10**6 if i == 0 else 1), 1.0

    wrapper, x = wrapped(flower.FedAvg(), 1e-6), begin()
    moved = np.linalg.norm(theirs(wrapper, heavy, x, 1)[0] - x)
    converted = from_flower(wrapper, population=CLIENTS)
    held = np.linalg.norm(ours(converted, heavy, x, 1, privacy=converted.privacy.model_dump())[0] - x)
    assert moved > 0.99 * 0.5 and held == pytest.approx(0.5 / CLIENTS, rel=1e-3)


def accountant(**more: float) -> PrivacyAccountant:
    """Return what is read of one: its configuration."""
    relation, method = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION
    return cast(PrivacyAccountant, SimpleNamespace(config=PrivacyConfig(1e-6, 50, relation, method, **more)))


def test_an_accountant_tells_population_and_delta() -> None:
    converted = from_flower(wrapped(flower.FedProx(proximal_mu=0.5), accountant=accountant()))
    assert isinstance(converted.privacy, ClientLevel)
    assert (converted.privacy.population, converted.privacy.delta) == (50, 1e-6)


class Mine(flower.FedAvg):
    """A strategy that may do anything."""


def wrapped(inside: flower.Strategy, noise: float = 1.0, **more: Any) -> flower.Strategy:
    return FIXED[0](inside, noise, 0.5, CLIENTS, **more)


REFUSED: dict[str, tuple[Callable[[], flower.Strategy], str]] = {
    "FedMedian": (
        lambda: flower.FedMedian(),
        r"looks at every client's update.*Strategy\(aggregator=Median\(\)\)",
    ),
    "FedTrimmedAvg": (lambda: flower.FedTrimmedAvg(beta=0.1), r"TrimmedMean\(f\), with f = 0\.1 times"),
    "Krum": (lambda: flower.Krum(num_malicious_nodes=2), r"aggregator=Krum\(f=2\)"),
    "MultiKrum": (
        lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=3),
        r"aggregator=MultiKrum\(f=2, m=3\)",
    ),
    "Bulyan": (lambda: flower.Bulyan(num_malicious_nodes=1), r"aggregator=Bulyan\(f=1\)"),
    "FedXgbBagging": (lambda: flower.FedXgbBagging(), "FedXgbBagging .* is not known to be a sum"),
    "FedXgbCyclic": (lambda: flower.FedXgbCyclic(), "FedXgbCyclic .* is not known to be a sum"),
    "a subclass": (lambda: Mine(), "what Mine makes .* no subclass, .* fedcore flower run"),
    "weights": (lambda: flower.FedAvg(weighted_by_key="quality"), "weigh by their number of examples"),
    "metrics": (
        lambda: flower.FedAvg(train_metrics_aggr_fn=lambda *_: MetricRecord()),
        "leave train_metrics_aggr_fn",
    ),
    "momentum": (lambda: flower.FedAvgM(server_momentum=1.0), "0 <= momentum < 1"),
    "no noise": (lambda: wrapped(flower.FedAvg(), 0.0), r"strategy without its wrapper, and limits\.norm"),
    "no population": (lambda: wrapped(flower.FedAvg()), r"from_flower\(strategy, population=100\)"),
    "noise after": (lambda: wrapped(flower.FedAdam()), "adds noise after FedAdam has moved the model"),
    "inside": (lambda: wrapped(flower.FedMedian()), "FedMedian looks at every"),
    "budget": (
        lambda: wrapped(flower.FedAvg(), accountant=accountant(max_epsilon=3.0)),
        "max_epsilon = 3 stops",
    ),
    "adaptive": (lambda: ADAPTIVE[0](flower.FedAvg(), 0.5, CLIENTS), "runs away from the quantile"),
    "adaptive clients": (lambda: ADAPTIVE[1](flower.FedAvg(), 0.5, CLIENTS), "runs away from the quantile"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sum_or_not_known_is_refused_with_a_remedy(case: str) -> None:
    build, told = REFUSED[case]
    with pytest.raises(SpecError, match=told):
        from_flower(build())


def test_flowers_adaptive_clip_norm_does_run_away() -> None:
    """All updates are far above the clip norm, so Andrew et al. would raise it; Flower's falls."""
    wrapper = ADAPTIVE[0](flower.FedAvg(), 0.0, CLIENTS, initial_clipping_norm=0.1)
    theirs(wrapper, alike, begin(), 3)
    assert wrapper.clipping_norm < 0.1


class Ragged(Task):
    """Clients of 4 to 14 examples."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def data(self, client: Client) -> Split[Any]:
        size = 4 + 2 * int(client.index or 0)
        part = client.rng.normal(size=(size, 6)).astype(np.float32), client.rng.integers(0, 3, size)
        return Split(part, part)


slowly = [pytest.param(name, marks=pytest.mark.slow) for name in ("FedAvgM", "FedYogi", "QFedAvg")]


@pytest.mark.parametrize("name", ["FedAdam", *slowly])
def test_under_secure_aggregation_the_models_are_flowers_in_the_clear(name: str) -> None:
    spec = RunSpec.parse(
        {
            "run": {"rounds": 3},
            "cohort": {"size": CLIENTS, "minimum": CLIENTS},
            "client": {"batch_size": 4, "optimizer": {"name": "sgd", "lr": RATE}},
            "limits": {"weight": 100},
            "encryption": {"updates": "secagg"},
            "simulation": {"engine": "sequential", "clients": CLIENTS},
        }
    )
    masked = simulate(Ragged(), spec, strategy=from_flower(SUMS[name]())).parameters.shared
    clear = Simulation(Ragged(), spec.with_("encryption.updates=tls"))

    def client(number: int, i: int, x: Vector) -> tuple[Vector, int, float]:
        clear.trainer.receive(Parameters(x, np.zeros(0, np.float32)))
        examples = clear.population.training(NAMES[i])
        seen = clear.trainer.evaluate(examples, {}).scalars
        update, _ = clear.trainer.train(clear.ref(number, "train"), NAMES[i], examples, {})
        y = cast(Vector, x + update.vectors["delta"])
        return y, int(update.scalars["weight"]), seen["loss"] / seen["count"]

    plain = theirs(SUMS[name](), client, cast(Vector, clear.state.parameters.shared), 3)[-1]
    clear.close()
    np.testing.assert_allclose(masked, plain, rtol=1e-4, atol=1e-5)


def test_under_secure_aggregation_a_wrapper_keeps_what_it_promises() -> None:
    """Clipped, noised and masked at once: everybody is asked, so that masks tell nobody who came."""
    strategy = from_flower(FIXED[0](flower.FedAvg(), 1e-3, 0.05, CLIENTS), population=CLIENTS)
    tables = {
        "run": {"rounds": 2},
        "cohort": {"size": CLIENTS},
        "client": {"batch_size": 4},
        "evaluation": {"where": "holdout"},
        "encryption": {"updates": "secagg"},
        "simulation": {"engine": "sequential", "clients": CLIENTS},
    }
    result = simulate(Held(), RunSpec.parse(tables), strategy=strategy)
    assert [row["expected"] for row in result.metrics] == [CLIENTS] * 2 and "epsilon" in result.metrics[0]
    first = Simulation(Held(), RunSpec.parse(tables)).state.parameters.shared
    assert 0 < np.linalg.norm(result.parameters.shared - first) <= 2 * 0.05 * 1.01


class Held(Ragged):
    """With test data of the server's."""

    def holdout(self) -> Any:
        rng = np.random.default_rng(0)
        return rng.normal(size=(8, 6)).astype(np.float32), rng.integers(0, 3, 8)
