"""Personal algorithms in a whole run: they help where labels or inputs differ, and their state is safe."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.client.kept import load_kept, save_kept
from fedcore.client.module import build
from fedcore.client.trainer import initial_seed
from fedcore.client.worker import Job
from fedcore.data import ArrayDataset, Split, digits
from fedcore.errors import SpecError
from fedcore.messages import Ref
from fedcore.models import digits_mlp
from fedcore.simulations.run import Simulation, simulate
from fedcore.spec import RunSpec
from fedcore.strategies import from_table
from fedcore.strategies.rounds import Round, advance, initial_state, receive, train_plan
from fedcore.task import Client, Task

pytestmark = pytest.mark.slow  # together more than ten seconds

ALL: dict[str, dict[str, Any]] = {
    "moon": {"name": "moon"},
    "ditto": {"name": "ditto", "lam": 0.5},
    "fedper": {"name": "fedper"},
    "fedrep": {"name": "fedrep", "head_epochs": 4},
    "fedbn": {"name": "fedbn"},
    "pfedme": {"name": "pfedme", "lam": 5.0, "eta": 0.1},
}


class Digits(Task):
    def model(self) -> nn.Module:
        return digits_mlp()

    def dataset(self) -> ArrayDataset:
        return digits().train


def spec(algorithm: Any, **tables: dict[str, Any]) -> RunSpec:
    given: dict[str, dict[str, Any]] = {
        "run": {"rounds": 8, "seed": 1},
        "cohort": {"size": 10},
        "client": {"batch_size": 16, "epochs": 2},
        "evaluation": {"every": 0},
        "simulation": {"clients": 10, "partition": {"name": "shards", "k": 2}},
        "strategy": {"algorithm": algorithm},
    }
    return RunSpec.parse({key: {**given.get(key, {}), **tables.get(key, {})} for key in {**given, **tables}})


@cache
def skewed(name: str) -> float:
    """Return the mean accuracy on the clients' test examples where each client has two or three digits."""
    final = simulate(Digits(), spec(ALL.get(name, name))).final
    return float(final["accuracy"])


@pytest.mark.parametrize("name", ["ditto", "fedper", "fedrep", "pfedme"])
def test_a_model_of_ones_own_beats_fedavg_under_label_skew(name: str) -> None:
    assert 0.6 < skewed("local_sgd") < 0.85
    assert skewed(name) > 0.92
    assert skewed(name) > skewed("local_sgd") + 0.1


def test_moon_stays_near_fedavg_with_so_few_clients() -> None:
    assert abs(skewed("moon") - skewed("local_sgd")) < 0.1


