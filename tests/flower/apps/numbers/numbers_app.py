"""A ClientApp that has an answer for each of Flower's strategies; its numbers follow from node and round."""

import json

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg


def clipping_mod(msg: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clip where the server sends a norm."""
    clips = "clipping_norm" in msg.content["config"]
    return adaptiveclipping_mod(msg, context, call_next) if clips else call_next(msg, context)


client = ClientApp(mods=[clipping_mod])


def tree(number: int) -> Array:
    """Return one made-up tree as XGBoost saves it."""
    model = {
        "gbtree_model_param": {"num_trees": "1", "num_parallel_tree": "1"},
        "iteration_indptr": [0, 1],
        "trees": [{"id": 0, "leaf": number}],
        "tree_info": [0],
    }
    saved = json.dumps({"learner": {"gradient_booster": {"model": model}}}).encode()
    return Array(np.frombuffer(saved, np.uint8))


@client.train()
def train(msg: Message, context: Context) -> Message:
    """Move every array a little; node 0 does harm where the config asks for it."""
    config, partition = msg.content["config"], int(context.node_config["partition-id"])
    number = int(config["server-round"])
    rng = np.random.RandomState(1000 * number + partition)
    arrays = {name: array.numpy() for name, array in msg.content["arrays"].items()}
    moved = {n: (a + rng.normal(0.1, 0.2, a.shape)).astype(a.dtype) for n, a in arrays.items() if n != "0"}
    examples, poison = 10 + partition, config.get("poison", "") if partition == 0 else ""
    if poison == "nan":
        moved["w"][0, 0] = np.nan
    if poison == "weight":
        examples = 10**12
    content = {name: Array(np.asarray(a)) for name, a in moved.items()} or {
        "0": tree(100 * number + partition)
    }
    loss = float(1 + rng.uniform() + config.get("proximal-mu", 0.0))
    metrics = MetricRecord({"num-examples": examples, "train_loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(content), "metrics": metrics}), reply_to=msg)


@client.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Measure the size of what came."""
    total = float(sum(np.abs(array.numpy()).sum() for array in msg.content["arrays"].values()))
    values = {"num-examples": 5, "size": total, "node": int(context.node_config["partition-id"])}
    return Message(RecordDict({"metrics": MetricRecord(values)}), reply_to=msg)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg."""
    zeros = ArrayRecord({"w": Array(np.zeros((3, 2), np.float32))})
    FedAvg().start(grid, zeros, num_rounds=1)
