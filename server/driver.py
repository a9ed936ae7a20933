"""One run on a coordinator: from round to round, from wherever the store says it is, to its end."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from fedcore.errors import FedcoreError
from fedcore.faults import point
from fedcore.messages import Blob, Plan, Ref, Verdict, Work
from fedcore.privacy.claims import spent
from fedcore.privacy.levels import OFF
from fedcore.server.attempts import lacking, play
from fedcore.server.buffered import Workers, workers_of
from fedcore.server.closing import close, news, participants, skip
from fedcore.server.evaluating import evaluate
from fedcore.server.gathering import Gathering
from fedcore.server.journal import Journal, Opening, remove
from fedcore.server.live import mapped
from fedcore.server.opening import Live
from fedcore.server.pausing import leave, patiently
from fedcore.server.registry import Signal
from fedcore.server.store import Committed, Known, Participant, Run
from fedcore.strategies import Strategy
from fedcore.strategies.catalog import strategy_of
from fedcore.strategies.privacy import clip_norm
from fedcore.strategies.rounds import State, cohort, initial_state, train_plan
from fedcore.strategies.samplers import Memory
from fedcore.strategies.stopping import stopped_early
from fedcore.waits import doubling

if TYPE_CHECKING:
    from fedcore.server.coordinator import Coordinator

log = logging.getLogger("fedcore.server")


class Driver:
    """One run: a loop over its rounds, from wherever the store says it is.

    committed: its rounds. rows: what is told of them, each once its evaluation is in. clients: what is known
    of every client that has ever been there for it. untold: rounds whose clients wait for their verdicts.
    """

    def __init__(
        self, coordinator: "Coordinator", run: Run, committed: list[Committed], clients: dict[str, Known]
    ) -> None:
        """Prepare; nothing moves before `start`."""
        self.coordinator, self.run, self.committed, self.clients = coordinator, run, committed, clients
        self.rows = [round.row for round in committed]
        if self.unevaluated:
            self.rows.pop()
        self.untold: list[Live] = []
        self.gathering = Gathering(coordinator.registry, run, self.say)
        self.task: asyncio.Task[None] | None = None
        self.workers: Workers | None = None  # of a run without cohorts
        self.begun = False  # whether it has none is known
        self.paused = False  # disk or database is waited for, as the run's detail says
        self.changed = Signal()

    @cached_property
    def strategy(self) -> Strategy:
        """The run's; first asked for off the loop, by `restore`, since a plug-in may have to be imported."""
        return strategy_of(self.run.spec)

    @cached_property
    def spent(self) -> list[float]:
        """The epsilon spent after each round, against the model's receiver; empty without privacy."""
        return spent(self.run.spec)

    @property
    def extra(self) -> tuple[str, ...]:
        """The vectors that are broadcast beside the model."""
        return self.strategy.algorithm.receives

    @property
    def address(self) -> str:
        """The newest parameters, with what is broadcast beside the model."""
        return self.committed[-1].parameters if self.committed else self.run.initial

    @property
    def model(self) -> Blob:
        """The newest model: the first bytes of the blob at `address`."""
        return Blob(self.committed[-1].model if self.committed else self.run.model, self.run.layout.nbytes)

    @property
    def addresses(self) -> set[str]:
        """The blobs that the run goes on from."""
        vectors = {round.vectors for round in self.committed[-1:] if round.vectors}
        return {self.address, *vectors, *(self.workers.addresses if self.workers else ())}

    @property
    def unevaluated(self) -> bool:
        """Whether the coordinator ended between a round's commit and its evaluation."""
        if self.run.state != "running" or not self.committed:
            return False
        last = self.committed[-1]
        return self.due(last.round) and last.row.keys().isdisjoint(self.run.metrics)

    def engaged(self, openings: Iterable[Opening]) -> set[str]:
        """Return who works for the run, by what its attempts asked, but for those of rounds that are over."""
        found = set[str]()
        for opening in openings:
            ref = opening.ref
            awaited = self.unevaluated if ref.kind == "evaluate" else ref.round > len(self.committed)
            if ref.run == self.run.id and (awaited or opening.parameters):
                found.update(opening.ready if self.gathering.offers else opening.cohort)
        return found

    def due(self, number: int) -> bool:
        """Whether the model of that round is to be evaluated."""
        every = self.run.spec.evaluation.every
        return number == self.run.spec.run.rounds or bool(every and number % every == 0)

    def start(self) -> None:
        """Begin or continue."""
        self.task = asyncio.create_task(self.drive(), name=self.run.id)

    async def stop(self) -> None:
        """End the run for good, keeping its committed rounds."""
        if self.task and not self.task.done():
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
            self.task = asyncio.create_task(self.end("stopped", "by an operator"))
            await self.task

    async def end(self, state: str, detail: str) -> None:
        """End the run for good, and tell the clients of a round that was under way what became of it."""

        async def ending() -> None:
            for live in self.untold:
                live.close()
            await self.reread()
            self.tell(lambda ref: ref.round <= len(self.committed))
            await self.become(state, detail)

        await patiently(self, ending)

    async def reread(self) -> None:
        """Learn from the store how far the run is: a commit may have been under way at its end."""
        store, blobs, write = self.coordinator.store, self.coordinator.blobs, self.coordinator.write
        self.committed = await write(store.rounds, self.run.id)
        self.clients = await write(store.clients, self.run.id)
        self.rows = [round.row for round in self.committed]
        # Behind the close of a round that nobody waits for any more, and which would leave its blobs.
        await self.coordinator.calculate(blobs.keep, self.run.id, self.addresses)

    def tell(self, counts: Callable[[Ref], bool]) -> None:
        """Announce the verdicts of the rounds that are over."""
        for live in self.untold:
            live.announce(counts(live.plan.ref))
        self.untold.clear()
        point("verdicts.told")

    def verdict(self, ref: Ref, client: str) -> Verdict | None:
        """Return what became of a client's training, by the committed rounds; None while it is open."""
        known = self.clients.get(client, Known())
        if (known.round, known.attempt) == (ref.round, ref.attempt):
            return Verdict("folded")
        if self.run.state == "running":
            awaited = self.workers.awaits(ref, client) if self.workers else ref.round > len(self.committed)
            if awaited or not self.begun:
                return None
        return Verdict("late")

    async def pause(self, reason: str, seconds: float) -> None:
        """Leave what is under way as it is on the disk, and wait."""
        self.say(reason, paused=True)
        for live in self.untold:
            await leave(live)
        self.untold.clear()
        await asyncio.sleep(seconds)

    async def become(self, state: str, detail: str = "") -> None:
        """Record and announce the run's state."""
        await self.coordinator.write(self.coordinator.store.set_state, self.run.id, state, detail)
        await self.coordinator.calculate(self.coordinator.journals.clear, self.run.id)
        self.coordinator.registry.release(self.run.id)
        self.coordinator.resumed(self.run.id)
        self.run, self.paused = replace(self.run, state=state, detail=detail), False
        log.info("run %s", state, extra={"run": self.run.id, "detail": detail})
        self.changed.send()
        if self.workers:
            self.workers.dismiss()
            await self.tidy()

    def say(self, detail: str, paused: bool = False) -> None:
        """Announce what the run waits for, without recording it."""
        if (detail, paused) != (self.run.detail, self.paused):
            self.run, self.paused = replace(self.run, detail=detail), paused
            self.changed.send()

    async def drive(self) -> None:
        """Run all rounds that are left; trouble with disk or database is waited out."""
        try:
            await patiently(self, self.rounds)
        except FedcoreError as error:
            await self.end("failed", str(error))
        except Exception as error:
            log.exception("run failed", extra={"run": self.run.id})
            await self.end("failed", f"{type(error).__name__}: {error}; the coordinator's log has more")

    async def rounds(self) -> None:
        """Run all rounds that are left, from wherever the store says the run is."""
        self.workers, self.begun = await self.coordinator.calculate(workers_of, self), True
        await self.reread()
        state = await self.coordinator.calculate(self.restore)
        openings = await self.coordinator.calculate(self.coordinator.journals.openings)
        begun = {opening.ref for opening in openings if opening.ref.run == self.run.id}
        self.coordinator.resuming |= begun
        await self.gathering.regain(self.engaged(openings))
        further = any(ref.kind == "train" and ref.round > state.round for ref in begun)
        spec, ending = self.run.spec, ""
        try:
            if self.workers:
                await self.workers.resume(state)
                self.coordinator.resumed(self.run.id)
            if self.unevaluated and not further:  # otherwise its evaluation came to nothing
                self.rows.pop()
                await self.conclude(state.round)
            while state.round < spec.run.rounds and not (ending := stopped_early(spec.evaluation, self.rows)):
                state = await (self.workers.step(state) if self.workers else self.train(state))
                await self.conclude(state.round)
        finally:
            if self.workers:
                await self.workers.leave()
        await self.become("finished", ending)

    def restore(self) -> State:
        """Return the state that the last committed round left."""
        blobs = self.coordinator.blobs
        for address in self.addresses:
            blobs.verify(address)
        _ = self.spent  # here rather than amid the first round: an accountant takes a second to begin
        parameters = blobs.parameters(self.address, self.run.layout, self.extra)
        if not self.committed:
            return initial_state(self.strategy, parameters, lambda _, *what: mapped(blobs.folder, *what))
        last = self.committed[-1]
        memory = {client: known.memory for client, known in self.clients.items() if known.memory}
        return State(last.round, parameters, blobs.load_state(last.vectors), memory)

    async def train(self, state: State) -> State:
        """Play one round until it succeeds or has to be skipped, commit it, and tell its clients."""
        started, ref, certificate = time.perf_counter(), Ref(self.run.id, state.round + 1, 0, "train"), b""
        journal = await self.resumed(ref.round, "train")
        beside = await self.resumed(ref.round, "root") if self.rooted else None
        while True:
            if journal:
                ref, certificate = journal.opening.ref, journal.opening.certificate
            # The end may have come between the two, or between the removals of an earlier attempt's.
            if journal and (not self.rooted or (beside and beside.opening.ref.attempt == ref.attempt)):
                ready, clients = journal.opening.ready, journal.opening.cohort
                trusted = beside.opening.cohort if beside else ()
            else:
                journal = beside = None
                ready, trusted = map(tuple, await self.gather(self.rooted))
                clients = self.cohort(ref, ready, state.memory)
            work = [(self.plan(ref, clients, ready, state), journal)]
            if self.rooted:
                root_ref = replace(ref, kind="root")
                work.append((replace(work[0][0], ref=root_ref, cohort=trusted, goal=1, minimum=1), beside))
            live, *root = await play(self, ready, *work, certificate=certificate)
            self.coordinator.resumed(self.run.id)
            point("round.closed")
            lacks = lacking(live, *root)
            if lacks:  # clients may have found the blob's bytes wrong
                await self.coordinator.calculate(self.coordinator.blobs.verify, self.address)
            if lacks and (live.certificate or not live.spent):
                self.tell(lambda _: False)
                certificate += live.certificate
                ref, journal, beside = replace(ref, attempt=ref.attempt + 1), None, None
                self.say(f"round {ref.round}: attempt {ref.attempt} had {lacks}")
                await asyncio.sleep(back_off(ref.attempt))
                continue
            what = (skip, self, live, state) if lacks else (close, self, live.round, state)
            rest = () if lacks else tuple(trusted.round for trusted in root)
            state, committed = await self.coordinator.calculate(*what, *rest)
            # A private round takes its deadline; how much longer would tell how many updates were added.
            seconds = live.plan.deadline if live.plan.timed else time.perf_counter() - started
            known = news(self.clients, dict.fromkeys(live.round.folded, ref), state.memory, ready)
            await self.commit(committed, known, participants(live, *root), seconds)
            self.tell(lambda _: True)
            await self.tidy(live, *root)
            return state

    async def commit(
        self,
        committed: Committed,
        known: Mapping[str, Known],
        participants: Sequence[Participant],
        seconds: float,
    ) -> None:
        """Record a round for good, with what is new of clients; its clients are told next, then `tidy`."""
        if self.spent:
            committed.row["epsilon"] = self.spent[committed.round - 1]
        committed.row["seconds"] = seconds
        write, store = self.coordinator.write, self.coordinator.store
        point("round.commit.before")
        await write(store.commit_round, self.run.id, committed, known, participants)
        point("round.commit.after")
        self.committed.append(committed)
        self.clients.update(known)
        log.info("round committed", extra={"run": self.run.id, **committed.row})

    async def tidy(self, *lives: Live) -> None:
        """Let go of what a round has replaced, and of the files of attempts that are over."""
        folders, keep = [live.journal.folder for live in lives], self.coordinator.blobs.keep

        def tidy(addresses: set[str]) -> None:
            keep(self.run.id, addresses)
            for folder in folders:
                remove(folder)

        await self.coordinator.calculate(tidy, self.addresses)

    async def resumed(self, round: int, kind: Work) -> Journal | None:
        """Return the attempt at a piece of work that was under way when the coordinator ended, if any was."""
        return await self.coordinator.calculate(self.coordinator.journals.resume, self.run.id, round, kind)

    def plan(self, ref: Ref, clients: tuple[str, ...], ready: Sequence[str], state: State) -> Plan:
        """Plan a round of training for a cohort that was drawn among those who were ready."""
        population = len(self.clients.keys() | set(ready))
        clip = clip_norm(self.strategy.privacy, state.vectors)
        return train_plan(self.strategy, self.run.spec, self.run.layout, ref, clients, population, clip)

    def cohort(self, ref: Ref, ready: Sequence[str], memory: Memory) -> tuple[str, ...]:
        """Draw a cohort; a private one by the operating system's randomness, since who is in it is secret."""
        spec, entropy = self.run.spec, self.entropy()
        return cohort(self.strategy, spec, ref, ready, spec.cohort.asked, memory, entropy)

    def entropy(self) -> int | None:
        """Return 256 new bits that nothing else knows or keeps; None where the run promises no privacy."""
        return None if self.strategy.privacy == OFF else secrets.randbits(256)

    async def conclude(self, number: int) -> None:
        """Evaluate a committed round if it is time, and tell of it."""
        if self.due(number):
            await evaluate(self, number)
        self.rows.append(self.committed[-1].row)
        self.changed.send()

    @property
    def rooted(self) -> bool:
        """Whether a round needs an update from data that the server trusts, which an evaluator holds."""
        return self.strategy.aggregator.anchor == "root"

    async def gather(self, rooted: bool = False, apart: Collection[str] = ()) -> tuple[list[str], list[str]]:
        """Wait for the clients of a round, and for an evaluator where it is rooted; return both."""
        spec = self.run.spec.cohort
        return await self.gathering.gather(spec.asked, spec.fewest, rooted, apart)


def back_off(attempt: int) -> float:
    """Return the seconds before another attempt, from 1, at a round: they double, up to half a minute."""
    return doubling(attempt, 0.1, 30.0)
