"""An app of the older kind: a NumPyClient by `client_fn`, a strategy of `flwr.server` by `server_fn`."""

from pathlib import Path

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


class Client(NumPyClient):
    """Adds its number to what comes; node 0 may claim to have seen everything."""

    def __init__(self, context: Context) -> None:
        self.partition = int(context.node_config["partition-id"])
        self.examples = 10**12 if context.run_config["boasts"] and not self.partition else 10

    def fit(self, parameters, config):
        return [array + self.partition for array in parameters], self.examples, {}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 10, {"partition": self.partition}


def client_fn(context: Context):
    return Client(context).to_client()


def server_fn(context: Context) -> ServerAppComponents:
    def written(number, parameters, config):
        if number == context.run_config["num-server-rounds"] and context.run_config["result"]:
            values = parameters_to_ndarrays(parameters) if hasattr(parameters, "tensors") else parameters
            Path(context.run_config["result"]).write_text(str(float(values[0][0])), encoding="utf-8")

    strategy = FedAvg(initial_parameters=ndarrays_to_parameters([np.zeros(4)]), evaluate_fn=written)
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=config)


client = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
