"""A round in progress: the shared state machine, with a clock, a disk and clients that come and go.

Updates are read by the coordinator, whether they come plain, in TLS alone, or sealed. A round whose updates
nobody reads is `fedcore.server.secure`.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import UpdateRefused
from fedcore.faults import point
from fedcore.layout import Layout
from fedcore.messages import Assignment, Outcome, Plan, Update, UploadHead, Verdict
from fedcore.server.admission import Refused
from fedcore.server.journal import Accepted, Journal
from fedcore.server.pausing import reason
from fedcore.server.registry import Registry
from fedcore.server.sealed import Vault
from fedcore.server.uploads import alone, check_head, check_hidden, end
from fedcore.strategies.rounds import Round, fold
from fedcore.strategies.terms import check
from fedcore.wire.chunks import holds, put

log = logging.getLogger("fedcore.server")

GRACE = 0.1  # of the deadline: how long a client that lost its connection is waited for
RETURN = 60.0  # seconds, if that is more, after a restart: agents seek the coordinator every 30 s or sooner
OVER = b"over"  # the record of an attempt that was given up


class Absences:
    """Clients whose connection is gone, each waited for as long as its round allows."""

    def __init__(self) -> None:
        """Start with nobody."""
        self.timers: dict[str, asyncio.TimerHandle] = {}

    def begin(self, client: str, seconds: float, lose: Callable[[str, str], None]) -> None:
        """Lose a client unless it is back by then."""
        self.end(client)
        loop = asyncio.get_running_loop()
        self.timers[client] = loop.call_later(seconds, lose, client, "the connection was lost")

    def end(self, client: str) -> None:
        """Note that a client is back."""
        if timer := self.timers.pop(client, None):
            timer.cancel()

    def clear(self) -> None:
        """Lose nobody any more."""
        for client in list(self.timers):
            self.end(client)


class Attempt:
    """What attempts of all kinds have: a round, the time that is left for it, and a word for its clients."""

    def __init__(self, round: Round, registry: Registry) -> None:
        """Begin now."""
        self.plan, self.round, self.registry = round.plan, round, registry
        self.absences = Absences()
        self.progress = asyncio.Event()
        self.failure: BaseException | None = None
        self.started = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.plan.deadline - (time.monotonic() - self.started)

    def fail(self, error: BaseException) -> None:
        """Have `play` raise an error: the disk or the database is in the way."""
        self.failure = error
        self.progress.set()

    def announce(self, counts: bool = True) -> None:
        """Tell every client of the cohort what became of its work.

        counts: whether the round stands; an update of one that was given up has been folded into nothing.
        """
        for client, verdict in self.round.verdicts.items():
            if verdict.status == "folded" and not counts:
                verdict = Verdict("late", "the attempt was given up")
            self.registry.send(client, Outcome(self.plan.ref, verdict))


class LiveRound(Attempt):
    """One attempt at a round, from its assignments to its close.

    Its event loop part keeps the books; checking and adding runs on the compute thread, one update at a
    time, over files that are mapped into memory. What is acknowledged is in the journal first, and stays
    there until the round is committed, so that a restarted coordinator goes on with it: it folds what it has
    again, which gives the same sums in any order, and gives the others the whole deadline anew.
    """

    spent, certificate = False, b""  # clients may be asked again without a reason; see `SecureRound`

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        registry: Registry,
        compute: Executor,
        refused: Refused,
        journal: Journal,
        assignment: Callable[[str, float], Assignment],
        vault: Vault | None = None,
        moved: Callable[[], None] | None = None,
    ) -> None:
        """Open the round, or go on where the journal's records end. It blocks, so it belongs off the loop.

        refused: is told of updates that do not count. assignment: makes the work of a client, given the
        seconds that are left. vault: where updates come sealed; they are folded when the round has closed.
        moved: where updates are only judged, to be folded by others (see `update`); called whenever one more
        client is settled.
        """
        # By the folder, not by a method: a cycle would hold the space of the files until it is collected.
        super().__init__(Round(plan, lambda _, *what: mapped(journal.folder, *what)), registry)
        self.layout, self.assignment, self.refused, self.moved = layout, assignment, refused, moved
        self.compute, self.journal, self.vault = compute, journal, vault
        self.accepted: dict[str, Accepted] = {}
        self.taken: dict[str, asyncio.Timeout] = {}  # uploads that are under way
        self.returned: set[str] = set()  # they came back while theirs was
        self.pending: set[asyncio.Task[None]] = set()  # updates that are being noted or judged
        self._restore()
        self.started = time.monotonic()

    def _restore(self) -> None:
        """Judge once more what was accepted before the coordinator ended."""
        if OVER in self.journal.records:
            self.round.close()
            return
        for accepted in map(Accepted.of_bytes, self.journal.records):
            client = accepted.client
            if client not in self.round.waiting:
                continue
            if holds(self.journal.update(client), accepted.head.payload):
                self.accepted[client] = accepted
                self._settle(client, self._judge(client))
            else:
                log.warning("update damaged", extra={"client": client, "ref": self.plan.ref})

    @property
    def closed(self) -> bool:
        """Whether an upload comes too late."""
        return self.round.closed

    @property
    def lacks(self) -> str:
        """What the closed round lacks to stand; "" where it lacks nothing."""
        return "" if self.round.sufficient else f"{len(self.round.folded)} updates"

    async def play(self) -> None:
        """Hand out the work, wait for the goal, the deadline or the last client, and close.

        Raises what `fail` was told.
        """
        await self._collect()
        self.close()
        await asyncio.get_running_loop().run_in_executor(self.compute, self._finish)

    def _finish(self) -> None:
        if self.moved:
            return
        if not self.round.sufficient:  # of which clients are told
            self.journal.note(OVER)
        elif self.vault:
            for client in self.round.folded:
                fold(self.round, client, self.update(client))

    async def _collect(self) -> None:
        grace = GRACE * self.plan.deadline
        for client in self.plan.cohort:
            if self._awaited(client) and not self.registry.send(client, self.assignment(client, self.left)):
                self.depart(client, max(grace, RETURN) if self.journal.resumed else grace)
        while not self.round.closed and not self.round.done and self.left > 0 and not self.failure:
            self.progress.clear()
            try:
                async with asyncio.timeout(self.left):  # wait_for may lose a cancellation on Python 3.11
                    await self.progress.wait()
            except TimeoutError:
                log.warning("deadline reached", extra={"ref": self.plan.ref, "in": len(self.round.folded)})
        while self.pending:
            await asyncio.gather(*self.pending)
        if self.failure:
            raise self.failure

    def bytes_of(self, client: str) -> int:
        """Return the size of a client's update, 0 where none was accepted."""
        return self.accepted[client].head.payload.size if client in self.accepted else 0

    def close(self) -> None:
        """Take no more updates."""
        self.round.close()
        self._move()
        self.absences.clear()
        end(self.taken)

    def _move(self) -> None:
        self.progress.set()
        if self.moved:
            self.moved()

    def received(self, client: str, head: UploadHead) -> bool:
        """Tell whether this very update of a client has been acknowledged, or would have been."""
        return client in self.accepted and self.accepted[client].head.payload == head.payload

    def take(self, client: str, head: UploadHead, scope: asyncio.Timeout) -> Path:
        """Begin a client's upload, and return where it is to lie; `scope` ends it.

        Raises ProtocolError unless it has exactly the bytes that the plan asks for, before the first of them
        is taken, UpdateRefused unless it is awaited, and Interrupted unless it is the only one.
        """
        if self.vault:
            check_hidden(head, self.vault.size)
        else:
            check_head(self.plan, head)
        self.round.admit(client)
        if client in self.accepted:
            raise UpdateRefused(f"{client} has answered {self.plan.ref} already")
        alone(self.taken, client, self.plan.ref)
        self.taken[client] = scope
        return self.journal.update(client)

    def drop(self, client: str) -> None:
        """An upload has ended: wait for another one, unless it was accepted."""
        self.taken.pop(client, None)
        if client not in self.registry.sessions:
            self.depart(client)
        elif client in self.returned:
            self.rejoin(client)

    async def accept(self, client: str, head: UploadHead, content: bytes | None = None) -> None:
        """Note an update that is on disk, by which it counts; it is judged on the compute thread later.

        content: of one that is not on disk yet, and is written first; each turn of a thread costs its time.
        Once begun that is finished before this returns, whatever becomes of the caller: who reads the journal
        next must find it. Raises UpdateRefused where the round has closed.
        """
        if self.closed:
            raise UpdateRefused(f"{self.plan.ref} has closed")
        noting = self._begin(self._note(Accepted(client, head, self.plan.deadline - self.left), content))
        try:
            await asyncio.shield(noting)
        finally:
            await asyncio.wait([noting])

    def _begin(self, step: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(step)
        self.pending.add(task)
        task.add_done_callback(self.pending.discard)
        return task

    async def _note(self, accepted: Accepted, content: bytes | None) -> None:
        await asyncio.to_thread(self._write, accepted, content)
        if accepted.client not in self.accepted:  # its caller may have come again meanwhile
            self.accepted[accepted.client] = accepted
            self._begin(self._fold(accepted.client))

    def _write(self, accepted: Accepted, content: bytes | None) -> None:
        if content is not None:
            put(self.journal.update(accepted.client), content)
        self.journal.note(accepted.to_bytes())

    async def _fold(self, client: str) -> None:
        try:
            verdict = await asyncio.get_running_loop().run_in_executor(self.compute, self._judge, client)
            point("round.folded")
        except Exception as error:
            if reason(error):
                self.fail(error)
                return
            log.exception("an update could not be folded", extra={"client": client, "ref": self.plan.ref})
            verdict = Verdict("refused", "the coordinator could not read the update")
        else:
            if verdict.status == "refused":
                self.refused(client, verdict.reason, True)
        self._settle(client, verdict)
        self._move()

    def _settle(self, client: str, verdict: Verdict) -> None:
        if verdict.status == "refused":
            log.warning("update refused", extra={"client": client, "reason": verdict.reason})
        self.round.seconds[client] = self.accepted[client].seconds
        self.round.settle(client, verdict)

    # What follows runs on the compute thread.

    def _judge(self, client: str) -> Verdict:
        try:
            update = self.update(client)
            if not self.vault and not self.moved:
                return fold(self.round, client, update)
            check(self.plan, update)
        except UpdateRefused as error:
            return Verdict("refused", str(error))
        return Verdict("folded")

    def update(self, client: str) -> Update:
        """Return an accepted update, mapped into memory; raises UpdateRefused where it does not open."""
        path, head = self.journal.update(client), self.accepted[client].head
        if self.vault:
            return self.vault.opened(client, path)
        flat = np.memmap(path, self.layout.dtype, mode="r") if head.payload.size else np.zeros(0)
        vectors, start = {}, 0
        for name, length in head.vectors:
            vectors[name] = flat[start : start + length]
            start += length
        return Update(vectors, head.scalars)

    # What follows is called on the event loop, by whoever hears of clients.

    def depart(self, client: str, seconds: float | None = None) -> None:
        """A client's connection is gone: lose it unless it is back within the grace."""
        if self._awaited(client):
            grace = GRACE * self.plan.deadline if seconds is None else seconds
            self.absences.begin(client, grace, self.lose)

    def _awaited(self, client: str) -> bool:
        return client in self.round.waiting and not self.round.closed and client not in self.accepted

    def lose(self, client: str, reason: str) -> None:
        """Go on without a client, unless its update is here or on its way."""
        if self._awaited(client) and client not in self.taken:
            log.warning("client lost", extra={"client": client, "ref": self.plan.ref, "reason": reason})
            self.round.lose(client, reason)
            self._move()

    def rejoin(self, client: str) -> None:
        """A client is back: hand it its work again if it has not answered."""
        self.absences.end(client)
        if client in self.taken:
            self.returned.add(client)
        elif self._awaited(client):
            self.returned.discard(client)
            self.registry.send(client, self.assignment(client, self.left))


def mapped(folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return zeros on disk. The file has no name: whatever happens to this process, nothing is left of it."""
    if 0 in shape:  # nothing to map
        return np.zeros(shape, dtype)
    with TemporaryFile(dir=folder) as file:
        # Written to, a hole for which the disk has no room would end this process.
        os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)
        return np.memmap(file, dtype, mode="w+", shape=shape)
