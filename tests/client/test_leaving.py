"""How an agent stops: nobody waits for what it will not send, and what is as good as sent is sent."""

import asyncio
import time
from typing import Any

import pytest

from fedcore.client import agent as agents
from fedcore.messages import Ref
from fedcore.wire import grpc

Federation = Any  # of conftest, which importlib mode cannot import
REASON = "the device is shutting down"


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 20.0)


def test_training_is_declined_and_the_stream_ends_in_peace(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent() as running:
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            fake.push(work := fake.assignment(103, digest))
            await federation.until(lambda: federation.lines("trained.txt") == ["103.0"])
            await soon(federation.last.leave())
            decline = await soon(fake.declines.get())
            assert (decline.ref, decline.reason) == (work.ref, REASON)
            await soon(running)  # by itself, for the coordinator has ended its side
            assert fake.hellos.empty() and federation.last.worker.process is None

    asyncio.run(run())
    assert federation.journal() == [("run/103.0/train", "declined")]


def test_an_upload_under_way_comes_to_its_end(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent() as running:
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            fake.permits.clear()
            fake.push(fake.assignment(1, digest))
            await soon(fake.uploads.get())
            leaving = asyncio.create_task(federation.last.leave())
            await asyncio.sleep(0.2)
            fake.push(fake.assignment(2, digest, kind="offer"))  # nothing new is begun
            assert (await soon(fake.declines.get())).reason == REASON
            fake.permits.set()
            await soon(leaving)
            await soon(running)
            assert fake.declines.empty()

    asyncio.run(run())
    assert federation.journal() == [("run/2.0/offer", "declined"), ("run/1.0/train", "sent")]


@pytest.mark.slow
def test_an_upload_that_does_not_end_is_declined(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agents, "GRACE", 0.2)

    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent() as running:
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            fake.permits.clear()
            fake.push(fake.assignment(1, digest))
            await soon(fake.uploads.get())
            await soon(federation.last.leave())
            assert (await soon(fake.declines.get())).ref == Ref("run", 1, 0, "train")
            await soon(running)

    asyncio.run(run())


@pytest.mark.slow
def test_without_a_coordinator_there_is_nothing_to_wait_for(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent() as running:
            await soon(fake.hellos.get())
            fake.refusal = (grpc.StatusCode.UNAVAILABLE, "going down")
            fake.hang_up()
            await federation.until(lambda: federation.last.connection.retries.attempt > 3)
            began = time.monotonic()
            await soon(federation.last.leave())
            assert time.monotonic() - began < 0.1 and federation.last.connection.made is None
            running.cancel()

    asyncio.run(run())
