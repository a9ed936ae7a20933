"""All runs of a coordinator: each is driven by one task of the event loop.

No NumPy call of size, no file and no SQL runs on the loop: folding and aggregation have one compute thread,
the database has one writer thread.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name
from fedcore.crypto.trust import Trust
from fedcore.errors import Interrupted, Overloaded, ProtocolError, SpecError, UpdateRefused
from fedcore.messages import Blob, Outcome, Ref, Submission
from fedcore.server.admission import Admission
from fedcore.server.blobs import Blobs
from fedcore.server.database import StoreUnavailable
from fedcore.server.denied import Denied
from fedcore.server.driver import Driver
from fedcore.server.journal import Journals
from fedcore.server.offers import Offers
from fedcore.server.opening import Live
from fedcore.server.registry import Registry, Session
from fedcore.server.relay import Relay
from fedcore.server.secure import SecureRound
from fedcore.server.store import Conduct, Run, Store
from fedcore.strategies.catalog import from_table, strategy_of
from fedcore.strategies.conflicts import check as check_strategy
from fedcore.strategies.encryption import check as check_encryption
from fedcore.strategies.modes import Synchronous
from fedcore.strategies.rounds import train_plan
from fedcore.strategies.stopping import check as check_stopping
from fedcore.wire.secure import config_of

log = logging.getLogger("fedcore.server")
T = TypeVar("T")


class Coordinator:
    """All runs of one coordinator, its agents and its state folder."""

    def __init__(self, folder: Path, identity: Identity, database_url: str = "") -> None:
        """Open the state folder: the database, `audit.key`, `blobs/`, `attempts/`, `apps/` and `denied.json`.

        identity: the one that calls and signatures show; replaced when its certificate is renewed.
        database_url: of PostgreSQL, in place of the folder's `coordinator.db`.
        """
        self.identity, self.denied = identity, Denied(folder / "denied.json")
        self.trust = Trust(identity.root, identity.name.federation)
        self.store = Store(folder, database_url)
        self.journals = Journals(folder / "attempts")
        held, openings = self.store.held(), self.journals.openings()
        for opening in openings:
            if opening.parameters:
                held.setdefault(opening.ref.run, set()).add(opening.parameters)
        self.blobs = Blobs(folder / "blobs", held)
        self.admission = Admission(self.store.conduct())
        self.registry = Registry(self.admission.barred)
        self.writer = ThreadPoolExecutor(1, "store")
        self.compute = ThreadPoolExecutor(1, "compute")
        self.drivers: dict[str, Driver] = {}
        self.live: dict[Ref, Live] = {}
        self.resuming = {opening.ref for opening in openings}  # attempts that will be live again
        self.errands: set[asyncio.Task[None]] = set()
        self.relay = Relay(self, folder / "apps")

    async def start(self) -> None:
        """Continue every run that was running."""
        self.relay.start()
        runs = await self.write(self.store.runs)
        await self.write(self.journals.keep, {run.id for run in runs if run.state == "running"})
        for run in runs:
            committed = await self.write(self.store.rounds, run.id)
            known = await self.write(self.store.clients, run.id)
            self.drivers[run.id] = Driver(self, run, committed, known)
        # Before any run moves: another one could take clients that are at work for an attempt that goes on.
        openings = await self.write(self.journals.openings)
        for driver in self.drivers.values():
            self.registry.lease(driver.run.id, driver.engaged(openings))
        for run in runs:
            if run.state == "running":
                self.drivers[run.id].start()

    async def close(self) -> None:
        """Stop driving; the runs stay as they are and continue at the next start."""
        tasks = [driver.task for driver in self.drivers.values() if driver.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self.errands, return_exceptions=True)
        self.writer.shutdown()
        self.compute.shutdown(cancel_futures=True)
        self.store.close()

    async def write(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a call on the writer thread."""
        return await asyncio.get_running_loop().run_in_executor(self.writer, call, *arguments)

    async def calculate(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run a call on the compute thread."""
        return await asyncio.get_running_loop().run_in_executor(self.compute, call, *arguments)

    async def note(self, operator: Name, action: str, of: str) -> None:
        """Write down what an operator is about to do."""
        await self.write(self.store.note, str(operator), action, of)

    async def lift(self, client: str) -> None:
        """Forget the offences of a client."""
        await self.write(self.store.lift, client)
        self.admission.lift(client)
        self.registry.changed.send()

    async def submit(self, operator: Name, submission: Submission, parameters: Path) -> Run:
        """Start a run that `check` passed; its initial parameters are in a file of the blobs' folder.

        Where that fails, no file stays.
        """
        asked = submission.spec.run
        run_id = f"{asked.name}-{secrets.token_hex(4)}"
        try:
            await self.note(operator, "submit", f"{asked.name}, {asked.rounds} rounds of {submission.task}")
            blob = await asyncio.to_thread(self._initial, submission, parameters, run_id)
            run = await self.write(self.store.add_run, run_id, submission, blob.sha256)
        except BaseException:
            await asyncio.to_thread(parameters.unlink, missing_ok=True)
            await asyncio.to_thread(self.blobs.keep, run_id, ())
            raise
        self.drivers[run_id] = Driver(self, run, [], {})
        self.drivers[run_id].start()
        log.info("run submitted", extra={"run": run_id, "task": run.task, "rounds": run.spec.run.rounds})
        return run

    def _initial(self, submission: Submission, parameters: Path, run_id: str) -> Blob:
        extra = from_table(submission.spec.strategy).algorithm.receives
        # What is beside the model is zero at first.
        os.truncate(parameters, submission.layout.blob_size(extra))
        return self.blobs.adopt(parameters, run_id)

    def connect(self, session: Session) -> None:
        """Take in an agent: tell it what became of what it has sent, and hand it the work that it left."""
        for ref in session.hello.pending:
            if (driver := self.drivers.get(ref.run)) and (verdict := driver.verdict(ref, session.client)):
                session.outbox.put_nowait(Outcome(ref, verdict))
        self.registry.join(session)
        for live in self.live.values() if session.client not in self.admission.barred else ():
            live.rejoin(session.client)

    def disconnect(self, session: Session) -> None:
        """An agent's stream has ended."""
        if self.registry.leave(session):
            for live in self.live.values():
                live.depart(session.client)

    def accept(self, ref: Ref, client: str) -> None:
        """A device takes part in a run."""
        if offers := self._offers(ref):
            offers.accept(client)

    def decline(self, ref: Ref, client: str, reason: str) -> None:
        """A device will not do a piece of work, or take part in a run."""
        if ref in self.live:  # otherwise it has closed
            self.live[ref].lose(client, f"declined: {reason}")
        elif offers := self._offers(ref):
            offers.decline(client)
            log.warning("run declined", extra={"client": client, "run": ref.run, "reason": reason})

    def _offers(self, ref: Ref) -> Offers | None:
        driver = self.drivers.get(ref.run)
        return driver.gathering.offers if driver and ref.kind == "offer" else None

    def expel(self, name: Name) -> None:
        """Go on without whose certificate was revoked; its calls are ended by `Denied`."""
        for live in list(self.live.values()) if name.role == "client" else ():
            live.lose(name.name, "its certificate was revoked")

    def refuse(self, client: str, reason: str, offence: bool) -> None:
        """Count what was not taken from a client, and its offences for good; the last brings quarantine."""
        self.admission.refuse(client, reason)
        if not offence or client in self.admission.barred:
            return
        known = self.admission.offend(client, reason)
        facts = {"offences": known.offences, "quarantined": known.quarantined}
        log.warning("offence", extra={"client": client, "reason": reason, **facts})
        if known.quarantined:
            self.relay.queues.expel(client)
        for live in list(self.live.values()) if known.quarantined else ():
            live.lose(client, "it is in quarantine")
        self.begin(self._keep(client, known))

    def begin(self, errand: Coroutine[Any, Any, None]) -> None:
        """Have something done that nobody waits for."""
        task = asyncio.create_task(errand)
        self.errands.add(task)
        task.add_done_callback(self.errands.discard)

    async def _keep(self, client: str, known: Conduct) -> None:
        try:
            await self.write(self.store.offend, client, known.reason, known.quarantined)
        except StoreUnavailable as error:
            log.warning("an offence is lost at a restart", extra={"client": client, "reason": str(error)})

    def hear(self, ref: Ref, client: str, message: bytes) -> None:
        """Take in a client's message of secure aggregation, or refuse it."""
        live = self.live.get(ref)
        if isinstance(live, SecureRound):
            live.hear(client, message)
        else:
            reason = f"{ref} is not open"
            self.refuse(client, reason, offence=False)
            log.warning("message refused", extra={"client": client, "reason": reason})

    def round_of(self, ref: Ref) -> Live:
        """Return the open round of that name.

        Raises UpdateRefused where there is none, Overloaded while its run waits, Interrupted where it is yet
        to be taken up again after a restart.
        """
        if ref not in self.live:
            if (driver := self.drivers.get(ref.run)) and driver.paused:
                raise Overloaded(f"the run is paused: {driver.run.detail}")
            if ref in self.resuming:
                raise Interrupted(f"{ref} is being taken up again; try again")
            raise UpdateRefused(f"{ref} is not open")
        return self.live[ref]

    def resumed(self, run: str) -> None:
        """Note that of a run's attempts all that go on are live."""
        self.resuming = {ref for ref in self.resuming if ref.run != run}


def check(submission: Submission) -> None:
    """Raise unless a run can work: its strategy, the bounds of its sums, and the size of its parameters.

    It blocks, for it may import plug-ins.
    """
    spec, layout = submission.spec, submission.layout
    strategy = strategy_of(spec)
    if spec.attack:
        raise SpecError("attack: attacks are for simulations; remove the table, or run `fedcore simulate`")
    check_strategy(strategy, spec)
    check_stopping(spec.evaluation, submission.metrics)
    if "auto" in (spec.encryption.updates, spec.encryption.encoding):
        raise SpecError('encryption: "auto" says nothing yet; hand the run in by `fedcore run submit`')
    check_encryption(strategy, spec)
    most = spec.cohort.asked if isinstance(strategy.mode, Synchronous) else strategy.mode.k
    clients = tuple(str(i) for i in range(most))
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
