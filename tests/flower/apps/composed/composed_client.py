"""A ClientApp whose numbers follow from node and round; node 0 attacks, or boasts."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Step towards a point of the node's own; node 0 goes far the other way, and may claim to know best."""
    partition, number = int(context.node_config["partition-id"]), int(msg.content["config"]["server-round"])
    rng = np.random.RandomState(1000 * number + partition)
    made = {}
    for name, array in msg.content["arrays"].items():
        x = array.numpy()
        step = 0.3 * (np.ones_like(x) - x) + rng.normal(0, 0.05, x.shape).astype(x.dtype)
        made[name] = Array(np.asarray(x + step if partition else x - 10 * step))
    examples = 10**9 if msg.content["config"]["boasts"] and not partition else 10 + partition
    metrics = MetricRecord({"num-examples": examples, "train_loss": float(rng.uniform())})
    return Message(RecordDict({"arrays": ArrayRecord(made), "metrics": metrics}), reply_to=msg)
