"""One run on a coordinator: from round to round, from wherever the store says it is, to its end."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from fedcore.errors import FedcoreError
from fedcore.messages import Assignment, Blob, Plan, Ref, Verdict, Work
from fedcore.privacy.claims import spent
from fedcore.privacy.levels import OFF, ClientLevel
from fedcore.server.journal import Journal, Opening
from fedcore.server.live import GRACE
from fedcore.server.offers import Offers
from fedcore.server.opening import Assign, Live, open_round
from fedcore.server.registry import Signal
from fedcore.server.store import Committed, Known, Run
from fedcore.strategies import Strategy
from fedcore.strategies.catalog import strategy_of
from fedcore.strategies.privacy import clip_norm
from fedcore.strategies.rounds import (
    State,
    advance,
    cohort,
    evaluate_plan,
    initial_state,
    metrics,
    tally,
    train_plan,
)
from fedcore.strategies.samplers import Memory

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
        drawn = isinstance(run.spec.privacy, ClientLevel)  # from those who have accepted the run
        self.offers = Offers(coordinator.registry) if drawn else None
        self.task: asyncio.Task[None] | None = None
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
    def unevaluated(self) -> bool:
        """Whether the coordinator ended between a round's commit and its evaluation."""
        if self.run.state != "running" or not self.committed:
            return False
        last = self.committed[-1]
        return self.due(last.round) and last.row.keys().isdisjoint(self.run.metrics)

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
            await self.break_off()
            await self.become("stopped", "by an operator")

    async def break_off(self) -> None:
        """Tell the clients of a round that was under way what became of it."""
        coordinator = self.coordinator
        for live in self.untold:
            live.close()
        # A commit may have been under way too: the store knows.
        self.committed = await coordinator.write(coordinator.store.rounds, self.run.id)
        self.clients = await coordinator.write(coordinator.store.clients, self.run.id)
        self.rows = [round.row for round in self.committed]
        self.tell(lambda ref: ref.round <= len(self.committed))

    def tell(self, counts: Callable[[Ref], bool]) -> None:
        """Announce the verdicts of the rounds that are over."""
        for live in self.untold:
            live.announce(counts(live.plan.ref))
        self.untold.clear()

    def verdict(self, ref: Ref, client: str) -> Verdict | None:
        """Return what became of a client's training, by the committed rounds; None while it is open."""
        known = self.clients.get(client, Known())
        if (known.round, known.attempt) == (ref.round, ref.attempt):
            return Verdict("folded")
        over = ref.round <= len(self.committed) or self.run.state != "running"
        return Verdict("late") if over else None

    async def become(self, state: str, detail: str = "") -> None:
        """Record and announce the run's state."""
        await self.coordinator.write(self.coordinator.store.set_state, self.run.id, state, detail)
        await self.coordinator.calculate(self.coordinator.journals.clear, self.run.id)
        self.run = replace(self.run, state=state, detail=detail)
        log.info("run %s", state, extra={"run": self.run.id, "detail": detail})
        self.changed.send()

    def say(self, detail: str) -> None:
        """Announce what the run waits for, without recording it."""
        if detail != self.run.detail:
            self.run = replace(self.run, detail=detail)
            self.changed.send()

    async def drive(self) -> None:
        """Run all rounds that are left."""
        try:
            state = await self.coordinator.calculate(self.restore)
            if self.unevaluated:
                await self.conclude(state.round)
            while state.round < self.run.spec.run.rounds:
                state = await self.train(state)
                await self.conclude(state.round)
            await self.become("finished")
        except FedcoreError as error:
            await self.break_off()
            await self.become("failed", str(error))
        except Exception as error:
            log.exception("run failed", extra={"run": self.run.id})
            await self.break_off()
            await self.become("failed", f"{type(error).__name__}: {error}; the coordinator's log has more")

    def restore(self) -> State:
        """Return the state that the last committed round left."""
        blobs = self.coordinator.blobs
        _ = self.spent  # here rather than amid the first round: an accountant takes a second to begin
        parameters = blobs.parameters(self.address, self.run.layout, self.extra)
        if not self.committed:
            return initial_state(self.strategy, parameters)
        last = self.committed[-1]
        memory = {client: known.memory for client, known in self.clients.items() if known.memory}
        return State(last.round, parameters, blobs.load_state(last.vectors), memory)

    async def train(self, state: State) -> State:
        """Play one round until it succeeds or has to be skipped, commit it, and tell its clients."""
        started, ref, certificate = time.perf_counter(), Ref(self.run.id, state.round + 1, 0, "train"), b""
        journal = await self.resumed(ref.round, "train")
        while True:
            if journal:
                ref, certificate = journal.opening.ref, journal.opening.certificate
                ready: Sequence[str] = journal.opening.ready
                plans = [self.plan(ref, journal.opening.cohort, ready, state)]
            else:
                ready = await self.gather()
                plans = self.plans(ref, ready, state)
            live, *root = await self.play(ready, *plans, journal=journal, certificate=certificate)
            lacks = self.lacks(live, *root)
            if lacks and (live.certificate or not live.spent):
                self.tell(lambda _: False)
                certificate += live.certificate
                ref, journal = replace(ref, attempt=ref.attempt + 1), None
                self.say(f"round {ref.round}: attempt {ref.attempt} had {lacks}")
                await asyncio.sleep(min(30.0, 0.1 * 2**ref.attempt))
                continue
            finish = self.skip if lacks else self.close
            state, committed, news = await self.coordinator.calculate(finish, live, root, state, ready)
            # A private round takes its deadline; how much longer would tell how many updates were added.
            seconds = time.perf_counter() - started
            if self.spent:
                committed.row["epsilon"] = self.spent[state.round - 1]
            committed.row["seconds"] = live.plan.deadline if live.plan.timed else seconds
            await self.coordinator.write(self.commit, committed, news)
            self.committed.append(committed)
            self.clients.update(news)
            self.tell(lambda _: True)
            log.info("round committed", extra={"run": self.run.id, **committed.row})
            return state

    async def resumed(self, round: int, kind: Work) -> Journal | None:
        """Return the attempt at secure aggregation that was under way when the coordinator ended, if any."""
        if self.run.spec.encryption.updates != "secagg":
            return None
        return await self.coordinator.calculate(self.coordinator.journals.resume, self.run.id, round, kind)

    def plans(self, ref: Ref, ready: Sequence[str], state: State) -> list[Plan]:
        """Plan a round of training, and beside it, where the aggregator asks, one on the evaluator's data."""
        plan = self.plan(ref, self.cohort(ref, ready, state.memory), ready, state)
        if not self.rooted:
            return [plan]
        root, trusted = replace(ref, kind="root"), tuple(self.evaluators()[:1])
        return [plan, replace(plan, ref=root, cohort=trusted, goal=1, minimum=1)]

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

    def lacks(self, live: Live, *root: Live) -> str:
        """Return what an attempt lacks to make a round, "" where it lacks nothing."""
        if live.lacks:
            return live.lacks
        said = [verdict.reason for trusted in root for verdict in trusted.round.verdicts.values()]
        enough = all(trusted.round.sufficient for trusted in root)
        return "" if enough else f"no update from the evaluator: {said[0] or 'it was late'}"

    def close(
        self, live: Live, root: list[Live], state: State, ready: Sequence[str]
    ) -> tuple[State, Committed, dict[str, Known]]:
        """Aggregate a closed round into a new parameter blob (on the compute thread)."""
        blobs, spec = self.coordinator.blobs, self.run.spec
        if root:
            live.round.root = root[0].round.rows.packed()["delta"][0]
        path, draft = blobs.draft(self.address, self.run.layout, self.extra)
        after = advance(self.strategy, live.round, state, spec.run.seed, lambda _: draft, self.entropy())
        model = draft.digest if self.extra else ""
        blob = blobs.adopt(path)
        vectors = blobs.save_state(after.vectors)
        row = {"round": after.round, **tally(live.round)}
        committed = Committed(after.round, blob.sha256, model or blob.sha256, vectors, row)
        return after, committed, self.news(live, after.memory, ready)

    def skip(
        self, live: Live, root: list[Live], state: State, ready: Sequence[str]
    ) -> tuple[State, Committed, dict[str, Known]]:
        """Leave out a round that clients would not enter again: the model stays (on the compute thread)."""
        blobs, number = self.coordinator.blobs, state.round + 1
        blobs.hold(self.address)
        refused = sum(verdict.status == "refused" for verdict in live.round.verdicts.values())
        row: dict[str, float] = {"round": number, "skipped": 1, "folded": 0, "refused": refused}
        vectors = blobs.save_state(state.vectors)
        committed = Committed(number, self.address, self.model.sha256, vectors, row)
        log.warning("round skipped", extra={"ref": live.plan.ref, "reason": live.lacks})
        return replace(state, round=number), committed, self.news(live, state.memory, ready)

    def news(self, live: Live, memory: Memory, ready: Sequence[str]) -> dict[str, Known]:
        """Return what a round changes in what is known of clients."""
        ref, folded, news = live.plan.ref, set(live.round.folded), dict[str, Known]()
        for client in self.clients.keys() | set(ready):
            before = self.clients.get(client, Known())
            last = (ref.round, ref.attempt) if client in folded else (before.round, before.attempt)
            after = Known(*last, memory.get(client, {}))
            if client not in self.clients or after != before:
                news[client] = after
        return news

    def commit(self, committed: Committed, news: Mapping[str, Known]) -> None:
        """Record a round, then let go of what it replaces (on the writer thread)."""
        before = [self.address, *(round.vectors for round in self.committed[-1:] if round.vectors)]
        self.coordinator.store.commit_round(self.run.id, committed, news)
        for address in before:
            self.coordinator.blobs.release(address)

    async def conclude(self, number: int) -> None:
        """Evaluate a committed round if it is time, and tell of it."""
        if self.due(number):
            await self.evaluate(number)
        self.rows.append(self.committed[-1].row)
        self.changed.send()

    async def evaluate(self, number: int) -> None:
        """Test the new model where the spec says."""
        spec, ref = self.run.spec, Ref(self.run.id, number, 0, "evaluate")
        journal = await self.resumed(number, "evaluate")
        if spec.evaluation.where == "holdout":
            ready: Sequence[str] = self.evaluators()[:1]
            clients = tuple(ready)
        elif journal:
            clients, ready = journal.opening.cohort, journal.opening.ready
        else:
            ready = await self.gather()
            clients = self.cohort(ref, ready, {})
        secret = self.offers and spec.evaluation.where == "clients"
        if not clients and not secret:  # a secret cohort may be empty, and nobody may know
            log.warning("no evaluator is connected; this round is not evaluated", extra={"ref": ref})
            return
        (live,) = await self.play(ready, evaluate_plan(spec, ref, clients, self.run.metrics), journal=journal)
        self.tell(lambda _: True)
        if live.lacks:
            log.warning("this round is not evaluated", extra={"ref": ref, "reason": live.lacks})
            return
        privacy = OFF if spec.evaluation.where == "holdout" else self.strategy.privacy
        means = metrics(live.round, privacy, self.entropy())
        await self.coordinator.write(self.coordinator.store.add_metrics, self.run.id, number, means)
        self.committed[-1].row.update(means)

    async def play(
        self, ready: Sequence[str], *plans: Plan, journal: Journal | None = None, certificate: bytes = b""
    ) -> list[Live]:
        """Play one attempt from assignments to close; more than one plan goes on side by side.

        ready: those among whom a cohort was drawn. One that is secret keeps all of them from other runs,
        which would otherwise see, by whom they can have, who is in it. journal, certificate: of secure
        aggregation, an attempt to go on with, and why another one may follow those before.
        """
        coordinator, ref = self.coordinator, plans[0].ref
        cohorts = [client for plan in plans for client in plan.cohort]
        # Before anything is awaited: until now, the clients were free for every run.
        coordinator.registry.lease(ref.run, ready if plans[0].timed else cohorts)
        self.say(f"round {ref.round}: {ref.kind} with {_size(plans[0])} clients")
        try:
            return await asyncio.gather(*(self._play(plan, ready, journal, certificate) for plan in plans))
        finally:
            coordinator.registry.release(ref.run)

    async def _play(
        self, plan: Plan, ready: Sequence[str], journal: Journal | None, certificate: bytes
    ) -> Live:
        coordinator, assign = self.coordinator, self.assignment(plan)
        opening = Opening(plan.ref, plan.cohort, tuple(ready), certificate)
        live = await coordinator.calculate(open_round, coordinator, self.run, plan, assign, opening, journal)
        self.untold.append(live)
        coordinator.live[plan.ref] = live
        try:
            await live.play()
        finally:
            del coordinator.live[plan.ref]
        return live

    def assignment(self, plan: Plan) -> Assign:
        """Return what makes a client's assignment of the plan, given the seconds that are left."""
        run, blob = self.run, Blob(self.address, self.run.layout.blob_size(self.extra))

        def make(client: str, left: float) -> Assignment:
            known = self.clients.get(client, Known())
            folded = Ref(run.id, known.round, known.attempt, "train") if known.round else None
            what, size = (run.task, run.digest, run.spec, run.layout.digest, blob), _size(plan)
            return Assignment(plan.ref, *what, size, left, folded, plan.clip)

        return make

    def offer(self) -> Assignment:
        """Return the question whether a device takes part in the run, at the price of all its rounds."""
        spec, ref = self.run.spec.cohort, Ref(self.run.id, 1, 0, "offer")
        plan = Plan(ref, (), 0, 0, spec.deadline, {}, {}, expected=float(spec.size), timed=True)
        return self.assignment(plan)("", spec.deadline)

    @property
    def rooted(self) -> bool:
        """Whether a round needs an update from data that the server trusts, which an evaluator holds."""
        return self.strategy.aggregator.anchor == "root"

    def evaluators(self) -> list[str]:
        """Return the evaluators that are free for this run, by name."""
        return self.coordinator.registry.eligible(self.run.id, self.run.task, self.run.digest, evaluator=True)

    async def gather(self) -> list[str]:
        """Wait for enough clients and return all that are eligible, by name.

        Enough are as many as a round asks, once all have answered that were offered the run; or the minimum,
        once nobody has come, gone or answered for a tenth of the deadline. An evaluator is waited for where
        rounds need one.
        """
        spec, registry, task = self.run.spec.cohort, self.coordinator.registry, self.run.task
        while True:
            changed = registry.changed.next
            ready = registry.eligible(self.run.id, task, self.run.digest)
            quiet, asking = registry.quiet, False
            if self.offers:
                ready = self.offers.willing(ready, self.offer())
                quiet, asking = min(quiet, self.offers.quiet), bool(self.offers.open)
            rooted = bool(self.evaluators()) or not self.rooted
            patience = GRACE * spec.deadline - quiet if len(ready) >= spec.fewest else None
            all_here = len(ready) >= spec.asked and not asking
            if rooted and (all_here or (patience is not None and patience <= 0)):
                return ready
            lacking = f"clients with task {task}: {len(ready)} of {spec.asked}"
            self.say(f"waiting for {lacking if rooted else f'an evaluator with task {task} and its root()'}")
            with suppress(TimeoutError):
                async with asyncio.timeout(patience if rooted else None):
                    await changed.wait()


def _size(plan: Plan) -> int:
    """Return how many clients are asked, of a cohort that is secret how many on average."""
    return round(plan.expected) if plan.timed else len(plan.cohort)
