"""What a device keeps of the runs whose app it hosts, on disk.

    apps/RUN/SHA256   the content of the letter in hand, as it came
    apps/RUN/newest   the answer to the last letter, and the app's state after it

The two are one file, so that one rename says both. Whatever dies, and whenever: before the rename the letter
is answered anew, from the state before; after it the same bytes are sent again, and the app has seen the
letter once. The next answer takes the place of this one, until the coordinator says that the run is over.

    newest: content | state | JSON of letter, head, content, state | length of the JSON, u32 little-endian
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from fedcore.crypto.files import make_private_folder, sync_folder
from fedcore.messages import Blob
from fedcore.wire.chunks import part_of
from fedcore.wire.codec import NAME


@dataclass(frozen=True)
class Spooled:
    """An answer on the disk: to which letter, its head and its content, which begins the file.

    state: bytes of the state behind the content.
    """

    letter: str
    head: bytes = field(repr=False)
    content: Blob | None
    state: int


@dataclass(frozen=True)
class Letters:
    """The folder `apps`, with a folder for each run."""

    folder: Path

    def runs(self) -> list[str]:
        """Return the runs of which something is kept."""
        return sorted(path.name for path in self.folder.glob("*/") if NAME.fullmatch(path.name))

    def newest(self, run: str) -> Path:
        """Return where the last answer of a run is, or will be."""
        return self.folder / run / "newest"

    def content(self, run: str, blob: Blob) -> Path:
        """Return where the content of the letter in hand belongs; that of any other letter goes."""
        folder, keep = self.folder / run, {"newest", blob.sha256, part_of(Path(blob.sha256)).name}
        _make(folder)
        for path in folder.iterdir():
            if path.name not in keep:
                path.unlink()
        return folder / blob.sha256

    def forget(self, run: str) -> None:
        """Remove all that is kept of a run."""
        shutil.rmtree(self.folder / run, ignore_errors=True)


def spool(path: Path, letter: str, head: bytes, content: bytes | None, state: bytes) -> None:
    """Write an answer and the state after it, durably and at once; None: the answer has no content."""
    blob = None if content is None else [sha256(content).hexdigest(), len(content)]
    row = json.dumps({"letter": letter, "head": head.hex(), "content": blob, "state": len(state)}).encode()
    _make(path.parent)
    temporary = part_of(path)
    with open(temporary, "wb", opener=_private) as file:
        file.writelines([content or b"", state, row, len(row).to_bytes(4, "little")])
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def spooled(path: Path) -> Spooled | None:
    """Return the last answer, if there is one."""
    try:
        with path.open("rb") as file:
            return _row(file)
    except FileNotFoundError:
        return None


def state_in(path: Path) -> bytes:
    """Return the state after the last answer, b"" where there is none."""
    try:
        with path.open("rb") as file:
            row = _row(file)
            file.seek(row.content.size if row.content else 0)
            return file.read(row.state)
    except FileNotFoundError:
        return b""


def _row(file: BinaryIO) -> Spooled:
    file.seek(-4, os.SEEK_END)
    size = int.from_bytes(file.read(), "little")
    file.seek(-4 - size, os.SEEK_END)
    row = json.loads(file.read(size))
    content = Blob(*row["content"]) if row["content"] else None
    return Spooled(row["letter"], bytes.fromhex(row["head"]), content, row["state"])


def _make(folder: Path) -> None:
    """Make a run's folder, which no loss of power takes away again."""
    if not folder.exists():
        make_private_folder(folder)
        sync_folder(folder.parent)
        sync_folder(folder.parent.parent)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
