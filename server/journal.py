"""What an attempt at a round must not forget, so that a restarted coordinator goes on with it.

One folder an attempt: `records`, which only grows, and what each client has sent as a file. A record is its
length and its CRC-32, both four bytes big-endian, then its bytes; a torn one at the end was never told to
anybody, and is cut off. The first record says what the attempt was asked to do. The functions block.

What is *kept* survives a loss of power. What is *noted* survives the end of the process, at a hundredth of
the cost: after a loss of power an update may be gone, and is asked for again.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Self, cast

from fedcore.crypto.files import make_private_folder, sync_folder
from fedcore.faults import point
from fedcore.messages import Blob, Ref, UploadHead, Work

HEAD = 8


@dataclass(frozen=True)
class Opening:
    """What an attempt was asked: its cohort, among whom that was drawn, and why it may follow another.

    key: what opens its sealed updates, itself wrapped (see `fedcore.server.sealed`); empty for others.
    parameters: the address of what it starts from, where the model moves on without it.
    """

    ref: Ref
    cohort: tuple[str, ...]
    ready: tuple[str, ...]
    certificate: bytes = field(default=b"", repr=False)
    key: bytes = field(default=b"", repr=False)
    parameters: str = ""

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        hidden = {"certificate": self.certificate.hex(), "key": self.key.hex()}
        return json.dumps(asdict(self) | hidden).encode()

    @classmethod
    def of_bytes(cls, content: bytes) -> Self:
        """Return what `to_bytes` wrote."""
        row = json.loads(content)
        certificate, key = bytes.fromhex(row["certificate"]), bytes.fromhex(row["key"])
        whom = (tuple(row["cohort"]), tuple(row["ready"]))
        return cls(Ref(**row["ref"]), *whom, certificate, key, row["parameters"])


@dataclass(frozen=True)
class Accepted:
    """An update that was acknowledged: whose, what its head says, and after how many seconds it came."""

    client: str
    head: UploadHead
    seconds: float

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of_bytes(cls, content: bytes) -> Self:
        """Return what `to_bytes` wrote."""
        row = json.loads(content)
        head = row["head"]
        vectors = tuple((name, length) for name, length in head["vectors"])
        found = UploadHead(Ref(**head["ref"]), head["scalars"], vectors, Blob(**head["payload"]))
        return cls(row["client"], found, row["seconds"])


class Journal:
    """The memory of one attempt. Nothing that follows from a record may be told before it is on the disk."""

    def __init__(self, folder: Path, opening: Opening, records: list[bytes], resumed: bool) -> None:
        """Go on in a folder whose records have been read; made by `create` and `load`."""
        self.folder, self.opening, self.records, self.resumed = folder, opening, records, resumed
        self.pending: list[bytes] = []
        self.lock = Lock()

    @classmethod
    def create(cls, folder: Path, opening: Opening) -> Self:
        """Begin in a folder that does not exist."""
        make_private_folder(folder)
        (folder / "records").touch()
        journal = cls(folder, opening, [], resumed=False)
        journal.add(opening.to_bytes())
        journal.keep()
        sync_folder(folder)
        sync_folder(folder.parent)
        return journal

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Return the journal in a folder; None where the end came before its first record was whole."""
        records, end = read(folder)
        if not records:
            return None
        os.truncate(folder / "records", end)
        return cls(folder, Opening.of_bytes(records[0]), records[1:], resumed=True)

    def add(self, record: bytes) -> None:
        """Append a record, when `keep` is called."""
        self.pending.append(framed(record))

    def keep(self) -> None:
        """Write what was added, so that it would survive a loss of power."""
        point("journal.keep.before")
        self._write(b"".join(self.pending), synced=True)
        point("journal.keep.after")
        self.pending.clear()

    def note(self, record: bytes) -> None:
        """Append a record at once, so that it survives the end of the process; from any thread."""
        point("update.note.before")
        self._write(framed(record), synced=False)
        point("update.note.after")

    def _write(self, content: bytes, synced: bool) -> None:
        # Not created: of an attempt that is over nothing comes back. Not buffered: closing writes nothing.
        with self.lock, (self.folder / "records").open("r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if synced:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # a torn record would hide those that follow it
                raise

    def update(self, client: str) -> Path:
        """Return where what a client has sent is, or will be."""
        return self.folder / f"{client}.update"


def read(folder: Path) -> tuple[list[bytes], int]:
    """Return the whole records in a folder, and where they end."""
    try:
        return whole_records((folder / "records").read_bytes())
    except FileNotFoundError:
        return [], 0


def framed(record: bytes) -> bytes:
    """Return a record, which is not empty, as it lies in the file."""
    return len(record).to_bytes(4, "big") + zlib.crc32(record).to_bytes(4, "big") + record


def whole_records(content: bytes) -> tuple[list[bytes], int]:
    """Return the records up to the first that is torn, and where they end."""
    records, end = list[bytes](), 0
    while len(head := content[end : end + HEAD]) == HEAD:
        start = end + HEAD
        length, checksum = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")
        record = content[start : start + length]
        # A loss of power may leave zeros, which look like records of no bytes.
        if not record or len(record) != length or zlib.crc32(record) != checksum:
            break
        records.append(record)
        end = start + len(record)
    return records, end


class Journals:
    """The attempts of all runs that are under way, a folder each."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, made if missing."""
        self.folder = folder
        make_private_folder(folder)

    def open(self, opening: Opening, beside: bool = False) -> Journal:
        """Begin an attempt. The run's earlier ones at that kind of work go, unless it goes on beside them."""
        ref, earlier = opening.ref, self._of(opening.ref.run)
        folder = self.folder / f"{ref.run}.{ref.round}.{ref.attempt}.{ref.kind}"
        remove(folder)
        journal = Journal.create(folder, opening)
        for other, path in earlier.items():
            if other.kind == ref.kind and path != folder and not beside:
                remove(path)
        return journal

    def resume(self, run: str, round: int, kind: Work) -> Journal | None:
        """Return the attempt at a piece of work that was under way when the coordinator ended, if any was.

        Of a run's attempts at one kind of work only the newest counts; the others go.
        """
        found: Journal | None = None
        for journal in self.resume_all(run, kind):
            if found:
                remove(found.folder)
            found = journal
        if found and found.opening.ref.round != round:
            remove(found.folder)
            return None
        return found

    def resume_all(self, run: str, kind: Work) -> list[Journal]:
        """Return all attempts of a run at a kind of work, the oldest first."""
        found = list[Journal]()
        for ref, folder in sorted(self._of(run).items(), key=lambda each: (each[0].round, each[0].attempt)):
            if ref.kind == kind:
                if journal := Journal.load(folder):
                    found.append(journal)
                else:
                    remove(folder)
        return found

    def keep(self, runs: Collection[str]) -> None:
        """Remove the attempts of all other runs."""
        for ref, folder in self._all().items():
            if ref.run not in runs:
                remove(folder)

    def clear(self, run: str) -> None:
        """Remove the attempts of a run that has ended."""
        for folder in self._of(run).values():
            remove(folder)

    def openings(self) -> list[Opening]:
        """Return what all attempts that are under way were asked; others may be writing in their folders."""
        found = (read(folder)[0] for folder in self._all().values())
        return [Opening.of_bytes(records[0]) for records in found if records]

    def _of(self, run: str) -> dict[Ref, Path]:
        return {ref: folder for ref, folder in self._all().items() if ref.run == run}

    def _all(self) -> dict[Ref, Path]:
        found = dict[Ref, Path]()
        for path in self.folder.iterdir():
            run, round, attempt, kind = path.name.rsplit(".", 3)
            found[Ref(run, int(round), int(attempt), cast("Work", kind))] = path
        return found


def remove(folder: Path) -> None:
    """Remove an attempt; an upload that is on its way may leave a file, which goes at the next start."""
    shutil.rmtree(folder, ignore_errors=True)
