"""A process for user code, as the agent sees it: asked, waited for, and replaced when it fails."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

from fedcore.client.memory import exceeds, size_of
from fedcore.errors import FedcoreError, UpdateRefused

REPLY_BYTES = 2**20  # the longest line of a reply; 64 names of vectors and scalars need a tenth of it
LOOK = 0.1  # seconds between two looks at the memory


class WorkFailed(FedcoreError):
    """Work that a worker did not do.

    `public` is what the coordinator may be told: never the message of a task's error, which may quote data.
    """

    def __init__(self, public: str, detail: str = "") -> None:
        """Say what failed; `detail` is for the device's own log."""
        super().__init__(f"{public}: {detail}" if detail else public)
        self.public = public


class WorkerProcess:
    """`python -m` a module that ends in `serving.main`, started when there is something to ask.

    It leads a process group, which ends with it: loaders of data and whatever else a task has started.
    """

    def __init__(
        self, folder: Path, tasks: Mapping[str, str], memory: str = "", module: str = "fedcore.client.worker"
    ) -> None:
        """Serve the tasks (name -> "module:object") of an agent's folder, within a memory such as "4GiB"."""
        self.folder, self.tasks, self.memory, self.module = folder, tasks, memory, module
        self.process: asyncio.subprocess.Process | None = None
        self.digests: dict[str, str] = {}

    async def describe(self) -> dict[str, str]:
        """Return the digest of each task, as the process that will train has imported it."""
        if self.process is None or self.process.returncode is not None:
            await self._start()
        return self.digests

    async def work(self, limit: float, **message: Any) -> dict[str, Any]:
        """Return the reply to one piece of work, the process started anew if need be.

        limit: seconds. Raises UpdateRefused with what the process refuses, and WorkFailed where it
        raises, dies, is late, holds too much memory or finds its own update unfit; a late one is killed, as
        it is when this call is cancelled.
        """
        try:
            async with asyncio.timeout(limit):
                await self.describe()
                reply: dict[str, Any] = await self._ask("work", **message)
                return reply
        except TimeoutError:
            raise WorkFailed(f"training took longer than the {limit:.1f} s to the deadline") from None

    async def stop(self) -> None:
        """End the process, if there is one. It holds nothing that a kill could harm."""
        process, self.process = self.process, None
        if process is None:
            return
        _kill(process)
        await process.wait()

    async def _start(self) -> None:
        # -P: a file beside agent.toml must not stand in for a module of the standard library.
        command = (sys.executable, "-P", "-m", self.module)
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, cwd=self.folder, limit=REPLY_BYTES
        )
        try:
            self.digests = await self._ask("describe", folder=str(self.folder), tasks=dict(self.tasks))
        except WorkFailed:
            await self.stop()
            raise

    async def _ask(self, command: str, **message: Any) -> Any:
        process = self.process
        assert process and process.stdin and process.stdout
        answered, watching = Event(), None
        if self.memory:
            loop = asyncio.get_running_loop()
            watching = loop.run_in_executor(None, self._watch, process.pid, answered)
        try:
            process.stdin.write(json.dumps({"do": command, **message}).encode() + b"\n")
            line = await process.stdout.readline()
            code = 0 if line.endswith(b"\n") else await process.wait()
        except BaseException:  # its answer would be taken for the next question's
            await self.stop()
            raise
        finally:
            answered.set()
        if not line.endswith(b"\n"):
            await self.stop()
            if watching and await watching:
                raise WorkFailed(f"the training process went over its memory limit of {self.memory}")
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise WorkFailed(f"the training process {how}; the agent's log may say why")
        reply = json.loads(line)
        if "refused" in reply:
            raise UpdateRefused(reply["refused"])
        if "unfit" in reply:
            raise WorkFailed("the update is beyond what the run allows, as this device found", reply["unfit"])
        if "error" in reply:
            what = "importing what agent.toml allows" if command == "describe" else "the task"
            raise WorkFailed(f"{what} raised {reply['error']}", reply["message"])
        return reply["done"]

    def _watch(self, group: int, answered: Event) -> bool:
        """Return whether a group came to hold too much memory before it answered; such a one is ended."""
        while not answered.wait(LOOK):
            if exceeds(group, size_of(self.memory)):
                os.killpg(group, signal.SIGKILL)
                return True
        return False


def _kill(process: asyncio.subprocess.Process) -> None:
    """End a process, and what is left of the group that it leads."""
    if process.returncode is None:
        process.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
