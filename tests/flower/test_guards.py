"""The guards: one client can spoil neither a mean nor its weights."""

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedcore.errors import SpecError
from fedcore.flower.guards import FINITE, Limits, check


def reply(arrays: dict[str, Any], **metrics: Any) -> Message:
    """Return a reply of node 7 with such arrays and metrics."""
    named = {
        key: value if isinstance(value, Array) else Array(np.asarray(value)) for key, value in arrays.items()
    }
    return replied(RecordDict({"arrays": ArrayRecord(named), "metrics": MetricRecord(metrics)}))


def replied(content: RecordDict) -> Message:
    """Return a reply of node 7."""
    return make_message(Metadata(1, "r", 7, 1, "m", "1", 2e9, 60.0, "train"), content)


def reason(message: Message) -> str:
    """Return why a reply was refused."""
    assert message.has_error() and message.metadata.src_node_id == 7
    return message.error.reason or ""


def weight(value: Any) -> Message:
    """Return a reply of that weight."""
    return reply({}, **{"num-examples": value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", ">f4"])
def test_one_value_that_is_not_finite_is_refused(value: float, dtype: str) -> None:
    array = np.zeros((3, 4), dtype)
    array[1, 2] = value
    assert reason(check(reply({"a": np.ones(2), "b": array}), FINITE)) == (
        "refused by fedcore: array 'arrays/b' holds nan or infinity"
    )


@given(hnp.arrays(st.sampled_from(["f4", "f8", "i8", "u1", "?"]), hnp.array_shapes(min_dims=0, min_side=0)))
def test_an_array_passes_exactly_if_all_of_it_is_finite(array: np.ndarray[Any, Any]) -> None:
    sent = reply({"a": array})
    checked = check(sent, FINITE)
    assert (checked is sent) == bool(np.isfinite(array).all()) != checked.has_error()


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY\x01\x00", b"no array", Array(np.ones(9)).data[:-1]])
def test_an_array_that_cannot_be_read_is_refused(data: bytes) -> None:
    array = Array("float64", (9,), "numpy.ndarray", data)
    assert "array 'arrays/a' cannot be read" in reason(check(reply({"a": array}), FINITE))


def test_what_is_no_array_of_numpy_is_the_apps_own() -> None:
    sent = reply({"a": Array("", (), "gguf", b"anything")})
    assert check(sent, FINITE) is sent


@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, [1, 2]])
def test_a_weight_that_is_none_is_refused(value: Any) -> None:
    said = reason(check(weight(value), FINITE))
    assert f"metric 'metrics/num-examples' is {value!r}, expected a number" in said


def test_an_integer_that_no_float_holds_is_refused() -> None:
    for metrics in ({"num-examples": 10**400}, {"loss": 10**400}, {"losses": [1, -(10**400)]}):
        assert "is an integer of more than 64 bits" in reason(check(reply({}, **metrics), FINITE))
    assert check(reply({}, loss=-(2**63), most=2**64 - 1), FINITE).has_content()


def test_a_weight_above_the_largest_is_refused() -> None:
    assert "is 101, expected at most 100" in reason(check(weight(101), Limits(100)))
    assert check(weight(100), Limits(100)).has_content()
    assert check(weight(10**12), FINITE).has_content()


@pytest.mark.parametrize("record", ["fitres.num_examples", "evaluateres.num_examples"])
def test_a_client_of_the_older_kind_has_a_weight_by_another_name(record: str) -> None:
    claims = RecordDict({record: MetricRecord({"num_examples": 101})})
    assert "is 101, expected at most 100" in reason(check(replied(claims), Limits(100)))
    others = replied(RecordDict({"metrics": MetricRecord({"num_examples": [101, 7]})}))
    assert check(others, Limits(100)) is others, "elsewhere the name is the app's own"


def test_a_limit_that_lets_nothing_through_is_refused() -> None:
    for nothing in (0.0, -1.0, math.nan):
        with pytest.raises(SpecError, match="--largest-weight"):
            Limits(nothing)
