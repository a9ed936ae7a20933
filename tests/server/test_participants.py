"""Who took part in a round is recorded with it, on either database."""

import asyncio

import numpy as np

from fedcore.messages import Assignment
from fedcore.server.store import Participant
from tests.server.conftest import LAYOUT, Agent, Running, honest, silent, spec_of, until, upload_parts


async def wrong(agent: Agent, assignment: Assignment) -> None:
    update = await agent.update(assignment)
    update.vectors["delta"][0] = np.nan
    await agent.upload(upload_parts(assignment.ref, update))


async def unwilling(agent: Agent, assignment: Assignment) -> None:
    await agent.decline(assignment.ref, "no budget")


def test_what_became_of_each_client_is_recorded_with_the_round(running: Running, database_url: str) -> None:
    async def run() -> list[Participant]:
        async with running(database_url=database_url) as federation:
            for number, work in enumerate([wrong, unwilling, silent, honest, honest]):
                await federation.agent(f"client-{number}", work)
            spec = spec_of(rounds=1, size=5, cohort={"minimum": 2}, deadline=1.0)
            name, store = await federation.submit(spec), federation.coordinator.store
            await until(lambda: store.rounds(name))
            found: list[Participant] = store.participants(name, 1)
            return found

    found = {participant.client: participant for participant in asyncio.run(run())}
    said = {client: (of.status, of.reason, of.bytes) for client, of in found.items()}
    assert said.pop("client-0") == ("refused", found["client-0"].reason, LAYOUT.nbytes)
    assert said == {
        "client-1": ("lost", "declined: no budget", 0),
        "client-2": ("late", "", 0),
        "client-3": ("folded", "", LAYOUT.nbytes),
        "client-4": ("folded", "", LAYOUT.nbytes),
    }
    assert "delta" in found["client-0"].reason
    assert all((of.seconds > 0) is (of.bytes > 0) for of in found.values())
