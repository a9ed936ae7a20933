"""Passes over arrays that may be mapped from files, of which only the part at work lies in memory then."""

import mmap
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 4 << 20  # bytes of one array
POPULATE_WRITE = 23  # of madvise, since Linux 5.14; Python has no name for it


def passing(*arrays: NDArray[Any], length: int) -> Iterator[slice]:
    """Cut the columns of arrays of shape (d,) or (k, d) into slices of at most `length`, window by window.

    Where an array is mapped from a file, a window's pages are made ready for writing all at once, which takes
    a quarter of the time that a fault for each would, and go back to the page cache when it is done.
    """
    size, rows = arrays[0].shape[-1], [row for each in arrays if lies_in_file(each) for row in _rows(each)]
    step = size
    if rows:
        step = max(1, WINDOW // max(row.itemsize for row in rows) // length) * length
    for start in range(0, size, max(1, step)):
        stop = min(start + step, size)
        for row in rows:
            if row.flags.writeable and sys.platform == "linux":
                advise(row[start:stop], POPULATE_WRITE)
        yield from (slice(i, min(i + length, stop)) for i in range(start, stop, length))
        for row in rows:
            advise(row[start:stop], mmap.MADV_DONTNEED)


def lies_in_file(array: NDArray[Any]) -> bool:
    """Tell whether an array is mapped from a file that has all that is written to it."""
    return isinstance(array, np.memmap) and array.mode in ("r", "r+", "w+")


def advise(part: NDArray[Any], advice: int) -> None:
    """Tell the system something of the pages of a part of a mapped file; not every system listens."""
    whole: Any = part
    while isinstance(whole, np.ndarray):
        whole = whole.base
    offset = _address(part) - _address(np.frombuffer(whole, np.uint8))
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    with suppress(OSError):
        whole.madvise(advice, start, offset + part.nbytes - start)


def _rows(array: NDArray[Any]) -> NDArray[Any]:
    return array if array.ndim > 1 else array[None]


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
