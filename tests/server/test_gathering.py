"""Whom a run waits for, and how several runs share the same clients."""

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress

from hypothesis import example, given
from hypothesis import strategies as st

from fedcore.messages import Hello
from fedcore.seeds import generator
from fedcore.server.gathering import Gathering
from fedcore.server.registry import Registry, Session
from fedcore.server.store import Run
from tests.server.conftest import DIGEST, LAYOUT, TASK, spec_of


def joined(registry: Registry, *clients: str, evaluator: bool = False, **labels: str) -> list[Session]:
    sessions = [Session(name, Hello({TASK: DIGEST}, evaluator, labels=labels)) for name in clients]
    for session in sessions:
        registry.join(session)
    return sessions


def gathering_of(registry: Registry, name: str = "run", size: int = 2, **cohort: object) -> Gathering:
    spec = spec_of(size=size, deadline=600.0, cohort=cohort)
    run = Run(name, spec, TASK, DIGEST, LAYOUT, ("loss",), "0" * 64, "0" * 64, "running", "", 0.0)
    gathering = Gathering(registry, run, said.append)
    said.clear()
    return gathering


said: list[str] = []


async def settled() -> None:
    """Let everybody who was woken look around."""
    for _ in range(5):
        await asyncio.sleep(0)


# --- labels


def test_clients_are_chosen_by_all_labels_and_evaluators_by_none() -> None:
    async def run() -> None:
        registry = Registry()
        joined(registry, "a", site="eu", kind="phone")
        joined(registry, "b", site="us", kind="phone")
        joined(registry, "c", kind="phone")
        joined(registry, "judge", evaluator=True)
        gathering = gathering_of(registry, labels={"site": "eu", "kind": "phone"})
        waiting = asyncio.create_task(gathering.gather(2, 2))
        await settled()
        assert said == [f"waiting for clients with task {TASK} and site=eu and kind=phone: 1 of 2"]
        joined(registry, "d", site="eu", kind="phone", more="yes")
        assert await waiting == (["a", "d"], [])
        assert await gathering.evaluator() == ["judge"]

    asyncio.run(run())


# --- patience


def test_with_fewer_than_asked_a_run_starts_though_agents_come_and_go_all_the_time() -> None:
    async def churn(registry: Registry) -> None:
        while True:
            (guest,) = joined(registry, "guest", site="us")
            await asyncio.sleep(0.01)
            registry.leave(guest)

    async def run() -> None:
        registry = Registry()
        joined(registry, "a", "b", site="eu")
        gathering = gathering_of(registry, size=3, minimum=2, labels={"site": "eu"}, deadline=0.4)
        coming = asyncio.create_task(churn(registry))
        started = time.monotonic()
        assert await gathering.gather(3, 2) == (["a", "b"], [])
        assert 0.3 < time.monotonic() - started < 3.0
        coming.cancel()
        with suppress(asyncio.CancelledError):
            await coming

    asyncio.run(run())


# --- turns


def test_a_run_that_waits_for_many_is_not_passed_by_runs_that_need_few() -> None:
    async def run() -> None:
        registry = Registry()
        joined(registry, "a", "b", "c")
        registry.lease("first", ["a"])
        large, small = gathering_of(registry, "large"), gathering_of(registry, "small")

        async def begin(gathering: Gathering, size: int) -> list[str]:
            ready, _ = await gathering.gather(size, size)
            registry.lease(gathering.run.id, ready[:size])
            return ready

        many = asyncio.create_task(begin(large, 3))
        await settled()
        few = asyncio.create_task(begin(small, 1))
        await settled()
        assert not few.done(), "b and c are free, but claimed"
        assert said == [f"waiting for clients that work for another run: {n}" for n in ("2 of 3", "0 of 1")]
        registry.release("first")
        assert await many == ["a", "b", "c"]
        await settled()
        assert not few.done()
        registry.release("large")
        assert await few == ["a", "b", "c"]

    asyncio.run(run())


def test_a_run_that_cannot_start_whoever_is_free_holds_nobody_up() -> None:
    async def run() -> None:
        registry = Registry()
        joined(registry, "a", "b")
        hopeless = asyncio.create_task(gathering_of(registry, "hopeless").gather(3, 3))
        rooted = asyncio.create_task(gathering_of(registry, "rooted").gather(2, 2, rooted=True))
        await settled()
        assert said[-1] == f"waiting for an evaluator with task {TASK} and its root()"
        assert await gathering_of(registry, "modest").gather(2, 2) == (["a", "b"], [])
        joined(registry, "judge", evaluator=True)
        assert await rooted == (["a", "b"], ["judge"])
        hopeless.cancel()
        await asyncio.gather(hopeless, return_exceptions=True)
        assert not registry.queue

    asyncio.run(run())


