"""`fedcore bench privacy`: one client's DP-SGD beside Opacus by itself, in turn.

Opacus by itself is what its documentation shows: `PrivacyEngine.make_private` and a loop over its loader of
Poisson batches. Both have the same model, examples, sampling rate, clip norm and noise multiplier. Then 100
of the job's clients, one after another with Opacus and at once in the vectorised engine.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedcore.bench.aggregators import seconds
from fedcore.bench.jobs import LEARNING_RATE, JobTask, job_of, load
from fedcore.client.examples import examples_from
from fedcore.client.trainer import TorchTrainer
from fedcore.messages import Ref
from fedcore.simulations.answers import ClientStates
from fedcore.simulations.borrowed import threads
from fedcore.simulations.population import Population
from fedcore.simulations.vectorized import Vectorized
from fedcore.spec import RunSpec

STEPS = 20  # 1 / q
CHUNK = 100  # clients


def measure(name: str, clipping: str, rounds: int) -> dict[str, Any]:
    """Train a client with 20 batches of a job's examples in both ways, in turn; return the line to print."""
    job = job_of(name)
    task, data = JobTask(job), load(job.data).train.take(np.arange(STEPS * job.batch))
    spec = RunSpec.parse(
        {
            "client": {"batch_size": job.batch, "optimizer": {"name": "sgd", "lr": LEARNING_RATE}},
            "privacy": {
                "level": "example",
                "noise_multiplier": 1.0,
                "sampling_rate": 1 / STEPS,
                "clipping": clipping,
            },
        }
    )
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus's, of its generator and of torch's hooks
        trainer, examples = TorchTrainer(task, spec), examples_from(data)
        alone = opacus_alone(
            task.model(), torch.from_numpy(data.x), torch.from_numpy(data.y), job.batch, clipping
        )
        ours, theirs = [], []
        for number in range(rounds + 1):
            theirs.append(seconds(alone))
            ref = Ref("bench", number, 0, "train")
            ours.append(seconds(partial(trainer.train, ref, "client", examples, {})))
    ratio = median(a / b for a, b in zip(ours[1:], theirs[1:], strict=True))
    return {
        "bench": "privacy",
        "job": name,
        "clipping": clipping,
        "batch": job.batch,
        "rounds": rounds,
        "step_ms": round(median(ours[1:]) / STEPS * 1e3, 3),
        "opacus_step_ms": round(median(theirs[1:]) / STEPS * 1e3, 3),
        "ratio_to_opacus": round(ratio, 3),
        f"chunk_of_{CHUNK}_ratio_to_one_by_one": round(together(task, spec, rounds), 2),
        "measured": time.strftime("%Y-%m-%d"),
    }


def together(task: JobTask, spec: RunSpec, rounds: int) -> float:
    """Return how many times as fast the vectorised engine trains clients as one after another with Opacus."""
    spec = spec.with_(f"simulation.clients={min(CHUNK, task.job.clients)}")
    population, trainer = Population(task, spec, "cpu"), TorchTrainer(task, spec)
    clients = tuple(population.names)
    engine = Vectorized(population, trainer, ClientStates(), CHUNK)

    def one_by_one(ref: Ref) -> None:
        for client in clients:
            trainer.train(ref, client, population.training(client), {})

    ratios = []
    for number in range(max(rounds // 8, 1) + 1):
        ref = Ref("bench", number, 0, "train")
        alone = seconds(partial(one_by_one, ref))
        ratios.append(alone / seconds(partial(engine.train, ref, clients, engine.stack(clients))))
    return median(ratios[1:])


def opacus_alone(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int, clipping: str
) -> Callable[[], None]:
    """Return a call that trains for as many steps as our client's round has."""
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=batch),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        criterion=nn.CrossEntropyLoss(),
        grad_sample_mode=clipping,
    )
    private, optimizer, loader = made[0], made[1], made[-1]
    criterion = made[2] if clipping == "ghost" else nn.CrossEntropyLoss()

    def epoch() -> None:
        for xb, yb in loader:
            optimizer.zero_grad()
            criterion(private(xb), yb).backward()
            optimizer.step()

    return epoch
