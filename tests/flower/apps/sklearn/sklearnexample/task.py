"""Model and data: a multinomial logistic regression whose coefficients travel as NumPy arrays of float64."""

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

Arrays = list[NDArray[np.float64]]
CLASSES, FEATURES = 10, 64


def load_data(partition: int, partitions: int) -> tuple[Arrays, Arrays]:
    """Return examples and labels to train on, and to test on."""
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    mine = np.array_split(order, partitions)[partition]
    x, y = digits.data[mine] / 16, digits.target[mine]
    cut = int(0.8 * len(x))
    return [x[:cut], y[:cut]], [x[cut:], y[cut:]]


def new_model(iterations: int) -> LogisticRegression:
    """Return a model that goes on from where it is."""
    model = LogisticRegression(max_iter=iterations, warm_start=True)
    model.classes_ = np.arange(CLASSES)
    set_parameters(model, [np.zeros((CLASSES, FEATURES)), np.zeros(CLASSES)])
    return model


def set_parameters(model: LogisticRegression, arrays: Arrays) -> None:
    """Put coefficients and intercepts into a model."""
    model.coef_, model.intercept_ = arrays


def fit(model: LogisticRegression, examples: Arrays) -> None:
    """Go a few iterations further, which do not have to converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(*examples)
