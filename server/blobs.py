"""Parameters on disk, by content: a folder of files named by the SHA-256 of their bytes.

A parameter blob is the little-endian shared vector, the buffer vector and what is broadcast beside the model,
mapped into memory and never read whole. The functions block, so the coordinator calls them from threads.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Lock
from typing import BinaryIO
from uuid import uuid4

import numpy as np

from fedcore.crypto.files import sync_folder
from fedcore.errors import ProtocolError
from fedcore.layout import Layout, Parameters, Vector
from fedcore.messages import Blob
from fedcore.wire.chunks import blob_of


class Blobs:
    """A folder of immutable files by content.

    Two runs may come to the same bytes, so a file is counted: it goes when its last user lets go of it.
    """

    def __init__(self, folder: Path, held: Iterable[str]) -> None:
        """Use `folder`, made if missing, where only the addresses in `held`, one a user, stay."""
        self.folder, self.lock, self.users = folder, Lock(), Counter(held)
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name not in self.users:
                path.unlink()

    def path(self, address: str) -> Path:
        """Return where a blob lies, or would lie."""
        return self.folder / address

    def new(self) -> Path:
        """Return a path for a file that `adopt` will take."""
        return self.folder / f"new-{uuid4().hex}"

    def open(self, address: str) -> BinaryIO:
        """Open a blob for reading; raises ProtocolError where it is no longer held."""
        try:
            return self.path(address).open("rb")
        except FileNotFoundError as error:
            raise ProtocolError(
                f"blob {address} is gone, since a newer model replaced it; ask again"
            ) from error

    def adopt(self, path: Path) -> Blob:
        """Name a finished file by its content, durably, and return its address, with one user more."""
        # The disk and the hash take about as long as each other, so they work at the same time.
        with path.open("rb") as file, ThreadPoolExecutor(1) as disk:
            flushed = disk.submit(os.fsync, file.fileno())
            blob = blob_of(file)
            flushed.result()
        with self.lock:
            os.replace(path, self.path(blob.sha256))
            self.users[blob.sha256] += 1
        sync_folder(self.folder)
        return blob

    def hold(self, address: str) -> None:
        """Count one user more of a blob that is held."""
        with self.lock:
            self.users[address] += 1

    def release(self, address: str) -> None:
        """Let go of a blob; it is removed with its last user."""
        with self.lock:
            self.users[address] -= 1
            if not self.users[address]:
                del self.users[address]
                self.path(address).unlink()

    def parameters(self, address: str, layout: Layout, extra: Sequence[str] = ()) -> Parameters:
        """Return the parameters in a blob, mapped read-only; `extra` names what lies behind the model."""
        return mapped(self.path(address), layout, extra, "r")

    def draft(self, address: str, layout: Layout, extra: Sequence[str] = ()) -> tuple[Path, Parameters]:
        """Return a new file with a copy of the parameters in a blob, and the copy mapped for writing."""
        path = self.new()
        shutil.copyfile(self.path(address), path)
        return path, mapped(path, layout, extra, "r+")

    def save_state(self, vectors: Mapping[str, Vector]) -> str:
        """Store named vectors as safetensors and return their address, "" where there are none."""
        if not vectors:
            return ""
        path = self.new()
        ends = list(accumulate((vector.nbytes for vector in vectors.values()), initial=0))
        header = {
            name: {"dtype": f"F{8 * vector.itemsize}", "shape": vector.shape, "data_offsets": offsets}
            for (name, vector), offsets in zip(vectors.items(), pairwise(ends), strict=True)
        }
        text = json.dumps(header)
        text = text.ljust(-(-len(text) // 8) * 8)  # the numbers lie aligned
        # Written and read here, because the library holds the interpreter lock, which stops the event loop.
        path.touch(0o600)  # a key of noise may be among the vectors
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text.encode())
            for vector in vectors.values():
                file.write(vector.data)
        return self.adopt(path).sha256

    def load_state(self, address: str) -> dict[str, Vector]:
        """Return what `save_state` stored, mapped read-only."""
        if not address:
            return {}
        with self.open(address) as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            flat = np.memmap(file, np.uint8, mode="r", offset=file.tell())
        return {
            name: flat[slice(*entry["data_offsets"])].view(f"<f{int(entry['dtype'][1:]) // 8}")
            for name, entry in header.items()
        }


def mapped(path: Path, layout: Layout, extra: Sequence[str], mode: str) -> Parameters:
    """Map a file of parameters into memory, mode "r" or "r+"."""
    if not layout.nbytes:
        return Parameters(np.zeros(0, layout.dtype), np.zeros(0, layout.dtype))
    flat = np.memmap(path, layout.dtype, mode=mode)  # type: ignore[call-overload]
    return Parameters.of_blob(flat, layout, extra)
