"""An agent in a round whose updates are sealed: to which key, and what goes out."""

import asyncio
from typing import Any

import numpy as np
import pytest

from fedcore.crypto import hpke
from fedcore.messages import Assignment, Ref
from fedcore.spec import RunSpec
from fedcore.wire import sealing

Federation = Any  # of conftest, which importlib mode cannot import
SEALED, MASKED = (RunSpec().with_(f"encryption.updates={way}") for way in ("sealed", "secagg"))


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 20.0)


def opened(work: Assignment, key: hpke.PrivateKey, sealed: bytes) -> tuple[list[float], list[float]]:
    """Return the scalars and the numbers of Moody's update."""
    bound = sealing.binding("fed", work.ref, "client-000000", work.layout)
    content = sealing.Sealed(key, np.frombuffer(sealed, np.uint8), bound).read(0, 24 + 16)
    return np.frombuffer(content, "<f8", 3).tolist(), np.frombuffer(content[24:], "<f4").tolist()


def test_what_goes_out_opens_with_the_key_of_the_attempt_alone(federation: Federation) -> None:
    """The bytes are sent again as they are; a coordinator that has lost its key gets new ones."""

    async def run() -> None:
        coordinator = federation.identity("coordinator", "main")
        async with federation.coordinator() as fake, federation.agent():
            digest, ref = (await soon(fake.hellos.get())).tasks["Moody"], Ref("run", 1, 0, "train")
            first, second = hpke.new_key(), hpke.new_key()
            sent = []
            for key in (first, first, second):
                announced = sealing.announce(coordinator, ref, hpke.public_bytes(key))
                fake.arrived.clear()
                fake.push(work := fake.assignment(1, digest, spec=SEALED, key=announced))
                head, sealed = await soon(fake.uploads.get())
                assert (head.scalars, head.vectors) == ({}, ())
                assert opened(work, key, sealed) == ([3.0, 6.0, 3.0], [2.0] * 4)
                sent.append(sealed)
                await federation.until(lambda: len(federation.journal()) == len(sent))
            assert sent[0] == sent[1] != sent[2]
            assert (federation.folder / "agent/state/spool" / "run.1.0.train").read_bytes() == sent[2]

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["1.0", "1.0"]


@pytest.mark.parametrize(
    ("role", "round", "reason"),
    [
        ("client", 1, "is signed by fedcore://fed/client/main, expected a coordinator of fed"),
        ("coordinator", 2, "the coordinator's key is of another attempt than run/1.0/train"),
        (None, 1, "the signed message has no certificate"),
    ],
)
def test_a_key_that_is_not_the_coordinators_is_refused_before_any_work(
    federation: Federation, role: Any, round: int, reason: str
) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent():
            digest, key = (await soon(fake.hellos.get())).tasks["Moody"], b""
            if role:
                public, identity = hpke.public_bytes(hpke.new_key()), federation.identity(role, "main")
                key = sealing.announce(identity, Ref("run", round, 0, "train"), public)
            fake.push(fake.assignment(1, digest, spec=SEALED, key=key))
            assert reason in (await soon(fake.declines.get())).reason

    asyncio.run(run())
    assert federation.lines("trained.txt") == []


def test_an_evaluators_numbers_are_the_operators_and_are_not_masked(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator() as fake, federation.agent(evaluator=True):
            digest = (await soon(fake.hellos.get())).tasks["Moody"]
            fake.push(fake.assignment(1, digest, spec=MASKED, kind="evaluate", cohort=1))
            assert (await soon(fake.uploads.get()))[0].scalars["count"] == 7.0

    asyncio.run(run())
