"""The state between two rounds as one file, from which a run continues to the same bits.

Vectors are safetensors, numbers and names JSON beside them; nothing is ever unpickled.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedcore.errors import ConfigError
from fedcore.layout import Parameters
from fedcore.strategies.rounds import State

Arrays = Mapping[str, NDArray[Any]]

BOOK = "book"  # the tensor that holds the JSON, which may outgrow what a header takes


def save_state(path: Path, state: State, beside: Arrays | None = None) -> None:
    """Write a state atomically.

    beside: arrays that a driver keeps outside the state, by name, such as what an attack remembers.
    """
    parameters = state.parameters
    tensors = {"shared": parameters.shared, "buffers": parameters.buffers}
    groups = {"extra": parameters.extra, "vectors": state.vectors, "beside": beside or {}}
    for kind, arrays in groups.items():
        tensors |= {f"{kind}/{name}": array for name, array in arrays.items()}
    book = json.dumps({"round": state.round, "memory": state.memory}).encode()
    tensors[BOOK] = np.frombuffer(book, np.uint8)
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    part.touch(0o600)  # a key of noise may be among the vectors
    # safetensors writes an array's memory as it lies, so a column or a transpose has to be laid out first.
    save_file(
        {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in tensors.items()}, part
    )
    os.replace(part, path)


def load_state(path: Path) -> tuple[State, Arrays]:
    """Return the state, and what was saved beside it. Raises ConfigError for any other file."""
    try:
        tensors = load_file(path)
        book = json.loads(tensors.pop(BOOK).tobytes())
        parameters = Parameters(tensors.pop("shared"), tensors.pop("buffers"), group("extra", tensors))
        state = State(book["round"], parameters, group("vectors", tensors), book["memory"])
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path}: expected a state that fedcore wrote: {error}") from error
    return state, group("beside", tensors)


def group(name: str, tensors: Arrays) -> dict[str, NDArray[Any]]:
    """Return the tensors of a group by their own names; there they are NAME/OWN."""
    return {n.removeprefix(f"{name}/"): t for n, t in tensors.items() if n.startswith(f"{name}/")}
