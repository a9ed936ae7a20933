"""Memory that a simulation's processes share: a file without a name, which goes when the last of them does.

Values are pickled with their arrays apart (protocol 5), so that a model is copied once on either side, in a
tenth of the time that a pipe takes. Only a parent and the children that it started can reach such a file:
what is unpickled here never came from a peer, or from a disk.
"""

import mmap
import os
import pickle
import tempfile
from typing import Any

ALIGNED = 64  # bytes


class Mapped:
    """What one process puts, others take. They must agree by other means on when."""

    def __init__(self, fd: int) -> None:
        """Map an open file, which closes with this object."""
        self.fd = fd
        self.memory: mmap.mmap | None = None

    @classmethod
    def new(cls) -> "Mapped":
        """Return an empty one: in memory on Linux, in the folder for temporary files elsewhere."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("fedcore"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def put(self, value: Any) -> list[int]:
        """Write a value over the last one; return its sizes in bytes, with which it is taken."""
        arrays: list[pickle.PickleBuffer] = []
        head = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
        parts = [memoryview(head), *(array.raw() for array in arrays)]
        sizes = [part.nbytes for part in parts]
        places = _places(sizes)
        memory = self._memory(places[-1])
        for part, start in zip(parts, places, strict=False):
            memory[start : start + part.nbytes] = part
        return sizes

    def take(self, sizes: list[int]) -> Any:
        """Return a copy of the value that was put."""
        places = _places(sizes)
        with memoryview(self._memory(places[-1])) as memory:
            copies = [bytearray(memory[start : start + n]) for start, n in zip(places, sizes, strict=False)]
        return pickle.loads(copies[0], buffers=copies[1:])

    def _memory(self, size: int) -> mmap.mmap:
        if self.memory is None or len(self.memory) < size:
            if os.fstat(self.fd).st_size < size:
                os.ftruncate(self.fd, size)
            self.memory = mmap.mmap(self.fd, size)
        return self.memory

    def close(self) -> None:
        """Give the memory back."""
        self.memory = None
        os.close(self.fd)


def _places(sizes: list[int]) -> list[int]:
    """Return where each part starts, and last where all end."""
    places = [0]
    for size in sizes:
        places.append(places[-1] + -(-size // ALIGNED) * ALIGNED)
    return places
