"""Recurrent layers as loops are torch's own, and can be batched over models."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils.rnn import pack_sequence

from fedcore.simulations.recurrent import recurrent

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu"),
}


def flat(result: Any) -> list[Tensor]:
    """Return the output and the last states, one or two."""
    output, last = result
    return [output, *([last] if isinstance(last, Tensor) else last)]


def gradients(layer: nn.RNNBase, outputs: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a sum of the outputs in which every number counts differently."""
    weighted = [(part * torch.linspace(0, 1, part.numel()).view_as(part)).sum() for part in outputs]
    return torch.autograd.grad(torch.stack(weighted).sum(), [*layer.parameters(), *inputs])


@given(
    kind=st.sampled_from(sorted(KINDS)),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    shape=st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(1, 4)),
    begins=st.booleans(),
)
def test_it_is_torchs_layer_forward_and_backward(
    kind: str,
    layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
    shape: tuple[int, int, int, int],
    begins: bool,
) -> None:
    """n = 0 stands for an input without a batch axis."""
    steps, n, features, units = shape
    torch.manual_seed(steps)
    layer = KINDS[kind](
        features, units, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional
    ).double()
    size = (steps, features) if not n else (n, steps, features) if batch_first else (steps, n, features)
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    states = [
        torch.randn(
            (layers * (1 + bidirectional), *((n,) if n else ()), units),
            dtype=torch.float64,
            requires_grad=True,
        )
        for _ in range(begins * (1 + (kind == "lstm")))
    ]
    first = (tuple(states) if kind == "lstm" else states[0]) if begins else None
    expected, found = flat(layer(x, first)), flat(recurrent(layer, x, first))
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(layer, expected, x, *states), gradients(layer, found, x, *states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
def test_in_float32_it_is_torchs_to_one_part_in_a_million(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = KINDS[kind](8, 64, 2), torch.randn(80, 10, 8, requires_grad=True)
    expected, found = flat(layer(x)), flat(recurrent(layer, x))
    expected += gradients(layer, expected, x)
    found += gradients(layer, found, x)
    for a, b in zip(expected, found, strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize("kind", list(KINDS))
def test_models_side_by_side_are_the_models_one_by_one(kind: str) -> None:
    torch.manual_seed(0)
    layers = [KINDS[kind](3, 5, 2, batch_first=True, bidirectional=True).double() for _ in range(4)]
    x = torch.randn(4, 6, 7, 3, dtype=torch.float64)
    stacked, _ = stack_module_state(layers)
    looped = KINDS[kind](3, 5, 2, batch_first=True, bidirectional=True)
    looped.forward = partial(recurrent, looped)
    together = vmap(lambda weights, rows: functional_call(looped, weights, (rows,))[0])(stacked, x)
    for layer, rows, found in zip(layers, x, together, strict=True):
        torch.testing.assert_close(layer(rows)[0], found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
def test_dropout_is_between_the_layers_and_only_in_training(kind: str) -> None:
    torch.manual_seed(0)
    layer, x = KINDS[kind](3, 4, 2, dropout=1.0), torch.randn(5, 2, 3)
    torch.testing.assert_close(layer(x)[0], recurrent(layer, x)[0])
    layer.eval()
    torch.testing.assert_close(layer(x)[0], recurrent(layer, x)[0])
    layer = KINDS[kind](3, 4, 2, dropout=0.5)
    torch.manual_seed(1)
    expected = layer(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(expected, recurrent(layer, x)[0])


def test_a_packed_sequence_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="pad it instead"):
        recurrent(nn.GRU(2, 3), pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]))
