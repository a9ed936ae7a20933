"""What an attempt has recorded is there after any end, up to the last record that was whole."""

import resource
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.messages import Blob, Ref, UploadHead
from fedcore.server.journal import Accepted, Journal, Journals, Opening, remove, whole_records

REF = Ref("a.run-1f0c22aa", 3, 1, "train")
OPENING = Opening(REF, ("a", "b"), ("a", "b", "c"), b"\0certificate")


def written(folder: Path, records: list[bytes]) -> Journal:
    journal = Journal.create(folder, OPENING)
    for record in records:
        journal.add(record)
    journal.keep()
    return journal


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=5), st.data())
def test_a_journal_cut_anywhere_has_the_records_before_the_cut(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("journal") / "attempt"
    path = written(folder, records).folder / "records"
    content = path.read_bytes()
    end = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:end])
    loaded = Journal.load(folder)
    whole, _ = whole_records(content[:end])
    if not whole:
        assert loaded is None
        return
    assert loaded is not None and loaded.opening == OPENING
    assert loaded.records == records[: len(whole) - 1]
    loaded.add(b"more")  # behind the last whole one, whatever was torn
    loaded.keep()
    again = Journal.load(folder)
    assert again is not None and again.records == [*loaded.records, b"more"]


def test_what_is_noted_is_there_at_once(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "attempt", OPENING)
    threads = [Thread(target=journal.note, args=(bytes([i]) * i,)) for i in range(1, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loaded = Journal.load(tmp_path / "attempt")
    assert loaded is not None and sorted(loaded.records, key=len) == [bytes([i]) * i for i in range(1, 20)]


@pytest.mark.parametrize("fits", [0, 5, 12])
def test_what_the_disk_has_no_room_for_hides_nothing_that_comes_later(tmp_path: Path, fits: int) -> None:
    journal = written(tmp_path / "attempt", [b"one"])
    end = (journal.folder / "records").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (end + fits, hard))
    try:
        with pytest.raises(OSError):
            journal.note(b"too much")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.note(b"two")
    loaded = Journal.load(tmp_path / "attempt")
    assert loaded is not None and loaded.records == [b"one", b"two"]


def test_an_attempt_that_is_over_is_not_brought_back_by_a_record(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "attempt", OPENING)
    remove(journal.folder)
    with pytest.raises(FileNotFoundError):
        journal.note(b"late")
    assert not list(tmp_path.iterdir())


def test_an_accepted_update_comes_back_as_it_was() -> None:
    head = UploadHead(REF, {"weight": 2.0}, (("delta", 3),), Blob("a" * 64, 12))
    accepted = Accepted("a", head, 1.5)
    assert Accepted.of_bytes(accepted.to_bytes()) == accepted


def test_keys_and_certificates_are_in_no_repr() -> None:
    assert "key" not in repr(replace(OPENING, key=b"secret")) and "certificate" not in repr(OPENING)


def test_attempts_at_other_work_and_those_beside_stay(tmp_path: Path) -> None:
    journals = Journals(tmp_path / "attempts")
    root = journals.open(replace(OPENING, ref=replace(REF, kind="root")))
    first = journals.open(OPENING)
    second = journals.open(replace(OPENING, ref=replace(REF, attempt=2)), beside=True)
    assert set(journals.folder.iterdir()) == {each.folder for each in (root, first, second)}
    assert [each.folder for each in journals.resume_all(REF.run, "train")] == [first.folder, second.folder]
    journals.open(replace(OPENING, ref=replace(REF, attempt=3)))
    assert root.folder.exists() and not first.folder.exists() and not second.folder.exists()


def test_an_altered_record_ends_the_journal(tmp_path: Path) -> None:
    path = written(tmp_path / "attempt", [b"one", b"two"]).folder / "records"
    path.write_bytes(path.read_bytes().replace(b"two", b"twO"))
    loaded = Journal.load(tmp_path / "attempt")
    assert loaded is not None and loaded.records == [b"one"]


def test_what_is_added_is_on_the_disk_when_it_is_kept_and_others_cannot_read_it(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "attempt", OPENING)
    journal.add(b"one")
    before = Journal.load(tmp_path / "attempt")
    assert before is not None and before.records == []
    journal.keep()
    after = Journal.load(tmp_path / "attempt")
    assert after is not None and after.records == [b"one"]
    assert journal.folder.stat().st_mode & 0o077 == 0


def test_a_new_attempt_takes_the_place_of_the_earlier_ones(tmp_path: Path) -> None:
    journals = Journals(tmp_path / "attempts")
    journals.open(replace(OPENING, ref=replace(REF, attempt=0))).update("a").write_bytes(b"words")
    other = journals.open(replace(OPENING, ref=replace(REF, run="other")))
    journals.open(OPENING)
    assert sorted(path.name for path in journals.folder.iterdir()) == [
        "a.run-1f0c22aa.3.1.train",
        other.folder.name,
    ]
    resumed = journals.resume(REF.run, 3, "train")
    assert resumed is not None and resumed.opening == OPENING
    assert journals.resume("other", 4, "train") is None  # it is of an earlier round, and goes
    assert not other.folder.exists()


def test_of_two_attempts_the_newest_that_was_begun_goes_on(tmp_path: Path) -> None:
    journals = Journals(tmp_path / "attempts")
    older = Journal.create(journals.folder / "a.run-1f0c22aa.3.1.train", OPENING)
    (journals.folder / "a.run-1f0c22aa.3.2.train").mkdir()  # the coordinator ended before its first record
    resumed = journals.resume(REF.run, 3, "train")
    assert resumed is not None and resumed.folder == older.folder
    assert [path.name for path in journals.folder.iterdir()] == [older.folder.name]


def test_attempts_of_runs_that_have_ended_are_removed(tmp_path: Path) -> None:
    journals = Journals(tmp_path / "attempts")
    for run in ("running", "stopped", "finished"):
        journals.open(replace(OPENING, ref=replace(REF, run=run)))
    journals.clear("finished")
    journals.keep({"running"})
    assert [path.name for path in journals.folder.iterdir()] == ["running.3.1.train"]


def test_who_looks_at_all_openings_cuts_off_nothing_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journals = Journals(tmp_path / "attempts")
    journal, read = journals.open(OPENING), Path.read_bytes

    def reading(path: Path) -> bytes:
        content = read(path)
        journal.note(b"acknowledged meanwhile")
        return content

    monkeypatch.setattr(Path, "read_bytes", reading)
    assert journals.openings() == [OPENING]
    monkeypatch.undo()
    (loaded,) = journals.resume_all(REF.run, "train")
    assert loaded.records == [b"acknowledged meanwhile"]


@pytest.mark.parametrize("zeros", [8, 9, 4096])
def test_zeros_that_a_loss_of_power_leaves_are_no_records(tmp_path: Path, zeros: int) -> None:
    path = written(tmp_path / "attempt", [b"one"]).folder / "records"
    path.write_bytes(path.read_bytes() + bytes(zeros))
    loaded = Journal.load(tmp_path / "attempt")
    assert loaded is not None and loaded.records == [b"one"]
    path.write_bytes(bytes(zeros))
    assert Journal.load(tmp_path / "attempt") is None
