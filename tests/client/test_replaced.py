"""A coordinator that asks twice for one attempt: what an agent made on some terms never serves others."""

import asyncio
from typing import Any

import pytest

from fedcore.messages import Ref, Secure
from fedcore.spec import RunSpec

Federation = Any  # of conftest, which importlib mode cannot import

MASKED = RunSpec().with_(
    "cohort.size=5", "cohort.minimum=4", "encryption.updates=secagg", "encryption.encoding=exact"
)
REF = Ref("run", 1, 0, "train")


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 20.0)


@pytest.mark.parametrize(
    "change",
    [
        {"spec": MASKED.with_("encryption.updates=tls")},
        {"spec": MASKED.with_("cohort.minimum=3")},
        {"spec": MASKED.with_("client.epochs=2")},
        {"cohort": 4},
    ],
    ids=["in the open", "among fewer", "trained otherwise", "of fewer"],
)
def test_words_that_were_made_on_other_terms_do_not_leave(federation: Federation, change: Any) -> None:
    """They wait unmasked for their cohort; then the attempt is asked for on terms that hide them less."""

    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            terms = {"spec": MASKED, "cohort": 5}
            fake.push(fake.assignment(1, digest, **terms))
            assert (await soon(fake.secures.get())).ref == REF
            plain = (federation.folder / "agent/state/spool/run.1.0.train").read_bytes()
            fake.push(Secure(REF, b"a lie, which ends it"))
            await soon(fake.declines.get())
            fake.push(fake.assignment(1, digest, **{**terms, **change}))
            waiting = [
                asyncio.create_task(queue.get()) for queue in (fake.declines, fake.secures, fake.uploads)
            ]
            (done, _) = await asyncio.wait(waiting, timeout=20.0, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
            (said,) = (task.result() for task in done)
            if isinstance(said, tuple):
                assert said[1] != plain, "the words left this device unmasked"
            elif isinstance(said, Secure):
                assert federation.lines("trained.txt") == ["1.0", "1.0"], "what is masked next is not new"

    asyncio.run(run())


def test_an_attempt_is_entered_once(federation: Federation) -> None:
    """Each time would be another draw of neighbours, until the coordinator likes it."""

    async def run() -> None:
        async with federation.coordinator() as fake:
            async with federation.agent():
                digest = (await soon(fake.hellos.get())).tasks["Moody"]
                fake.push(work := fake.assignment(1, digest, spec=MASKED, cohort=5))
                await soon(fake.secures.get())
                fake.push(Secure(REF, b"a lie, which ends it"))
                await soon(fake.declines.get())
                fake.push(work)
                assert "takes no part" in (await soon(fake.declines.get())).reason
            async with federation.agent():
                await soon(fake.hellos.get())
                fake.push(work)
                assert "takes no part" in (await soon(fake.declines.get())).reason
                fake.push(fake.assignment(1, digest, spec=MASKED, cohort=5, attempt=1))
                await soon(fake.secures.get())

    asyncio.run(run())
