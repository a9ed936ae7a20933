"""What an agent remembers of the attempts that it has entered, and of masked words that it has sent."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.client.sent import Sent
from fedcore.errors import UpdateRefused
from fedcore.messages import Ref

Moment = tuple[int, int]
moments = st.tuples(st.integers(1, 4), st.integers(0, 3))


@given(moments, moments)
def test_only_newer_work_is_entered_and_a_round_again_with_the_receipt(
    tmp_path_factory: pytest.TempPathFactory, first: Moment, second: Moment
) -> None:
    folder = tmp_path_factory.mktemp("state") / "sent"
    Sent(folder).note(Ref("run", *first, "train"), b"receipt")
    sent, ref = Sent(folder), Ref("run", *second, "train")
    if second <= first:
        with pytest.raises(UpdateRefused, match=f"entered round {first[0]}, attempt {first[1]};"):
            sent.receipt(ref)
    else:
        assert sent.receipt(ref) == (b"receipt" if first[0] == second[0] else b"")


@given(moments, moments)
def test_a_note_that_comes_late_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, first: Moment, second: Moment
) -> None:
    """A thread cannot be cancelled: it may note an attempt that the agent has left for a newer one."""
    sent = Sent(tmp_path_factory.mktemp("state") / "sent")
    sent.note(Ref("run", *first, "train"), b"first")
    late, after = Ref("run", *second, "train"), Ref("run", max(first, second)[0], 9, "train")
    if second < first:
        with pytest.raises(UpdateRefused, match="was entered since"):
            sent.note(late, b"second")
    else:
        sent.note(late, b"second")
    assert sent.receipt(after) == (b"first" if second < first else b"second")


def test_runs_and_kinds_of_work_are_apart(tmp_path: Path) -> None:
    sent = Sent(tmp_path / "sent")
    sent.note(Ref("run", 3, 0, "train"), b"a")
    sent.note(Ref("run", 1, 0, "evaluate"), b"b")
    assert sent.receipt(Ref("run", 3, 1, "train")) == b"a"
    assert sent.receipt(Ref("run", 1, 1, "evaluate")) == b"b"
    assert sent.receipt(Ref("other", 1, 0, "train")) == b""
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "sent").iterdir())
