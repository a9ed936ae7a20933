"""The models have the sizes that their papers give, and learn."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedcore.data import ALPHABET
from fedcore.models import (
    MODELS,
    CharLSTM,
    char_lstm,
    cifar_cnn,
    digits_cnn,
    digits_mlp,
    mnist_2nn,
    mnist_cnn,
)

SIZES: dict[Callable[[], nn.Module], int] = {
    digits_mlp: 4_810,
    digits_cnn: 9_930,
    cifar_cnn: 122_570,
    mnist_2nn: 199_210,
    mnist_cnn: 1_663_370,
    # 8 V embedding, 4 * 256 * (8 + 256 + 2) and 4 * 256 * (256 + 256 + 2) LSTM, 257 V linear.
    char_lstm: 265 * 65 + 798_720,
}


def example(name: str, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "char_lstm":
        codes = torch.randint(0, len(ALPHABET), (n, 11), generator=generator)
        return codes[:, :-1], codes[:, -1]
    channels, side = {"digits": (1, 8), "mnist": (1, 28), "cifar": (3, 32)}[name.partition("_")[0]]
    return torch.rand(n, channels, side, side, generator=generator), torch.arange(n) % 10


def test_names_and_sizes() -> None:
    assert {name: model.__name__ for name, model in MODELS.items()} == {name: name for name in MODELS}
    counts = {model: sum(p.numel() for p in model().parameters()) for model in MODELS.values()}
    assert counts == SIZES


@pytest.mark.parametrize("name", MODELS)
def test_a_few_steps_fit_a_few_examples(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    x, y = example(name, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses = []
    for _ in range(16):
        optimizer.zero_grad()
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert logits.shape == (8, len(ALPHABET) if name == "char_lstm" else 10)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_initial_weights_follow_the_seed_alone(name: str) -> None:
    def weights() -> Tensor:
        torch.manual_seed(1)
        return nn.utils.parameters_to_vector(MODELS[name]().parameters())

    assert torch.equal(weights(), weights())


def test_an_example_is_predicted_alike_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    model = char_lstm()
    x, _ = example("char_lstm", 4)
    assert torch.allclose(model(x)[2:3], model(x[2:3]), atol=1e-6)


def test_an_alphabet_of_ones_own() -> None:
    model = CharLSTM(5)
    assert model(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 5)
