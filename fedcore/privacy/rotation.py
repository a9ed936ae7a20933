"""Random rotation: spread a vector's energy evenly, so that no single coordinate of it is large.

The randomised Hadamard transform x -> H D x / sqrt(w) of blocks of width w, D a diagonal of random signs
(Ailon and Chazelle 2006; for federated sums Suresh et al. 2017, arXiv 1611.00429). A coordinate of the result
exceeds t ||x|| with probability at most 2 exp(-t^2 w / 2) over the signs (Hoeffding), for any vector that
was fixed before they were.

All blocks are equally wide and a power of two. Where the last one would stick out of the vector it is laid
over the one before, once that has been rotated: so nothing is padded, no coordinate is left in a block too
short to spread it, and the whole stays orthogonal.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore import seeds
from fedcore.layout import Vector

WIDEST = 1 << 14  # two factors of 128: a block is two small matrix products, and stays in the cache


def width(size: int) -> int:
    """Return the width of the blocks in which a vector of so many coordinates, at least one, is rotated."""
    return min(WIDEST, 1 << (size.bit_length() - 1))


def rotate(vector: Vector, seed: int) -> Vector:
    """Return the vector rotated; shape (d,), dtype float32 or float64 kept, norm kept up to rounding."""
    rotated = vector.copy()
    for block, signs in _blocks(rotated, seed):
        block[:] = _hadamard(block * signs)
    return rotated


def unrotate(vector: Vector, seed: int) -> Vector:
    """Return what `rotate` with the same seed made the vector from, up to rounding."""
    restored = vector.copy()
    for block, signs in reversed(list(_blocks(restored, seed))):
        block[:] = _hadamard(block) * signs
    return restored


def _blocks(vector: Vector, seed: int) -> Iterator[tuple[Vector, NDArray[np.int8]]]:
    """Yield the whole blocks as the rows of a view, then the one laid over the end, each with its signs."""
    if not len(vector):
        return
    wide = width(len(vector))
    whole = len(vector) // wide * wide
    bits = seeds.generator("rotation", seed)
    yield (rows := vector[:whole].reshape(-1, wide)), _signs(bits, rows.size).reshape(rows.shape)
    if whole < len(vector):
        yield vector[None, -wide:], _signs(bits, wide)[None]


def _signs(bits: np.random.Generator, size: int) -> NDArray[np.int8]:
    """Return fair signs, shape (size,)."""
    ones = np.unpackbits(np.frombuffer(bits.bytes(-(-size // 8)), np.uint8), count=size)
    return 1 - 2 * ones.view(np.int8)


def _hadamard(rows: Vector) -> Vector:
    """Return each row times H / sqrt(w), shape (k, w), by H_w = H_a ⊗ H_b with w = a b (Kronecker)."""
    bits = rows.shape[1].bit_length() - 1
    left, right = (_matrix(half, rows.dtype) for half in (bits // 2, bits - bits // 2))
    squares = rows.reshape(-1, len(left), len(right))
    product: Vector = left @ (squares @ right)
    return product.reshape(rows.shape)


@lru_cache(maxsize=32)
def _matrix(bits: int, dtype: np.dtype[Any]) -> Vector:
    """Return Sylvester's matrix of order 2^bits, scaled to be orthogonal."""
    matrix: Vector = np.ones((1, 1))
    for _ in range(bits):
        matrix = np.kron([[1, 1], [1, -1]], matrix) / np.sqrt(2)
    return matrix.astype(dtype)
