import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.crypto.secagg import edges
from fedcore.errors import ProtocolError


@given(n=st.integers(0, 40), data=st.data())
def test_sets_come_back(n: int, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.sampled_from(range(n)))) if n else set()
    assert edges.members(edges.bitmap(chosen, n), n) == chosen


def test_the_order_of_bits() -> None:
    assert edges.bitmap([0, 2, 9], 10) == b"\x05\x02"


@pytest.mark.parametrize("bits", [b"", b"\x05", b"\x05\x04", b"\x05\x02\0"])
def test_bytes_that_are_no_set(bits: bytes) -> None:
    with pytest.raises(ProtocolError, match="a bitmap of 10 has"):
        edges.members(bits, 10)


@pytest.mark.parametrize("positions", [[1, 1], [2, 1], [3]])
def test_positions_that_are_no_set(positions: list[int]) -> None:
    with pytest.raises(ProtocolError, match="do not ascend, or are not below 3"):
        edges.distinct(positions, 3)


def test_links_are_among_those_who_have_said_what_they_hold() -> None:
    """0 holds shares of 1 and 2, and 1 those of 0 and 3, who has said nothing."""
    held = {0: edges.bitmap([1, 2], 4), 1: edges.bitmap([0, 3], 4)}
    assert np.argwhere(edges.links(held, 4)).tolist() == [[0, 1], [1, 0]]
    held[2] = edges.bitmap([], 4)
    assert np.argwhere(edges.links(held, 4)).tolist() == [[0, 1], [1, 0], [2, 0]]


def test_nobody_is_linked_to_itself() -> None:
    with pytest.raises(ProtocolError, match="holds shares of its own secrets"):
        edges.links({1: edges.bitmap([1], 3)}, 3)


def test_who_is_left_out_takes_others_along() -> None:
    """A path of five: its ends have one link, and then their neighbours have."""
    links = np.eye(5, k=1, dtype=np.bool_) | np.eye(5, k=-1, dtype=np.bool_)
    assert edges.kept(links, range(5), 2) == set()
    links[0, 4] = links[4, 0] = True
    assert edges.kept(links, range(5), 2) == set(range(5))
    assert edges.kept(links, range(1, 5), 2) == set()
    assert edges.kept(links, range(1, 4), 1) == {1, 2, 3}
