"""A round in progress: the shared state machine, with a clock, a disk and clients that come and go.

Updates are read by the coordinator, whether they come plain, in TLS alone, or sealed. A round whose updates
nobody reads is `fedcore.server.secure`.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import ProtocolError, UpdateRefused
from fedcore.layout import Layout
from fedcore.messages import Assignment, Outcome, Plan, Update, UploadHead, Verdict
from fedcore.server.registry import Registry
from fedcore.server.sealed import Vault
from fedcore.strategies.rounds import Round, fold

log = logging.getLogger("fedcore.server")

GRACE = 0.1  # of the deadline: how long a client that lost its connection is waited for


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


class LiveRound:
    """One attempt at a round, from its assignments to its close.

    Its event loop part keeps the books; checking and adding runs on the compute thread, one update at a
    time, over files that are mapped into memory. Of the two, only `__init__` blocks.
    """

    spent, certificate = False, b""  # clients may be asked again without a reason; see `SecureRound`

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        registry: Registry,
        compute: Executor,
        spool: Path,
        assignment: Callable[[str, float], Assignment],
        vault: Vault | None = None,
    ) -> None:
        """Open the round, with sums, rows and uploads in `spool`.

        assignment: makes the work of a client, given the seconds that are left. vault: where updates come
        sealed.
        """
        self.plan, self.layout, self.assignment = plan, layout, assignment
        self.registry, self.compute, self.spool, self.vault = registry, compute, spool, vault
        self.round = Round(plan, self._zeros, self._space)
        self.taken: set[str] = set()  # their upload is under way or being folded
        self.returned: set[str] = set()  # they came back while it was
        self.absences = Absences()
        self.folding: set[asyncio.Task[None]] = set()
        self.progress = asyncio.Event()
        self.started = time.monotonic()

    def _zeros(self, name: str, length: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        return self._space(name, (length,), dtype)

    def _space(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return mapped(self.spool, shape, dtype)

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.plan.deadline - (time.monotonic() - self.started)

    @property
    def closed(self) -> bool:
        """Whether an upload comes too late."""
        return self.round.closed

    @property
    def lacks(self) -> str:
        """What the closed round lacks to stand; "" where it lacks nothing."""
        return "" if self.round.sufficient else f"{len(self.round.folded)} updates"

    async def play(self) -> None:
        """Hand out the work, wait for the goal, the deadline or the last client, and close."""
        try:
            await self._collect()
            self.close()
            if self.vault:
                await asyncio.get_running_loop().run_in_executor(self.compute, self.vault.fold, self.round)
        finally:
            if self.vault:
                self.compute.submit(self.vault.clear)

    async def _collect(self) -> None:
        for client in self.plan.cohort:
            if not self.registry.send(client, self.assignment(client, self.left)):
                self.depart(client)
        while not self.round.done and self.left > 0:
            self.progress.clear()
            try:
                async with asyncio.timeout(self.left):  # wait_for may lose a cancellation on Python 3.11
                    await self.progress.wait()
            except TimeoutError:
                log.warning("deadline reached", extra={"ref": self.plan.ref, "in": len(self.round.folded)})
        while self.folding:
            await asyncio.gather(*self.folding)

    def close(self) -> None:
        """Take no more updates."""
        self.round.close()
        self.progress.set()
        self.absences.clear()

    def take(self, client: str, head: UploadHead) -> Path:
        """Begin a client's upload, and return where it is to lie.

        Raises ProtocolError unless it has exactly the bytes that the plan asks for, before the first of them
        is taken, and UpdateRefused unless it is awaited and the only one.
        """
        if self.vault:
            check_hidden(head, self.vault.size)
        else:
            check_head(self.plan, head)
        self.round.admit(client)
        if client in self.taken:
            raise UpdateRefused(f"another upload of {client} for {self.plan.ref} is under way")
        self.taken.add(client)
        return self.spool / uuid4().hex

    def drop(self, client: str) -> None:
        """An upload has failed: wait for another one."""
        self.taken.discard(client)
        if client not in self.registry.sessions:
            self.depart(client)
        elif client in self.returned:
            self.rejoin(client)

    async def accept(self, client: str, head: UploadHead, path: Path) -> None:
        """Check an upload that is on disk and add it, on the compute thread; the file goes."""
        self.round.seconds[client] = self.plan.deadline - self.left
        task = asyncio.ensure_future(self._fold(client, head, path))
        self.folding.add(task)
        task.add_done_callback(self.folding.discard)

    async def _fold(self, client: str, head: UploadHead, path: Path) -> None:
        loop = asyncio.get_running_loop()
        try:
            verdict = await loop.run_in_executor(self.compute, self._fold_file, client, head, path)
        except Exception:
            log.exception("an update could not be folded", extra={"client": client, "ref": self.plan.ref})
            verdict = Verdict("refused", "the coordinator could not read the update")
        if verdict.status == "refused":
            log.warning("update refused", extra={"client": client, "reason": verdict.reason})
        self.taken.discard(client)
        self.round.settle(client, verdict)
        self.progress.set()

    def _fold_file(self, client: str, head: UploadHead, path: Path) -> Verdict:
        if self.vault:
            return self.vault.take(client, path)
        flat = np.memmap(path, self.layout.dtype, mode="r") if head.payload.size else np.zeros(0)
        path.unlink()
        vectors, start = {}, 0
        for name, length in head.vectors:
            vectors[name] = flat[start : start + length]
            start += length
        return fold(self.round, client, Update(vectors, head.scalars))

    def depart(self, client: str) -> None:
        """A client's connection is gone: lose it unless it is back within the grace."""
        if self._awaited(client):
            self.absences.begin(client, GRACE * self.plan.deadline, self.lose)

    def _awaited(self, client: str) -> bool:
        return client in self.round.waiting and not self.round.closed

    def lose(self, client: str, reason: str) -> None:
        """Go on without a client, unless its update is here or on its way."""
        if self._awaited(client) and client not in self.taken:
            log.warning("client lost", extra={"client": client, "ref": self.plan.ref, "reason": reason})
            self.round.lose(client, reason)
            self.progress.set()

    def rejoin(self, client: str) -> None:
        """A client is back: hand it its work again if it has not answered."""
        self.absences.end(client)
        if client in self.taken:
            self.returned.add(client)
        elif self._awaited(client):
            self.returned.discard(client)
            self.registry.send(client, self.assignment(client, self.left))

    def announce(self, counts: bool = True) -> None:
        """Tell every client of the cohort what became of its work; counts: whether the round stands."""
        announce(self.round, self.registry, counts)


