"""Ready tasks on the data sets that fedcore knows, for demonstrations, benchmarks and first steps."""

from typing import TYPE_CHECKING

from fedcore.data import ArrayDataset, digits, shakespeare
from fedcore.data.datasets import images, mnist_pixels
from fedcore.task import Task

if TYPE_CHECKING:
    from torch import nn


class Digits(Task):
    """Handwritten digits of 8 x 8 pixels (scikit-learn's), learned by a small perceptron."""

    def model(self) -> "nn.Module":
        """Return the perceptron 64-64-10."""
        from fedcore.models import digits_mlp

        return digits_mlp()

    def dataset(self) -> ArrayDataset:
        """Return 1,437 examples."""
        return digits().train

    def holdout(self) -> ArrayDataset | None:
        """Return 360 examples."""
        return digits().test


class DigitsCNN(Digits):
    """Handwritten digits of 8 x 8 pixels, learned by a small convolutional network."""

    def model(self) -> "nn.Module":
        """Return two convolutions and a linear layer."""
        from fedcore.models import digits_cnn

        return digits_cnn()


class Mnist(Task):
    """MNIST, learned by the two-hidden-layer network of McMahan et al. 2017."""

    def model(self) -> "nn.Module":
        """Return the 2NN, 199,210 parameters."""
        from fedcore.models import mnist_2nn

        return mnist_2nn()

    def dataset(self) -> ArrayDataset:
        """Return 60,000 examples."""
        return images(mnist_pixels().train)

    def holdout(self) -> ArrayDataset | None:
        """Return 10,000 examples."""
        test = mnist_pixels().test
        return test and images(test)


class MnistCNN(Mnist):
    """MNIST, learned by the convolutional network of McMahan et al. 2017."""

    def model(self) -> "nn.Module":
        """Return the CNN, 1,663,370 parameters."""
        from fedcore.models import mnist_cnn

        return mnist_cnn()


class Shakespeare(Task):
    """The next character in Shakespeare's plays, a client being a speaker (partition natural)."""

    def model(self) -> "nn.Module":
        """Return the two-layer LSTM of McMahan et al. 2017."""
        from fedcore.data import ALPHABET
        from fedcore.models import char_lstm

        return char_lstm(len(ALPHABET))

    def dataset(self) -> ArrayDataset:
        """Return windows of text with their speakers under the key `speaker`."""
        return shakespeare().train

    def holdout(self) -> ArrayDataset | None:
        """Return the last fifth of each speaker's text."""
        return shakespeare().test
