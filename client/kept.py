"""What a client keeps to itself from one folded round to the next, on disk.

    kept/RUN/current                of its last update that was folded
    kept/RUN/pending.ROUND.ATTEMPT  of an update that waits for its verdict

Both are safetensors. A pending file is on the disk for good before its update leaves the device, and it
becomes the current one, by a rename, only on the coordinator's word that the update was folded. So whatever
dies, and whenever, a client's state and the model have seen the same rounds. A new run starts from nothing.
Nobody tells an agent that a run has ended, so the states of the `RUNS` runs that moved last are kept.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from fedcore.client.training import Kept
from fedcore.crypto.files import make_private_folder, sync_folder, write_atomically
from fedcore.faults import point
from fedcore.messages import Ref
from fedcore.wire.codec import MAX_PENDING

RUNS = MAX_PENDING


@dataclass(frozen=True)
class KeptStates:
    """The folder `kept`, with a folder for each run that has kept something."""

    folder: Path

    def current(self, run: str) -> Path:
        """Return where the state of a run is, if there is one."""
        return self.folder / run / "current"

    def pending(self, ref: Ref) -> Path:
        """Return where the state that waits for a verdict is, or will be."""
        return self.folder / ref.run / f"pending.{ref.round}.{ref.attempt}"

    def waiting(self) -> tuple[Ref, ...]:
        """Return the training whose verdict is waited for."""
        runs = sorted(self.folder.iterdir()) if self.folder.exists() else []
        return tuple(ref for run in runs for ref in self._waiting(run.name))[:MAX_PENDING]

    def _waiting(self, run: str) -> Iterator[Ref]:
        for path in sorted((self.folder / run).glob("pending.*")):
            _, number, attempt = path.name.split(".")
            yield Ref(run, int(number), int(attempt), "train")

    def settle(self, ref: Ref, folded: bool) -> None:
        """Take over what is pending, durably, or drop it; without anything pending, do nothing."""
        path = self.pending(ref)
        if not folded:
            path.unlink(missing_ok=True)
        elif path.exists():
            os.replace(path, self.current(ref.run))
            point("agent.kept.rename")
            sync_folder(path.parent)

    def begin(self, ref: Ref, folded: Ref | None) -> None:
        """Settle what is pending in the run of new work; `folded` is what the coordinator folded last.

        An evaluation drops nothing: in a buffered run an update may still wait for the others of its step.
        """
        for path in (self.folder / ref.run).glob(".*"):
            path.unlink()  # half a file, of a process that was killed
        for waiting in self._waiting(ref.run):
            if waiting != ref and (waiting == folded or ref.kind == "train"):
                self.settle(waiting, waiting == folded)

    def trim(self) -> None:
        """Remove the states of all runs but those that moved last."""
        runs = sorted(self.folder.iterdir(), key=_moved) if self.folder.exists() else []
        for run in runs[:-RUNS]:
            shutil.rmtree(run)


def _moved(path: Path) -> int:
    return path.stat().st_mtime_ns


def save_kept(path: Path, kept: Kept) -> None:
    """Write what a client would keep, durably; nothing is written where it keeps nothing."""
    if kept:
        make_private_folder(path.parent)
        write_atomically(path, save({n: np.ascontiguousarray(vector) for n, vector in kept.items()}), 0o600)


def load_kept(path: Path) -> Kept:
    """Return what a client has kept, nothing where there is no file."""
    return load_file(path) if path.exists() else {}
