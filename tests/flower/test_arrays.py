from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, scalar_dtypes

from fedcore.flower.arrays import SHORT, made, values

VALUES = arrays(
    st.one_of(scalar_dtypes(), st.sampled_from([np.dtype(">f4"), np.dtype([("a", "<i4"), ("b", "<f2")])])),
    array_shapes(min_dims=0, min_side=0, max_side=4),
)
ORDERS = st.sampled_from(["as it is", "fortran", "every other", "turned"])


def laid(numbers: np.ndarray[Any, Any], order: str) -> np.ndarray[Any, Any]:
    """Return an array in another order of its memory."""
    if order == "fortran":
        return np.asfortranarray(numbers)
    if order == "turned":
        return numbers.T
    return numbers[..., ::2] if order == "every other" and numbers.ndim else numbers


@given(VALUES, ORDERS)
def test_an_array_is_made_and_read_as_flower_does(numbers: np.ndarray[Any, Any], order: str) -> None:
    numbers = laid(numbers, order)
    theirs = Array.from_numpy_ndarray(numbers)
    mine = SHORT[Array, "from_numpy_ndarray"].__func__(numbers)
    assert mine == theirs and mine.object_id == theirs.object_id
    read, expected = SHORT[Array, "numpy"](mine), theirs.numpy()
    assert read.dtype == expected.dtype and read.shape == expected.shape
    assert read.tobytes("A") == expected.tobytes("A") == values(theirs.data).tobytes("A")
    assert read.flags.writeable and read.flags.owndata
    assert read.flags.f_contiguous == expected.flags.f_contiguous


def test_what_is_made_of_fields_is_an_array_like_any_other() -> None:
    theirs = Array(np.arange(3.0))
    mine = made(theirs.dtype, theirs.shape, theirs.stype, theirs.data)
    assert mine == theirs and mine.object_id == theirs.object_id
    mine.data = Array(np.zeros(3)).data
    assert mine != theirs and mine.object_id == Array(np.zeros(3)).object_id


def test_what_is_no_numpy_file_is_refused_as_flower_refuses_it() -> None:
    with pytest.raises(TypeError, match="Unsupported serialization type for numpy conversion: 'my-own'"):
        SHORT[Array, "numpy"](made("float32", (1,), "my-own", b""))
    with pytest.raises(AssertionError, match="Expected NumPy ndarray"):
        SHORT[Array, "from_numpy_ndarray"].__func__([1.0])
    whole = Array(np.ones(3)).data
    for broken in (b"", whole[:-1], whole[:20], b"\x93NUMPY\x01\x00", b"no file", b"PK\x03\x04"):
        with pytest.raises(ValueError):
            values(broken)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        values(whole.replace(b"'<f8'", b"'|O' "))


SHAPED = "{'descr': '<f8', 'fortran_order': False, 'shape': %s}"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "header",
    ["(" * 50, "\n  x\n y", "-" * 5000 + "1", SHAPED % "(True,)", SHAPED % (10**20,), SHAPED % "(0o,)"],
)
def test_a_header_that_is_made_to_harm_is_refused_like_any_other(header: str, version: int) -> None:
    """NumPy raises TokenError, IndentationError, RecursionError, TypeError, OverflowError, MemoryError."""
    length = len(header).to_bytes(2 * version, "little")
    with pytest.raises(ValueError):
        values(b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + bytes(8))


def test_records_check_what_is_set_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for (owner, name), function in SHORT.items():
        monkeypatch.setattr(owner, name, function)
    record = RecordDict(
        {"a": ArrayRecord([np.ones(2)]), "m": MetricRecord({"x": 1}), "c": ConfigRecord({"k": b"v"})}
    )
    before = record.object_id
    record.metric_records["m"]["x"] = 2
    assert record.object_id != before and dict(record.metric_records["m"]) == {"x": 2}
    assert np.array_equal(record.array_records["a"].to_numpy_ndarrays()[0], np.ones(2))
    wrong: Any = "no number"
    for of in (record, record.array_records["a"], record.metric_records["m"]):
        with pytest.raises(TypeError):
            of["x"] = wrong
    key: Any = 3
    with pytest.raises(TypeError):
        record.config_records["c"][key] = 1
