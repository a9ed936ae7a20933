"""Secure aggregation among virtual clients gives the bits of the same run without masks."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from fedcore.client.training import Kept
from fedcore.data import Split
from fedcore.errors import RunFailed, SpecError, UpdateRefused
from fedcore.messages import Plan, Update
from fedcore.simulations import secure
from fedcore.simulations.result import Result
from fedcore.simulations.run import Simulation, simulate
from fedcore.simulations.sequential import Sequential
from fedcore.spec import RunSpec
from fedcore.strategies.rounds import Round, train_plan
from fedcore.strategies.words import Words, encoded
from fedcore.task import Client, Task
from fedcore.tasks import Digits

CLIENTS = 7


class Ragged(Task):
    """Clients of 4 to 16 examples, and a hidden layer of some width."""

    def __init__(self, width: int = 20) -> None:
        self.width = width
        self.metrics = {"accuracy": lambda output, y: (output.argmax(1) == y).double()}

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, self.width), nn.Tanh(), nn.Linear(self.width, 3))

    def data(self, client: Client) -> Split[Any]:
        assert client.index is not None
        rng = np.random.default_rng(client.index)
        size = 4 + 2 * client.index
        part = rng.normal(client.index / 9, 1, (size, 6)).astype(np.float32), rng.integers(0, 3, size)
        return Split(part, part)


class Normed(Ragged):
    """With running statistics, which are averaged beside the model."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def spec_for(encoding: str = "exact", **tables: dict[str, Any]) -> RunSpec:
    given: dict[str, dict[str, Any]] = {
        "run": {"seed": 3, "rounds": 2},
        "cohort": {"size": CLIENTS, "minimum": 5},
        "client": {"batch_size": 4},
        "limits": {"weight": 100} | ({"norm": 0.5} if encoding != "exact" else {}),
        "encryption": {"encoding": encoding},
        "simulation": {"engine": "sequential", "clients": CLIENTS},
    }
    return RunSpec.parse({key: {**given.get(key, {}), **tables.get(key, {})} for key in {**given, **tables}})


def both(spec: RunSpec, task: Task | None = None) -> list[Result]:
    """Run a spec as it is, and with masks."""
    return [simulate(task or Ragged(), each) for each in (spec, spec.with_("encryption.updates=secagg"))]


def told(result: Result) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in result.metrics]


CLIENT_LEVEL = {"level": "client", "population": CLIENTS, "noise_multiplier": 0.5, "metric_noise": 2.0}
DISTRIBUTED = {"level": "distributed", "noise_multiplier": 0.5, "metric_noise": 2.0}
TREE = {"level": "tree", "separation": 1, "noise_multiplier": 0.5, "metric_noise": 2.0}
RUNS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedprox": {"strategy": {"name": "fedprox", "mu": 0.1}},
    "scaffold": {"strategy": {"name": "scaffold"}},
    "fednova": {"strategy": {"name": "fednova"}},
    "feddyn": {"strategy": {"name": "feddyn"}},
    "fedadam": {"strategy": {"name": "fedavg", "optimizer": {"name": "adam", "lr": 0.01}}},
    "qfedavg": {"strategy": {"name": "qfedavg"}},
    "client level": {"privacy": CLIENT_LEVEL, "cohort": {"minimum": 0}, "limits": {"norm": 0.0}},
    "tree": {"privacy": TREE, "limits": {"norm": 0.0}},
}
ONCE = ("feddyn", "qfedavg", "client level", "tree")  # every client counts once


@pytest.mark.parametrize("encoding", ["exact", "q32"])
@pytest.mark.parametrize("name", RUNS)
def test_masks_change_nothing(name: str, encoding: str) -> None:
    plain, masked = both(spec_for(encoding, **RUNS[name]))
    assert masked.parameters.digest == plain.parameters.digest
    assert told(masked) == told(plain) and "accuracy" in masked.final
    assert masked.spec.encryption.encoding == encoding and masked.spec.encryption.updates == "secagg"


