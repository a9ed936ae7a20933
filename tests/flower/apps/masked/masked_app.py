"""Flower's SecAgg+, whose mod keeps keys and shares in `context.state` over four messages a round."""

from pathlib import Path

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import Grid, LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow


class Client(NumPyClient):
    """Answers with its number."""

    def __init__(self, context: Context) -> None:
        self.partition = int(context.node_config["partition-id"])

    def fit(self, parameters, config):
        return [np.full(4, float(self.partition))], 10, {}


def client_fn(context: Context):
    return Client(context).to_client()


client = ClientApp(client_fn=client_fn, mods=[secaggplus_mod])
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the workflow, and write what it has summed up to."""
    values = []
    strategy = FedAvg(
        initial_parameters=ndarrays_to_parameters([np.zeros(4)]),
        fraction_evaluate=0.0,
        evaluate_fn=lambda number, parameters, config: values.append(float(parameters[0][0])),
    )
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    legacy = LegacyContext(context=context, config=config, strategy=strategy)
    fit = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2, timeout=30)
    DefaultWorkflow(fit_workflow=fit)(grid, legacy)
    if path := context.run_config["result"]:
        Path(path).write_text(" ".join(map(str, values)), encoding="utf-8")
