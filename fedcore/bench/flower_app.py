"""The Flower app of `fedcore bench flower`: a job of `fedcore.bench.jobs` with Flower's unmodified FedAvg.

Nothing in it knows where it runs. A round is the time between two calls of the strategy's `evaluate_fn`,
which only notes the time.
"""

import json
import time
from functools import cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedcore.bench.jobs import LEARNING_RATE, JobTask, job_of
from fedcore.bench.serial import tensors

client = ClientApp()
server = ServerApp()


@cache
def built(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a process's model and optimiser, with the job's initial parameters."""
    torch.manual_seed(0)
    model = JobTask(job_of(name)).model()
    return model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


@cache
def examples(name: str, index: int) -> tuple[Tensor, Tensor]:
    """Return a client's examples; a process reads them once."""
    return tensors(job_of(name), index, "cpu")


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train a client from what came, and say how long that took, from the message to the reply."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    name = str(context.run_config["job"])
    model, optimizer = built(name)
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    model.load_state_dict(arrays.to_torch_state_dict())
    x, y = examples(name, int(context.node_config["partition-id"]))
    batch = job_of(name).batch
    for xb, yb in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
        optimizer.zero_grad()
        cross_entropy(model(xb), yb).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    trained = ArrayRecord(model.state_dict())
    metrics = MetricRecord({"num-examples": len(x), "own-s": time.perf_counter() - started})
    return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)


@torch.no_grad()
def accuracy(name: str, arrays: ArrayRecord) -> float:
    """Return the fraction of test examples that a model classifies correctly."""
    model, _ = built(name)
    model.load_state_dict(arrays.to_torch_state_dict())
    test = JobTask(job_of(name)).holdout()
    assert test is not None
    return float((model(torch.from_numpy(test.x)).argmax(1) == torch.from_numpy(test.y)).float().mean())


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for every node, run the strategy, and write what was measured."""
    name, marks = str(context.run_config["job"]), []
    while len(list(grid.get_node_ids())) < job_of(name).clients:
        time.sleep(0.05)

    def note_time(number: int, arrays: ArrayRecord) -> None:
        marks.append(time.perf_counter())

    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid,
        initial_arrays=ArrayRecord(built(name)[0].state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=note_time,
    )
    own = [metrics["own-s"] for metrics in result.train_metrics_clientapp.values()]
    line = {"marks": marks, "own": own, "accuracy": accuracy(name, result.arrays)}
    Path(str(context.run_config["result"])).write_text(json.dumps(line), encoding="utf-8")
