"""When an agent comes back to a coordinator that it has lost, and what it says of that meanwhile."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedcore.waits import doubling

log = logging.getLogger("fedcore.client")

FIRST_WAIT, LONGEST_WAIT = 0.1, 25.0  # seconds between attempts: after any outage all are back within 30 s
STOOD = 10.0  # seconds after which a stream counts as more than an attempt
QUIET = 60.0  # seconds between two log lines of one outage


def backoff(attempt: int, chance: float) -> float:
    """Return the seconds to wait before an attempt (from 0): exponential, the upper half of them random.

    chance: uniform in [0, 1), so that agents which lost the same coordinator do not return at once.
    """
    return doubling(attempt, FIRST_WAIT, LONGEST_WAIT) * (0.5 + 0.5 * chance)


@dataclass
class Retries:
    """Attempts at something that may fail for hours, without filling the log with it. clock: monotonic."""

    event: str
    clock: Callable[[], float] = time.monotonic
    attempt: int = 0
    next_line: float = field(default=0.0, init=False)

    def after(self, reason: str) -> float:
        """Return the seconds to wait after a failure; it is told at first, then once in `QUIET` seconds."""
        wait = backoff(self.attempt, random.random())
        self.attempt += 1
        if self.attempt == 1 or self.clock() >= self.next_line:
            facts = {"reason": reason, "attempt": self.attempt, "wait_s": round(wait, 2)}
            log.warning(self.event, extra=facts)
            self.next_line = self.clock() + QUIET
        return wait


@dataclass
class Connection:
    """Whether the coordinator is there, and when to try again.

    An attempt that succeeds does not end the back-off: only a stream that has stood for `STOOD` seconds does,
    or one over which work came to its end. Two agents with one identity throw each other out, and would do
    so without a pause. tell: hears each change, as a row for people. clock: monotonic.
    """

    tell: Callable[[dict[str, Any]], None]
    clock: Callable[[], float] = time.monotonic
    retries: Retries = field(init=False)
    made: float | None = None  # when the stream was; None where there is none
    lost_at: float = 0.0  # seconds since 1970; 0: not since this agent has started
    rested: float = 0.0  # when the pause that the coordinator asked for is over

    def __post_init__(self) -> None:
        """Begin without a stream."""
        self.retries = Retries("connection lost", self.clock)

    @property
    def pause(self) -> float:
        """Seconds for which the coordinator still wants to be left alone."""
        return max(0.0, self.rested - self.clock())

    def welcome(self, coordinator: str) -> None:
        """Note that there is a stream."""
        self.made, self.rested, self.lost_at = self.clock(), 0.0, 0.0
        log.info("connected", extra={"coordinator": coordinator, "attempts": self.retries.attempt + 1})
        self.tell({"state": "connected", "since": time.time()})

    def worked(self) -> None:
        """Note that work came to its end: the next wait is a short one."""
        self.retries.attempt = 0

    def rest(self, seconds: float) -> None:
        """Note that the coordinator asks this agent to come back so many seconds later."""
        self.rested = self.clock() + seconds
        log.info("paused by the coordinator", extra={"seconds": round(seconds, 1)})

    def lose(self, reason: str) -> float:
        """Note that there is no stream, or none any more; return the seconds to wait before the next."""
        if self.made is not None and self.clock() - self.made >= STOOD:
            self.worked()
        self.made, self.lost_at = None, self.lost_at or time.time()
        pause = self.pause
        until = time.time() + pause if pause else 0.0
        self.tell({"state": "not connected", "since": self.lost_at, "reason": reason, "until": until})
        return pause or self.retries.after(reason)
