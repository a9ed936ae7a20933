"""Which devices have accepted a run before anybody is drawn for it.

The epsilon of client-level noise is that of a device which might be drawn in every round. It is spent
whether or not the device ever is, so a device has to reserve it first, for the whole run: each is offered the
run when it is seen, and cohorts are drawn among those that have accepted. What a device has accepted is in
its ledger; asked again after a restart, it finds it there.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedcore.messages import Assignment
from fedcore.server.registry import Registry, Session


@dataclass
class Offers:
    """The offers of one run: who was asked, on which connection, who has accepted, and who is to answer."""

    registry: Registry
    asked: dict[str, Session] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    moved: float = field(default_factory=time.monotonic)

    @property
    def quiet(self) -> float:
        """Seconds since a device was asked or accepted."""
        return time.monotonic() - self.moved

    def willing(self, clients: Iterable[str], offer: Assignment) -> list[str]:
        """Return those that have accepted, and make an offer to those that were not asked since they came."""
        present = {client: self.registry.sessions[client] for client in clients}
        for client, session in present.items():
            if client not in self.accepted and self.asked.get(client) is not session:
                self.asked[client] = session
                self.open.add(client)
                self.moved = time.monotonic()
                self.registry.send(client, offer)
        self.open &= self.registry.sessions.keys()
        return [client for client in present if client in self.accepted]

    def accept(self, client: str) -> None:
        """Take a device in, if it was asked."""
        if client in self.asked:
            self.accepted.add(client)
            self.moved = time.monotonic()
            self.decline(client)

    def decline(self, client: str) -> None:
        """Wait for a device no longer."""
        self.open.discard(client)
        self.registry.changed.send()
