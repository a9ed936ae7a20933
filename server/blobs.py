"""Parameters on disk, by content: a folder of files named by the SHA-256 of their bytes.

A parameter blob is the little-endian shared vector, the buffer vector and what is broadcast beside the model,
mapped into memory and never read whole. The functions block, so the coordinator calls them from threads.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate, chain, pairwise
from pathlib import Path
from threading import Lock
from typing import BinaryIO
from uuid import uuid4

import numpy as np

from fedcore.crypto.files import sync_folder
from fedcore.errors import Blameless, FedcoreError
from fedcore.faults import point
from fedcore.layout import Layout, Parameters, Vector
from fedcore.messages import SMALL, Blob
from fedcore.wire.chunks import blob_of


class CorruptBlob(FedcoreError):
    """A blob that is missing, or has other bytes than its name says."""


class Blobs:
    """A folder of immutable files by content.

    Two runs may come to the same bytes, so a file goes when the last run that has it lets go of it.
    """

    def __init__(self, folder: Path, held: Mapping[str, Collection[str]]) -> None:
        """Use `folder`, made if missing, where only the addresses stay that `held` has for any run."""
        self.folder, self.lock = folder, Lock()
        self.held = {run: set(addresses) for run, addresses in held.items()}
        self.uses = Counter(chain.from_iterable(self.held.values()))
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.name not in self.uses:
                path.unlink()

    def path(self, address: str) -> Path:
        """Return where a blob lies, or would lie."""
        return self.folder / address

    def new(self) -> Path:
        """Return a path for a file that `adopt` will take."""
        return self.folder / f"new-{uuid4().hex}"

    def small(self, address: str) -> bytes:
        """Return a blob's bytes where they may travel with an assignment, b"" where they are too many."""
        path = self.path(address)
        return path.read_bytes() if path.stat().st_size <= SMALL else b""

    def open(self, address: str) -> BinaryIO:
        """Open a blob for reading; raises Blameless where it is no longer held."""
        try:
            return self.path(address).open("rb")
        except FileNotFoundError as error:
            raise Blameless(f"blob {address} is gone, since a newer model replaced it; ask again") from error

    def adopt(self, path: Path, run: str) -> Blob:
        """Name a finished file by its content, durably, for a run, and return its address.

        A file that the disk does not take goes.
        """
        with gone_if_it_fails(path):
            # The disk and the hash take about as long as each other, so they work at the same time.
            with path.open("rb") as file, ThreadPoolExecutor(1) as disk:
                point("blob.write")
                flushed = disk.submit(os.fsync, file.fileno())
                blob = blob_of(file)
                flushed.result()
            point("blob.rename.before")
            with self.lock:
                os.replace(path, self.path(blob.sha256))
                self._hold(run, blob.sha256)
        sync_folder(self.folder)
        point("blob.rename.after")
        return blob

    def hold(self, run: str, address: str) -> bool:
        """Let a run have a blob that some run has already; return whether one has."""
        with self.lock:
            if found := address in self.uses:
                self._hold(run, address)
        return found

    def _hold(self, run: str, address: str) -> None:
        mine = self.held.setdefault(run, set())
        self.uses[address] += address not in mine
        mine.add(address)

    def keep(self, run: str, addresses: Collection[str]) -> None:
        """Let a run have exactly these blobs; one that no run has any more is removed."""
        with self.lock:
            before, after = self.held.pop(run, set()), set(addresses)
            if after:
                self.held[run] = after
            self.uses.update(after)
            self.uses.subtract(before)
            for address in before:
                if not self.uses[address]:
                    del self.uses[address]
                    self.path(address).unlink(missing_ok=True)

    def verify(self, address: str) -> None:
        """Read a blob to its end; raises CorruptBlob unless it is there, with the bytes of its name."""
        problem = "missing"
        with suppress(FileNotFoundError), self.path(address).open("rb") as file:
            if blob_of(file).sha256 == address:
                return
            problem = "corrupt"
        raise CorruptBlob(f"blob {address} is {problem}: put it back from a backup")

    def parameters(self, address: str, layout: Layout, extra: Sequence[str] = ()) -> Parameters:
        """Return the parameters in a blob, mapped read-only; `extra` names what lies behind the model."""
        return mapped(self.path(address), layout, extra, "r")

    def draft(self, address: str, layout: Layout, extra: Sequence[str] = ()) -> tuple[Path, Parameters]:
        """Return a new file with a copy of the parameters in a blob, and the copy mapped for writing."""
        path = self.new()
        with gone_if_it_fails(path):
            shutil.copyfile(self.path(address), path)
        return path, mapped(path, layout, extra, "r+")

    def save_state(self, vectors: Mapping[str, Vector], run: str) -> str:
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
        with gone_if_it_fails(path), path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text.encode())
            for vector in vectors.values():
                file.write(vector.data)
        return self.adopt(path, run).sha256

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


@contextmanager
def gone_if_it_fails(path: Path) -> Iterator[None]:
    """Remove a file whose writing fails: on a full disk, it would be in the way of the next try."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def mapped(path: Path, layout: Layout, extra: Sequence[str], mode: str) -> Parameters:
    """Map a file of parameters into memory, mode "r" or "r+"."""
    if not layout.nbytes:
        return Parameters(np.zeros(0, layout.dtype), np.zeros(0, layout.dtype))
    flat = np.memmap(path, layout.dtype, mode=mode)  # type: ignore[call-overload]
    return Parameters.of_blob(flat, layout, extra)
