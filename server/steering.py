"""Pace steering: agents are told when to come back, so that neither a stop nor a restart is a stampede.

A coordinator that stops gives each agent a time of its own. One that was killed cannot; then agents come back
by their own back-off, and those that are too many at once are given a time here.
"""

import time
from collections.abc import Callable, Iterator
from itertools import count

RATE = 100.0  # agents a second
BURST = 200  # so many more are let in at once
REST = 1.0  # seconds that a coordinator needs at least to start again


class Steering:
    """Whom a coordinator lets in at once, and when it expects the others."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Expect nobody; `now` is a clock in seconds."""
        self.now, self.latest = now, float("-inf")
        self.expected: dict[str, float] = {}

    def wait(self, client: str) -> float:
        """Return the seconds after which a client is to come again, 0 where it may come in.

        The time that it was given once stays its own.
        """
        now = self.now()
        if client not in self.expected:
            self.latest = max(self.latest, now - BURST / RATE) + 1 / RATE
        due = self.expected.pop(client, self.latest)
        if due <= now:
            return 0.0
        self.expected[client] = due
        return due - now


def returns() -> Iterator[float]:
    """Yield the seconds after which each agent is to come back to a coordinator that stops."""
    return (REST + i / RATE for i in count())