def announce(round: Round, registry: Registry, counts: bool) -> None:
    """Tell the clients of a round that is over what became of their work.

    counts: whether the round stands; an update of one that was given up has been folded into nothing.
    """
    for client, verdict in round.verdicts.items():
        if verdict.status == "folded" and not counts:
            verdict = Verdict("late", "the attempt was given up")
        registry.send(client, Outcome(round.plan.ref, verdict))


def mapped(folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return zeros on disk. The file has no name: whatever happens to this process, nothing is left of it."""
    if 0 in shape:  # nothing to map
        return np.zeros(shape, dtype)
    with TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype, mode="w+", shape=shape)


def check_head(plan: Plan, head: UploadHead) -> None:
    """Raise ProtocolError unless an upload has the plan's vectors and exactly their bytes."""
    expected = {name: spec.length for name, spec in plan.vectors.items()}
    if dict(head.vectors) != expected:
        raise ProtocolError(f"the update has vectors {dict(head.vectors)}, expected {expected}")
    check_size(head, sum(spec.length * spec.dtype.itemsize for spec in plan.vectors.values()))


def check_hidden(head: UploadHead, size: int) -> None:
    """Raise ProtocolError unless an upload has so many bytes, and its head tells of nothing in them."""
    if head.vectors or head.scalars:
        told = sorted([*dict(head.vectors), *head.scalars])
        raise ProtocolError(f"the head of an encrypted update tells of {told}, expected nothing")
    check_size(head, size)


def check_size(head: UploadHead, size: int) -> None:
    """Raise ProtocolError unless an upload has so many bytes."""
    if head.payload.size != size:
        raise ProtocolError(f"the payload has {head.payload.size} bytes, expected {size}")
