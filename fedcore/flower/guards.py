"""What a reply may not bring into an aggregation, whoever sent it and whatever the app does with it.

Flower's strategies take what comes: one client's nan makes every mean and every median nan, and a client that
says it had 10^12 examples is the model from then on.
"""

import math
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, MetricRecordValues
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode, SType

from fedcore.errors import SpecError, UpdateRefused
from fedcore.flower.arrays import Values, values

WEIGHT = "num-examples"  # by which Flower's strategies weigh replies unless told otherwise
OLDER = "num_examples"  # the same of clients of the older kind, in a record "fitres.num_examples"
BITS = 64  # of an integer, as in messages of Flower's own


@dataclass(frozen=True)
class Limits:
    """What is checked in every reply, beside that all its arrays are finite.

    largest_weight: of `num-examples`, which is also never negative, nan or infinite; None: no limit.
    """

    largest_weight: float | None = None

    def __post_init__(self) -> None:
        if self.largest_weight is not None and not self.largest_weight > 0:
            raise SpecError(f"--largest-weight {self.largest_weight}: expected more than 0")


FINITE = Limits()


def check(reply: Message, limits: Limits) -> Message:
    """Return a reply, or an error in its place that says what of it was refused."""
    if reply.has_error():
        return reply
    try:
        for record, of in reply.content.items():  # array_records and its like copy, at 20 us a reply
            if isinstance(of, ArrayRecord):
                for name, array in of.items():
                    _finite(f"{record}/{name}", array)
            elif isinstance(of, MetricRecord):
                weight = OLDER if record.endswith(f"res.{OLDER}") else WEIGHT
                for name, value in of.items():
                    _within(f"{record}/{name}", value)
                if weight in of:
                    _weight(f"{record}/{weight}", of[weight], limits.largest_weight)
    except UpdateRefused as refused:
        return make_message(reply.metadata, error=Error(ErrorCode.UNKNOWN, f"refused by fedcore: {refused}"))
    return reply


def _finite(name: str, array: Array) -> None:
    """Raise UpdateRefused unless an array can be read and holds no nan or infinity.

    What is not NumPy's format is the app's own, and passes.
    """
    if array.stype != SType.NUMPY:
        return
    found = readable(name, array)
    if found.dtype.kind in "fc" and not np.isfinite(found).all():
        raise UpdateRefused(f"array {name!r} holds nan or infinity")


def readable(name: str, array: Array) -> Values:
    """Return the values of an array in NumPy's format; raises UpdateRefused where they cannot be read."""
    try:
        return values(array.data)
    except ValueError as error:
        raise UpdateRefused(f"array {name!r} cannot be read: {error}") from error


def _within(name: str, value: MetricRecordValues) -> None:
    """Raise UpdateRefused for an integer that no float holds: any mean of it would end the run."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and number.bit_length() > BITS:
            raise UpdateRefused(f"metric {name!r} is an integer of more than {BITS} bits")


def _weight(name: str, value: object, most: float | None) -> None:
    """Raise UpdateRefused unless a weight is a number from 0 to the largest."""
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UpdateRefused(f"metric {name!r} is {value!r}, expected a number that is not negative")
    if most is not None and value > most:
        raise UpdateRefused(f"metric {name!r} is {value!r}, expected at most {most:g}")
