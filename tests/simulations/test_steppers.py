"""The optimisers over rows do what torch's do for each client alone, and leave alone who has no step."""

import pytest
import torch

from fedcore.client.trainer import make_optimizer
from fedcore.simulations.steppers import stepper_for
from fedcore.spec import RunSpec

STEPS = (3, 3, 2, 1, 0)  # of each client: the largest come first


@pytest.mark.parametrize(
    "optimizer",
    [
        '{name="sgd", lr=0.2}',
        '{name="sgd", lr=0.1, momentum=0.9, weight_decay=0.01}',
        '{name="sgd", lr=0.1, momentum=0.9, nesterov=true}',
        '{name="adam", lr=0.01, weight_decay=0.01}',
        '{name="adamw", lr=0.01, weight_decay=0.1}',
    ],
)
def test_each_row_takes_its_own_steps_as_torch_does(optimizer: str) -> None:
    spec = RunSpec().with_(f"client.optimizer={optimizer}").client
    rng = torch.Generator().manual_seed(0)
    shapes = [(len(STEPS), 2, 3), (len(STEPS), 4)]
    rows = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
    gradients = [[torch.randn(r.shape, generator=rng, dtype=torch.float64) for r in rows] for _ in range(3)]
    begin = [r.clone() for r in rows]
    step = stepper_for(spec.optimizer, rows)
    for number, each in enumerate(gradients):
        active = sum(steps > number for steps in STEPS)
        step([g[:active] for g in each])
    for client, steps in enumerate(STEPS):
        alone = [torch.nn.Parameter(b[client].clone()) for b in begin]
        torchs = make_optimizer(spec, alone)
        for each in gradients[:steps]:
            for parameter, g in zip(alone, each, strict=True):
                parameter.grad = g[client].clone()
            torchs.step()
        for row, parameter in zip(rows, alone, strict=True):
            torch.testing.assert_close(row[client], parameter.detach(), rtol=1e-12, atol=1e-12)
