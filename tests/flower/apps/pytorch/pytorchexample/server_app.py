"""The ServerApp."""

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from pytorchexample.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg, and write the model and the metrics to the file that the run config names."""
    config = context.run_config
    torch.manual_seed(0)
    strategy = FedAvg(fraction_train=config["fraction-train"], fraction_evaluate=config["fraction-evaluate"])
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
        num_rounds=config["num-server-rounds"],
    )
    if config["result"]:
        arrays = {name: array.numpy() for name, array in result.arrays.items()}
        losses = [metrics["train_loss"] for metrics in result.train_metrics_clientapp.values()]
        accuracies = [metrics["eval_acc"] for metrics in result.evaluate_metrics_clientapp.values()]
        np.savez(config["result"], **arrays, losses=losses, accuracies=accuracies)
