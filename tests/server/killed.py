"""A coordinator as a process, for tests that end it where it stands."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import tomli_w

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Role
from fedcore.loopback import free_port


class Killed:
    """A coordinator as a process, which dies by SIGKILL."""

    def __init__(
        self, folder: Path, identity: Callable[[Role, str], Identity], database_url: str = ""
    ) -> None:
        self.folder, self.port = folder, free_port()
        folder.mkdir()
        identity("coordinator", "main").save(folder / "identity")
        settings = {"listen": f"127.0.0.1:{self.port}", "database_url": database_url}
        (folder / "server.toml").write_text(tomli_w.dumps(settings))

    @asynccontextmanager
    async def process(self, faults: str = "") -> AsyncIterator[asyncio.subprocess.Process]:
        """Run it until the end of the block, or until it comes by one of the `faults`."""
        code = "from fedcore.server.cli import app; app()"
        command = [sys.executable, "-c", code, "start", "--dir", str(self.folder)]
        environment = {**os.environ, "FEDCORE_FAULTS": faults}
        process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE, env=environment)
        assert process.stderr
        try:
            while b"listening" not in (line := await process.stderr.readline()):
                assert line, "the coordinator did not start"
            drain = asyncio.create_task(process.stderr.read())
            yield process
            if process.returncode is None:
                os.kill(process.pid, signal.SIGKILL)
            await process.wait()
            await drain
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
