"""What an attempt at secure aggregation must not forget, so that a restarted coordinator resumes it.

One folder an attempt: `records`, which only grows, and the masked words of each client as a file. A record is
its length and its CRC-32, both four bytes big-endian, then its bytes; a torn one at the end was never told
to anybody, and is cut off. The first record says what the attempt was asked to do. The functions block.
"""

import json
import os
import shutil
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self, cast

from fedcore.crypto.files import make_private_folder, sync_folder
from fedcore.messages import Ref, Work

HEAD = 8


@dataclass(frozen=True)
class Opening:
    """What an attempt was asked: its cohort, among whom that was drawn, and why it may follow another."""

    ref: Ref
    cohort: tuple[str, ...]
    ready: tuple[str, ...]
    certificate: bytes = field(default=b"", repr=False)

    def to_bytes(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(asdict(self) | {"certificate": self.certificate.hex()}).encode()

    @classmethod
    def of_bytes(cls, content: bytes) -> Self:
        """Return what `to_bytes` wrote."""
        row = json.loads(content)
        certificate = bytes.fromhex(row["certificate"])
        return cls(Ref(**row["ref"]), tuple(row["cohort"]), tuple(row["ready"]), certificate)


class Journal:
    """The memory of one attempt. Nothing that follows from a record may be told before it is kept."""

    def __init__(self, folder: Path, opening: Opening, records: list[bytes], resumed: bool) -> None:
        """Go on in a folder whose records have been read; made by `create` and `load`."""
        self.folder, self.opening, self.records, self.resumed = folder, opening, records, resumed
        self.pending: list[bytes] = []

    @classmethod
    def create(cls, folder: Path, opening: Opening) -> Self:
        """Begin in a folder that does not exist."""
        make_private_folder(folder)
        journal = cls(folder, opening, [], resumed=False)
        journal.add(opening.to_bytes())
        journal.keep()
        sync_folder(folder)
        sync_folder(folder.parent)
        return journal

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Return the journal in a folder; None where the end came before its first record was whole."""
        try:
            content = (folder / "records").read_bytes()
        except FileNotFoundError:
            return None
        records, end = whole_records(content)
        if not records:
            return None
        os.truncate(folder / "records", end)
        return cls(folder, Opening.of_bytes(records[0]), records[1:], resumed=True)

    def add(self, record: bytes) -> None:
        """Append a record, when `keep` is called."""
        self.pending += [len(record).to_bytes(4, "big"), zlib.crc32(record).to_bytes(4, "big"), record]

    def keep(self) -> None:
        """Write what was added, so that it would survive a loss of power."""
        with (self.folder / "records").open("ab") as file:
            file.write(b"".join(self.pending))
            file.flush()
            os.fsync(file.fileno())
        self.pending.clear()

    def words(self, client: str) -> Path:
        """Return where the masked words of a client are, or will be."""
        return self.folder / f"{client}.words"


def whole_records(content: bytes) -> tuple[list[bytes], int]:
    """Return the records up to the first that is torn, and where they end."""
    records, end = list[bytes](), 0
    while len(head := content[end : end + HEAD]) == HEAD:
        start = end + HEAD
        length, checksum = int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")
        record = content[start : start + length]
        if len(record) != length or zlib.crc32(record) != checksum:
            break
        records.append(record)
        end = start + len(record)
    return records, end


class Journals:
    """The attempts of all runs that are under way, a folder each; of a run's, only the newest counts."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, made if missing."""
        self.folder = folder
        make_private_folder(folder)

    def open(self, opening: Opening) -> Journal:
        """Begin an attempt; what the run's earlier ones have left goes."""
        ref, earlier = opening.ref, self._of(opening.ref.run)
        name = f"{ref.run}.{ref.round}.{ref.attempt}.{ref.kind}"
        journal = Journal.create(self.folder / name, opening)
        for folder in earlier.values():
            remove(folder)
        return journal

    def resume(self, run: str, round: int, kind: Work) -> Journal | None:
        """Return the attempt at a piece of work that was under way when the coordinator ended, if any was.

        Whatever else the run has left is over, and goes.
        """
        found: Journal | None = None
        for ref, folder in sorted(self._of(run).items(), key=lambda each: -each[0].attempt):
            if not found and (ref.round, ref.kind) == (round, kind):
                found = Journal.load(folder)
            if not found or found.folder != folder:
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
