"""Flower's records without their detours, which cost a small model more than its training does.

NumPy writes and reads the header of a file with Python's own parser, though a layer has the same header at
every client of every round; a typed dictionary spells out a type for each item that it checks; an Array first
finds out in which of four ways it was called. `install` puts functions in their place that do the same; the
tests hold them against Flower's own, of the one release that fedcore takes.
"""

import math
from functools import lru_cache
from io import BytesIO
from typing import Any, Literal

import numpy as np
from flwr.app import Array
from flwr.app.message.typeddict import TypedDict
from flwr.common.constant import SType
from numpy.lib.format import read_array, read_array_header_1_0, write_array_header_1_0

Values = np.ndarray[Any, Any]
Order = Literal["C", "F"]

NPY_1 = b"\x93NUMPY\x01\x00"  # version 1.0, which np.save writes unless a header is huge
KINDS = "biufc"  # of dtype: what is a number


def install() -> None:
    """Let Flower's arrays and records take the short way in this process."""
    for (owner, name), function in SHORT.items():
        setattr(owner, name, function)


def made(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> Array:
    """Return an Array of these fields, whose types are not looked at again."""
    array = Array.__new__(Array)
    vars(array).update(dtype=dtype, shape=shape, stype=stype, data=data)
    return array


def values(data: bytes) -> Values:
    """Return the values of a file that `np.save` wrote, as a view of its bytes where they are numbers.

    Raises ValueError where it is none, or holds Python objects.
    """
    try:
        if data.startswith(NPY_1):
            start = len(NPY_1) + 2 + int.from_bytes(data[8:10], "little")
            dtype, shape, order = _described(data[8:start])
            if dtype.kind in KINDS:
                return np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape, order=order)
        return np.asarray(read_array(BytesIO(data), allow_pickle=False))
    except Exception as error:  # of a header that is made to harm, NumPy raises a dozen kinds
        raise ValueError(f"no file of NumPy's: {error}") from error


def _numpy(array: Array) -> Values:
    """Return the values of an Array as an array of their own."""
    if array.stype != SType.NUMPY:
        raise TypeError(f"Unsupported serialization type for numpy conversion: '{array.stype}'")
    return values(array.data).copy(order="K")


def _from_numpy(ndarray: Values) -> Array:
    """Return an Array of the file that `np.save` would write."""
    assert isinstance(ndarray, np.ndarray), f"Expected NumPy ndarray, got {type(ndarray)}"
    order: Order = "C" if ndarray.flags.c_contiguous or not ndarray.flags.f_contiguous else "F"
    if ndarray.dtype.kind in KINDS:
        name, header = _header(ndarray.dtype.str, ndarray.shape, order)
        return made(name, ndarray.shape, SType.NUMPY, header + ndarray.tobytes(order))
    buffer = BytesIO()
    np.save(buffer, ndarray, allow_pickle=False)
    return made(str(ndarray.dtype), ndarray.shape, SType.NUMPY, buffer.getvalue())


def _set(record: TypedDict[Any, Any], key: Any, value: Any) -> None:
    """Set an item after both checks."""
    of = vars(record)
    of["_check_key_fn"](key)
    of["_check_value_fn"](value)
    of["_data"][key] = value


@lru_cache(4096)
def _described(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Order]:
    """Return what a header says, which begins with its own length."""
    shape, fortran, dtype = read_array_header_1_0(BytesIO(header))
    return dtype, shape, "F" if fortran else "C"


@lru_cache(4096)
def _header(descr: str, shape: tuple[int, ...], order: Order) -> tuple[str, bytes]:
    """Return the name of a dtype, and the beginning of the file, up to its values."""
    buffer = BytesIO()
    write_array_header_1_0(buffer, {"descr": descr, "fortran_order": order == "F", "shape": shape})
    return str(np.dtype(descr)), buffer.getvalue()


SHORT: dict[tuple[type, str], Any] = {
    (Array, "numpy"): _numpy,
    (Array, "from_numpy_ndarray"): staticmethod(_from_numpy),
    (TypedDict, "__setitem__"): _set,
}
