"""The ClientApp."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from pytorchexample.task import Net, load_data
from pytorchexample.task import test as test_fn
from pytorchexample.task import train as train_fn

app = ClientApp()


def arrived(msg: Message, context: Context):
    """Return the model that came, and this node's examples."""
    torch.set_num_threads(1)
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    number = int(msg.content["config"]["server-round"])
    partition, partitions = context.node_config["partition-id"], context.node_config["num-partitions"]
    return model, *load_data(partition, partitions, context.run_config["batch-size"], number)


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the model on local data."""
    model, examples, _ = arrived(msg, context)
    loss = train_fn(model, examples, context.run_config["local-epochs"], msg.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(examples.dataset)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the model on local data."""
    model, _, examples = arrived(msg, context)
    loss, accuracy = test_fn(model, examples)
    values = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(examples.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(values)}), reply_to=msg)
