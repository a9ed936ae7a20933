"""A run without cohorts: clients work at their own speed, and the model moves on arrivals.

    draw   clients that were given the same model at the same moment: an attempt like any other, with its own
           deadline, journal and assignments, whose updates are judged as they come and kept as files
    step   the first K of them, discounted by their age, are a round; committed, and told to their clients

A client whose update is in rests until the model has moved, so a step has K different clients; one that gave
none is asked again after a while, later each time. What a restart needs is in the journals of the draws and
in the participants of committed rounds. From those alone `fedcore.strategies.steps` makes the same bits.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fedcore.layout import Parameters
from fedcore.messages import Blob, Outcome, Plan, Ref, Verdict
from fedcore.server.attempts import assignment
from fedcore.server.closing import close, news, participant
from fedcore.server.journal import Journal, Opening, remove
from fedcore.server.live import LiveRound, mapped
from fedcore.server.opening import Assign, open_round
from fedcore.server.pausing import leave
from fedcore.server.store import Participant
from fedcore.strategies.modes import OnArrival, Synchronous
from fedcore.strategies.rounds import Round, State, cohort
from fedcore.strategies.steps import Arrival, step
from fedcore.strategies.terms import Rows
from fedcore.waits import doubling

if TYPE_CHECKING:
    from fedcore.server.driver import Driver

SHORTEST, LONGEST = 0.1, 30.0  # seconds that a client rests which gave no update


@dataclass(eq=False)
class Draw:
    """Clients that were given a version of the model at the same moment.

    open: those of whom no committed step has told yet, and who have not been told that they are out.
    """

    ref: Ref
    model: Blob
    parameters: Parameters
    open: set[str]
    live: LiveRound = field(init=False)
    task: asyncio.Task[None] = field(init=False)

    @property
    def version(self) -> int:
        """How often the model had moved."""
        return self.ref.round - 1


class Workers:
    """The clients of one run that are at work, and those who have arrived since the model moved last.

    at_work: client -> its draw, and arrived, in the order of arrival. gone: what has become of others since,
    each with the version it had. hired: how many draws there were of each round.
    """

    def __init__(self, driver: "Driver", mode: OnArrival, journals: Sequence[Journal]) -> None:
        """Begin with the draws that were open when the coordinator ended; nothing moves before `resume`."""
        self.driver, self.mode, self.journals = driver, mode, journals
        self.places = mode.concurrency or driver.run.spec.cohort.size
        self.draws: dict[Ref, Draw] = {}
        self.at_work: dict[str, Draw] = {}
        self.arrived: dict[str, Draw] = {}
        self.gone: list[tuple[int, Participant]] = []
        self.hired = Counter[int]()
        self.resting: dict[str, float] = {}
        self.failures = Counter[str]()
        self.queued = ExitStack()  # while it waits for clients that other runs have

    @property
    def addresses(self) -> set[str]:
        """The models that somebody may be at work on."""
        restored = {journal.opening.parameters for journal in self.journals}
        return restored | {draw.model.sha256 for draw in self.draws.values()}

    def awaits(self, ref: Ref, client: str) -> bool:
        """Whether it is open what becomes of a client's update."""
        if self.journals:  # not yet resumed
            return True
        return ref in self.draws and client in self.draws[ref].open

    # --- from one step to the next

    async def step(self, state: State) -> State:
        """Wait for K good updates, move the model by them, commit, and tell their clients."""
        driver, started = self.driver, time.perf_counter()
        try:
            round = await self.filled(state)
        finally:
            self.queued.close()
        after, committed = await driver.coordinator.calculate(close, driver, round, state)
        told = [(self.arrived[client], client, Verdict("folded")) for client in round.folded]
        gone, self.gone = self.gone, []
        committed.row["staleness"] = sum(state.round - draw.version for draw, *_ in told) / len(told)
        committed.row["refused"] = sum(each.status in ("refused", "lost") for _, each in gone)
        refs = {client: draw.ref for draw, client, _ in told}
        known = news(driver.clients, refs, after.memory, driver.gathering.clients())
        record = [participant(d.live, client, v, state.round - d.version) for d, client, v in told]
        record += [replace(each, staleness=state.round - version) for version, each in gone]
        await driver.commit(committed, known, record, time.perf_counter() - started)
        for draw, client, verdict in told:
            del self.arrived[client], self.failures[client]
            self.tell(draw, client, verdict)
        await self.sweep()
        return after

    async def filled(self, state: State) -> Round:
        """Let clients work until K updates are in that pass when they are discounted; return the round."""
        driver, k, registry = self.driver, self.mode.k, self.driver.coordinator.registry
        while True:
            changed = registry.changed.next
            for draw in self.draws.values():
                if draw.task.done():
                    draw.task.result()  # raises what ended it
            if len(self.arrived) >= k:
                first = list(self.arrived.items())[:k]
                round = await driver.coordinator.calculate(self.fold, first, state)
                if round.sufficient:
                    return round
                for client, verdict in round.verdicts.items():
                    if verdict.status != "folded":
                        self.out(self.arrived.pop(client), client, verdict)
                continue
            if await self.hire(state):
                await self.sweep()  # of draws whose clients all gave nothing, there may be more and more
                continue
            working = len(self.at_work) or f"no client with task {driver.run.task}"
            driver.say(f"step {state.round + 1}: {len(self.arrived)} of {k} in, {working} at work")
            with suppress(TimeoutError):
                async with asyncio.timeout(self.rest()):
                    await changed.wait()

    def fold(self, arrivals: Sequence[tuple[str, Draw]], state: State) -> Round:
        """Return the round of a step (on the compute thread); `advance` may follow, or another try."""
        driver, clients = self.driver, tuple(sorted(client for client, _ in arrivals))
        plan = driver.plan(Ref(driver.run.id, state.round + 1, 0, "train"), clients, clients, state)
        folder = arrivals[0][1].live.journal.folder

        def each() -> Iterator[Arrival]:
            for client, draw in arrivals:
                rows, stale = Rows.of([draw.live.update(client)]), state.round - draw.version
                yield Arrival(client, rows, stale, draw.parameters, draw.live.round.seconds[client])

        return step(self.mode, plan, each(), state.parameters, lambda _, *what: mapped(folder, *what))

    # --- who is at work

    async def hire(self, state: State) -> bool:
        """Give the present model to as many clients as there are free places; tell whether there were any."""
        driver, places = self.driver, self.places - len(self.at_work)
        ready = self.ready() if places > 0 else []
        if not ready:
            return False
        ref = Ref(driver.run.id, state.round + 1, self.hired[state.round + 1], "train")
        spec, entropy = driver.run.spec, driver.entropy()
        clients = cohort(driver.strategy, spec, ref, ready, places, state.memory, entropy)
        await self.begin(Opening(ref, clients, (), parameters=driver.address), state, state.parameters)
        return True

    def ready(self) -> list[str]:
        """Return who may be hired now, by name; where other runs have all of them, queue up for them."""
        run, registry, now = self.driver.run.id, self.driver.coordinator.registry, time.monotonic()
        idle = [
            client
            for client in self.driver.gathering.clients()
            if client not in self.at_work
            and client not in self.arrived
            and self.resting.get(client, 0.0) <= now
        ]
        free = registry.free(run, idle)
        if free or not idle:
            self.queued.close()
        else:
            if run not in registry.queue:
                self.queued.enter_context(registry.turn(run))
            registry.claim(run, idle)
        return free

    async def begin(
        self, opening: Opening, state: State, parameters: Parameters, journal: Journal | None = None
    ) -> None:
        """Hand out the work of a draw, or go on with one whose journal is given."""
        driver, ref, clients = self.driver, opening.ref, opening.cohort
        driver.coordinator.registry.lease(ref.run, clients)  # before anything is awaited
        self.hired[ref.round] = max(self.hired[ref.round], ref.attempt + 1)
        model = Blob(opening.parameters, driver.run.layout.blob_size(driver.extra))
        draw = Draw(ref, model, parameters, set(clients))
        self.at_work |= dict.fromkeys(clients, draw)
        plan = replace(driver.plan(ref, clients, clients, state), goal=len(clients), minimum=0)
        what = (driver.coordinator, driver.run, plan, self.assign(plan, model), opening, journal)
        live = await driver.coordinator.calculate(open_round, *what, lambda: self.hear(draw))
        assert isinstance(live, LiveRound)
        draw.live, self.draws[ref], driver.coordinator.live[ref] = live, draw, live
        self.hear(draw)
        draw.task = asyncio.create_task(self.play(draw), name=str(ref))
        draw.task.add_done_callback(lambda _: driver.coordinator.registry.changed.send())

    def assign(self, plan: Plan, model: Blob) -> Assign:
        """Return what makes a client's assignment: a model that need not be the newest, for a step of K."""
        make, size = assignment(self.driver, plan), min(self.mode.k, self.driver.run.spec.cohort.asked)
        return lambda client, left: replace(make(client, left), parameters=model, cohort=size)

    async def play(self, draw: Draw) -> None:
        """Let a draw's clients work until all have answered or its deadline has passed."""
        await draw.live.play()
        self.hear(draw)

    def hear(self, draw: Draw) -> None:
        """Take note of who has answered or is out."""
        for client, verdict in draw.live.round.verdicts.items():
            if self.at_work.get(client) is draw:
                del self.at_work[client]
                if verdict.status == "folded":
                    self.arrived[client] = draw
                else:
                    self.out(draw, client, verdict)
                self.driver.coordinator.registry.release(draw.ref.run, [client])

    def out(self, draw: Draw, client: str, verdict: Verdict) -> None:
        """Tell a client that its work counts for nothing, and let it rest."""
        pause = doubling(self.failures[client], SHORTEST, LONGEST)
        self.failures[client] += 1
        self.resting[client] = time.monotonic() + pause
        self.gone.append((draw.version, participant(draw.live, client, verdict)))
        self.tell(draw, client, verdict)

    def rest(self) -> float | None:
        """Return the seconds until the next client has rested; None where none does."""
        now = time.monotonic()
        self.resting = {client: end for client, end in self.resting.items() if end > now}
        free = len(self.at_work) < self.places
        return min(self.resting.values()) - now if self.resting and free else None

    def tell(self, draw: Draw, client: str, verdict: Verdict) -> None:
        """Tell a client what became of its work, once and for all."""
        draw.open.discard(client)
        self.driver.coordinator.registry.send(client, Outcome(draw.ref, verdict))

    async def sweep(self) -> None:
        """Forget the draws of which everything has been told."""
        over = [draw for draw in self.draws.values() if not draw.open and draw.task.done()]
        for draw in over:
            del self.draws[draw.ref], self.driver.coordinator.live[draw.ref]
        await self.driver.tidy(*(draw.live for draw in over))

    # --- from one start of the coordinator to the next

    async def resume(self, state: State) -> None:
        """Go on with the draws in the journals, but for those clients that committed steps have told of."""
        coordinator, driver = self.driver.coordinator, self.driver
        oldest = min((journal.opening.ref.round for journal in self.journals), default=state.round + 1)
        settled = await coordinator.write(self.settled, oldest, state.round)
        for journal in self.journals:
            opening, ref = journal.opening, journal.opening.ref
            left = tuple(c for c in opening.cohort if (ref.round, ref.attempt, c) not in settled)
            if not left:
                await coordinator.calculate(remove, journal.folder)
                continue
            place = (opening.parameters, driver.run.layout, driver.extra)
            parameters = await coordinator.calculate(coordinator.blobs.parameters, *place)
            await self.begin(replace(opening, cohort=left), state, parameters, journal)
        done = {c for journal in self.journals for c in journal.opening.cohort} - self.at_work.keys()
        coordinator.registry.release(driver.run.id, done)
        self.journals = ()

    def settled(self, oldest: int, newest: int) -> set[tuple[int, int, str]]:
        """Return (round, attempt, client) of all work that committed steps have told of."""
        store, run = self.driver.coordinator.store, self.driver.run.id
        return {
            (number - each.staleness, each.attempt, each.client)
            for number in range(oldest, newest + 1)
            for each in store.participants(run, number)
        }

    async def leave(self) -> None:
        """Stop waiting for anybody, without a word; the journals stay as they are."""
        self.at_work.clear()  # so that nobody is told that it is late
        tasks = [draw.task for draw in self.draws.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for draw in self.draws.values():
            self.driver.coordinator.live.pop(draw.ref, None)
            await leave(draw.live)
        self.queued.close()
        self.driver.coordinator.registry.release(self.driver.run.id)

    def dismiss(self) -> None:
        """Tell everybody whose work is open what became of it, now that the run has ended."""
        for draw in self.draws.values():
            for client in draw.open:
                if verdict := self.driver.verdict(draw.ref, client):
                    self.driver.coordinator.registry.send(client, Outcome(draw.ref, verdict))
        self.draws.clear()


def workers_of(driver: "Driver") -> Workers | None:
    """Return the workers of a run without cohorts, None of any other; it blocks."""
    mode = driver.strategy.mode
    if isinstance(mode, Synchronous):
        return None
    return Workers(driver, mode, driver.coordinator.journals.resume_all(driver.run.id, "train"))
