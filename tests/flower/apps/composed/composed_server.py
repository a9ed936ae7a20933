"""A ServerApp that learns three times from all nodes by strategies of fedcore, then once in private."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedcore import RunSpec
from fedcore.flower import as_flower
from fedcore.privacy.levels import ClientLevel
from fedcore.spec import Cohort, Evaluation, Run
from fedcore.strategies import (
    Adam,
    CenteredClipping,
    FedExP,
    NearestNeighborMixing,
    Poisson,
    Strategy,
    TrimmedMean,
)

app = ServerApp()
ROUNDS = 4
STRATEGIES = {
    "robust": Strategy(
        pre=(NearestNeighborMixing(f=1),), aggregator=TrimmedMean(f=1), optimizer=Adam(lr=0.2)
    ),
    "extrapolated": Strategy(optimizer=FedExP()),
    "clipped": Strategy(aggregator=CenteredClipping(radius=3.0)),
}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all and write the models."""
    nodes = len(list(grid.get_node_ids()))
    rounds, cohort = Run(rounds=ROUNDS), Cohort(size=nodes)
    everybody = RunSpec(run=rounds, cohort=cohort, evaluation=Evaluation(where="holdout"))
    level = ClientLevel(level="client", population=nodes, target_epsilon=8.0)
    strategies = STRATEGIES | {"private": Strategy(sampler=Poisson(), privacy=level)}
    written = {}
    for name, strategy in strategies.items():
        initial = ArrayRecord({"w": Array(np.zeros((4, 3), np.float32)), "b": Array(np.zeros(()))})
        config = ConfigRecord({"boasts": name == "extrapolated"})
        result = as_flower(strategy, everybody).start(grid, initial, ROUNDS, train_config=config)
        written |= {f"{name}/{key}": array.numpy() for key, array in result.arrays.items()}
        last = result.train_metrics_clientapp[ROUNDS]
        written |= {f"{name}/{key}": np.array(value) for key, value in last.items()}
    np.savez(str(context.run_config["result"]), **written)
