"""Secure aggregation as an agent lives it: from the keys that it advertises to the verdict.

`fedcore.crypto.secagg.Client` says what to answer; here are its messages, its clock and its files. The keys
are in this process's memory alone, so an agent that was started again takes no further part in an attempt.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedcore.client.config import Terms
from fedcore.client.process import WorkFailed
from fedcore.client.sent import Sent
from fedcore.client.state import State
from fedcore.crypto.identity import Identity
from fedcore.crypto.secagg import Client, Floors
from fedcore.crypto.secagg.again import enter
from fedcore.crypto.secagg.config import SMALLEST
from fedcore.crypto.trust import Trust
from fedcore.messages import Assignment, Blob, Ref, Secure, UploadHead
from fedcore.wire.chunks import blob_of
from fedcore.wire.secure import config_of

log = logging.getLogger("fedcore.client")

LINGER = 0.5  # of the time to the deadline: how much longer an agent answers whose words are out
PENDING = 8  # messages that wait for their answer; an honest coordinator sends one at a time

Tell = Callable[[Secure], None]
Upload = Callable[[UploadHead], Awaitable[None]]


class Aggregation:
    """This device's part: one attempt at a time, and what is known of the clients and attempts before."""

    def __init__(self, state: State, terms: Terms, identity: Identity, tell: Tell) -> None:
        """Take part on the owner's terms; `tell` sends a message."""
        self.state, self.tell = state, tell
        self.floors = Floors(max(SMALLEST, terms.smallest_cohort), terms.corrupt)
        self.sent = Sent(state.folder / "sent")
        self.trust = Trust(identity.root, identity.name.federation)
        self.attempt: Attempt | None = None

    def admit(self, work: Assignment) -> None:
        """Refuse a round that this device has left behind; raises UpdateRefused."""
        enter(work.ref, self.sent.receipt(work.ref), work.certificate)

    async def take_part(
        self, work: Assignment, identity: Identity, words: tuple[int, ...], upload: Upload, deadline: float
    ) -> None:
        """Take part in an attempt with the words in the spool, as `Attempt.run` does.

        words: the bits of a narrow word, and how many narrow and wide words there are. upload: sends the
        masked words; it returns too where the coordinator went on without them.
        """
        name, (bits, narrow, wide) = identity.name, words
        sizes = (bits, narrow, wide)
        config = config_of(name.federation, work.ref, work.spec, work.parameters, work.cohort, sizes)
        sent = self.sent.receipt(work.ref)
        await asyncio.to_thread(self.sent.note, work.ref, sent)
        client = Client(config, identity, self.trust, self.floors, sent=sent, certificate=work.certificate)
        self.attempt = Attempt(work.ref, client, sizes, self.state, self.sent, self.tell, upload)
        try:
            await self.attempt.run(deadline)
        finally:
            self.attempt = None

    def at(self, ref: Ref) -> "Attempt | None":
        """Return the attempt of that name, if this device is at it."""
        return self.attempt if self.attempt and self.attempt.ref == ref else None


@dataclass(eq=False)
class Attempt:
    """One attempt, whose plain words are in the spool and are masked there; fields as in `Aggregation`."""

    ref: Ref
    client: Client
    words: tuple[int, int, int]
    state: State
    sent: Sent
    tell: Tell
    upload: Upload
    advertised: bytes = b""
    handed_over: bool = False
    inbox: "asyncio.Queue[bytes]" = field(default_factory=lambda: asyncio.Queue(PENDING))

    async def run(self, deadline: float) -> None:
        """Answer the coordinator until it is past the deadline (monotonic), or cancelled by the verdict.

        Raises Aborted with the attack that was seen, and WorkFailed where the words were not asked for in
        time. One whose words are out answers a while longer: the others may need what it holds.
        """
        left = deadline - time.monotonic()
        try:
            async with asyncio.timeout_at(deadline) as limit:
                self.advertised = await asyncio.to_thread(self.client.advertise)
                self.repeat()
                while True:
                    reply = await asyncio.to_thread(self.client.receive, await self.inbox.get())
                    if reply is not None:
                        self.tell(Secure(self.ref, reply))
                    elif not self.handed_over:
                        head = await asyncio.to_thread(self._mask)
                        self.handed_over = True
                        limit.reschedule(deadline + LINGER * left)
                        await self.upload(head)
        except TimeoutError:
            if not self.handed_over:
                raise WorkFailed("too few others were ready before the deadline") from None

    def hear(self, message: bytes) -> None:
        """Take a message of the coordinator; what is too much is left out, and repeated if it mattered."""
        try:
            self.inbox.put_nowait(message)
        except asyncio.QueueFull:
            log.warning("message left out", extra={"ref": self.ref, "pending": PENDING})

    def repeat(self) -> None:
        """Advertise, again where a connection was lost."""
        if self.advertised:
            self.tell(Secure(self.ref, self.advertised))

    def _mask(self) -> UploadHead:
        """Mask the words where they lie, note that they go out, and return their head."""
        started = time.perf_counter()
        self.state.unspool(self.ref)
        blob = mask(self.state.payload(self.ref), self.words, self.client)
        self.sent.note(self.ref, self.client.receipt)
        log.info("masked", extra={"ref": self.ref, "seconds": round(time.perf_counter() - started, 6)})
        return UploadHead(self.ref, {}, (), blob)


def mask(path: Path, words: tuple[int, int, int], client: Client) -> Blob:
    """Add a client's masks to the words in a file, in place, and return what the file is now."""
    bits, narrow, wide = words
    views = []
    for dtype, length, offset in ((f"<u{bits // 8}", narrow, 0), ("<u8", wide, narrow * bits // 8)):
        # Nothing can be mapped from a file where there is nothing.
        views.append(np.memmap(path, dtype, "r+", offset, (length,)) if length else np.zeros(0, dtype))
    client.mask(*views)
    with path.open("rb") as file:
        return blob_of(file)
