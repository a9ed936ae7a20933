"""The agent's state folder, which only its user can enter.

    lock          held by the agent that runs
    identity/     key and certificates, and the address of the authority that issued them
    cache/        parameters by their SHA-256, the two newest
    spool/        the finished update of the newest assignment, until its outcome: payload and head
    kept/         what the client keeps between rounds, see `fedcore.client.kept`
    apps/         what apps of Flower keep between messages, see `fedcore.client.letters`
    sent/         which attempts of secure aggregation were entered, see `fedcore.client.sent`
    rounds.jsonl  what became of the last rounds, for people
    connection.json  whether the coordinator is there, since when and why not, for people
    starts.json   when training has begun of late, see `fedcore.client.pace`

A file has its name only when it is complete, so a crash at any moment leaves nothing half done. Cache and
spool are not fsynced: after power loss a blob is checked before use, and an update is trained again.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from fedcore.crypto.files import make_private_folder
from fedcore.errors import ConfigError, ProtocolError
from fedcore.messages import Blob, Ref, UploadHead
from fedcore.wire.chunks import blob_of, holds, part_of

log = logging.getLogger("fedcore.client")

CACHED = 2  # a round's parameters are those of the evaluation before it
JOURNAL_BYTES = 2**20
JOURNAL_ROWS = 100  # kept when the journal has outgrown its bytes


@dataclass(frozen=True)
class Finished:
    """An update that is ready: its head, and for what its payload was made.

    terms: digest of all that it follows from, and may leave for. words: of a payload that is masked before it
    leaves, the bits of a narrow word and how many narrow and wide words it has.
    """

    head: UploadHead
    terms: str
    words: tuple[int, ...] = ()


@dataclass(frozen=True)
class State:
    """The folder, with the paths in it."""

    folder: Path

    @property
    def identity(self) -> Path:
        """The folder of the agent's identity."""
        return self.folder / "identity"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made if need be; raises ConfigError where another agent holds it."""
        for folder in (self.folder, self.folder / "cache", self.folder / "spool"):
            make_private_folder(folder)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"{self.folder} is in use by another agent; stop that one, or set another `state`"
                ) from error
            yield

    @property
    def running(self) -> bool:
        """Whether an agent holds the folder now."""
        try:
            with (self.folder / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def blob(self, sha256: str) -> Path:
        """Return where parameters are, or will be."""
        return self.folder / "cache" / sha256

    def keep_blob(self, blob: Blob, content: bytes) -> None:
        """Put parameters into the cache; raises ProtocolError unless they are those of their address."""
        if sha256(content).hexdigest() != blob.sha256:
            raise ProtocolError(f"the parameters in an assignment are not those of {blob.sha256}")
        _replace(self.blob(blob.sha256), content)

    def check_cache(self) -> None:
        """Remove what was altered, so that what is whole can be trusted; parts are judged when they are."""
        whole = [path for path in (self.folder / "cache").iterdir() if not path.suffix]
        for path in whole:
            with path.open("rb") as file:
                sound = blob_of(file).sha256 == path.name
            if not sound:
                path.unlink()

    def trim_cache(self, newest: Path) -> None:
        """Remove all parameters but the newest, whatever time the clock had for them."""
        others = {*(self.folder / "cache").iterdir()} - {newest}
        for path in sorted(others, key=lambda path: path.stat().st_mtime_ns)[: 1 - CACHED]:
            path.unlink()

    def payload(self, ref: Ref) -> Path:
        """Return where the numbers of a finished update are, or will be."""
        return self.folder / "spool" / f"{ref.run}.{ref.round}.{ref.attempt}.{ref.kind}"

    def spooled(self, ref: Ref) -> Finished | None:
        """Return a finished update, if there is one that is whole; it blocks."""
        try:
            row = json.loads(_head(self.payload(ref)).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        vectors = tuple((name, length) for name, length in row["vectors"])
        head = UploadHead(ref, row["scalars"], vectors, Blob(row["sha256"], row["size"]))
        whole = holds(self.payload(ref), head.payload)
        return Finished(head, row["terms"], tuple(row["words"])) if whole else None

    def spool(self, update: Finished) -> None:
        """Declare an update finished whose payload has been written."""
        head = update.head
        made = {"terms": update.terms, "words": update.words}
        row = {"vectors": head.vectors, "scalars": head.scalars, **vars(head.payload), **made}
        _replace(_head(self.payload(head.ref)), json.dumps(row).encode())

    def unspool(self, ref: Ref) -> None:
        """Declare an update unfinished: its payload is about to be altered."""
        _head(self.payload(ref)).unlink(missing_ok=True)

    def drop(self, ref: Ref) -> None:
        """Forget a finished update; its head goes first, for without one a payload counts for nothing."""
        self.unspool(ref)
        self.payload(ref).unlink(missing_ok=True)

    def drop_others(self, ref: Ref) -> None:
        """Forget every finished update but one: new work means that the coordinator is done with them."""
        keep = (self.payload(ref), _head(self.payload(ref)))
        for path in sorted((self.folder / "spool").iterdir(), reverse=True):
            if path not in keep:
                path.unlink()

    def record(self, ref: object, event: str, reason: str = "") -> None:
        """Add a line to the journal, if the disk takes it; ref: of work, or of an app's letter."""
        row = {"time": time.time(), "ref": str(ref), "event": event, **({"reason": reason} if reason else {})}
        path = self.folder / "rounds.jsonl"
        with _for_people(path):
            with path.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(row) + "\n")
                if journal.tell() < JOURNAL_BYTES:
                    return
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True)[-JOURNAL_ROWS:]
            _replace(path, "".join(rows).encode())

    def tell(self, connection: Mapping[str, Any]) -> None:
        """Put down what is known of the connection, if the disk takes it."""
        path = self.folder / "connection.json"
        with _for_people(path):
            _replace(path, json.dumps(connection).encode())

    def connection(self) -> dict[str, Any]:
        """Return what was put down last; nothing where there is no file."""
        path = self.folder / "connection.json"
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return row

    def journal(self, count: int) -> list[dict[str, Any]]:
        """Return the last rows of the journal, the newest last; a line that is not finished is left out."""
        try:
            text = (self.folder / "rounds.jsonl").read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()[-count:]]


def _head(payload: Path) -> Path:
    return payload.with_name(f"{payload.name}.json")


def _replace(path: Path, content: bytes) -> None:
    temporary = part_of(path)
    temporary.write_bytes(content)
    os.replace(temporary, path)


@contextmanager
def _for_people(path: Path) -> Iterator[None]:
    """Let a write fail without harm: a full disk must not keep the agent from declining its work."""
    try:
        yield
    except OSError as error:
        log.warning("not written down", extra={"path": str(path), "reason": str(error)})
