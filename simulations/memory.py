"""How much memory a simulation takes to go faster, and what is kept in it."""

from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

MEMORY = 1 << 28  # bytes


def memory_for(device: str | None) -> int:
    """Return how many bytes a chunk may take, or the examples that are kept on a device.

    On a GPU a quarter of what is free, since activations take more; in main memory little, which other work
    on a laptop needs, too.
    """
    if device is None or not device.startswith("cuda"):
        return MEMORY
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free // 4)


class Room:
    """The bytes that are left for caches."""

    def __init__(self, left: int) -> None:
        """Give so many away."""
        self.left = left


class Cache(Generic[Key, Value]):
    """A function of a key that remembers its values while there is room, and makes the others anew.

    Nothing that is kept is replaced. Cohorts go through a population in turn or at random: either way no
    client is more likely to be asked for than another, so whoever came first may as well stay.
    """

    def __init__(self, make: Callable[[Key], Value], nbytes: Callable[[Value], int], room: Room) -> None:
        """Keep nothing yet; `nbytes` tells how much room a value takes."""
        self.make, self.nbytes, self.room = make, nbytes, room
        self.values: dict[Key, Value] = {}

    def __call__(self, key: Key) -> Value:
        """Return the value of a key, kept or made."""
        if key in self.values:
            return self.values[key]
        value = self.make(key)
        if (size := self.nbytes(value)) <= self.room.left:
            self.room.left -= size
            self.values[key] = value
        return value

    def clear(self) -> None:
        """Forget all values and give their room back."""
        self.room.left += sum(map(self.nbytes, self.values.values()))
        self.values.clear()