@pytest.mark.parametrize("name", ONCE)
def test_masks_change_nothing_in_sixteen_bits(name: str) -> None:
    plain, masked = both(spec_for("q16", **RUNS[name]))
    assert masked.parameters.digest == plain.parameters.digest and told(masked) == told(plain)


def test_buffers_are_masked_too() -> None:
    plain, masked = both(spec_for("q32"), Normed())
    assert masked.parameters.digest == plain.parameters.digest
    assert plain.parameters.buffers.any()


def test_masks_change_nothing_where_clients_train_together() -> None:
    plain, masked = both(spec_for("q32", simulation={"engine": "vectorized", "chunk": 3}))
    assert masked.parameters.digest == plain.parameters.digest and told(masked) == told(plain)


@pytest.mark.slow
def test_engines_agree_in_narrow_words() -> None:
    """Worker processes to the bit; together, to the tolerance of training, if rounding does not flip it."""
    results = {
        engine: simulate(Digits(), spec_for("q32", simulation={"engine": engine, "workers": 2}))
        for engine in ("sequential", "vectorized", "processes")
    }
    one, together, apart = (result.parameters.shared for result in results.values())
    assert np.array_equal(one, apart) and np.abs(one - together).max() < 1e-5


@pytest.mark.slow
def test_masks_change_nothing_on_a_sparse_graph() -> None:
    sizes = {"cohort": {"size": 70, "minimum": 60}, "simulation": {"clients": 70}, "run": {"rounds": 1}}
    plain, masked = both(spec_for("q32", **sizes))
    assert masked.parameters.digest == plain.parameters.digest and told(masked) == told(plain)


def test_a_simulation_is_encoded_as_a_deployment_would_and_not_masked_unasked() -> None:
    assert Simulation(Ragged(), spec_for("auto")).spec.encryption.encoding == "q32"
    unbounded = Simulation(Ragged(), spec_for("auto", limits={"norm": 0.0}))
    assert unbounded.spec.encryption.encoding == "exact" and unbounded.federation is None
    assert unbounded.spec.encryption.updates == "auto"


def faulty(monkeypatch: pytest.MonkeyPatch, *clients: int) -> None:
    """Let clients train to something that is not finite."""
    work = Sequential.work

    def broken(self: Sequential, plan: Plan, client: str) -> tuple[Update, Kept]:
        update, kept = work(self, plan, client)
        if plan.ref.kind == "train" and self.population.index[client] in clients:
            update.vectors["delta"][0] = np.nan
        return update, kept

    monkeypatch.setattr(Sequential, "work", broken)


def test_a_client_that_refuses_its_own_update_drops_out(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, 2)
    finish = secure.Masked.finish

    def watched(self: secure.Masked, round: Round) -> None:
        finish(self, round)
        assert set(self.clients) == set(self.server.included) == set(round.folded)

    monkeypatch.setattr(secure.Masked, "finish", watched)
    plain, masked = both(spec_for("q32"))
    assert masked.parameters.digest == plain.parameters.digest and told(masked) == told(plain)
    assert [row["refused"] for row in masked.metrics] == [1, 1]


def test_too_few_clients_fail_the_run_as_they_do_without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, 0, 1, 2)
    with pytest.raises(RunFailed, match=r"4 of at least 5 updates; refused: delta has a coordinate"):
        simulate(Ragged(), spec_for().with_("encryption.updates=secagg"))


def test_a_sum_that_no_honest_cohort_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lying(plan: Plan, update: Update) -> Words:
        words = encoded(plan, update)
        words.wide[-1] += np.uint64(2**61)
        return words

    monkeypatch.setattr(secure, "encoded", lying)
    with pytest.raises(UpdateRefused, match=r"the sum of count of 7 clients is .*, expected 0 to 700"):
        simulate(Ragged(), spec_for().with_("encryption.updates=secagg"))


