"""What replies say of themselves: weights that are believed within limits, and means of their metrics."""

from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from typing import TypeVar

import numpy as np
from flwr.app import MetricRecord, MetricRecordValues
from numpy.typing import NDArray

from fedcore.errors import UpdateRefused

Record = TypeVar("Record")
Metrics = dict[str, MetricRecordValues]
LARGEST = 1e300  # sums of what is below cannot overflow


def only(records: Mapping[str, Record], kind: str) -> Record:
    """Return the one record of a kind that a reply has; raises UpdateRefused where it has none or several."""
    if len(records) != 1:
        raise UpdateRefused(f"sent {len(records)} {kind}s, expected exactly one")
    return next(iter(records.values()))


def number(metrics: MetricRecord, name: str) -> float:
    """Return a metric that is a single number; raises UpdateRefused where there is none of that name."""
    value = metrics.get(name)
    if not isinstance(value, int | float):
        raise UpdateRefused(f"metric {name!r} is {value!r}, expected a number")
    return float(_floats(value))


def weighted_means(replies: Iterable[tuple[float, MetricRecord]], without: str) -> Metrics:
    """Return sum w_i m_i / sum w_i of every metric but `without`, over the replies that have it.

    A metric is a number or a list of numbers. A value that is not finite (or beyond LARGEST), or has another
    shape than the first reply's, is left out of its mean. Sums are exact, so that no order shows in them.
    """
    found: dict[str, list[tuple[float, NDArray[np.float64]]]] = {}
    for weight, metrics in replies:
        for name, value in metrics.items():
            given = _floats(value)
            if name == without or not weight or not (np.abs(given) < LARGEST).all():
                continue
            same = found.setdefault(name, [])
            if not same or same[0][1].shape == given.shape:
                same.append((weight, given))
    return {name: _mean(*zip(*same, strict=True)).tolist() for name, same in found.items()}


def _floats(value: MetricRecordValues) -> NDArray[np.float64]:
    """Return a metric as an array, of infinities where an integer is larger than any float64."""
    try:
        return np.asarray(value, np.float64)
    except OverflowError:
        return np.full(np.shape(value), np.inf)


def _mean(weights: Sequence[float], values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    total = fsum(weights)
    columns = zip(*(value.reshape(-1).tolist() for value in values), strict=True)
    means = [fsum(w / total * v for w, v in zip(weights, column, strict=True)) for column in columns]
    return np.reshape(means, values[0].shape)
