"""Nodes that count how often they were asked, and keep an array of their own, in `context.state`."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()


@client.train()
def train(msg: Message, context: Context) -> Message:
    """Add one, remember it, and say how often."""
    partition, number = int(context.node_config["partition-id"]), msg.content["config"]["server-round"]
    if path := context.run_config["log"]:
        with Path(path).open("a", encoding="utf-8") as log:
            log.write(f"{number}.{partition} begun\n")
    time.sleep(float(context.run_config["seconds"]))
    state = context.state
    if "memory" not in state:
        state["memory"] = MetricRecord({"count": 0})
        state["mine"] = ArrayRecord([np.zeros(3)])
        state["notes"] = ConfigRecord({"rounds": []})
    state["memory"]["count"] += 1
    state["notes"]["rounds"] = [*state["notes"]["rounds"], number]
    mine = state["mine"].to_numpy_ndarrays()[0] + (partition + 1)
    state["mine"] = ArrayRecord([mine])
    arrays = ArrayRecord({"w": Array(msg.content["arrays"]["w"].numpy() + mine)})
    metrics = MetricRecord({"num-examples": 1, "count": state["memory"]["count"]})
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Give the memory away, from another function than the one that wrote it."""
    memory, rounds = context.state["memory"], context.state["notes"]["rounds"]
    values = {"num-examples": 1, "count": memory["count"], "agree": int(len(rounds) == memory["count"])}
    return Message(content=RecordDict({"metrics": MetricRecord(values)}), reply_to=msg)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg; counts and arrays grow with the rounds only if nobody forgets, or counts twice."""
    config = context.run_config
    result = FedAvg(fraction_train=1.0, fraction_evaluate=1.0).start(
        grid=grid,
        initial_arrays=ArrayRecord({"w": Array(np.zeros(3))}),
        num_rounds=config["num-server-rounds"],
    )
    trained, evaluated = result.train_metrics_clientapp, result.evaluate_metrics_clientapp
    lines = {
        "w": result.arrays["w"].numpy().tolist(),
        "trained": [metrics["count"] for metrics in trained.values()],
        "evaluated": [metrics["count"] for metrics in evaluated.values()],
        "agree": [metrics["agree"] for metrics in evaluated.values()],
    }
    if config["result"]:
        Path(config["result"]).write_text(json.dumps(lines), encoding="utf-8")
