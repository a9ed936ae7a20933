"""Passes over the rows of a large matrix: column blocks that fit the cache, on a few threads.

Every function reads an (n, d) array, in memory or mapped from a file, and never holds more of it than a
block a thread. Block lengths and the ranges whose sums are added up follow from the shape alone, so a result
has the same bits however many threads there are.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from fedcore.encoding import blocks

Rows = NDArray[np.floating[Any]]
Vector = NDArray[np.float64]
ColumnRule = Callable[[Rows], Rows]
T = TypeVar("T")

THREADS = min(4, os.cpu_count() or 1)  # two fill the memory's bandwidth, more help to sort and multiply
RANGES = 8  # of columns; a multiple of the threads
CACHE = 640 << 10  # bytes of a block and its copies, which stay in a core's own cache
WIDE = 1 << 15  # columns of a block that is read once and needs no copy
PAD = 16  # numbers between the rows of a copied block
SHORT = 32  # rows that are added in their own precision before float64 takes over


class NotFinite(ArithmeticError):
    """A pass met a row with a value that is not finite."""

    def __init__(self) -> None:
        super().__init__("a row has a value that is not finite, or too large to be squared")


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def sweep(size: int, width: int, work: Callable[[Iterator[slice]], T]) -> list[T]:
    """Cut the columns 0..size into a few ranges and return what `work` made of each range's blocks, in order.

    width: columns in a block. BLAS runs with one thread meanwhile: its own threads would wait for each other.
    """
    count = -(-size // width)
    cuts = [min(size, width * (count * i // RANGES)) for i in range(RANGES + 1)]
    ranges = [(start, stop) for start, stop in pairwise(cuts) if start < stop]

    def run(ends: tuple[int, int]) -> T:
        start, stop = ends
        with np.errstate(all="ignore"):  # what is not finite is looked for, not warned about
            return work(slice(start + s.start, start + s.stop) for s in blocks(stop - start, width))

    with _libraries().limit(limits=1, user_api="blas"):
        if count <= RANGES:  # done before threads have started
            return [run(ends) for ends in ranges]
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(run, ranges))


def _width(numbers: int, dtype: np.dtype[Any] | type[np.float64] = np.float64) -> int:
    """Return how many columns of so many numbers fit the cache."""
    return max(256, CACHE // (max(1, numbers) * np.dtype(dtype).itemsize) // 256 * 256)


def finite(rows: Rows) -> NDArray[np.bool_]:
    """Tell of each row whether its squared norm is finite in float64; shape (n,)."""
    whole: NDArray[np.bool_] = np.isfinite(_norms(rows, None)[0])
    return whole


def _norms(rows: Rows, anchor: Rows | None) -> Vector:
    """Return ||x_i||^2, and behind them <x_i, a>, or zero without an anchor; shape (2, n)."""
    count = len(rows)

    def work(parts: Iterator[slice]) -> Vector:
        total, buffer = np.zeros((2, count)), np.empty((count, _width(count)))
        for part in parts:
            block = buffer[:, : part.stop - part.start]
            np.copyto(block, rows[:, part])
            total[0] += np.einsum("ij,ij->i", block, block)
            if anchor is not None:
                total[1] += block @ anchor[part]
        return total

    products: Vector = np.sum(sweep(rows.shape[1], _width(count), work), axis=0, initial=0.0)
    return products


def star(rows: Rows, keep: NDArray[np.intp] | None = None, anchor: Rows | None = None) -> Vector:
    """Return the diagonal of `gram` and the anchor's row and column, the rest zero. Raises NotFinite."""
    products = _norms(rows, anchor)[:, slice(None) if keep is None else keep]
    if not np.isfinite(products[0]).all():
        raise NotFinite
    if anchor is None:
        return np.diag(products[0])
    square = sum(float(np.square(anchor[block], dtype=np.float64).sum()) for block in blocks(len(anchor)))
    total = np.diag(np.append(products[0], square))
    total[-1, :-1] = total[:-1, -1] = products[1]
    return total


