"""A round whose updates nobody reads: secure aggregation, with a clock, a disk and clients that come and go.

The protocol is `fedcore.crypto.secagg.Server`; this drives it. Clients train as in any round, and advertise
when they have an update; those that come first are the cohort of the protocol, so that slow training costs
no drop-outs. Every step then ends as soon as nobody is awaited, or when its share of the deadline is over. A
client that is lost at a step is lost for the steps after it, the round is not, as long as enough remain.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import numpy as np

from fedcore.crypto.files import sync_folder
from fedcore.crypto.identity import Identity
from fedcore.crypto.secagg import Config, Failed, Server, Step
from fedcore.crypto.trust import Trust
from fedcore.errors import AuthenticationError, ProtocolError, UpdateRefused
from fedcore.messages import Assignment, Blob, Plan, Secure, UploadHead, Verdict
from fedcore.server.admission import Refused, is_offence
from fedcore.server.journal import Journal
from fedcore.server.live import GRACE, Attempt, mapped
from fedcore.server.registry import Registry
from fedcore.server.uploads import alone, check_hidden, end
from fedcore.strategies.rounds import Round
from fedcore.strategies.words import Words, check_sum
from fedcore.wire.chunks import put

log = logging.getLogger("fedcore.server")
T = TypeVar("T")

TRAINING = 0.7  # of the deadline: how long the cohort of the protocol stays open
STEPS = tuple(step for step in Step if step not in (Step.ADVERTISE, Step.ABORT, Step.DONE))  # share the rest
MASKED = (Step.MASK, Step.AGREE, Step.REVEAL, Step.ABORT, Step.DONE)  # clients may have sent masked words


@dataclass(frozen=True)
class Report:
    """What came of a turn on the compute thread.

    heard: whose messages were read. step: what is waited for now, of those awaited. unheard: who had not
    answered the step before its end. refused: whose message was not taken, and why. told: what to tell whom
    where the step has ended.
    """

    heard: frozenset[str]
    step: Step
    unheard: frozenset[str]
    awaited: frozenset[str]
    refused: Mapping[str, Exception]
    told: Mapping[str, bytes] | None


class SecureRound(Attempt):
    """One attempt at a round, from its assignments to its close; used as a `LiveRound` is.

    The event loop keeps the books; all that the protocol computes, and every file, is the compute thread's.
    """

    def __init__(
        self,
        plan: Plan,
        registry: Registry,
        compute: Executor,
        refused: Refused,
        assignment: Callable[[str, float], Assignment],
        journal: Journal,
        config: Config,
        identity: Identity,
        trust: Trust,
    ) -> None:
        """Open the round, or go on where the journal's records end. It blocks, so it belongs off the loop."""
        super().__init__(Round(plan, lambda _, *what: mapped(journal.folder, *what)), registry)
        self.config, self.assignment, self.journal = config, assignment, journal
        self.compute, self.refused = compute, refused
        self.lacks = ""
        try:
            self.server = Server.restored(
                config, identity, trust, plan.cohort, records=journal.records, record=journal.add
            )
            self._find_words()
        except Failed as error:
            self.server, self.lacks = Server(config, identity, trust, ()), str(error)
        self.step = Step.DONE if self.lacks else self.server.step
        self.awaited = self.server.waiting
        self.told = {client: said for client in self.awaited if (said := self.server.message(client))}
        self.inbox = SimpleQueue[tuple[str, bytes | None]]()  # None: masked words are on disk
        self.unread: set[str] = set()  # who has a message in the inbox, one at most
        self.taken: dict[str, asyncio.Timeout] = {}  # uploads that are under way
        self.acknowledged: dict[str, Blob] = {}
        self.gone: dict[str, str] = {}  # they are not waited for, and why
        self.refusals = 0
        self.added = False
        self.certificate = b""
        self.started = time.monotonic()

    def _find_words(self) -> None:
        """Take in masked words that were complete when the coordinator ended, before it could record them."""
        for client in sorted(self.server.waiting) if self.server.step is Step.MASK else ():
            path = self.journal.update(client)
            if path.exists() and path.stat().st_size == self.plan.payload:
                self.server.uploaded(client)

    @property
    def closed(self) -> bool:
        """Whether an upload comes too late."""
        return self.step is not Step.MASK or self.round.closed

    @property
    def spent(self) -> bool:
        """Whether clients may have sent masked words, so that only a certificate allows another attempt."""
        return self.step in MASKED

    async def play(self) -> None:
        """Hand out the work, run the protocol step by step, add up what is masked, and close."""
        for client in self.plan.cohort:
            self.rejoin(client)
            if client not in self.registry.sessions and not self.journal.resumed:
                self.depart(client)  # after a restart they have the time of the step to come back
        await self._aggregate()
        self.close()

    async def _aggregate(self) -> None:
        try:
            if self.lacks:
                raise Failed(self.lacks)
            while self.step not in (Step.ABORT, Step.DONE):
                await self._play_step()
                if self.step is Step.AGREE:  # while the clients sign
                    await self._calculate(self._add_words)
            if self.step is Step.ABORT:
                raise Failed("it was being given up when the coordinator ended")
            await self._calculate(self._unmask)
        except (Failed, UpdateRefused) as error:
            self.lacks = str(error)
            log.warning("secure aggregation failed", extra={"ref": self.plan.ref, "reason": self.lacks})
            if self.step in (Step.MASK, Step.ABORT):  # later, clients have signed that it has not ended
                await self._give_up()
        else:
            for client in self.server.included:
                self.round.settle(client, Verdict("folded"))

    async def _give_up(self) -> None:
        """Ask for signatures that the attempt has ended, without which no client would enter another."""
        told = await self._calculate(self._abort)
        self.step, self.awaited = Step.ABORT, frozenset(told)
        self._tell(told)
        await self._play_step()
        self.certificate = self.server.certificate

    async def _play_step(self) -> None:
        """Await what the clients say in a step, end it, and tell them what they need for the next."""
        step, started, awaited = self.step, time.monotonic(), len(self.awaited)
        ends, told = started + self._seconds(step), None
        while told is None:
            expired = await self._wait(ends)
            report = await self._calculate(self._turn, frozenset(self.gone), expired)
            self.unread -= report.heard
            for client, error in report.refused.items():
                self.gone[client] = str(error)
                self.refuse(client, str(error), is_offence(error))
            self.awaited, told = report.awaited, report.told
        self.step, answered = report.step, awaited - len(report.unheard)
        facts = {"ref": self.plan.ref, "step": str(step), "answered": answered, "of": awaited}
        log.info("step ended", extra={**facts, "seconds": round(time.monotonic() - started, 6)})
        self._tell(told)

    def _seconds(self, step: Step) -> float:
        """Return how long a step may take: training its share, any other an equal part of what is left."""
        if step is Step.ADVERTISE:
            return self.left - (1 - TRAINING) * self.plan.deadline
        return self.left / (len(STEPS) - STEPS.index(step) if step in STEPS else 2)

    async def _wait(self, ends: float) -> bool:
        """Wait until there is something to do; return whether the step's time is over."""
        while (left := ends - time.monotonic()) > 0 and not self.unread and not self._heard_all():
            if self.failure:
                raise self.failure
            self.progress.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self.progress.wait()
        return left <= 0

    def _heard_all(self) -> bool:
        """Whether nobody is waited for; of a cohort that is secret, an early end would tell how many came."""
        timed = self.plan.timed and self.step is Step.ADVERTISE
        return not timed and not (self.awaited - self.gone.keys())

    def _tell(self, told: Mapping[str, bytes]) -> None:
        self.told = dict(told)
        for client, message in told.items():
            self.registry.send(client, Secure(self.plan.ref, message))

    async def _calculate(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.compute, call, *arguments)

    # What follows runs on the compute thread, one turn at a time.

    def _turn(self, gone: frozenset[str], expired: bool) -> Report:
        """Take in what has come by now, also while this thread was busy; end the step if it is over."""
        server, heard, refused = self.server, set[str](), dict[str, Exception]()
        while not self.inbox.empty():
            client, message = self.inbox.get()
            heard.add(client)
            if client in server.waiting and not self._full:
                try:
                    if message is None:
                        server.uploaded(client)
                    else:
                        server.receive(client, message)
                except (ProtocolError, AuthenticationError) as error:
                    refused[client] = error
        unheard, timed = server.waiting, self.plan.timed and server.step is Step.ADVERTISE
        complete = self._full or not unheard - gone - refused.keys()
        told = self._end_step() if expired or (complete and not timed) else None
        return Report(frozenset(heard), server.step, unheard, server.waiting, refused, told)

    @property
    def _full(self) -> bool:
        """Whether more answers would change nothing."""
        if self.server.step is Step.ABORT:
            return bool(self.server.certificate)
        advertised = len(self.plan.cohort) - len(self.server.waiting)
        most = self.config.asked if self.plan.timed else self.plan.goal
        return self.server.step is Step.ADVERTISE and advertised >= most

    def _end_step(self) -> Mapping[str, bytes]:
        """Return what to tell whom, once all that led to it is recorded."""
        told = {} if self.server.step is Step.ABORT else self.server.proceed()
        self.journal.keep()
        return told

    def _abort(self) -> Mapping[str, bytes]:
        told = self.server.abort()
        self.journal.keep()
        return told

    def _add_words(self) -> None:
        """Add the masked words of all who are included."""
        for client in self.server.included:
            raw = np.memmap(self.journal.update(client), np.uint8, mode="r")
            self.round.sums.add_words(Words.read(self.plan, raw))
        self.added = True

    def _unmask(self) -> None:
        """Take the masks off the sums; raises Failed or UpdateRefused where they do not hold."""
        if not self.added:  # before the coordinator was started again
            self._add_words()
        words = self.round.sums.words
        self.server.unmask(words.narrow, words.wide)
        check_sum(self.plan, self.round.sums, len(self.server.included))

    # What follows is called on the event loop, by whoever hears of clients.

    def hear(self, client: str, message: bytes) -> None:
        """Take in a client's message of the protocol, or refuse it."""
        if client not in self.awaited or client in self.unread or self.step is Step.MASK:
            self.refuse(client, f"a message is out of place in the step {self.step}", offence=False)
            return
        self._put(client, message)

    def _put(self, client: str, message: bytes | None) -> None:
        self.unread.add(client)
        self.inbox.put((client, message))
        self.progress.set()

    def refuse(self, client: str, reason: str, offence: bool) -> None:
        """Note what was not taken from a client."""
        self.refused(client, reason, offence)
        self.refusals += 1
        facts = {"client": client, "ref": self.plan.ref, "reason": reason, "refusals": self.refusals}
        log.warning("message refused", extra=facts)

    def received(self, client: str, head: UploadHead) -> bool:
        """Tell whether these very words have been acknowledged, or would have been."""
        return self.acknowledged.get(client) == head.payload

    def take(self, client: str, head: UploadHead, scope: asyncio.Timeout) -> Path:
        """Begin the upload of a client's masked words, and return where they are to lie; `scope` ends it.

        Raises ProtocolError unless they have exactly the plan's size, UpdateRefused unless they are awaited,
        and Interrupted unless they are the only ones.
        """
        check_hidden(head, self.plan.payload)
        if self.closed:
            raise UpdateRefused(f"{self.plan.ref} takes no masked words: it is at the step {self.step}")
        if client not in self.awaited or client in self.unread:
            raise UpdateRefused(f"no masked words of {client} are awaited in {self.plan.ref}")
        alone(self.taken, client, self.plan.ref)
        self.taken[client] = scope
        return self.journal.update(client)

    def drop(self, client: str) -> None:
        """An upload has ended: wait for another one, unless it was accepted."""
        self.taken.pop(client, None)
        if client not in self.registry.sessions:
            self.depart(client)

    async def accept(self, client: str, head: UploadHead, content: bytes | None = None) -> None:
        """Take in masked words that have come, once they would survive a loss of power.

        content: of those that are not on disk yet.
        """
        await asyncio.to_thread(keep_file, self.journal.update(client), content)
        if self.closed:
            raise UpdateRefused(f"{self.plan.ref} takes no masked words any more")
        self.acknowledged[client] = head.payload
        self._put(client, None)

    def depart(self, client: str) -> None:
        """A client's connection is gone: lose it unless it is back within the grace."""
        if client in self.plan.cohort and not self.round.closed:
            self.absences.begin(client, GRACE * self.plan.deadline, self.lose)

    def lose(self, client: str, reason: str) -> None:
        """Wait for a client no longer, unless it comes back; what it has sent still counts."""
        there = set(self.plan.cohort) - self.gone.keys() - self.taken.keys()
        if client in there and not self.round.closed:
            log.warning("client lost", extra={"client": client, "ref": self.plan.ref, "reason": reason})
            self.gone[client] = reason
            self.progress.set()

    def rejoin(self, client: str) -> None:
        """A client is there, or back: hand it its work, or tell it again what it has not answered."""
        self.absences.end(client)
        self.gone.pop(client, None)
        if client in self.awaited and client not in self.taken.keys() | self.unread:
            if client in self.told:
                self.registry.send(client, Secure(self.plan.ref, self.told[client]))
            elif self.step is Step.ADVERTISE:
                self.registry.send(client, self.assignment(client, self.left))

    def close(self) -> None:
        """Take nothing more."""
        for client, reason in self.gone.items():
            self.round.lose(client, reason)
        self.round.close()
        self.absences.clear()
        end(self.taken)

    def bytes_of(self, client: str) -> int:
        """Return the size of a client's masked words, 0 where they were not added."""
        return self.plan.payload if client in self.round.folded else 0


def keep_file(path: Path, content: bytes | None) -> None:
    """Wait until a file would survive a loss of power, under its name.

    content: of one that is not there yet.
    """
    if content is not None:
        put(path, content)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(path.parent)
