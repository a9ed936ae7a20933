"""Every strategy that comes with Flower, over our Grid and hosts, and in a plain loop: the same bits."""

import gc
import random
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as theirs
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedcore.flower.app import App
from fedcore.flower.grid import Fleet
from fedcore.flower.guards import FINITE, Limits
from fedcore.flower.hosting import load
from fedcore.flower.hosts import Hosts

NODES, ROUNDS = 7, 3
Build = Callable[[], theirs.Strategy]
BUILDS: dict[str, Build] = {
    "FedAvg": lambda: theirs.FedAvg(),
    "FedAvg-sampled": lambda: theirs.FedAvg(fraction_train=0.5, fraction_evaluate=0.4),
    "FedAvgM": lambda: theirs.FedAvgM(server_learning_rate=0.9, server_momentum=0.5),
    "FedAdagrad": lambda: theirs.FedAdagrad(),
    "FedAdam": lambda: theirs.FedAdam(),
    "FedYogi": lambda: theirs.FedYogi(),
    "FedProx": lambda: theirs.FedProx(proximal_mu=0.5),
    "QFedAvg": lambda: theirs.QFedAvg(client_learning_rate=0.1, q=0.2, train_loss_key="train_loss"),
    "FedMedian": lambda: theirs.FedMedian(),
    "FedTrimmedAvg": lambda: theirs.FedTrimmedAvg(beta=0.2),
    "Krum": lambda: theirs.Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: theirs.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3),
    "Bulyan": lambda: theirs.Bulyan(num_malicious_nodes=1),
    "FedXgbBagging": lambda: theirs.FedXgbBagging(),
    "FedXgbCyclic": lambda: theirs.FedXgbCyclic(),
    "DifferentialPrivacyServerSideFixedClipping": lambda: theirs.DifferentialPrivacyServerSideFixedClipping(
        theirs.FedAvg(), 0.1, 0.5, NODES
    ),
    "DifferentialPrivacyClientSideFixedClipping": lambda: theirs.DifferentialPrivacyClientSideFixedClipping(
        theirs.FedAvg(), 0.1, 0.5, NODES
    ),
    "DifferentialPrivacyServerSideAdaptiveClipping": lambda: (
        theirs.DifferentialPrivacyServerSideAdaptiveClipping(theirs.FedAvg(), 0.6, NODES)
    ),
    "DifferentialPrivacyClientSideAdaptiveClipping": lambda: (
        theirs.DifferentialPrivacyClientSideAdaptiveClipping(theirs.FedAvg(), 0.6, NODES)
    ),
}


class Loop(Grid):
    """The plain loop over the nodes of another grid: each gets a copy, one after another."""

    def __init__(self, app: ClientApp, nodes: list[int], run: Run) -> None:
        self.app, self.nodes, self._run = app, nodes, run
        self.contexts = {
            node: Context(run.run_id, node, {"partition-id": index}, RecordDict(), {})
            for index, node in enumerate(nodes)
        }

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return self._run

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        copies = list(map(deepcopy, messages))
        return [self.app(each, self.contexts[each.metadata.dst_node_id]) for each in copies]


@pytest.fixture(scope="module")
def app() -> App:
    return App.read(Path(__file__).parent / "apps" / "numbers")


@pytest.fixture(scope="module")
def hosts(app: App) -> Iterator[Hosts]:
    hosts = Hosts(app, NODES, seed=0, workers=2)
    gc.freeze()  # Flower collects garbage for every reply that QFedAvg or Bulyan reads
    yield hosts
    gc.unfreeze()
    hosts.close("finished", "")


def start(build: Build, grid: Grid, poison: str = "") -> theirs.Result:
    """Run a strategy with what it draws from fixed."""
    random.seed(1)
    np.random.seed(1)
    strategy = build()
    initial = {"w": np.ones((3, 2), np.float32), "b": np.zeros(4), "scale": np.float32(1.5)}
    if isinstance(strategy, theirs.FedXgbBagging | theirs.FedXgbCyclic):
        initial = {"0": np.frombuffer(b"", np.uint8)}
    arrays = ArrayRecord({name: Array(np.asarray(value)) for name, value in initial.items()})
    config = ConfigRecord({"poison": poison})
    return strategy.start(grid, arrays, num_rounds=ROUNDS, timeout=30, train_config=config)


def shown(result: theirs.Result) -> dict[str, Any]:
    """Return all of a result, to the bit."""
    return {
        "arrays": {name: (a.dtype, a.shape, a.data) for name, a in result.arrays.items()},
        "train": {number: dict(m) for number, m in result.train_metrics_clientapp.items()},
        "evaluate": {number: dict(m) for number, m in result.evaluate_metrics_clientapp.items()},
    }


def test_no_strategy_is_left_out() -> None:
    assert set(theirs.__all__) - {"Strategy", "Result"} == {name.partition("-")[0] for name in BUILDS}


@pytest.mark.parametrize("name", BUILDS)
def test_a_strategy_of_flower(name: str, app: App, hosts: Hosts) -> None:
    fleet = Fleet(hosts, Run.create_empty(7))
    got = start(BUILDS[name], fleet)
    expected = start(BUILDS[name], Loop(load(app), fleet.get_node_ids(), fleet.run))
    assert shown(got) == shown(expected)
    assert len(got.train_metrics_clientapp) == len(got.evaluate_metrics_clientapp) == ROUNDS
    assert (fleet.tally.failed, fleet.tally.refused, fleet.tally.lost) == (0, 0, 0)


@pytest.mark.parametrize("name", ["FedAvg", "FedMedian", "Krum", "FedAdam"])
@pytest.mark.parametrize("poison", ["nan", "weight"])
def test_what_one_client_does_to_a_strategy_without_guards_it_cannot_do_here(
    name: str, poison: str, app: App, hosts: Hosts
) -> None:
    fleet = Fleet(hosts, Run.create_empty(7), Limits(largest_weight=1000) if poison == "weight" else FINITE)
    got = start(BUILDS[name], fleet, poison)
    values = [array.numpy() for array in got.arrays.values()]
    assert all(np.isfinite(value).all() for value in values)
    assert fleet.tally.refused == ROUNDS
    assert all(metrics["train_loss"] < 3 for metrics in shown(got)["train"].values())
