"""Mods of an app and of a function, a lifespan on both sides, and a strategy that adds in a fixed order.

With this order of the sum the result is the same to the bit wherever the app runs.
"""

import time
from collections.abc import Iterable, Iterator

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod, fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

SHAPES = {"w": (4, 3), "b": (3,)}
alive: list[str] = []


def scaling_mod(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Scale the arrays that came *in place*: who shares them between nodes will see it."""
    scale = float(context.run_config["scale"])
    arrays = msg.content["arrays"]
    for name, array in arrays.items():
        arrays[name] = Array((array.numpy() * scale).astype(np.float32))
    msg.content["config"]["scaled"] = int(msg.content["config"].get("scaled", 0)) + 1
    return call_next(msg, context)


def timing_mod(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Add to the metrics that time passed, and who was asked."""
    started = time.monotonic()
    reply = call_next(msg, context)
    metrics = reply.content["metrics"]
    metrics["took"] = float(time.monotonic() >= started)
    metrics["partition-id"] = int(context.node_config["partition-id"])
    return reply


client = ClientApp(mods=[timing_mod])


@client.lifespan()
def client_lifespan(context: Context) -> Iterator[None]:
    """Be alive exactly while a message is answered."""
    alive.append("client")
    yield
    alive.remove("client")


@client.train(mods=[fixedclipping_mod, arrays_size_mod, scaling_mod])
def train(msg: Message, context: Context) -> Message:
    """Add noise of this node and round to what the mods left."""
    partition, number = int(context.node_config["partition-id"]), int(msg.content["config"]["server-round"])
    rng = np.random.RandomState(100 * number + partition)
    arrays = {name: a.numpy() for name, a in msg.content["arrays"].items()}
    grown = {name: a + rng.standard_normal(a.shape).astype(np.float32) for name, a in arrays.items()}
    values = {"num-examples": 1, "alive": len(alive), "scaled": msg.content["config"]["scaled"]}
    records = {"arrays": ArrayRecord({name: Array(a) for name, a in grown.items()})}
    return Message(content=RecordDict({**records, "metrics": MetricRecord(values)}), reply_to=msg)


class InOrder(FedAvg):
    """FedAvg which adds in the order of partitions."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        """Sort, and aggregate as ever."""
        good = [reply for reply in replies if not reply.has_error()]
        good.sort(key=lambda reply: reply.content["metrics"]["partition-id"])
        return super().aggregate_train(server_round, good)


server = ServerApp()


@server.lifespan()
def server_lifespan(context: Context) -> Iterator[None]:
    """Be alive while the run goes on."""
    alive.append("server")
    yield
    alive.remove("server")


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run a wrapped strategy without noise, and write what came of it."""
    config = context.run_config
    nodes = 0
    while nodes < 2:
        nodes = len(list(grid.get_node_ids()))
        time.sleep(0.05)
    inner = InOrder(fraction_evaluate=0.0)
    strategy = DifferentialPrivacyClientSideFixedClipping(
        inner, noise_multiplier=0.0, clipping_norm=2.0, num_sampled_clients=nodes
    )
    zeros = {name: Array(np.zeros(shape, np.float32)) for name, shape in SHAPES.items()}
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(zeros),
        train_config=ConfigRecord({"scaled": 0}),
        num_rounds=config["num-server-rounds"],
    )
    if config["result"]:
        arrays = {name: array.numpy() for name, array in result.arrays.items()}
        last = result.train_metrics_clientapp[config["num-server-rounds"]]
        measured = {name: last[name] for name in ("alive", "scaled", "took")}
        np.savez(config["result"], **arrays, **measured, server_alive="server" in alive)
