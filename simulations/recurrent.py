"""Recurrent layers as a loop over time, which `torch.func.vmap` can batch; torch's kernels it cannot.

Equal to torch's layers up to rounding, forward and backward. What the input adds to all gates is one product
for all steps; each step is then one product with the last output.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, ...]  # of a layer in one direction, each (n, units): the output, and an LSTM's cell
Cell = Callable[[Tensor, Tensor, State], State]  # W_ih x + b_ih, W_hh h + b_hh, the state -> the next state


def recurrent(
    layer: nn.RNNBase, x: Tensor | PackedSequence, first: Tensor | State | None = None
) -> tuple[Tensor, Tensor | State]:
    """Return the outputs of all steps and the last states, in the shapes of the layer's own `forward`.

    Raises NotImplementedError for a packed sequence, whose lengths would differ from client to client.
    """
    if isinstance(x, PackedSequence):
        raise NotImplementedError("a packed sequence has other lengths for every client; pad it instead")
    single, turned = x.dim() == 2, x.dim() == 3 and layer.batch_first
    x = x[:, None] if single else x.transpose(0, 1) if turned else x  # (steps, n, features)
    states = (first,) if isinstance(first, Tensor) else first or ()
    states = tuple(state[:, None] for state in states) if single else states  # (layers * ways, n, units)
    zeros = (x.new_zeros(x.shape[1], layer.hidden_size),) * (1 + isinstance(layer, nn.LSTM))
    ends: list[State] = []
    for depth in range(layer.num_layers):
        ways = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            begin = tuple(state[len(ends)] for state in states) or zeros
            outputs, end = _run(layer, x, begin, f"l{depth}{suffix}")
            ways.append(outputs)
            ends.append(end)
        x = torch.cat(ways, -1)
        if layer.dropout and depth + 1 < layer.num_layers:
            x = dropout(x, layer.dropout, layer.training)
    last = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
    if single:
        x, last = x[:, 0], tuple(state[:, 0] for state in last)
    return x.transpose(0, 1) if turned else x, last if len(last) > 1 else last[0]


def _run(layer: nn.RNNBase, x: Tensor, state: State, name: str) -> tuple[Tensor, State]:
    """Run over (steps, n, features) in one direction; return (steps, n, units), the last state."""
    cell, backward = CELLS[layer.mode], name.endswith("reverse")
    w_ih, w_hh = (getattr(layer, f"weight_{part}_{name}") for part in ("ih", "hh"))
    b_ih, b_hh = (getattr(layer, f"bias_{part}_{name}") if layer.bias else None for part in ("ih", "hh"))
    given = linear(x, w_ih, b_ih).unbind()  # not indexed: its gradient is then stacked once, not added up
    outputs = []
    for each in reversed(given) if backward else given:
        state = cell(each, linear(state[0], w_hh, b_hh), state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backward else outputs), state


def _lstm(given: Tensor, held: Tensor, state: State) -> State:
    """c' = sigmoid(f) c + sigmoid(i) tanh(g);  h' = sigmoid(o) tanh(c')  (Gers et al. 2000)."""
    i, f, g, o = (given + held).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(given: Tensor, held: Tensor, state: State) -> State:
    """h' = z h + (1 - z) tanh(n_x + r n_h), r and z sigmoids  (Cho et al. 2014, its version 1)."""
    (rx, zx, nx), (rh, zh, nh) = given.chunk(3, -1), held.chunk(3, -1)
    new = (nx + (rx + rh).sigmoid() * nh).tanh()
    return (new + (zx + zh).sigmoid() * (state[0] - new),)


CELLS: Mapping[str, Cell] = MappingProxyType(
    {
        "RNN_TANH": lambda given, held, state: ((given + held).tanh(),),
        "RNN_RELU": lambda given, held, state: ((given + held).relu(),),
        "LSTM": _lstm,
        "GRU": _gru,
    }
)
"""A layer's `mode` -> its step."""
