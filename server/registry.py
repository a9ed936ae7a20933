"""Which agents are connected, what they may run, and which run each works for."""

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, takewhile

from fedcore.errors import Overloaded
from fedcore.messages import Assignment, Hello, Outcome, Pause, Receipt, Secure
from fedcore.server.steering import Steering, returns

log = logging.getLogger("fedcore.server")

Push = Assignment | Outcome | Pause | Receipt | Secure


@dataclass(eq=False)
class Session:
    """One agent's stream; what is put into `outbox` is pushed to it, None ends it."""

    client: str
    hello: Hello
    outbox: asyncio.Queue[Push | None] = field(default_factory=asyncio.Queue)


class Signal:
    """Wakes everybody who waits for something to change.

    Take `next` before looking at what may change, then wait for it: no change in between is missed.
    """

    def __init__(self) -> None:
        """Start without anybody waiting."""
        self.next = asyncio.Event()

    def send(self) -> None:
        """Wake all who wait."""
        self.next.set()
        self.next = asyncio.Event()


class Registry:
    """The connected agents and their leases; lives on the event loop.

    A lease says for which run a client works. It outlives the connection, so that an agent that drops out
    for a moment comes back to its work, and ends with the round.

    Runs that want the same clients take turns, and whoever has waited longest is first. A run queues up when
    it is ready for a round; once all that it needs are connected it claims them, and no run behind it may
    have them. So while one waits for its turn, every other run begins at most one round with its clients,
    and none starves; of runs that cannot work side by side, each begins as many rounds as the next, but for
    one.
    """

    def __init__(self, barred: Collection[str] = ()) -> None:
        """Start with nobody. barred: who gets no work, for as long as it is in there."""
        self.barred, self.steering = barred, Steering()
        self.sessions: dict[str, Session] = {}
        self.leases: dict[str, str] = {}
        self.queue: dict[str, Collection[str]] = {}  # what the runs that wait have claimed, the first ahead
        self.changed = Signal()
        self.moved = time.monotonic()

    @property
    def quiet(self) -> float:
        """Seconds since somebody came or went."""
        return time.monotonic() - self.moved

    def check(self, session: Session) -> None:
        """Raise Overloaded for a second agent of one identity; an agent may have lost its first stream."""
        older = self.sessions.get(session.client, session)
        if older.hello.instance != session.hello.instance:
            raise Overloaded(
                f"another agent is connected as {session.client}, and an identity is for one; stop one of "
                "them, or enrol it under a name of its own"
            )

    def join(self, session: Session) -> None:
        """Take in a session; an older one of the same client ends."""
        if older := self.sessions.get(session.client):
            older.outbox.put_nowait(None)
        self.sessions[session.client] = session
        self._move()
        log.info("agent connected", extra={"client": session.client, "agents": len(self.sessions)})

    def leave(self, session: Session) -> bool:
        """Forget a session; return False where a newer one has taken its place."""
        if self.sessions.get(session.client) is not session:
            return False
        del self.sessions[session.client]
        self._move()
        log.info("agent disconnected", extra={"client": session.client, "agents": len(self.sessions)})
        return True

    def dismiss(self) -> None:
        """End all sessions, and say when to come back."""
        for session, seconds in zip(self.sessions.values(), returns(), strict=False):
            session.outbox.put_nowait(Pause(seconds))
            session.outbox.put_nowait(None)

    def _move(self) -> None:
        self.moved = time.monotonic()
        self.changed.send()

    def eligible(
        self, task: str, digest: str, labels: Mapping[str, str], evaluator: bool = False
    ) -> list[str]:
        """Return the connected clients with a task and all labels, whoever they work for, by name."""
        return sorted(
            client
            for client, session in self.sessions.items()
            if session.hello.tasks.get(task) == digest
            and session.hello.evaluator == evaluator
            and labels.items() <= session.hello.labels.items()
            and client not in self.barred
        )

    @contextmanager
    def turn(self, run: str) -> Iterator[None]:
        """Queue a run up until the end of the block."""
        self.queue[run] = ()
        try:
            yield
        finally:
            del self.queue[run]
            self.changed.send()

    def claim(self, run: str, clients: Collection[str]) -> None:
        """Keep clients from the runs that are behind one in the queue."""
        before, self.queue[run] = self.queue[run], clients
        if not set(clients).issuperset(before):
            self.changed.send()

    def free(self, run: str, clients: Iterable[str]) -> list[str]:
        """Return those that neither work for another run nor are claimed by one ahead in the queue."""
        ahead = takewhile(lambda other: other != run, self.queue)
        claimed = set(chain.from_iterable(self.queue[other] for other in ahead))
        return [c for c in clients if c not in claimed and self.leases.get(c, run) == run]

    def lease(self, run: str, clients: Iterable[str]) -> None:
        """Reserve clients for a run until `release`."""
        self.leases.update(dict.fromkeys(clients, run))

    def release(self, run: str, clients: Collection[str] | None = None) -> None:
        """End a run's leases of some clients, or all of them."""
        ended = self.leases if clients is None else clients
        self.leases = {c: owner for c, owner in self.leases.items() if owner != run or c not in ended}
        self.changed.send()

    def send(self, client: str, message: Push) -> bool:
        """Push a message to a client; return False where it is not connected."""
        session = self.sessions.get(client)
        if session is None:
            return False
        session.outbox.put_nowait(message)
        return True
