"""Sets of members as bitmaps, and the links between members.

i is linked to j where j holds shares of i's secrets, which i gave to those alone whom it drew. Two members
have an edge, and agree on a mask, where either is linked to the other.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import ProtocolError

Matrix = NDArray[np.bool_]  # (n, n)


def bitmap(members: Iterable[int], n: int) -> bytes:
    """Return a set of positions below n."""
    bits = np.zeros(n, np.bool_)
    bits[list(members)] = True
    return np.packbits(bits, bitorder="little").tobytes()


def members(bits: bytes, n: int) -> frozenset[int]:
    """Return the set that `bitmap` packed; raises ProtocolError for another length, or a bit beyond n."""
    return frozenset(np.flatnonzero(_unpacked(bits, n)).tolist())


def distinct(positions: Sequence[int], n: int) -> frozenset[int]:
    """Return positions as a set; raises ProtocolError unless they ascend and are below n."""
    if any(one >= other for one, other in pairwise(positions)) or (positions and positions[-1] >= n):
        raise ProtocolError(f"positions of members do not ascend, or are not below {n}")
    return frozenset(positions)


def links(held: Mapping[int, bytes], n: int) -> Matrix:
    """Return who is linked to whom among those who have said, each in a bitmap, whose shares they hold.

    Raises ProtocolError where a bitmap is none, or somebody holds its own.
    """
    matrix = np.zeros((n, n), np.bool_)
    for holder, bits in held.items():
        matrix[:, holder] = _unpacked(bits, n)
    if matrix.diagonal().any():
        raise ProtocolError("a client holds shares of its own secrets")
    return matrix & _among(held, n)


def _among(members: Iterable[int], n: int) -> Matrix:
    there = np.zeros(n, np.bool_)
    there[list(members)] = True
    return there & there[:, None]


def alone(matrix: Matrix, members: Collection[int], threshold: int) -> frozenset[int]:
    """Return those of the members that are linked to fewer of them than that."""
    counts = (matrix & _among(members, len(matrix))).sum(axis=1)
    return frozenset(member for member in members if counts[member] < threshold)


def kept(matrix: Matrix, members: Iterable[int], threshold: int) -> frozenset[int]:
    """Return the members without those who are alone, and who are then, until nobody is."""
    left = frozenset(members)
    while short := alone(matrix, left, threshold):
        left -= short
    return left


def _unpacked(bits: bytes, count: int) -> NDArray[np.bool_]:
    padded = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").astype(np.bool_)
    if len(bits) != (count + 7) // 8 or padded[count:].any():
        raise ProtocolError(f"a bitmap of {count} has {len(bits)} bytes, or bits beyond its end")
    return padded[:count]
