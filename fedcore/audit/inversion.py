"""Gradient inversion: what a client's update says of a single example."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedcore.layout import Layout, Vector


def invert_linear(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the input of a linear layer from its gradients on one example: x = dW_i / db_i, exactly.

    weight: (out, in). bias: (out,). Any multiple of the gradients does, such as a step of SGD. Row i is the
    one with the largest finite |db_i|; NaN where all are zero (Phong et al. 2018, section 3.1).
    """
    row = int(bias.abs().nan_to_num(0.0, 0.0).argmax())
    return weight[row] / bias[row]


def candidates(weight: Tensor, bias: Tensor) -> Tensor:
    """Return what every output of a linear layer makes of its input, (out, in), of which a sum has many.

    An output that only one example of a batch moves gives that example, exactly (Boenisch et al. 2023).
    Outputs that none moves are left out.
    """
    moved = bias != 0
    return weight[moved] / bias[moved, None]


def first_linear(module: nn.Module, x: Tensor) -> tuple[str, str] | None:
    """Return the names of weight and bias of a linear layer that reads an example as it is, if there is one.

    x: one example, (1, ...).
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None and layer.in_features == x.numel():
            seen: list[Tensor] = []
            handle = layer.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0]))
            with torch.no_grad():
                module(x)
            handle.remove()
            if len(seen) == 1 and torch.equal(seen[0].flatten(), x.flatten()):
                return f"{name}.weight".removeprefix("."), f"{name}.bias".removeprefix(".")
    return None


def layer(layout: Layout, delta: Vector, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Return how an update moves weight and bias of a linear layer, in float64."""
    parts = layout.unflatten(delta, "shared")
    weight, bias = (torch.from_numpy(parts[name].copy()).double() for name in names)
    return weight, bias


def from_update(layout: Layout, delta: Vector, names: tuple[str, str]) -> Tensor:
    """Return the input that an update after one step of SGD on one example shows."""
    return invert_linear(*layer(layout, delta, names))


def relative_error(guess: Tensor, truth: Tensor) -> float:
    """Return ||guess - truth|| / ||truth||, at most 1, which a blank guess has as well."""
    guess, truth = guess.flatten().double(), truth.flatten().double()
    error = float((guess - truth).norm() / truth.norm().clamp_min(1e-12))
    return min(error, 1.0) if error == error else 1.0


def deep_leakage(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    gradients: Mapping[str, Tensor],
    shape: torch.Size,
    steps: int = 300,
    seed: int = 0,
) -> Tensor:
    """Return the input whose gradients come closest to given ones, by L-BFGS (DLG, Zhu et al. 2019).

    loss: of the module's output; an attacker knows the target, since the last layer's gradient tells it
    (iDLG, Zhao et al. 2020). gradients: of parameters, by name. shape: of one example, (1, ...). It wants a
    smooth model: through ReLU and max-pooling it often finds nothing.
    """
    guess = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    parameters = [module.get_parameter(name) for name in gradients]
    scale = torch.stack([g.square().sum() for g in gradients.values()]).sum()
    optimizer = torch.optim.LBFGS([guess], max_iter=steps, line_search_fn="strong_wolfe")

    def distance() -> float:
        optimizer.zero_grad()
        own = torch.autograd.grad(loss(module(guess)), parameters, create_graph=True)
        gaps = [(a - b).square().sum() for a, b in zip(own, gradients.values(), strict=True)]
        gap = torch.stack(gaps).sum() / scale
        (guess.grad,) = torch.autograd.grad(gap, [guess])
        return float(gap.detach())

    optimizer.step(distance)  # type: ignore[no-untyped-call]
    return guess.detach()
