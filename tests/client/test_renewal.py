"""An agent whose certificate is renewed while it works."""

import asyncio
import logging
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from fedcore.crypto.identity import Identity, utc_now
from fedcore.errors import AuthenticationError
from fedcore.server.authority import Authority
from fedcore.server.authority_service import start_service
from fedcore.task import digest, resolve
from fedcore.wire import grpc

Federation = Any  # of conftest, which importlib mode cannot import


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 30)


@pytest.mark.slow
def test_work_goes_on_under_a_new_certificate(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """An upload in progress ends as it began; nothing is trained again; no moment without a stream."""
    caplog.set_level(logging.INFO)

    async def run() -> None:
        async with federation.coordinator() as fake:
            server, port = await start_service(federation.authority, "127.0.0.1:0")
            at = replace(federation.authority, address=f"127.0.0.1:{port}", lifetime=timedelta(seconds=9))
            federation.authority = at
            folder = federation.agent_folder()
            known = digest(resolve("moody:Moody", folder))
            first = Identity.load(folder / "state" / "identity")
            async with federation.agent():
                await soon(fake.hellos.get())
                fake.permits.clear()
                fake.push(fake.assignment(1, known))
                head, _ = await soon(fake.uploads.get())
                await soon(fake.hellos.get())  # of the stream with the new certificate
                fake.push(fake.assignment(1, known))  # as a coordinator does when somebody is back
                await asyncio.sleep(0.2)
                fake.permits.set()
                await federation.until(lambda: ("run/1.0/train", "sent") in federation.journal())
                fake.outcome(head.ref)
                fake.push(fake.assignment(2, known))
                await soon(fake.uploads.get())
            renewed = Identity.load(folder / "state" / "identity")
            assert renewed.name == first.name and renewed.not_after > first.not_after
            await server.stop(0)

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["1.0", "2.0"]
    assert "connection lost" not in caplog.text and "certificate renewed" in caplog.text


def test_an_agent_that_starts_when_its_renewal_is_due_renews_at_once(federation: Federation) -> None:
    def past() -> datetime:
        return utc_now() - timedelta(days=25)

    async def run() -> None:
        then = Authority.create(federation.folder / "older", "fed", "127.0.0.1:8700", clock=past)
        now = federation.authority = replace(then, clock=utc_now)
        async with federation.coordinator() as fake:
            server, port = await start_service(now, "127.0.0.1:0")
            federation.authority = replace(then, address=f"127.0.0.1:{port}")
            folder = federation.agent_folder()
            first = Identity.load(folder / "state" / "identity")
            async with federation.agent():
                await soon(fake.hellos.get())
                await federation.until(
                    lambda: Identity.load(folder / "state" / "identity").not_after > first.not_after
                )
            await server.stop(0)

    asyncio.run(run())


def test_an_agent_that_the_coordinator_denies_ends_and_says_why(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent() as task:
            await soon(fake.hellos.get())
            reason = "the certificate of fedcore://fed/client/client-000000 was revoked"
            fake.refusal = (grpc.StatusCode.UNAUTHENTICATED, reason)
            fake.hang_up()
            with pytest.raises(
                AuthenticationError, match=r"turned this agent away: .*client-000000 was revoked"
            ):
                await soon(task)

    asyncio.run(run())
