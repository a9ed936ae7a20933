"""Flower's ArrayRecord as our flat vectors, and back: where its arrays lie, and the numbers of a reply."""

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SType

from fedcore.errors import SpecError, UpdateRefused
from fedcore.flower.guards import readable
from fedcore.layout import Entry, Kind, Layout, Parameters, Vector

STATISTICS = ("running_mean", "running_var")  # what PyTorch calls the buffers of its normalisation layers
FLOATS = ("float16", "float32", "float64")


def layout_of(arrays: ArrayRecord) -> Layout:
    """Return where the arrays of a model lie in flat vectors.

    Floating point is shared, but for the running statistics of PyTorch's layers, which are buffers, by their
    names; integers, such as num_batches_tracked, are nobody's to average. Raises SpecError for what is
    neither, such as bfloat16, of which NumPy's format keeps raw bytes only, and where nothing is shared.
    """
    entries = (Entry(name, each.shape, each.dtype, _kind(name, each)) for name, each in arrays.items())
    layout = Layout(tuple(entries))
    if not layout.shared_size:
        raise SpecError(f"the model's arrays {list(arrays)} hold no floating point number to train")
    return layout


def _kind(name: str, array: Array) -> Kind:
    if array.stype != SType.NUMPY:
        raise SpecError(f"array {name!r} is serialised as {array.stype!r}, expected {SType.NUMPY!r}")
    if array.dtype in FLOATS:
        return "buffer" if name.rpartition(".")[2] in STATISTICS else "shared"
    if array.dtype == "bool" or array.dtype.startswith(("int", "uint")):
        return "local"
    raise SpecError(
        f"array {name!r} is {array.dtype}, expected {', '.join(FLOATS)} or integers; an ArrayRecord has no "
        "bfloat16: send the model as float32 (`model.float()`), and compute in bfloat16 on the client"
    )


def parameters_of(arrays: ArrayRecord, layout: Layout) -> Parameters:
    """Return the numbers of a model, a copy in the layout's dtype; integers are left out.

    Raises UpdateRefused unless the arrays have the layout's names and shapes, and are floating point in
    NumPy's format. They may still be NaN or infinite.
    """
    names = {entry.name for entry in layout.entries}
    if arrays.keys() != names:
        raise UpdateRefused(f"sent the arrays {sorted(arrays)}, expected {sorted(names)}")
    shared, buffers = (np.empty(size, layout.dtype) for size in (layout.shared_size, layout.buffer_size))
    kinds: tuple[tuple[Kind, Vector], ...] = (("shared", shared), ("buffer", buffers))
    with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is refused as that
        for kind, vector in kinds:
            for place, entry in layout.of(kind):
                vector[place] = _numbers(arrays[entry.name], entry)
    return Parameters(shared, buffers)


def _numbers(array: Array, entry: Entry) -> Vector:
    """Return the numbers of an array, flat, in the dtype in which they came."""
    came = readable(entry.name, array)
    if came.shape != entry.shape or came.dtype.kind != "f":
        raise UpdateRefused(
            f"array {entry.name!r} is {came.shape} {came.dtype}, expected {entry.shape} {entry.dtype}"
        )
    return came.reshape(-1)


def arrays_of(parameters: Parameters, layout: Layout, sent: ArrayRecord) -> ArrayRecord:
    """Return a model as Flower sends it, in the entries' order and dtypes; integers as they were `sent`."""
    numbers = layout.unflatten(parameters.shared, "shared") | layout.unflatten(parameters.buffers, "buffer")
    kept = {e.name: sent[e.name] for e in layout.entries if e.kind == "local"}
    made = {e.name: Array(numbers[e.name].astype(e.dtype)) for e in layout.entries if e.kind != "local"}
    named = kept | made
    return ArrayRecord({entry.name: named[entry.name] for entry in layout.entries})
