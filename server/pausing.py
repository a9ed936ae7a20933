"""What makes a run wait instead of fail: trouble with disk or database, which somebody will mend.

A run that waits is broken off as by the end of this process, and goes on as after its start: from what the
store and the journals have. So a pause needs no state of its own, nothing that was acknowledged is lost, and
a coordinator that is started before all is well pauses again.
"""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from traceback import clear_frames
from typing import TYPE_CHECKING

from fedcore.errors import Interrupted, Overloaded
from fedcore.server.blobs import CorruptBlob
from fedcore.server.database import StoreUnavailable
from fedcore.waits import doubling

if TYPE_CHECKING:
    from fedcore.server.driver import Driver
    from fedcore.server.opening import Live

log = logging.getLogger("fedcore.server")

DISK = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk full",
    errno.EROFS: "read-only disk",
    errno.EIO: "disk error",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
    errno.ENOMEM: "out of memory",
}
SHORTEST, LONGEST = 1.0, 30.0  # seconds between one try and the next


def reason(error: BaseException) -> str:
    """Return what a run waits for after an error, "" where waiting would not help; anybody may be told."""
    if isinstance(error, OSError):
        return DISK.get(error.errno or 0, "")
    return str(error) if isinstance(error, StoreUnavailable | CorruptBlob) else ""


@contextmanager
def told() -> Iterator[None]:
    """Turn such trouble into what a peer is told, who tries again."""
    try:
        yield
    except Exception as error:
        if why := reason(error):
            raise Overloaded(why) from error
        raise


async def leave(live: "Live") -> None:
    """Break off a round as the end of this process would; nobody writes into its folder when this returns."""
    live.close()
    live.failure = Interrupted("it is broken off")  # in place of the error, which holds what it came through
    while live.taken:  # noqa: ASYNC110  # an event at the end of every upload would serve only this
        await asyncio.sleep(0.01)


async def patiently(driver: "Driver", call: Callable[[], Awaitable[None]]) -> None:
    """Have a run do something, again and again where disk or database are in the way; raises what else fails.

    Tries lie 1 s apart, then twice as long each time, up to 30 s, until the run has come a round further.
    """
    attempts, known = 0, ("", -1)
    while True:
        try:
            return await call()
        except Exception as error:
            if not (why := reason(error)):
                raise
            if known != (known := (why, len(driver.committed))):
                attempts = 0
                log.warning("run paused", extra={"run": driver.run.id, "reason": why, "error": str(error)})
            clear_frames(error.__traceback__)  # which hold the round, and the space of its files, in a cycle
        await driver.pause(why, doubling(attempts, SHORTEST, LONGEST))
        attempts += 1
