"""A chain of rows that somebody has tampered with."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedcore.chain import ChainBroken, Head, Row, follow, next_row

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CONTENTS = st.dictionaries(
    st.text(max_size=5), st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)
)


def chain(contents: list[dict[str, object]]) -> list[Row]:
    rows: list[Row] = []
    for content in contents:
        rows.append(next_row(rows[-1].head if rows else Head(), content, KEY))
    return rows


def read(rows: list[Row], head: Head = Head()) -> list[dict[str, object]]:  # noqa: B008 - frozen
    return [content for _, content in follow(head, rows, KEY.public_key())]


@given(
    st.lists(CONTENTS.filter(lambda c: float("inf") not in c.values() and -float("inf") not in c.values()))
)
def test_what_was_written_is_read_from_any_row_on(contents: list[dict[str, object]]) -> None:
    rows = chain(contents)
    assert read(rows) == contents
    for place, row in enumerate(rows):
        assert read(rows[place + 1 :], row.head) == contents[place + 1 :]


@given(st.integers(2, 6), st.data())
def test_no_row_can_be_altered_removed_repeated_or_moved(count: int, data: st.DataObject) -> None:
    rows = chain([{"n": n} for n in range(count)])
    place = data.draw(st.integers(0, count - 2))
    row = rows[place]
    own = Ed25519PrivateKey.generate()
    forged = next_row(rows[place - 1].head if place else Head(), {"n": -1}, own)
    for tampered in (
        [*rows[:place], replace(row, content='{"n":-1}'), *rows[place + 1 :]],
        [*rows[:place], replace(row, signature=bytes(64)), *rows[place + 1 :]],
        [*rows[:place], replace(row, hash=bytes(32)), *rows[place + 1 :]],
        [*rows[:place], forged, *rows[place + 1 :]],
        rows[:place] + rows[place + 1 :],
        [*rows[: place + 1], *rows[place:]],
        [*rows[:place], rows[place + 1], row, *rows[place + 2 :]],
    ):
        with pytest.raises(ChainBroken, match=rf"row {place + 1}|row {place + 2}"):
            read(tampered)


def test_a_row_is_these_bytes() -> None:
    """The format is read by other releases and by auditors, so it may not change unnoticed."""
    first = next_row(Head(), {"b": 1.5, "a": "x"}, KEY)
    assert first.content == '{"a":"x","b":1.5}'
    assert first.hash.hex() == "c2e3dfc43b14558a9375a98194e2e74779c09266038575fa0aabe65a12f79ec5"
    assert (
        next_row(first.head, {}, KEY).hash.hex()
        == "86ba88b47c971f39678ab9f8a95d1b0a9606c0f4741813c26ce9c95ad4991fc4"
    )


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        next_row(Head(), {"epsilon": float("inf")}, KEY)
