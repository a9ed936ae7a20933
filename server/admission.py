"""What one client may ask of the coordinator, what it is blamed for, and when it is asked for nothing more.

An offence is what no agent of fedcore does: bytes that are no message, an update of another shape or beyond
its bounds, more messages than rounds can need. To be late, to send a thing twice or to decline is none. A
client with three of them is in quarantine until an operator lifts it: it may stay connected, but it gets no
work, and what it sends is refused. All else that is refused is counted, and forgotten at a restart.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from math import inf

from fedcore.errors import AuthenticationError, Blameless, Overloaded, ProtocolError, UpdateRefused
from fedcore.server.store import Conduct
from fedcore.wire.chunks import CHUNK

OFFENCES = 3  # the last of them puts a client into quarantine
RATE, BURST = 200.0, 1000.0  # messages of a client, a second for long and at once; a round has about ten
STREAM = 20.0  # as many messages as the opening of a stream counts for
CALLS = 8  # of a client in progress: its stream, a transfer, and those that a broken connection has left
TRIES = 8  # times its size that may be moved for a transfer, which may be interrupted
SMALL = 1 << 16  # bytes that a message of a transfer counts for at least
UPLOADS = 12  # that are read at a time, about 15 MB of memory each
SLOW = 1.0  # seconds for a chunk, after which an upload needs no place
LINES, LINES_AT_ONCE = 1.0, 20.0  # warnings of one kind about one client, a second

Seconds = Callable[[], float]
Refused = Callable[[str, str, bool], None]  # of which client, why, and whether that is an offence


class Flood(Overloaded):
    """More messages than any round needs; coming back later is right, but it is an offence."""


def is_offence(error: Exception) -> bool:
    """Tell whether what was refused with this error is an offence of whoever sent it."""
    blamed = isinstance(error, ProtocolError | AuthenticationError | Flood)
    return blamed and not isinstance(error, Blameless)


class Bucket:
    """A token bucket: so much at once, and so much a second for long."""

    def __init__(self, rate: float, burst: float) -> None:
        """Start full."""
        self.rate, self.burst = rate, burst
        self.level, self.at = burst, -inf

    def take(self, tokens: float, now: float) -> bool:
        """Take tokens at a time in seconds, unless there are too few."""
        self.level, self.at = min(self.burst, self.level + (now - self.at) * self.rate), now
        if self.level < tokens:
            return False
        self.level -= tokens
        return True


class Admission:
    """What the coordinator keeps in mind of each client; lives on the event loop.

    conduct: offences, as the store has them. barred: who is in quarantine. refused, reasons: how often
    something of a client was refused since the start, and why the last time.
    """

    def __init__(self, conduct: Mapping[str, Conduct], clock: Seconds = time.monotonic) -> None:
        """Start with what the store knows."""
        self.conduct, self.clock = dict(conduct), clock
        self.barred = {client for client, known in conduct.items() if known.quarantined}
        self.refused, self.reasons = Counter[str](), dict[str, str]()
        self.calls, self.buckets = Counter[str](), dict[str, Bucket]()
        self.transfers = dict[tuple[str, type], tuple[object, int]]()

    @contextmanager
    def call(self, client: str, cost: float = 1.0) -> Iterator[None]:
        """Count a call in progress; raises Overloaded for one too many."""
        self.charge(client, cost)
        if self.calls[client] >= CALLS:
            raise Overloaded(f"{client} has {CALLS} calls in progress, the most that one client may have")
        self.calls[client] += 1
        try:
            yield
        finally:
            self.calls[client] -= 1

    def charge(self, client: str, cost: float = 1.0) -> None:
        """Count a message; raises Flood for one beyond the rate, and begins to count anew."""
        bucket = self.buckets.setdefault(client, Bucket(RATE, BURST))
        if not bucket.take(cost, self.clock()):
            del self.buckets[client]
            raise Flood(f"{client} sends more than {RATE:g} messages a second; come back later")

    def check(self, client: str) -> None:
        """Raise UpdateRefused for a client that is in quarantine."""
        if client in self.barred:
            known = self.conduct[client]
            raise UpdateRefused(
                f"quarantined: {known.offences} offences, the last: {known.reason}; an operator may lift it"
            )

    def transfer(self, client: str, what: object, moved: int, size: int) -> None:
        """Count a message of a transfer; raises UpdateRefused where that never ends.

        what: which update goes up, or which parameters go down; of each type, a client's newest one counts.
        moved, size: bytes of the message, and of all there is.
        """
        way, most = (client, type(what)), TRIES * (size + CHUNK)
        before, total = self.transfers.get(way, (what, 0))
        total = max(moved, SMALL) + (total if before == what else 0)
        self.transfers[way] = what, total
        if total > most:
            raise UpdateRefused(f"{client} has moved {total} bytes for a transfer of {size}, at most {most}")

    def refuse(self, client: str, reason: str) -> None:
        """Count what was not taken from a client."""
        self.refused[client] += 1
        self.reasons[client] = reason

    def offend(self, client: str, reason: str) -> Conduct:
        """Count an offence, and return what is known of the client then."""
        offences = self.conduct.get(client, Conduct()).offences + 1
        known = Conduct(offences, reason, time.time(), quarantined=offences >= OFFENCES)
        self.conduct[client] = known
        if known.quarantined:
            self.barred.add(client)
        return known

    def lift(self, client: str) -> None:
        """Forget the offences of a client."""
        self.conduct.pop(client, None)
        self.barred.discard(client)


class Places:
    """How many uploads are read at a time: a fast one takes megabytes of memory, a slow one next to nothing.

    The others wait in line. So whoever turns out to be slow gives its place up, goes on, and keeps no other
    one waiting.
    """

    def __init__(self, count: int) -> None:
        """Start with all free."""
        self.free = asyncio.Semaphore(count)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Callable[[], None]]:
        """Wait for a place, which ends with the block, or when the yielded function is called."""
        await self.free.acquire()
        held = [self.free]

        def give_up() -> None:
            while held:
                held.pop().release()

        try:
            yield give_up
        finally:
            give_up()


class Sparing(logging.Filter):
    """Lets through a few warnings of one kind about one client, and tells with the next how many it has not.

    Whoever can make the coordinator write a line could otherwise fill its disk.
    """

    def __init__(self, clock: Seconds = time.monotonic) -> None:
        """Start with nothing said."""
        super().__init__()
        self.clock, self.unsaid = clock, Counter[tuple[str, str]]()
        self.buckets = dict[tuple[str, str], Bucket]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line is to be written."""
        client = getattr(record, "client", None)
        if client is None or record.levelno != logging.WARNING:
            return True
        kind = (record.msg, client)
        bucket = self.buckets.setdefault(kind, Bucket(LINES, LINES_AT_ONCE))
        if not bucket.take(1.0, self.clock()):
            self.unsaid[kind] += 1
            return False
        if unsaid := self.unsaid.pop(kind, 0):
            record.unsaid = unsaid
        return True
