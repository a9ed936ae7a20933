"""Classifiers of small images, shape (n, channels, height, width) to logits of shape (n, 10)."""

from torch import nn


def digits_mlp() -> nn.Sequential:
    """Return a 64-64-10 perceptron for 8 x 8 images, 4,810 parameters.

    Source: ours, the smallest model that learns `fedcore.data.digits`.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def digits_cnn() -> nn.Sequential:
    """Return a CNN for 8 x 8 images, 9,930 parameters: 3 x 3 convolutions (16, 32 channels), pool, linear.

    Source: ours, the smallest convolutional model for `fedcore.data.digits`.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def mnist_2nn() -> nn.Sequential:
    """Return the 2NN, a 784-200-200-10 perceptron for 28 x 28 images, 199,210 parameters.

    Source: McMahan et al. 2017 (arXiv:1602.05629), section 3.
    """
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def mnist_cnn() -> nn.Sequential:
    """Return the CNN for 28 x 28 images, 1,663,370 parameters: 5 x 5 convolutions (32, 64), 512 units.

    Source: McMahan et al. 2017 (arXiv:1602.05629), section 3; padding 2, which its parameter count implies.
    """
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def cifar_cnn() -> nn.Sequential:
    """Return a CNN for 32 x 32 images in colour, 122,570 parameters: 3 x 3 convolutions (32, 64), 64 units.

    Source: the model of TensorFlow's tutorial on CIFAR-10, which federated benchmarks took up.
    """
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
