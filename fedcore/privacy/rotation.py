"""Random rotation: spread a vector's energy evenly, so that no single coordinate of it is large.

The randomised Hadamard transform x -> H D x / sqrt(w) of blocks of width w, D a diagonal of random signs
(Ailon and Chazelle 2006; for federated sums Suresh et al. 2017, arXiv 1611.00429). A coordinate of the result
exceeds t ||x|| with probability at most 2 exp(-t^2 w / 2) over the signs (Hoeffding), for any vector that
was fixed before they were.

All blocks are equally wide and a power of two. Where the last one would stick out of the vector it is laid
over the one before, once that has been rotated: so nothing is padded, no coordinate is left in a block too
short to spread it, and the whole stays orthogonal.

It is made of additions and subtractions in a fixed order, so a vector has the same bits on every machine.
"""

from collections.abc import Iterator
from math import log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore import seeds
from fedcore.layout import Vector

Rows = NDArray[np.floating[Any]]

WIDEST = 1 << 14  # a block and its temporaries stay in the cache
AT_ONCE = 1 << 16  # coordinates


def width(size: int) -> int:
    """Return the width of the blocks in which a vector of so many coordinates, at least one, is rotated."""
    return min(WIDEST, 1 << (size.bit_length() - 1))


def flatness(size: int, failure: float) -> float:
    """Return t such that all coordinates of a rotated unit vector lie in [-t, t].

    This fails with the given probability over the signs, by Hoeffding's bound for each coordinate; t is 1
    where that says nothing.
    """
    return min(1.0, sqrt(2 * log(2 * size / failure) / width(size)))


def rotate(vector: Vector, seed: int) -> Vector:
    """Return the vector rotated; shape (d,), dtype float32 or float64 kept, norm kept up to rounding."""
    return _whole(vector, rotated(vector[None], seed))


def unrotate(vector: Vector, seed: int) -> Vector:
    """Return what `rotate` with the same seed made the vector from, up to rounding."""
    return _whole(vector, unrotated(vector[None], seed))


def _whole(vector: Vector, pieces: Iterator[tuple[slice, Rows]]) -> Vector:
    whole = np.empty_like(vector)
    for place, piece in pieces:
        whole[place] = piece[0]
    return whole


def rotated(rows: NDArray[Any], seed: int) -> Iterator[tuple[slice, Rows]]:
    """Yield the places of rotated rows piece by piece, each with its coordinates of all rows, a new array.

    rows: shape (k, d), all rotated by the same signs, each to the bits that `rotate` gives it; float32 or
    float64, which is kept, or integers, which become float64.
    """
    for place, piece, blocks in _pieces(rows, seed):
        for block, signs in blocks:
            _transform(block, signs)
        yield place, piece


def unrotated(rows: NDArray[Any], seed: int) -> Iterator[tuple[slice, Rows]]:
    """Yield what rotated rows were made from, piece by piece as in `rotated`."""
    for place, piece, blocks in _pieces(rows, seed):
        for block, signs in reversed(blocks):
            _transform(block, 1)
            block *= signs
        yield place, piece


def _pieces(rows: NDArray[Any], seed: int) -> Iterator[tuple[slice, Rows, list[tuple[Rows, Rows]]]]:
    """Cut rows into pieces that rotate apart from each other; yield a copy of each, with blocks and signs.

    A piece is some whole blocks, as a view (k, n, w), and at the end also the block laid over the last one.
    """
    count, size = rows.shape
    if not size:
        return
    bits, wide = seeds.generator("rotation", seed), width(size)
    dtype = rows.dtype if rows.dtype.kind == "f" else np.dtype(np.float64)
    step = max(1, AT_ONCE // (count * wide)) * wide
    last = (size // wide - 1) // (step // wide) * step  # where the piece starts that has the last whole block
    for start in range(0, last + 1, step):
        place = slice(start, size if start == last else start + step)
        piece = rows[:, place].astype(dtype)
        length = piece.shape[1] // wide * wide
        whole = piece[:, :length].reshape(count, -1, wide)
        blocks = [(whole, _signs(bits, length, dtype).reshape(-1, wide))]
        if start + length < place.stop:
            blocks.append((piece[:, None, -wide:], _signs(bits, wide, dtype)))
        yield place, piece, blocks


def _signs(bits: np.random.Generator, size: int, dtype: np.dtype[Any]) -> Vector:
    """Return fair signs, shape (size,)."""
    ones = np.unpackbits(np.frombuffer(bits.bytes(-(-size // 8)), np.uint8), count=size)
    return (1 - 2 * ones.view(np.int8)).astype(dtype)


def _transform(blocks: Rows, signs: Rows | int) -> None:
    """Replace each block x of shape (..., w) by H (signs x) / sqrt(w), by H_w = H_a ⊗ H_b with w = a b.

    The factor by butterflies along rows of the block as a matrix, the other one along rows of its transpose,
    so that what is added is contiguous.
    """
    wide = blocks.shape[-1]
    tall = 1 << (wide.bit_length() - 1) // 2
    shape = (*blocks.shape[:-1], tall, wide // tall)
    scaled = np.multiply(blocks, signs * blocks.dtype.type(1 / sqrt(wide)))
    first, spare = _butterflies(scaled.reshape(shape), np.empty(shape, blocks.dtype))
    turned = spare.reshape(*shape[:-2], shape[-1], tall)
    turned[:] = first.swapaxes(-1, -2)
    second, _ = _butterflies(turned, first.reshape(turned.shape))
    blocks[:] = second.swapaxes(-1, -2).reshape(blocks.shape)


def _butterflies(x: Rows, spare: Rows) -> tuple[Rows, Rows]:
    """Return Sylvester's H times x along the last axis but one, in one of two arrays of the same shape.

    Both are overwritten; the other one is returned as well.
    """
    *outer, count, length = x.shape
    half = 1
    while half < count:
        pairs = (*outer, count // (2 * half), 2, half * length)
        these, those = x.reshape(pairs), spare.reshape(pairs)
        np.add(these[..., 0, :], these[..., 1, :], out=those[..., 0, :])
        np.subtract(these[..., 0, :], these[..., 1, :], out=those[..., 1, :])
        x, spare, half = spare, x, 2 * half
    return x, spare
