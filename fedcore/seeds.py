"""Random streams named by what they are for: no global state, no order of calls.

A stream is a counter-based Philox generator whose 128-bit key is a hash of its path, such as
`(run seed, "batches", round, client)`. The same path gives the same numbers in any process, on any
worker and after any restart, and two paths share nothing. These seeds make runs repeatable; keys and
the noise of a deployment come from the operating system instead, never from here.
"""

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

Path = str | int


def digest(*path: Path) -> int:
    """Return the 128-bit integer that names a stream; distinct paths collide with probability 2^-128.

    A part is written with its type and length, so `("a", 1)` and `("a1",)` differ.
    """
    text = "".join(f"{type(part).__name__}{len(str(part))}:{part}" for part in path)
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


class _Key(ISeedSequence):
    """A key as it is; with `Philox(key=...)` NumPy also draws entropy, which takes as long for nothing."""

    def __init__(self, key: int) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> NDArray[Any]:
        """Return the key as two words, all that Philox asks for."""
        return np.frombuffer(self.key.to_bytes(8 * n_words, "little"), "<u8").astype(dtype)


def generator(*path: Path) -> np.random.Generator:
    """Return the NumPy generator of a stream (Philox4x64-10, Salmon et al. 2011)."""
    key: Any = _Key(digest(*path))  # NumPy's stubs know no seed of one's own
    return np.random.Generator(np.random.Philox(key))


def integer(*path: Path) -> int:
    """Return a 63-bit seed for libraries that want one integer, such as torch."""
    return digest(*path) >> 65
