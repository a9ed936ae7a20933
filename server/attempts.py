"""One attempt at a piece of work: clients are leased and get it, and its round closes."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedcore.messages import Assignment, Blob, Plan, Ref
from fedcore.server.journal import Journal, Opening
from fedcore.server.opening import Assign, Live, open_round
from fedcore.server.store import Known

if TYPE_CHECKING:
    from fedcore.server.driver import Driver


async def play(
    driver: "Driver", ready: Sequence[str], *work: tuple[Plan, Journal | None], certificate: bytes = b""
) -> list[Live]:
    """Play one attempt from assignments to close; more than one plan goes on side by side.

    ready: those among whom a cohort was drawn. One that is secret keeps all of them from other runs,
    which would otherwise see, by whom they can have, who is in it. work: plans, and the journals of those
    that go on. certificate: of secure aggregation, why another attempt may follow those before.
    """
    plans = [plan for plan, _ in work]
    coordinator, ref = driver.coordinator, plans[0].ref
    leased = ready if plans[0].timed else [client for plan in plans for client in plan.cohort]
    if not driver.workers:  # what was leased at the start, for an attempt that does not go on after all
        coordinator.registry.release(ref.run)
    # Before anything is awaited: until now, the clients were free for every run.
    coordinator.registry.lease(ref.run, leased)
    driver.say(f"round {ref.round}: {ref.kind} with {_size(plans[0])} clients")
    tasks = [asyncio.ensure_future(_play(driver, *each, ready, certificate)) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)  # what fails one of them ends the others
        coordinator.registry.release(ref.run, leased)


async def _play(
    driver: "Driver", plan: Plan, journal: Journal | None, ready: Sequence[str], certificate: bytes
) -> Live:
    coordinator, address = driver.coordinator, driver.address
    opening = Opening(plan.ref, plan.cohort, tuple(ready), certificate)

    def opened() -> Live:
        assign = assignment(driver, plan, coordinator.blobs.small(address))
        return open_round(coordinator, driver.run, plan, assign, opening, journal)

    live = await coordinator.calculate(opened)
    driver.untold.append(live)
    coordinator.live[plan.ref] = live
    try:
        await live.play()
    finally:
        del coordinator.live[plan.ref]
    return live


def assignment(driver: "Driver", plan: Plan, content: bytes = b"") -> Assign:
    """Return what makes a client's assignment of the plan, given the seconds that are left.

    content: the parameters, where they travel with it.
    """
    run, blob = driver.run, Blob(driver.address, driver.run.layout.blob_size(driver.extra))

    def make(client: str, left: float) -> Assignment:
        known = driver.clients.get(client, Known())
        folded = Ref(run.id, known.round, known.attempt, "train") if known.round else None
        what, size = (run.task, run.digest, run.spec, run.layout.digest, blob), _size(plan)
        return Assignment(plan.ref, *what, size, left, folded, plan.clip, content=content)

    return make


def lacking(live: Live, *root: Live) -> str:
    """Return what an attempt lacks to make a round, "" where it lacks nothing."""
    if live.lacks:
        return live.lacks
    said = [verdict.reason for trusted in root for verdict in trusted.round.verdicts.values()]
    enough = all(trusted.round.sufficient for trusted in root)
    return "" if enough else f"no update from the evaluator: {''.join(said) or 'it was late'}"


def _size(plan: Plan) -> int:
    """Return how many clients are asked, of a cohort that is secret how many on average."""
    return round(plan.expected) if plan.timed else len(plan.cohort)
