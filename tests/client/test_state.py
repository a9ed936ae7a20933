"""The state folder: what is in it is complete, or counts for nothing."""

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.client.state import CACHED, JOURNAL_BYTES, JOURNAL_ROWS, Finished, State
from fedcore.errors import ConfigError
from fedcore.messages import Blob, Ref, UploadHead

REF = Ref("run-1", 3, 1, "train")
NUMBERS = Blob(sha256(b"numbers").hexdigest(), 7)
HOLD = """
import sys, time
from pathlib import Path
from fedcore.client.state import State
with State(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def state(tmp_path: Path) -> State:
    state = State(tmp_path / "state")
    with state.locked():
        pass
    return state


def test_a_second_agent_is_refused_until_the_first_has_died(state: State) -> None:
    command = [sys.executable, "-c", HOLD, str(state.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        assert state.running
        with pytest.raises(ConfigError, match="in use by another agent"), state.locked():
            pass
        process.kill()
        process.wait()
    assert not state.running
    with state.locked():
        assert state.running


def test_the_folder_is_the_users_alone(state: State) -> None:
    assert state.folder.stat().st_mode & 0o777 == 0o700


def test_asking_whether_it_runs_makes_nothing(tmp_path: Path) -> None:
    assert not State(tmp_path / "none").running
    assert not (tmp_path / "none").exists()


@given(
    st.dictionaries(st.sampled_from(["weight", "loss"]), st.floats(allow_nan=False, allow_infinity=False)),
    st.lists(st.tuples(st.sampled_from(["delta", "buffers"]), st.integers(0, 2**40)), max_size=3),
)
def test_a_spooled_head_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, scalars: dict[str, float], vectors: list[tuple[str, int]]
) -> None:
    state = State(tmp_path_factory.mktemp("state"))
    (state.folder / "spool").mkdir()
    state.payload(REF).write_bytes(b"numbers")
    head = UploadHead(REF, scalars, tuple(vectors), NUMBERS)
    for update in (Finished(head, "these"), Finished(head, "those", words=(32, 4, 3))):
        state.spool(update)
        assert state.spooled(REF) == update
    state.unspool(REF)
    assert state.spooled(REF) is None and state.payload(REF).exists()


def test_a_payload_without_a_head_is_no_update(state: State) -> None:
    state.payload(REF).write_bytes(b"numbers")
    assert state.spooled(REF) is None


@pytest.mark.parametrize(
    ("name", "content"), [("", b"numb"), ("", bytes(7)), (".json", b""), (".json", b"{")]
)
def test_an_update_that_a_loss_of_power_has_torn_is_none(state: State, name: str, content: bytes) -> None:
    state.payload(REF).write_bytes(b"numbers")
    state.spool(Finished(UploadHead(REF, {}, (), NUMBERS), "these"))
    assert state.spooled(REF) is not None
    state.payload(REF).with_name(state.payload(REF).name + name).write_bytes(content)
    assert state.spooled(REF) is None


def test_dropping_others_keeps_one(state: State) -> None:
    others = [Ref("run-1", 2, 0, "train"), Ref("run-1", 3, 0, "train"), Ref("run-2", 3, 1, "evaluate")]
    for ref in (REF, *others):
        state.payload(ref).write_bytes(b"numbers")
        state.spool(Finished(UploadHead(ref, {}, (), NUMBERS), "these"))
    state.drop_others(REF)
    assert state.spooled(REF) is not None and state.payload(REF).exists()
    assert [state.spooled(ref) for ref in others] == [None] * 3
    assert len(list((state.folder / "spool").iterdir())) == 2
    state.drop(REF)
    assert not list((state.folder / "spool").iterdir())


def test_the_newest_parameters_are_kept_and_altered_ones_are_not(state: State) -> None:
    blobs = {number: State.blob(state, str(number)) for number in range(4)}
    for number, path in blobs.items():
        path.write_bytes(b"parameters")
        os.utime(path, (number, number))
    state.trim_cache(blobs[3])
    assert [number for number, path in blobs.items() if path.exists()] == list(range(4))[-CACHED:]
    os.utime(blobs[3], (0, 0))  # the clock has been set back
    state.trim_cache(blobs[3])
    assert blobs[3].exists()
    state.check_cache()
    assert not list((state.folder / "cache").iterdir())


def test_the_journal_keeps_the_last_rounds_and_stays_small(state: State) -> None:
    assert state.journal(3) == []
    for number in range(1, 2500):
        state.record(Ref("run", number, 0, "train"), "refused", "x" * 400)
    rows = state.journal(JOURNAL_ROWS)
    assert [row["ref"] for row in rows] == [f"run/{n}.0/train" for n in range(2500 - JOURNAL_ROWS, 2500)]
    assert rows[-1]["event"] == "refused" and rows[-1]["reason"] == "x" * 400
    assert (state.folder / "rounds.jsonl").stat().st_size <= JOURNAL_BYTES


def test_a_line_that_power_loss_cut_is_left_out(state: State) -> None:
    state.record(REF, "folded")
    with (state.folder / "rounds.jsonl").open("a") as journal:
        journal.write('{"time": 1, "re')
    assert [row["event"] for row in state.journal(9)] == ["folded"]