class Styles(Task):
    """Digits, each client's twice as bright as those of the one before it."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
        )

    def data(self, client: Client) -> Split[Any]:
        assert client.index is not None
        train = digits().train
        x, y = train.x[client.index :: 10], train.y[client.index :: 10]
        x = x * np.float32(2.0 ** (client.index - 5))
        return Split((x[:110], y[:110]), (x[110:], y[110:]))


def test_norms_of_ones_own_beat_fedavg_where_inputs_differ_in_style() -> None:
    accuracy = {name: simulate(Styles(), spec(name)).final["accuracy"] for name in ("local_sgd", "fedbn")}
    assert accuracy["local_sgd"] < 0.6
    assert accuracy["fedbn"] > 0.9


# --- a small task: two clouds, one client in four sends NaN ---


class Clouds(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))

    def data(self, client: Client) -> Split[Any]:
        assert client.index is not None
        rng = np.random.default_rng(client.index)
        y = rng.integers(0, 2, 24)
        x = (rng.normal(size=(24, 2)) + 3 * y[:, None]).astype(np.float32)
        return Split((x[:16], y[:16]), (x[16:], y[16:]))


class Poisoned(Clouds):
    def data(self, client: Client) -> Split[Any]:
        split = super().data(client)
        if client.index == 1:
            split.train[0][:] = np.nan
        return split


def small(algorithm: Any, **tables: dict[str, Any]) -> RunSpec:
    given: dict[str, dict[str, Any]] = {
        "run": {"rounds": 3},
        "cohort": {"size": 4},
        "client": {"batch_size": 8},
        "simulation": {"clients": 4},
    }
    return spec(algorithm, **{k: {**given.get(k, {}), **tables.get(k, {})} for k in {**given, **tables}})


@pytest.mark.parametrize("name", ALL)
def test_the_state_of_a_refused_client_is_not_committed(name: str) -> None:
    simulation = Simulation(Poisoned(), small(ALL[name]))
    rows = list(simulation.rounds(lambda _: None))
    assert [row["refused"] for row in rows] == [1, 1, 1]
    assert set(simulation.states.states) == {f"client-{i:06d}" for i in (0, 2, 3)}
    assert np.isfinite(rows[-1]["loss"])
    finite = [np.isfinite(v).all() for kept in simulation.states.states.values() for v in kept.values()]
    assert finite
    assert all(finite)


@pytest.mark.parametrize("name", ALL)
def test_a_device_that_restarts_every_round_comes_to_a_simulations_bits(name: str, tmp_path: Path) -> None:
    """The worker's job with its state on disk, under the coordinator's state machine."""
    run = small(ALL[name], simulation={"engine": "sequential"})
    simulation = Simulation(Clouds(), run)
    list(simulation.rounds(lambda _: None))

    strategy, names = from_table(run.strategy), simulation.population.names
    layout = simulation.layout

    class Device(Clouds):
        def data(self, client: Client) -> Split[Any]:
            index = names.index(client.name)
            return super().data(Client(client.name, index, client.rng))

    def job(client: str) -> Job:
        return Job(Device(), run, client, {}, evaluator=False)

    state = initial_state(strategy, job(names[0]).trainer.parameters())
    for number in (1, 2, 3):
        ref = Ref(run.run.name, number, 0, "train")
        round = Round(train_plan(strategy, run, layout, ref, tuple(names), len(names)))
        for client in names:
            before = load_kept(tmp_path / client / "current")
            update, kept = job(client).work(ref, state.parameters, before, 0.0)
            assert receive(round, client, update).status == "folded"
            save_kept(tmp_path / client / "current", kept)
        round.close()
        state = advance(strategy, round, state, run.run.seed)
    assert state.parameters.digest == simulation.state.parameters.digest
    for client in names:
        on_disk, simulated = load_kept(tmp_path / client / "current"), simulation.states[client]
        assert {n: v.tobytes() for n, v in on_disk.items()} == {n: v.tobytes() for n, v in simulated.items()}
        tested, _ = job(client).work(Ref("r", 3, 0, "evaluate"), state.parameters, on_disk, 0.0)
        simulation.trainer.receive(state.parameters)
        test = simulation.population.examples(client)[1]
        assert tested.scalars == simulation.trainer.evaluate(test, simulated).scalars


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("moon", "Moon runs two more models beside each client's"),
        ("ditto", "Ditto has a second model for each client"),
        ("fedrep", "FedRep trains each client in two phases"),
        ("pfedme", "PFedMe has a second model for each client"),
    ],
)
def test_what_runs_client_by_client_says_why(name: str, words: str) -> None:
    choice = Simulation(Digits(), spec(ALL[name], simulation={"workers": 1})).choice
    assert (choice.engine.name, choice.reason) == ("sequential", f"not vectorised: {words}")
    with pytest.raises(SpecError, match=f"cannot train this task: {words}"):
        Simulation(Digits(), spec(ALL[name], simulation={"engine": "vectorized"}))


class Layered(Clouds):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))


class Tracked(Clouds):
    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        model.register_buffer("seen", torch.tensor(0))
        return model


@pytest.mark.parametrize("name", ["fedper", "fedbn"])
def test_split_models_train_in_chunks_to_the_same_result(name: str) -> None:
    def run(engine: str) -> Simulation:
        tables: dict[str, Any] = {
            "simulation": {"engine": engine, "chunk": 3},
            "client": {"batch_size": 5, "epochs": 2},
        }
        simulation = Simulation(Layered(), small(ALL[name], **tables))
        list(simulation.rounds(lambda _: None))
        return simulation

    one, other = run("sequential"), run("vectorized")
    assert other.engine.name == "vectorized"
    np.testing.assert_allclose(one.state.parameters.shared, other.state.parameters.shared, atol=1e-5)
    assert one.states.states.keys() == other.states.states.keys() == set(one.population.names)
    own = [[s.states[name]["model.local"] for name in one.population.names] for s in (one, other)]
    np.testing.assert_allclose(own[0], own[1], atol=1e-5)
    assert len({part.tobytes() for part in own[1]}) == 4, "each its own"
    with pytest.raises(SpecError, match="each client has buffers of its own"):
        Simulation(Tracked(), small(ALL[name], simulation={"engine": "vectorized"}))


def test_a_result_holds_the_shared_part_and_the_local_one_that_the_model_began_with(tmp_path: Path) -> None:
    result = simulate(Clouds(), small("fedper"), out=tmp_path)
    shared, model = result.layout.unflatten(result.parameters.shared, "shared"), result.module()
    assert set(shared) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    np.testing.assert_array_equal(model.get_parameter("0.weight").detach(), shared["0.weight"])
    initial = build(Clouds(), initial_seed(1))
    assert not torch.equal(model.get_parameter("0.weight"), initial.get_parameter("0.weight"))
    assert torch.equal(model.get_parameter("3.weight"), initial.get_parameter("3.weight"))


def test_a_split_model_goes_with_robust_rules_and_adaptive_optimisers() -> None:
    strategy: dict[str, Any] = {
        "pre": [{"name": "nnm", "f": 1}],
        "aggregator": {"name": "trimmed_mean", "f": 1},
        "optimizer": {"name": "adam", "lr": 0.05},
    }
    final = simulate(Clouds(), small("fedper", strategy=strategy, cohort={"minimum": 4})).final
    assert final["accuracy"] > 0.5


@pytest.mark.parametrize("name", ["ditto", "fedper"])
def test_who_never_trained_is_tested_with_what_was_received(name: str) -> None:
    simulation = Simulation(Clouds(), small(ALL[name], cohort={"size": 3}, run={"rounds": 1}))
    list(simulation.rounds(lambda _: None))
    (stranger,) = set(simulation.population.names) - set(simulation.states.states)
    result = simulation.result([])
    x, y = simulation.population.examples(stranger)[1].batch(slice(0, 8))
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(result.module().eval()(x), y))
    simulation.trainer.receive(simulation.state.parameters)
    tested = simulation.trainer.evaluate(simulation.population.examples(stranger)[1], {}).scalars
    assert tested["loss"] / tested["count"] == pytest.approx(expected, rel=1e-6)
