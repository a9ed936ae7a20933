"""Which agents are connected, what they may run, and which run each works for."""

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedcore.messages import Assignment, Hello, Outcome, Secure

log = logging.getLogger("fedcore.server")

Push = Assignment | Outcome | Secure


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
    """

    def __init__(self) -> None:
        """Start with nobody."""
        self.sessions: dict[str, Session] = {}
        self.leases: dict[str, str] = {}
        self.changed = Signal()
        self.moved = time.monotonic()

    @property
    def quiet(self) -> float:
        """Seconds since somebody came or went."""
        return time.monotonic() - self.moved

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
        """End all sessions."""
        for session in self.sessions.values():
            session.outbox.put_nowait(None)

    def _move(self) -> None:
        self.moved = time.monotonic()
        self.changed.send()

    def eligible(self, run: str, task: str, digest: str, evaluator: bool = False) -> list[str]:
        """Return the connected clients that hold a task and are free for a run, by name."""
        return sorted(
            client
            for client, session in self.sessions.items()
            if session.hello.tasks.get(task) == digest
            and session.hello.evaluator == evaluator
            and self.leases.get(client, run) == run
        )

    def lease(self, run: str, clients: Iterable[str]) -> None:
        """Reserve clients for a run until `release`."""
        self.leases.update(dict.fromkeys(clients, run))

    def release(self, run: str) -> None:
        """End all leases of a run."""
        self.leases = {client: owner for client, owner in self.leases.items() if owner != run}
        self.changed.send()

    def send(self, client: str, message: Push) -> bool:
        """Push a message to a client; return False where it is not connected."""
        session = self.sessions.get(client)
        if session is None:
            return False
        session.outbox.put_nowait(message)
        return True