def test_what_is_added_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each client's words differ from those that it encodes in nearly every place."""
    seen: list[float] = []

    class Watched(secure.Masked):
        def receive(self, round: Any, clients: Any, rows: Any) -> None:
            for client, update in zip(clients, rows.updates(), strict=True):
                before, expected = round.sums.words.narrow.copy(), encoded(round.plan, update)
                super().receive(round, (client,), type(rows).of([update]))
                added = round.sums.words.narrow - before
                seen.append(float((added == expected.narrow).mean()) if len(added) else 0.0)

    monkeypatch.setattr("fedcore.simulations.run.Masked", Watched)
    simulate(Ragged(), spec_for("q32", run={"rounds": 1}).with_("encryption.updates=secagg"))
    assert len(seen) == 2 * CLIENTS and max(seen) < 0.05


def test_it_takes_a_few_vectors_of_memory_and_not_one_a_client() -> None:
    task, width = Ragged(width=100_000), 10 * 100_000 * 4
    peaks = []
    for updates in ("auto", "secagg"):
        spec = spec_for("q32", run={"rounds": 1}, encryption={"updates": updates, "encoding": "q32"})
        simulation = Simulation(task, spec)
        tracemalloc.start()
        simulation.train(1, lambda _: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 3 * width


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"strategy": {"name": "krum"}}, "Krum looks at single updates"),
        ({"cohort": {"size": 2, "minimum": 0}}, "a round may close with 2 clients, expected at least 3"),
        (
            {"simulation": {"clients": 4}},
            "simulation.clients = 4, but under secure aggregation fewer than 5 close no round",
        ),
    ],
)
def test_what_cannot_be_masked_is_refused_before_the_first_round(
    tables: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        Simulation(Ragged(), spec_for(**tables).with_("encryption.updates=secagg"))


def test_a_grid_without_room_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(SpecError, match=r'16 bits have no room for weights, .* encryption.encoding = "q32"'):
        Simulation(Ragged(), spec_for("q16"))


def test_an_attacker_reckons_with_the_limit() -> None:
    """Who chooses a forged update by what the server makes of it knows that it scales updates down."""
    simulation = Simulation(Ragged(), spec_for("q32"))
    length, limit = simulation.layout.shared_size, simulation.spec.limits.norm
    ref, names = simulation.ref(1, "train"), tuple(simulation.population.names)
    plan = train_plan(simulation.strategy, simulation.spec, simulation.layout, ref, names, CLIENTS)
    made = simulation.guess(plan, np.ones((CLIENTS, length), np.float32))
    assert np.linalg.norm(made) == pytest.approx(limit)


def test_the_report_says_how_updates_were_summed(tmp_path: Path) -> None:
    for updates, said in (("secagg", "under masks"), ("auto", "not encrypted")):
        spec = spec_for("q32", run={"rounds": 1}, encryption={"updates": updates, "encoding": "q32"})
        simulate(Ragged(), spec, out=tmp_path / updates)
        page = (tmp_path / updates / "report.html").read_text()
        assert said in page and "in words of 32 bits" in page


def test_words_are_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[Words] = []
    finish = secure.Masked.finish

    def watched(self: secure.Masked, round: Any) -> None:
        finish(self, round)
        sizes.append(round.sums.words)

    monkeypatch.setattr(secure.Masked, "finish", watched)
    simulate(Ragged(), spec_for("q32", run={"rounds": 1}).with_("encryption.updates=secagg"))
    train, evaluate = sizes
    assert (len(train.narrow), len(train.wide)) == (6 * 20 + 20 + 20 * 3 + 3, 3)
    assert (len(evaluate.narrow), len(evaluate.wide)) == (0, 3)


@pytest.mark.parametrize("encoding", ["q32", "q16"])
def test_shares_of_noise_are_summed_under_masks(encoding: str) -> None:
    tables: dict[str, Any] = {"privacy": DISTRIBUTED, "limits": {"norm": 0.0}}
    plain, masked = both(spec_for(encoding, **tables))
    assert masked.parameters.digest == plain.parameters.digest and told(masked) == told(plain)
