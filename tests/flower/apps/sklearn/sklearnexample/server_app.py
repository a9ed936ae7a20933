"""The ServerApp."""

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from sklearnexample.task import new_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg, and write the model and the metrics to the file that the run config names."""
    config = context.run_config
    model = new_model(config["local-iterations"])
    result = FedAvg(fraction_train=config["fraction-train"], fraction_evaluate=1.0).start(
        grid=grid,
        initial_arrays=ArrayRecord([model.coef_, model.intercept_]),
        num_rounds=config["num-server-rounds"],
    )
    if config["result"]:
        arrays = dict(zip(("coef", "intercept"), result.arrays.to_numpy_ndarrays(), strict=True))
        accuracies = [metrics["test_accuracy"] for metrics in result.evaluate_metrics_clientapp.values()]
        np.savez(config["result"], **arrays, accuracies=accuracies)
