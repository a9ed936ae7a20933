"""The agent on a device: connects, judges what is asked, reserves its privacy budget, has it done, sends it.

It never imports torch.
"""

import asyncio
import json
import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from hashlib import sha256

from fedcore.client.config import Config, Encryption
from fedcore.client.connection import Connection
from fedcore.client.hosting import Hosting
from fedcore.client.kept import KeptStates
from fedcore.client.ledger import keep_showing, open_ledger, show
from fedcore.client.policy import Policy, encryption_of
from fedcore.client.process import WorkerProcess, WorkFailed
from fedcore.client.secure import Aggregation
from fedcore.client.session import ConnectionLost, Session
from fedcore.client.state import Finished, State
from fedcore.client.transfers import Transfers
from fedcore.crypto.identity import Identity, utc_now
from fedcore.crypto.secagg import Aborted
from fedcore.errors import AuthenticationError, FedcoreError
from fedcore.faults import point
from fedcore.messages import (
    Accept,
    Assignment,
    Blob,
    Decline,
    Hello,
    Outcome,
    Pause,
    Ref,
    Secure,
    UploadHead,
)
from fedcore.privacy.account import Claim
from fedcore.privacy.ledger import Ledger, LedgerRefused
from fedcore.wire import sealing
from fedcore.wire.chunks import reuse_buffers
from fedcore.wire.renewal import keep_renewed

log = logging.getLogger("fedcore.client")

GRACE = 5.0  # seconds that an upload gets to come to its end when the agent stops
GOODBYE = 2.0  # seconds that the coordinator gets to hear of it
STOPPING = "the device is shutting down"


