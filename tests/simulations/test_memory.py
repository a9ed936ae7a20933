"""The cache: values are what is made, once each while there is room, and the room is never exceeded."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.simulations.memory import MEMORY, Cache, Room, memory_for


@given(keys=st.lists(st.integers(0, 12), max_size=60), room=st.integers(0, 100))
def test_values_are_kept_while_there_is_room(keys: list[int], room: int) -> None:
    made: Counter[int] = Counter()

    def make(key: int) -> bytes:
        made[key] += 1
        return bytes([key]) * key

    cache = Cache(make, len, Room(room))
    for key in keys:
        assert cache(key) == bytes([key]) * key
    kept = sum(key for key in cache.values)
    assert kept <= room and cache.room.left == room - kept
    assert all(made[key] == 1 for key in cache.values)
    refused = set(keys) - cache.values.keys()
    assert all(key > cache.room.left for key in refused)
    assert all(made[key] == keys.count(key) for key in refused)
    cache.clear()
    assert cache.room.left == room and not cache.values


def test_caches_share_their_room() -> None:
    room = Room(10)
    one, other = Cache(bytes, len, room), Cache(bytes, len, room)
    assert len(one(6)) == 6 and len(other(5)) == 5 and len(other(4)) == 4
    assert room.left == 0 and list(other.values) == [4]
    one.clear()
    assert room.left == 6 and other(4) is other(4)


def test_a_gpu_gives_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cuda:1": (40 << 30, 80 << 30)}
    monkeypatch.setattr("torch.cuda.mem_get_info", free.__getitem__)
    assert memory_for("cuda:1") == 10 << 30
    assert memory_for("cpu") == memory_for(None) == MEMORY
