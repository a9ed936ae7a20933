"""The local optimisers over rows of clients: the arithmetic of torch.optim, one client a row.

Only the first rows of a chunk take a step, as many as there are rows of gradients: the others have no example
in it, and keep their weights and their state.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedcore.spec import SGD, Adam

Stepper = Callable[[Sequence[Tensor]], None]


def stepper_for(spec: SGD | Adam, weights: Sequence[Tensor]) -> Stepper:
    """Return `step(gradients)`, each (a, *shape), that moves the first a rows of `weights` in place."""
    return _sgd(spec, weights) if isinstance(spec, SGD) else _adam(spec, weights)


def _sgd(spec: SGD, weights: Sequence[Tensor]) -> Stepper:
    """g += wd w;  v = momentum v + g;  w -= lr (g + momentum v, or v)."""
    velocities = [torch.zeros_like(w) for w in weights] if spec.momentum else []

    @torch.no_grad()
    def step(gradients: Sequence[Tensor]) -> None:
        for i, (rows, g) in enumerate(zip(weights, gradients, strict=True)):
            w = rows[: len(g)]
            if spec.weight_decay:
                g = g.add(w, alpha=spec.weight_decay)
            if spec.momentum:
                v = velocities[i][: len(g)].mul_(spec.momentum).add_(g)
                g = g.add(v, alpha=spec.momentum) if spec.nesterov else v
            w.add_(g, alpha=-spec.lr)

    return step


def _adam(spec: Adam, weights: Sequence[Tensor]) -> Stepper:
    """m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  w -= lr m^ / (sqrt(v^) + eps), bias-corrected.

    AdamW decays w by lr wd beforehand, Adam adds wd w to g (Loshchilov and Hutter 2019).
    """
    (b1, b2), eps = spec.betas, 1e-8
    means = [torch.zeros_like(w) for w in weights]
    squares = [torch.zeros_like(w) for w in weights]
    steps = torch.zeros(len(weights[0]), dtype=torch.float64, device=weights[0].device)

    @torch.no_grad()
    def step(gradients: Sequence[Tensor]) -> None:
        active = len(gradients[0])
        taken = steps[:active].add_(1)
        rate = (spec.lr / (1 - b1**taken)).to(weights[0].dtype)
        root = ((1 - b2**taken) ** 0.5).to(weights[0].dtype)
        for i, (rows, g) in enumerate(zip(weights, gradients, strict=True)):
            w = rows[:active]
            if spec.weight_decay and spec.name == "adam":
                g = g.add(w, alpha=spec.weight_decay)
            elif spec.weight_decay:
                w.mul_(1 - spec.lr * spec.weight_decay)
            mean = means[i][:active].lerp_(g, 1 - b1)
            square = squares[i][:active].mul_(b2).addcmul_(g, g, value=1 - b2)
            w.sub_(_wide(rate, w) * mean / (square.sqrt().div_(_wide(root, w)).add_(eps)))

    return step


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """Return (a,) as (a, 1, ...) to go with (a, *shape)."""
    return rows.view(-1, *(1,) * (like.dim() - 1))
