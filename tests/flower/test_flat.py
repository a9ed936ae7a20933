"""ArrayRecords as flat vectors: what lies where, and what is not taken."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedcore.errors import SpecError, UpdateRefused
from fedcore.flower.flat import arrays_of, layout_of, parameters_of

NAMES = st.lists(st.text("ab.", min_size=1, max_size=6), min_size=1, max_size=4, unique=True)


@given(NAMES.flatmap(lambda names: st.tuples(*(st.tuples(st.just(n), one_array()) for n in names))))
def test_a_model_comes_back_to_the_bit(model: tuple[tuple[str, Any], ...]) -> None:
    some = ("w", np.ones(1, np.float32))
    record = ArrayRecord({name: Array(value) for name, value in (some, *model)})
    layout = layout_of(record)
    after = arrays_of(parameters_of(record, layout), layout, record)
    assert [(n, a.dtype, a.shape, a.data) for n, a in after.items()] == [
        (n, a.dtype, a.shape, a.data) for n, a in record.items()
    ]


def one_array() -> st.SearchStrategy[Any]:
    kinds = st.sampled_from([np.dtype(name) for name in ("float16", "float32", "float64", "int64", "bool")])
    shapes = arrays.array_shapes(min_dims=0, max_dims=3, max_side=3)
    return kinds.flatmap(lambda dtype: arrays.arrays(dtype, shapes)).map(np.asarray)


def test_running_statistics_are_buffers_and_integers_local() -> None:
    names = ("conv.weight", "bn.running_mean", "running_var", "bn.num_batches_tracked")
    values = (np.zeros(2), np.zeros(1), np.ones(1), np.array(0))
    layout = layout_of(ArrayRecord({n: Array(v) for n, v in zip(names, values, strict=True)}))
    assert [entry.kind for entry in layout.entries] == ["shared", "buffer", "buffer", "local"]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (Array("bfloat16", (2,), "numpy.ndarray", b""), r"array 'w' is bfloat16, .*model\.float\(\)"),
        (Array(np.zeros(2, np.complex64)), "array 'w' is complex64"),
        (Array("float32", (2,), "own", b""), "serialised as 'own'"),
        (Array(np.zeros(2, np.int64)), "no floating point number to train"),
    ],
    ids=["bfloat16", "complex", "own", "integers"],
)
def test_what_cannot_be_trained_is_refused(array: Array, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        layout_of(ArrayRecord({"w": array}))


def test_what_claims_to_be_vast_is_not_read() -> None:
    """A header of 2^60 numbers before no number at all: NumPy would have to find room for them first."""
    vast = np.zeros(1, np.float32)
    data = Array(vast).data.replace(b"(1,)", b"(%d,)" % 2**60)
    layout = layout_of(ArrayRecord({"w": Array(vast)}))
    with pytest.raises(UpdateRefused, match="array 'w' cannot be read"):
        parameters_of(ArrayRecord({"w": Array("float32", (1,), "numpy.ndarray", data)}), layout)