class Agent:
    """One device in a federation, from its start to its stop. It does one piece of work at a time."""

    def __init__(self, config: Config, identity: Identity) -> None:
        """Use a folder whose state is locked by the caller; raises as `Hosting` does."""
        self.config, self.identity = config, identity
        self.state, self.kept = State(config.state), KeptStates(config.state / "kept")
        self.worker = WorkerProcess(config.folder, config.settings.tasks, config.settings.worker.memory)
        self.hosting = Hosting(config, identity.name.name)
        self.connection = Connection(self.state.tell)
        self.instance, self.stopping = secrets.randbits(63), False
        self.ledger: Ledger | None = None
        self.reserved = asyncio.Event()  # since the authority was last shown the ledger
        self.assignment: Assignment | None = None
        self.task: asyncio.Task[None] | None = None
        self.aggregation = Aggregation(
            self.state, config.settings.policy, identity, lambda message: self.session.tell(message)
        )
        self.considering: set[asyncio.Task[None]] = set()  # of offers; it goes on beside the work
        self.turn = asyncio.Lock()  # one offer at a time, so that many leave threads and ledger to the work

    async def run(self) -> None:
        """Serve the coordinator until cancelled or left; a lost connection is sought again, for ever.

        Raises WorkFailed where the tasks of agent.toml cannot be imported, AuthenticationError where the
        coordinator turns this identity away or its certificate has expired, ProtocolError where it speaks
        another version, ConfigError for an app that cannot be imported, and ConfigError and LedgerDamaged
        for a ledger that cannot be used.
        """
        beside: list[asyncio.Task[None]] = []
        try:
            await asyncio.to_thread(self.state.check_cache)
            self.ledger = await asyncio.to_thread(open_ledger, self.config)
            if self.ledger:
                # Before any work, because an old copy is put back while no agent runs.
                if not await show(self.ledger, self.identity):
                    self.reserved.set()
                showing = keep_showing(self.ledger, lambda: self.identity, self.reserved)
                beside.append(asyncio.create_task(showing))
            digests = await self.worker.describe() if self.config.settings.tasks else {}
            self.policy = Policy(self.config, digests)
            await self.hosting.describe()
            async with Session(self.config.settings.coordinator, self.identity) as self.session:
                self.transfers = Transfers(self.session, self.state, self.connection)
                renewing = keep_renewed(self.state.identity, self.identity, self._renewed)
                beside.append(asyncio.create_task(renewing))
                if self.hosting.hosts:
                    beside.append(asyncio.create_task(self.hosting.run(self.transfers)))
                await self._stay_connected()
        finally:
            for task in (*beside, *self.considering):
                task.cancel()
            await self._abandon()
            await self.hosting.stop()
            await self.worker.stop()

    def _hello(self) -> Hello:
        settings, waiting = self.config.settings, self.kept.waiting()
        return Hello(self.policy.digests, settings.evaluator, waiting, self.instance, settings.labels)

    async def _renewed(self, identity: Identity) -> None:
        self.identity = identity
        await self.session.renew(identity, self._hello())

    async def leave(self) -> None:
        """End the work in progress so that nobody waits for it, and the stream once that is told.

        A finished update that is on its way gets `GRACE` seconds; anything else is declined.
        """
        self.stopping = True
        if self.task and self.assignment and not self.task.done():
            if self.transfers.sending:
                log.info("waiting for an upload", extra={"ref": self.assignment.ref, "seconds": GRACE})
                await asyncio.wait([self.task], timeout=GRACE)
            if not self.task.done():
                attempt = self.aggregation.at(self.assignment.ref)
                masked = attempt is not None and attempt.handed_over and not self.transfers.sending
                await self._end()
                if not masked:  # such words are with the coordinator, and count without this device
                    self._decline(self.assignment.ref, STOPPING, STOPPING)
        if self.connection.made is not None:
            self.session.leave()

    async def _stay_connected(self) -> None:
        while not self.stopping:
            reason = "the coordinator asked for a pause"
            try:
                async with aclosing(self.session.messages(self._hello())) as messages:
                    async for message in messages:
                        if isinstance(message, Pause):
                            self.connection.rest(message.seconds)
                            break
                        await self._hear(message)
            except ConnectionLost as error:
                if utc_now() >= self.identity.not_after:
                    expired = f"the certificate expired at {self.identity.not_after:%Y-%m-%d %H:%M} UTC"
                    raise AuthenticationError(
                        f"{expired}; enrol again with 'fedcore client enroll'"
                    ) from error
                reason = str(error)
            if not self.stopping:
                await asyncio.sleep(self.connection.lose(reason))

    async def _hear(self, message: Assignment | Outcome | Secure | None) -> None:
        match message:
            case Secure(ref, content):
                if attempt := self.aggregation.at(ref):
                    attempt.hear(content)
                elif not self.stopping:  # otherwise `leave` says why
                    reason = "this agent has no keys for it: it was started again, or has left the attempt"
                    self._decline(ref, reason, reason)
            case Assignment(ref) if ref.kind == "offer":
                considering = asyncio.create_task(self._fulfil(message, self._accept))
                self.considering.add(considering)
                considering.add_done_callback(self.considering.discard)
            case Assignment():
                await self._begin(message)
            case Outcome(ref, verdict):
                log.info(verdict.status, extra={"ref": ref, "reason": verdict.reason})
                point("agent.verdict.before")
                if self.aggregation.at(ref):  # nobody needs its answers any more
                    await self._end()
                self.state.record(ref, verdict.status, verdict.reason)
                # The update goes first: one that is sent again needs what it would have kept beside it.
                self.state.drop(ref)
                await asyncio.to_thread(self.kept.settle, ref, verdict.status == "folded")
                point("agent.verdict.after")
            case None:
                self.connection.welcome(self.config.settings.coordinator)

    async def _begin(self, assignment: Assignment) -> None:
        """Start work. Newer work replaces older; the same again, after a reconnect, goes on."""
        busy, before = self.task is not None and not self.task.done(), self.assignment
        if busy and before and (before.ref, before.key) == (assignment.ref, assignment.key):
            if attempt := self.aggregation.at(assignment.ref):
                attempt.repeat()
            return
        await self._abandon()
        self.assignment = assignment
        self.task = asyncio.create_task(self._fulfil(assignment, self._do), name=str(assignment.ref))

    async def _abandon(self) -> None:
        """End the work in progress; training that is not finished ends with its process."""
        if self.task and not self.task.done():
            log.warning("work abandoned", extra={"ref": self.task.get_name()})
            await self._end()

    async def _end(self) -> None:
        if self.task:
            self.task.cancel()
            await asyncio.wait([self.task])

    async def _fulfil(
        self, assignment: Assignment, do: Callable[[Assignment, float], Awaitable[None]]
    ) -> None:
        """Do what is asked until its deadline or decline it; what fails here never ends the agent."""
        try:
            if self.stopping:
                raise WorkFailed(STOPPING)
            self.policy.judge(assignment)
            await do(assignment, time.monotonic() + assignment.deadline)
        except (WorkFailed, LedgerRefused) as error:
            self._decline(assignment.ref, error.public, str(error))
        except Aborted as error:
            self._decline(assignment.ref, str(error), str(error), "aborted")
        except FedcoreError as error:
            self._decline(assignment.ref, str(error), str(error))
        except Exception as error:
            log.exception("work failed", extra={"ref": assignment.ref})
            self._decline(assignment.ref, f"the agent failed: {type(error).__name__}", str(error))

    def _decline(self, ref: Ref, public: str, reason: str, event: str = "declined") -> None:
        log.warning(event, extra={"ref": ref, "reason": reason})
        self.state.record(ref, event, reason)
        self.session.tell(Decline(ref, public))

    async def _accept(self, offer: Assignment, deadline: float) -> None:
        """Reserve what a run may cost the data, drawn or not, and take part in it."""
        async with self.turn:
            claim = await self._claim(offer)
            if claim and self.ledger:
                await self._reserve(self.ledger, claim)
        self.state.record(offer.ref, "accepted")
        self.session.tell(Accept(offer.ref))

    async def _do(self, assignment: Assignment, deadline: float) -> None:
        """Fetch the parameters, train, and send the update; an update that is finished is only sent."""
        ref, claim = assignment.ref, await self._claim(assignment)
        encryption, key = self._encryption(assignment), ""
        if encryption == "sealed":
            announced = await asyncio.to_thread(sealing.announced, assignment.key, ref, self.identity)
            key = announced.hex()
        if encryption == "secagg":
            self.aggregation.admit(assignment)
        self.state.drop_others(ref)
        update = await asyncio.to_thread(self._resumed, assignment)
        terms, again = self._terms(assignment, encryption, key), True
        if update and update.terms != terms:  # what was made on others stays here
            self.state.drop(ref)
            update = None
        if update is None:
            self.policy.admit(assignment)
            if claim and self.ledger:  # a refusal should cost no download, and a lost download no budget
                await asyncio.to_thread(self.ledger.judge, claim)
            await self.transfers.fetch(assignment.parameters, deadline, assignment.content)
            await asyncio.to_thread(self.policy.begin, assignment)
            if claim and self.ledger:
                await self._reserve(self.ledger, claim)
            head, words = await self._train(assignment, encryption, key, deadline)
            update = Finished(head, terms, words)
            self.state.spool(update)
            point("agent.spooled")
            self.kept.trim()
            again = False
        if encryption == "secagg":
            send = partial(self.transfers.send, deadline=deadline)
            await self.aggregation.take_part(assignment, self.identity, update.words, send, deadline)
        else:
            await self.transfers.send(update.head, deadline, again)

    def _resumed(self, assignment: Assignment) -> Finished | None:
        """Settle what is pending of work before this, and return its update if it is finished; it blocks."""
        self.kept.begin(assignment.ref, assignment.folded)
        return self.state.spooled(assignment.ref)

    def _encryption(self, assignment: Assignment) -> Encryption:
        """Return how this update travels; the operator's own data have no cohort to hide in."""
        encryption = encryption_of(assignment.spec)
        return "tls" if encryption == "secagg" and self.config.settings.evaluator else encryption

    def _terms(self, work: Assignment, encryption: Encryption, key: str) -> str:
        """Return a digest of all that an update follows from, and of the way on which alone it may leave."""
        spec, asked = work.spec.model_dump_json(), work.cohort if encryption == "secagg" else 0
        what = [work.task, work.digest, work.layout, work.parameters.sha256, work.clip, spec]
        how = [self.config.settings.evaluator, encryption, key, asked]
        return sha256(json.dumps([what, how]).encode()).hexdigest()

    async def _claim(self, work: Assignment) -> Claim | None:
        """Return what work would do to the data set, counted off the loop; refuses as the policy does."""
        if not self.ledger:
            return None
        return await asyncio.to_thread(self.policy.claim, work, self.identity.name)

    async def _reserve(self, ledger: Ledger, claim: Claim) -> None:
        """Reserve what the work costs; each start of training anew, whatever became of the last one."""
        started = time.perf_counter()
        entry = await asyncio.to_thread(ledger.reserve, claim)
        point("agent.reserved")
        self.reserved.set()
        facts = {"ref": claim.ref, "row": entry.sequence, "spent": round(entry.spent, 4)}
        log.info("budget reserved", extra={**facts, "seconds": round(time.perf_counter() - started, 6)})

    async def _train(
        self, assignment: Assignment, encryption: Encryption, key: str, deadline: float
    ) -> tuple[UploadHead, tuple[int, ...]]:
        name = self.identity.name
        ref, settings = assignment.ref, self.config.settings
        started = time.perf_counter()
        done = await self.worker.work(
            deadline - time.monotonic(),
            task=assignment.task,
            digest=assignment.digest,
            spec=assignment.spec.travels(),
            layout=assignment.layout,
            ref=[ref.run, ref.round, ref.attempt, ref.kind],
            client=name.name,
            options=settings.data,
            evaluator=settings.evaluator,
            parameters=str(self.state.blob(assignment.parameters.sha256)),
            kept=str(self.kept.current(ref.run)),
            keep=str(self.kept.pending(ref)),
            out=str(self.state.payload(ref)),
            clip=assignment.clip,
            cohort=assignment.cohort,
            encryption=encryption,
            public=key,
            bound=sealing.binding(name.federation, ref, name.name, assignment.layout).hex(),
        )
        log.info("work done", extra={"ref": ref, "seconds": round(time.perf_counter() - started, 6)})
        vectors = tuple((name, length) for name, length in done["vectors"])
        head = UploadHead(ref, done["scalars"], vectors, Blob(done["sha256"], done["size"]))
        return head, tuple(done["words"])


async def serve(agent: Agent) -> None:
    """Run an agent until SIGTERM or Ctrl-C, which have it leave; a second one ends it at once."""
    reuse_buffers()
    running = asyncio.create_task(agent.run())
    stopping = list[asyncio.Task[None]]()

    async def leave() -> None:
        await agent.leave()
        await asyncio.wait([running], timeout=GOODBYE if agent.connection.made is not None else 0.0)
        running.cancel()

    def stop() -> None:
        if stopping:
            running.cancel()
        stopping.append(asyncio.create_task(leave()))

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    with suppress(asyncio.CancelledError):
        await running
    log.info("stopped")