def test_a_run_that_gives_up_leaves_its_claim_to_those_behind() -> None:
    async def run() -> None:
        registry = Registry()
        joined(registry, "a", "b")
        registry.lease("other", ["a"])
        first = asyncio.create_task(gathering_of(registry, "first").gather(2, 2))
        await settled()
        second = asyncio.create_task(gathering_of(registry, "second").gather(1, 1))
        await settled()
        first.cancel()
        await settled()
        # It starts with as many as it asks for; who works for another run is waited for only up to that.
        assert await second == (["b"], [])

    asyncio.run(run())


def test_who_is_at_work_for_the_run_is_not_asked_again() -> None:
    async def run() -> None:
        registry = Registry()
        joined(registry, "a", "b")
        apart = {"a", "b"}
        waiting = asyncio.create_task(gathering_of(registry).gather(1, 1, apart=apart))
        await settled()
        assert said == [f"waiting for clients with task {TASK}: 0 of 1"]
        apart.remove("b")
        registry.changed.send()
        assert await waiting == (["b"], [])

    asyncio.run(run())


def test_an_evaluator_that_works_for_another_run_is_waited_for() -> None:
    async def run() -> None:
        registry = Registry()
        joined(registry, "judge", evaluator=True)
        registry.lease("other", ["judge"])
        waiting = asyncio.create_task(gathering_of(registry).evaluator())
        await settled()
        assert said == ["waiting for the evaluator, which works for another run"]
        registry.release("other")
        assert await waiting == ["judge"]
        assert await gathering_of(Registry()).evaluator() == [], "nobody is there, and nobody is waited for"

    asyncio.run(run())


class Sharing:
    """Runs that go on side by side; a moment of theirs is a turn of the event loop."""

    def __init__(self, clients: int) -> None:
        self.registry, self.rng = Registry(), generator("sharing", clients)
        self.names = [f"client-{i}" for i in range(clients)]
        self.begun = Counter[str]()
        self.passed: dict[str, Counter[str]] = {}  # by each run that waits: what others have begun since

    async def run(self, name: str, size: int, lengths: Sequence[int], arrival: int = 0) -> None:
        """Play rounds, each of so many moments."""
        gathering = gathering_of(self.registry, name, size)
        await self.moments(arrival)
        for length in lengths:
            self.passed[name] = Counter()
            ready, _ = await gathering.gather(size, size)
            del self.passed[name]
            cohort = list(map(str, self.rng.permutation(ready)[:size]))
            assert not self.registry.leases.keys() & set(cohort), "a client works for one run at a time"
            self.registry.lease(name, cohort)
            self.begin(name)
            await self.moments(length)
            self.registry.release(name)
            await self.moments(1)  # the round is committed

    def begin(self, name: str) -> None:
        self.begun[name] += 1
        for waiting, passed in self.passed.items():
            passed[name] += bool(self.registry.queue.get(waiting))  # not while it waits for some to connect
            assert passed[name] <= 1, f"{name} began twice while another run waited"

    async def moments(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def play(self, runs: Collection[tuple[int, Sequence[int], int]], arrivals: Sequence[int]) -> None:
        """Let clients come and runs go on to their ends."""

        async def come() -> None:
            for name, arrival in zip(self.names, arrivals, strict=False):
                await self.moments(arrival)
                joined(self.registry, name)

        tasks = [self.run(f"run-{i}", *run) for i, run in enumerate(runs)]
        async with asyncio.timeout(20):
            await asyncio.gather(come(), *tasks)


moments = st.integers(0, 6)
lengths = st.lists(moments, min_size=1, max_size=6)


@given(st.integers(1, 7), st.data())
def test_no_run_starves_and_none_begins_twice_while_another_waits(clients: int, data: st.DataObject) -> None:
    """Of runs of any size that fits, whenever they and the clients come."""
    sharing = Sharing(clients)
    runs = data.draw(st.lists(st.tuples(st.integers(1, clients), lengths, moments), min_size=1, max_size=5))
    arrivals = data.draw(st.lists(moments, min_size=clients, max_size=clients))
    asyncio.run(sharing.play(runs, arrivals))
    assert sharing.begun == {f"run-{i}": len(run[1]) for i, run in enumerate(runs)}


@given(st.integers(1, 7), st.integers(2, 5), moments, st.data())
@example(clients=5, runs=3, same=2, data=None)
def test_equal_runs_begin_as_many_rounds_but_for_one(
    clients: int, runs: int, same: int, data: st.DataObject | None
) -> None:
    """Whether their rounds take the same time, or any time where one run at a time is all that fits."""
    size = 2 if data is None else data.draw(st.integers(1, clients))
    alone = 2 * size > clients

    class Equal(Sharing):
        def begin(self, name: str) -> None:
            super().begin(name)
            counts = [self.begun[f"run-{i}"] for i in range(runs)]
            assert max(counts) - min(counts) <= 1

    times = [
        data.draw(st.lists(moments, min_size=4, max_size=4)) if data and alone else [same] * 4
        for _ in range(runs)
    ]
    asyncio.run(Equal(clients).play([(size, each, 0) for each in times], [0] * clients))
