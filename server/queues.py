"""The agents that host apps, and the letters that wait for each; lives on the event loop."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from fedcore.server.letters import AppRun, Posted
from fedcore.wire.relay import HostHello, Letter, LetterRef, Over, Void

OUTSTANDING = 4  # letters that an agent has at a time, so that the next is there when one is answered


@dataclass(eq=False)
class Host:
    """The stream of an agent that hosts apps; what is put into `outbox` is pushed to it, None ends it."""

    client: str
    hello: HostHello
    outbox: asyncio.Queue[Letter | Over | Void | None] = field(default_factory=asyncio.Queue)
    pushed: set[LetterRef] = field(default_factory=set)


class Queues:
    """One queue a client, in the order of sending; its head is pushed to the client's agent.

    A letter leaves its queue when it is answered or nobody waits for it any more. An agent that comes back is
    pushed the head of its queue again, since it may have lost it.
    """

    def __init__(self, runs: Mapping[str, AppRun], expire: Callable[[Posted], None]) -> None:
        """Start with nothing. runs: whose letters these are. expire: told of a letter whose time is over."""
        self.runs, self.expire = runs, expire
        self.hosts = dict[str, Host]()
        self.waiting = dict[str, OrderedDict[LetterRef, Posted]]()
        self.timers = dict[LetterRef, asyncio.TimerHandle]()

    def attend(self, host: Host) -> None:
        """Take in an agent's stream, in place of an older one."""
        self.expel(host.client)
        self.hosts[host.client] = host
        self._feed(host.client)

    def leave(self, host: Host) -> None:
        """An agent's stream has ended."""
        if self.hosts.get(host.client) is host:
            del self.hosts[host.client]

    def expel(self, client: str) -> None:
        """End the stream of an agent."""
        if host := self.hosts.get(client):
            host.outbox.put_nowait(None)

    def tell(self, message: Over | None) -> None:
        """Push a message to all agents; None ends their streams."""
        for host in self.hosts.values():
            host.outbox.put_nowait(message)

    def add(self, letters: Iterable[Posted]) -> None:
        """Put letters behind those of their clients."""
        now, later = time.time(), asyncio.get_running_loop().call_later
        for letter in letters:
            self.waiting.setdefault(letter.client, OrderedDict())[letter.ref] = letter
            self.timers[letter.ref] = later(max(letter.expires - now, 0.0), self.expire, letter)
            self._feed(letter.client)

    def drop(self, letters: Iterable[Posted], void: bool = False) -> None:
        """Take letters out of their queues, and push what is at the heads then.

        void: tell the agents that have them that nobody waits for the answers.
        """
        clients = set[str]()
        for letter in letters:
            queue, host = self.waiting.get(letter.client), self.hosts.get(letter.client)
            if not queue or not queue.pop(letter.ref, None):
                continue
            self.timers.pop(letter.ref).cancel()
            clients.add(letter.client)
            if host and letter.ref in host.pushed:
                host.pushed.discard(letter.ref)
                if void:
                    host.outbox.put_nowait(Void(letter.ref))
        for client in clients:
            if self.waiting[client]:
                self._feed(client)
            else:
                del self.waiting[client]

    def _feed(self, client: str) -> None:
        """Push to a client's agent what is at the head of its queue, unless it has it."""
        host = self.hosts.get(client)
        if host is None:
            return
        for letter in islice(self.waiting.get(client, {}).values(), OUTSTANDING):
            left = letter.expires - time.time()
            if letter.ref not in host.pushed and left > 0:
                host.pushed.add(letter.ref)
                run = self.runs[letter.ref.run]
                parts = (run.app, run.digest, letter.head, letter.content)
                host.outbox.put_nowait(Letter(letter.ref, *parts, left))
