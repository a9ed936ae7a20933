"""The models of the examples, as their papers have them; initial weights follow torch's random state."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from fedcore.models.images import cifar_cnn as cifar_cnn
from fedcore.models.images import digits_cnn as digits_cnn
from fedcore.models.images import digits_mlp as digits_mlp
from fedcore.models.images import mnist_2nn as mnist_2nn
from fedcore.models.images import mnist_cnn as mnist_cnn
from fedcore.models.text import CharLSTM as CharLSTM
from fedcore.models.text import char_lstm as char_lstm

MODELS: Mapping[str, Callable[[], nn.Module]] = MappingProxyType(
    {
        "digits_mlp": digits_mlp,
        "digits_cnn": digits_cnn,
        "cifar_cnn": cifar_cnn,
        "mnist_2nn": mnist_2nn,
        "mnist_cnn": mnist_cnn,
        "char_lstm": char_lstm,
    }
)
"""The models by name."""
