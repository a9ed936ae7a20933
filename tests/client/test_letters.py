"""An answer and the state after it: one file, whole or absent, and the last answer's alone."""

import errno
import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.client.hosting import failed
from fedcore.client.letters import Letters, Spooled, spool, spooled, state_in
from fedcore.messages import Blob
from fedcore.wire.chunks import part_of
from fedcore.wire.relay import LetterRef

CONTENTS = st.none() | st.binary(min_size=1, max_size=300)


def blob(content: bytes) -> Blob:
    return Blob(sha256(content).hexdigest(), len(content))


@given(head=st.binary(max_size=100), content=CONTENTS, state=st.binary(max_size=300))
def test_what_is_spooled_comes_back(
    tmp_path_factory: pytest.TempPathFactory, head: bytes, content: bytes | None, state: bytes
) -> None:
    path = Letters(tmp_path_factory.mktemp("apps")).newest("run")
    assert spooled(path) is None and state_in(path) == b""
    spool(path, "a", head, content, state)
    assert spooled(path) == Spooled("a", head, blob(content) if content else None, len(state))
    assert path.read_bytes()[: len(content or b"")] == (content or b"")  # as it is sent, from the beginning
    assert state_in(path) == state
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_answer_before_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    path = tmp_path / "run" / "newest"
    spool(path, "a", b"{}", b"old", b"before")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(os, step, fail)
        spool(path, "b", b"{}", b"new", b"after")
    assert spooled(path) == Spooled("a", b"{}", blob(b"old"), 6) and state_in(path) == b"before"
    spool(path, "b", b"{}", None, b"")
    assert spooled(path) == Spooled("b", b"{}", None, 0) and state_in(path) == b""
    assert [path.name for path in path.parent.iterdir()] == ["newest"]


def test_a_run_keeps_one_content_and_its_newest_answer(tmp_path: Path) -> None:
    letters, one, two = Letters(tmp_path / "apps"), blob(b"1"), blob(b"2")
    assert letters.runs() == []
    first = letters.content("run", one)
    part_of(first).write_bytes(b"half")
    assert letters.content("run", one) == first and part_of(first).exists()  # the transfer can go on
    first.write_bytes(b"1")
    spool(letters.newest("run"), "a", b"{}", b"x", b"y")
    letters.content("run", two).write_bytes(b"2")
    assert {path.name for path in first.parent.iterdir()} == {"newest", two.sha256}
    letters.content("other", one)
    assert letters.runs() == ["other", "run"]
    letters.forget("run")
    letters.forget("never was")
    assert letters.runs() == ["other"]


def test_an_error_reads_as_flowers() -> None:
    answer = failed(LetterRef("run", "a"), 8, "the app's process was killed")
    head = json.loads(answer.head)
    assert head["error"] == [8, "the app's process was killed"] and head["created"] > 0
    assert answer.content is None
