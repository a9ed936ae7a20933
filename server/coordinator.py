"""All runs of a coordinator: each is driven by one task of the event loop.

No NumPy call of size, no file and no SQL runs on the loop: folding and aggregation have one compute thread,
the database has one writer thread.
"""

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name
from fedcore.crypto.trust import Trust
from fedcore.errors import ProtocolError, SpecError, UpdateRefused
from fedcore.messages import Blob, Outcome, Ref, Submission
from fedcore.server.blobs import Blobs
from fedcore.server.denied import Denied
from fedcore.server.driver import Driver
from fedcore.server.journal import Journals
from fedcore.server.opening import Live
from fedcore.server.registry import Registry, Session
from fedcore.server.secure import SecureRound
from fedcore.server.store import Run, Store
from fedcore.strategies.catalog import from_table, strategy_of
from fedcore.strategies.conflicts import check as check_strategy
from fedcore.strategies.encryption import check as check_encryption
from fedcore.strategies.modes import Synchronous
from fedcore.strategies.rounds import train_plan
from fedcore.wire.secure import config_of

log = logging.getLogger("fedcore.server")
T = TypeVar("T")


class Coordinator:
    """All runs of one coordinator, its agents and its state folder."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        """Open the state folder: `coordinator.db`, `blobs/`, `spool/`, `attempts/` and `denied.json`.

        identity: the one that calls and signatures show; replaced when its certificate is renewed.
        """
        self.identity, self.denied = identity, Denied(folder / "denied.json")
        self.trust = Trust(identity.root, identity.name.federation)
        self.store = Store(folder / "coordinator.db")
        self.blobs = Blobs(folder / "blobs", self.store.held())
        self.spool = folder / "spool"
        shutil.rmtree(self.spool, ignore_errors=True)
        self.spool.mkdir()
        self.journals = Journals(folder / "attempts")
        self.registry = Registry()
        self.writer = ThreadPoolExecutor(1, "store")
        self.compute = ThreadPoolExecutor(1, "compute")
        self.drivers: dict[str, Driver] = {}
        self.live: dict[Ref, Live] = {}

    async def start(self) -> None:
        """Continue every run that was running."""
        runs = await self.write(self.store.runs)
        await self.write(self.journals.keep, {run.id for run in runs if run.state == "running"})
        for run in runs:
            committed = await self.write(self.store.rounds, run.id)
            known = await self.write(self.store.clients, run.id)
            driver = self.drivers[run.id] = Driver(self, run, committed, known)
            if run.state == "running":
                driver.start()

    async def close(self) -> None:
        """Stop driving; the runs stay as they are and continue at the next start."""
        tasks = [driver.task for driver in self.drivers.values() if driver.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.writer.shutdown()
        self.compute.shutdown(cancel_futures=True)
        self.store.close()

    async def write(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a call on the writer thread."""
        return await asyncio.get_running_loop().run_in_executor(self.writer, call, *arguments)

    async def calculate(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a call on the compute thread."""
        return await asyncio.get_running_loop().run_in_executor(self.compute, call, *arguments)

    async def submit(self, submission: Submission, parameters: Path) -> Run:
        """Start a run that `check` passed; its initial parameters are in a file of the blobs' folder."""
        blob = await asyncio.to_thread(self._initial, submission, parameters)
        run_id = f"{submission.spec.run.name}-{secrets.token_hex(4)}"
        run = await self.write(self.store.add_run, run_id, submission, blob.sha256)
        self.drivers[run_id] = Driver(self, run, [], {})
        self.drivers[run_id].start()
        log.info("run submitted", extra={"run": run_id, "task": run.task, "rounds": run.spec.run.rounds})
        return run

    def _initial(self, submission: Submission, parameters: Path) -> Blob:
        extra = from_table(submission.spec.strategy).algorithm.receives
        os.truncate(
            parameters, submission.layout.blob_size(extra)
        )  # what is beside the model is zero at first
        return self.blobs.adopt(parameters)

    def connect(self, session: Session) -> None:
        """Take in an agent: tell it what became of what it has sent, and hand it the work that it left."""
        for ref in session.hello.pending:
            if (driver := self.drivers.get(ref.run)) and (verdict := driver.verdict(ref, session.client)):
                session.outbox.put_nowait(Outcome(ref, verdict))
        self.registry.join(session)
        for live in self.live.values():
            live.rejoin(session.client)

    def disconnect(self, session: Session) -> None:
        """An agent's stream has ended."""
        if self.registry.leave(session):
            for live in self.live.values():
                live.depart(session.client)

    def accept(self, ref: Ref, client: str) -> None:
        """A device takes part in a run."""
        if (driver := self.drivers.get(ref.run)) and driver.offers and ref.kind == "offer":
            driver.offers.accept(client)

    def decline(self, ref: Ref, client: str, reason: str) -> None:
        """A device will not do a piece of work, or take part in a run."""
        if ref in self.live:  # otherwise it has closed
            self.live[ref].lose(client, f"declined: {reason}")
        elif (driver := self.drivers.get(ref.run)) and driver.offers and ref.kind == "offer":
            driver.offers.decline(client)
            log.warning("run declined", extra={"client": client, "run": ref.run, "reason": reason})

    def expel(self, name: Name) -> None:
        """Go on without whose certificate was revoked; its calls are ended by `Denied`."""
        for live in list(self.live.values()) if name.role == "client" else ():
            live.lose(name.name, "its certificate was revoked")

    def hear(self, ref: Ref, client: str, message: bytes) -> None:
        """Take in a client's message of secure aggregation, or refuse it."""
        live = self.live.get(ref)
        if isinstance(live, SecureRound):
            live.hear(client, message)
        else:
            log.warning("message refused", extra={"client": client, "ref": ref, "reason": "it is not open"})

    def round_of(self, ref: Ref) -> Live:
        """Return the open round of that name; raises UpdateRefused where there is none."""
        if ref not in self.live:
            raise UpdateRefused(f"{ref} is not open")
        return self.live[ref]


def check(submission: Submission) -> None:
    """Raise unless a run can work: its strategy, the bounds of its sums, and the size of its parameters.

    It blocks, for it may import plug-ins.
    """
    spec, layout = submission.spec, submission.layout
    strategy = strategy_of(spec)
    if spec.attack:
        raise SpecError("attack: attacks are for simulations; remove the table, or run `fedcore simulate`")
    if strategy.mode != Synchronous():
        mode = type(strategy.mode).__name__
        raise SpecError(f'strategy.mode: {mode} runs in simulations only; set mode = "synchronous"')
    check_strategy(strategy, spec)
    if "auto" in (spec.encryption.updates, spec.encryption.encoding):
        raise SpecError('encryption: "auto" says nothing yet; hand the run in by `fedcore run submit`')
    check_encryption(strategy, spec)
    clients = tuple(str(i) for i in range(spec.cohort.asked))
    plan = train_plan(strategy, spec, layout, Ref("check", 1, 0, "train"), clients, len(clients))
    for term in plan.terms:
        plan.shift(term)
    if spec.encryption.updates == "secagg":
        config_of("check", plan.ref, spec, submission.parameters, len(clients), plan.sizes)
    if not layout.shared_size:
        raise SpecError("the layout has no shared parameter, so there is nothing to learn")
    if submission.parameters.size != layout.nbytes:
        given, expected = submission.parameters.size, layout.nbytes
        raise ProtocolError(f"the initial parameters have {given} bytes, the layout needs {expected}")
