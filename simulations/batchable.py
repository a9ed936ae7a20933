"""Layers that torch cannot batch over clients, written so that it can.

`torch.func.vmap` has no rule for the kernels of `nn.RNN`, `nn.GRU` and `nn.LSTM`, and a batch norm must not
count the padding of a ragged batch. So the vectorised engine trains a copy of the model in which these layers
have a `forward` of plain operations. The copy shares the model's tensors, under the same names.

What batch norms remember differs from client to client, and goes along in rows like the parameters:

    remembered = model.statistics(received, kept)    name -> (k, *shape), which every step moves in place
    model.fewest = ...                               examples in a step's smallest batch, one at least
    vmap(...)                                        over model({**weights, **remembered}, x, mask)
    model.sent(remembered), model.own(remembered)
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedcore.client.algorithms.base import AnyHalf
from fedcore.client.module import Resident
from fedcore.client.training import Kept
from fedcore.simulations.recurrent import recurrent

NORM = nn.modules.batchnorm._BatchNorm
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM)
MASK = "present"  # the buffer of a batch norm that says which rows of a batch are examples


class Batchable:
    """A model that takes the tensors of one client in place of its own, also under `vmap`."""

    def __init__(self, model: Resident) -> None:
        """Copy a model that is not `unbatchable`."""
        module = model.module
        shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        replaced = any(isinstance(layer, (NORM, nn.RNNBase)) for layer in module.modules())
        self.model, self.module = model, deepcopy(module, shared) if replaced else module
        self.fewest = 2  # more than a batch norm refuses
        norms = {name: layer for name, layer in self.module.named_modules() if isinstance(layer, NORM)}
        names = {n for name, layer in norms.items() for n, _ in layer.named_buffers(name)}
        self.received = [e.name for e in model.layout.entries if e.kind == "buffer"]
        self.local = [name for name in model.local if name in names]
        self.masks = [f"{name}.{MASK}".lstrip(".") for name in norms]
        for norm in norms.values():
            norm.register_buffer(MASK, torch.ones(1))
        forwards: dict[type[nn.Module], Callable[..., Any]] = {nn.RNNBase: recurrent, NORM: self._norm}
        for kind, forward in forwards.items():
            for layer in self.module.modules():
                if isinstance(layer, kind):
                    layer.forward = partial(forward, layer)

    def __call__(self, tensors: Mapping[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        """Return one client's output for a batch; mask (n,) is 1 where it holds an example, else 0."""
        output: Tensor = functional_call(self.module, {**tensors, **dict.fromkeys(self.masks, mask)}, (x,))
        return output

    def statistics(self, received: Tensor, kept: Sequence[Kept]) -> dict[str, Tensor]:
        """Return what the batch norms of k clients begin with: what was received, made or kept."""
        flat, k = self.model.flat["buffer"], len(kept)
        parts = zip(self.received, flat.parts(received), strict=True)
        begin = {name: part for name, (_, part) in parts} | {n: self.model.fresh[n] for n in self.local}
        rows = {name: part.repeat(k, *(1,) * part.dim()) for name, part in begin.items()}
        sizes = [self.model.fresh[name].numel() for name in self.local]
        for place, state in enumerate(kept):
            if sizes and "model.local" in state:
                last = torch.from_numpy(state["model.local"][-sum(sizes) :])
                for name, part in zip(self.local, torch.split(last, sizes), strict=True):
                    rows[name][place].copy_(part.view_as(rows[name][place]))
        return rows

    def sent(self, remembered: Mapping[str, Tensor]) -> Tensor:
        """Return the rows of what is sent as `buffers`, (k, d)."""
        return torch.cat([remembered[name].flatten(1) for name in self.received], 1)

    def own(self, remembered: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the rows of what stays on the device, each (k, d), in the order of `model.local`."""
        rows = [remembered[name] for name in self.local]
        return [row.reshape(len(row), -1) for row in rows]

    def _norm(self, layer: NORM, x: Tensor) -> Tensor:
        """Normalise (n, c, ...) over the examples, as torch does over all rows; update what is remembered."""
        if layer.training or layer.running_mean is None:
            x, variance = self._centred(layer, x)
        else:
            assert layer.running_var is not None
            x, variance = x - _wide(layer.running_mean, x), layer.running_var
        x = x * _wide((variance + layer.eps).rsqrt(), x)
        x = x if layer.weight is None else x * _wide(layer.weight, x)
        return x if layer.bias is None else x + _wide(layer.bias, x)

    def _centred(self, layer: NORM, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x less each channel's mean over the examples, and their biased variance, (c,).

        Padding becomes 0: in a deep model it could grow from layer to layer, and infinity times 0 is NaN.
        Raises ValueError, as torch does, where a channel has a single value.
        """
        mask, each = layer.get_buffer(MASK), x[0, 0].numel()
        if len(x) != len(mask):
            raise NotImplementedError(f"a batch norm gets {len(x)} rows of a batch of {len(mask)}")
        if layer.training and self.fewest * each < 2:
            raise ValueError("expected more than 1 value per channel when training, got a batch of 1 example")
        rows = mask.view(-1, *(1,) * (x.dim() - 1))
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = mask.sum() * each
        mean = (x * rows).sum(axes) / count
        x = (x - _wide(mean, x)) * rows
        variance = x.square().sum(axes) / count
        if layer.training and layer.running_mean is not None:
            _remember(layer, mean.detach(), variance.detach() * (count / (count - 1)))
        return x, variance


def _wide(channels: Tensor, like: Tensor) -> Tensor:
    """Return (c,) as (1, c, 1, ...) to go with (n, c, ...)."""
    return channels.view(1, -1, *(1,) * (like.dim() - 2))


def _remember(layer: NORM, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics by the momentum, or where it is None to the mean of all so far."""
    assert layer.running_mean is not None and layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    share = 1 / layer.num_batches_tracked.to(mean.dtype) if layer.momentum is None else layer.momentum
    layer.running_mean.add_(share * (mean - layer.running_mean))
    layer.running_var.add_(share * (variance - layer.running_var))


def unbatchable(model: Resident, half: AnyHalf) -> str:
    """Return which layer or buffer keeps clients from being batched, "" where none is known to."""
    known: set[str] = set()
    for name, layer in model.module.named_modules():
        kind = f"{type(layer).__name__} {name!r}"
        if isinstance(layer, nn.RNNBase) and (type(layer) not in RECURRENT or layer.proj_size):
            return f"{kind} is not nn.RNN, nn.GRU or nn.LSTM without projection"
        if isinstance(layer, NORM):
            if type(layer) not in NORMS:
                return f"{kind} is not nn.BatchNorm1d, nn.BatchNorm2d or nn.BatchNorm3d"
            if half.measures and not layer.track_running_stats:
                return f"{kind} has no statistics to test the received model with"
            known.update(buffer for buffer, _ in layer.named_buffers(name))
    sent = {entry.name for entry in model.layout.entries if entry.kind == "buffer"}
    for name, _ in model.module.named_buffers():
        if name not in known and name in sent:
            return f"buffer {name!r} may change from client to client"
        if name not in known and half.splits:
            return f"each client has buffers of its own, such as {name!r}"
    return ""
