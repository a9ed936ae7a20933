"""An agent that is killed where it hurts, and started again: each round counts once, here and there."""

import asyncio
import os
import signal
import sys
from typing import Any

import numpy as np
import pytest

from fedcore.faults import AGENT

pytestmark = pytest.mark.slow  # a process is started twice for each point

Federation = Any  # of conftest, which importlib mode cannot import
ROUNDS = 3
POINTS = [point for point in AGENT if point != "agent.reserved"]  # which needs a ledger: tests/integration


async def start(federation: Federation, faults: str = "") -> asyncio.subprocess.Process:
    folder = federation.agent_folder()
    command = (sys.executable, "-m", "fedcore", "client", "start", "--dir", str(folder))
    return await asyncio.create_subprocess_exec(*command, env={**os.environ, "FEDCORE_FAULTS": faults})


async def attend(fake: Any, folded: list[Any], open_work: list[Any]) -> None:
    """Tell an agent that comes what became of its updates, and hand it the work that is open."""
    while True:
        hello = await fake.hellos.get()
        for ref in hello.pending:
            if ref in folded:
                fake.outcome(ref)
        for work in open_work:
            fake.push(work)


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_started_again(federation: Federation, point: str) -> None:
    async def run() -> None:
        folded: list[Any] = []
        work: list[Any] = []
        kills = 0
        async with federation.coordinator() as fake:
            process = await start(federation, f"{point}:2=kill")  # in the second round
            digest = (await asyncio.wait_for(fake.hellos.get(), 30)).tasks["Moody"]
            attending = asyncio.create_task(attend(fake, folded, work))
            for number in range(1, ROUNDS + 1):
                work[:] = [fake.assignment(number, digest, folded=folded[-1] if folded else None)]
                fake.push(work[0])
                while (received := fake.uploads.qsize()) == 0:
                    if process.returncode is not None:
                        assert process.returncode == -signal.SIGKILL
                        process, kills = await start(federation), kills + 1
                    await asyncio.sleep(0.05)
                (head, data), *others = [fake.uploads.get_nowait() for _ in range(received)]
                assert head.ref == work[0].ref and not others
                assert np.frombuffer(data, "<f4").tolist() == [2.0 * number] * 4
                folded.append(work.pop().ref)
                fake.outcome(folded[-1])
            await federation.until(lambda: (f"run/{ROUNDS}.0/train", "folded") in federation.journal())
            attending.cancel()
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 20) == 0
            assert fake.declines.empty() and kills == 1

    asyncio.run(run())
    assert federation.lines("kept.txt")[-1] == f"run/{ROUNDS}.0/train:{sum(range(1, ROUNDS + 1))}"
    assert len(federation.lines("trained.txt")) == ROUNDS
