"""Which attempts of secure aggregation this device has entered, on its disk before anybody hears of it.

    sent/RUN.KIND   the newest round and attempt, and the receipt of the last one that got masked words

Whoever holds a sum could say that the attempt has failed, have it repeated without one client, and subtract.
So a client that has handed its words over enters another attempt at that round only with a certificate,
which `fedcore.crypto.secagg` judges. And it enters an attempt once, and never goes back to an older one: each
time it draws other neighbours, and whoever may ask again can do so until he likes the draw.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from fedcore.crypto.files import make_private_folder, write_atomically
from fedcore.errors import UpdateRefused
from fedcore.messages import Ref


@dataclass(frozen=True)
class Sent:
    """The folder `sent`. Its files are small and stay: one that is gone would open an old round again."""

    folder: Path
    lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def receipt(self, ref: Ref) -> bytes:
        """Return the receipt of an earlier attempt at the same round, b"" where none got masked words.

        Raises UpdateRefused for an attempt that is not newer than the last one that was entered.
        """
        last, receipt = self._read(ref)
        if last >= (ref.round, ref.attempt):
            raise UpdateRefused(
                f"this device entered round {last[0]}, attempt {last[1]}; it takes no part in {ref} any more"
            )
        return receipt if last[0] == ref.round else b""

    def note(self, ref: Ref, receipt: bytes) -> None:
        """Write down, durably, that an attempt is entered, and later that its words are about to leave.

        Raises UpdateRefused where a newer one has been entered since.
        """
        with self.lock:
            last, _ = self._read(ref)
            if last > (ref.round, ref.attempt):
                raise UpdateRefused(f"{ref} is over: round {last[0]}, attempt {last[1]} was entered since")
            make_private_folder(self.folder)
            row = {"round": ref.round, "attempt": ref.attempt, "receipt": receipt.hex()}
            write_atomically(self._path(ref), json.dumps(row).encode(), 0o600)

    def _read(self, ref: Ref) -> tuple[tuple[int, int], bytes]:
        """Return the newest round and attempt of a run and kind of work, and the receipt."""
        try:
            row = json.loads(self._path(ref).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return (0, 0), b""
        return (row["round"], row["attempt"]), bytes.fromhex(row["receipt"])

    def _path(self, ref: Ref) -> Path:
        return self.folder / f"{ref.run}.{ref.kind}"