def gram(rows: Rows, keep: NDArray[np.intp] | None = None, anchor: Rows | None = None) -> Vector:
    """Return G_ij = <x_i, x_j> over the kept rows and, last, the anchor; float64, symmetric.

    Products are formed in float64. So ||x_i - x_j||^2 = G_ii + G_jj - 2 G_ij is off by about
    1e-15 (||x_i||^2 + ||x_j||^2), less than the rounding of float32 rows moves it, and nothing has to be
    centred: a centre is one more thing that an outlier can drag away. Raises NotFinite.
    """
    count = len(rows) if keep is None else len(keep)
    points = count + (anchor is not None)

    def work(parts: Iterator[slice]) -> Vector:
        total, buffer = np.zeros((points, points)), np.empty((points, _width(points)))
        for part in parts:
            block = buffer[:, : part.stop - part.start]
            block[:count] = rows[:, part] if keep is None else rows[keep, part]
            if anchor is not None:
                block[count] = anchor[part]
            total += block @ block.T
        return total

    total: Vector = np.sum(sweep(rows.shape[1], _width(points), work), axis=0, initial=0.0)
    if not np.isfinite(np.diagonal(total)).all():
        raise NotFinite
    return total


def combine(coefficients: Vector, rows: Rows, result: Vector) -> Vector:
    """Return sum_i a_i x_i, added to `result`, zeros (d,) in float64; rows with a_i = 0 are not read.

    At most 32 rows are added in their own precision, those sums in float64. Raises NotFinite.
    """
    used = np.flatnonzero(coefficients)
    factors = coefficients[used]
    if np.abs(factors).max(initial=0.0) < np.finfo(rows.dtype).max:  # a row of tiny numbers may be scaled up
        factors = factors.astype(rows.dtype)
    every = len(used) == len(rows)

    def work(parts: Iterator[slice]) -> None:
        for part in parts:
            total = result[part]
            for few in blocks(len(used), SHORT):
                total += factors[few] @ (rows[few, part] if every else rows[used[few], part])

            if not np.isfinite(total).all():
                raise NotFinite

    sweep(rows.shape[1], WIDE, work)
    return result


def by_columns(
    rule: ColumnRule,
    rows: Rows,
    result: Vector,
    keep: NDArray[np.intp] | None = None,
    mixing: Vector | None = None,
) -> Vector:
    """Apply a rule to every column of the kept, then mixed, rows; return `result`, shape (d,), float64.

    The rule gets blocks (m, b) whose columns are contiguous, which it may overwrite, and returns (b,).
    Raises NotFinite.
    """
    count = len(rows) if keep is None else len(keep)
    height = count if mixing is None else len(mixing)
    width = _width(count + height, rows.dtype)
    weights = None if mixing is None else np.ascontiguousarray(mixing.T, rows.dtype)

    def work(parts: Iterator[slice]) -> None:
        # Rows lie a power of two apart in many models; read across them, they would fight for a few cache
        # lines. So a block is first copied row by row to where they do not.
        staged = np.empty((count, width + PAD), rows.dtype)[:, :width]
        columns = np.empty((width, height), rows.dtype)
        for part in parts:
            size = part.stop - part.start
            source, block = staged[:, :size], columns[:size]
            source[:] = rows[:, part] if keep is None else rows[keep, part]
            if weights is None:
                block[:] = source.T
            else:
                np.matmul(source.T, weights, out=block)
            flat = block.reshape(-1)
            if not (np.isfinite(flat @ flat) or np.isfinite(flat).all()):
                raise NotFinite
            result[part] = rule(block.T)

    sweep(rows.shape[1], width, work)
    return result


def mix(mixing: Vector, rows: Rows, keep: NDArray[np.intp] | None = None) -> Rows:
    """Return W X over the kept rows; shape (m, d), in the rows' dtype. Raises NotFinite."""
    result = np.empty((len(mixing), rows.shape[1]), rows.dtype)
    weights = mixing.astype(rows.dtype)

    def work(parts: Iterator[slice]) -> None:
        for part in parts:
            mixed = np.matmul(
                weights, rows[:, part] if keep is None else rows[keep, part], out=result[:, part]
            )
            if not np.isfinite(mixed).all():
                raise NotFinite

    sweep(rows.shape[1], _width(len(mixing)), work)
    return result
