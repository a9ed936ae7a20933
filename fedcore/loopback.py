"""A whole federation on this machine: authority, coordinator, operator and agents as processes of their own.

It drives the command line as a person would, so demonstrations, benchmarks and tests exercise what is
deployed. Everything lies in one folder and every process has ended when the context has.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from fedcore.errors import RunFailed
from fedcore.interrupts import terminable

START_TIMEOUT = 60.0  # seconds
STOP_TIMEOUT = 15.0


class Loopback:
    """The processes of one federation; make it with `federation`."""

    def __init__(self, folder: Path) -> None:
        """Use an empty folder."""
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = ""

    def fedcore(self, *arguments: str | Path) -> str:
        """Run one command to its end and return its standard output; raises RunFailed with its errors."""
        command = [sys.executable, "-m", "fedcore", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, check=False)
        if done.returncode:
            raise RunFailed(f"fedcore {' '.join(map(str, arguments))}: {done.stderr.strip()}")
        return done.stdout

    def spawn(self, name: str, *arguments: str | Path, faults: str = "") -> None:
        """Start a command in the background, with its log in NAME.log; faults: see `fedcore.faults`."""
        command = [sys.executable, "-m", "fedcore", *map(str, arguments)]
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, "FEDCORE_FAULTS": faults},
            )

    def log(self, name: str) -> Path:
        """Return where a process writes its log."""
        return self.folder / f"{name}.log"

    def wait_for(self, name: str, pattern: str, timeout: float = START_TIMEOUT) -> re.Match[str]:
        """Wait until a process's log has a line with a pattern; raises RunFailed if it ends before."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if found := re.search(pattern, self.log(name).read_text(encoding="utf-8")):
                return found
            if self.processes[name].poll() is not None:
                break
            time.sleep(0.02)
        tail = "\n".join(self.log(name).read_text(encoding="utf-8").splitlines()[-5:])
        raise RunFailed(f"{name} showed no {pattern!r} within {timeout:.0f} s; its log ends:\n{tail}")

    def start_coordinator(self) -> None:
        """Make and start authority and coordinator, and enrol an operator."""
        authority = f"127.0.0.1:{free_port()}"
        self.fedcore("authority", "init", "authority", "--federation", "loopback", "--address", authority)
        self.spawn("authority", "authority", "start", "--dir", "authority")
        self.tokens("coordinator", "coordinator")
        self.tokens("operator", "operator")
        self.wait_for("authority", "listening")
        token = ("--token", "@tokens/coordinator.token")
        self.fedcore("server", "init", "coordinator", *token, "--listen", f"127.0.0.1:{free_port()}")
        self.start("coordinator")
        self.address = self.wait_for("coordinator", r"listening .*address=(127\.0\.0\.1:\d+)")[1]
        self.fedcore("run", "enroll", "@tokens/operator.token", "--coordinator", self.address)

    def start(self, name: str, faults: str = "") -> None:
        """Start, or start again, the coordinator or an agent that has been made."""
        room = "server" if name == "coordinator" else "client"
        self.spawn(name, room, "start", "--dir", name, faults=faults)

    def tokens(self, role: str, *names: str) -> None:
        """Make enrolment tokens as files in `tokens/`."""
        self.fedcore("authority", "token", "--dir", "authority", "--role", role, "--out", "tokens", *names)

    def make_agents(self, names: Sequence[str], settings: Callable[[str], dict[str, Any]]) -> None:
        """Make and enrol agents; `settings(name)` is what agent.toml holds beside the coordinator."""
        self.tokens("client", *names)
        for name in names:
            (self.folder / name).mkdir()
            table = {"coordinator": self.address, "state": "state", **settings(name)}
            (self.folder / name / "agent.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            enrol = ("client", "enroll")
            list(pool.map(lambda n: self.fedcore(*enrol, f"@tokens/{n}.token", "--dir", n), names))

    def start_agents(self, names: Sequence[str], task: str, module: str, source: str) -> None:
        """Make and start agents that have one task, `module:task`, with its source beside each, as here."""
        self.make_agents(names, lambda _: {"tasks": {task: f"{module}:task"}})
        for place in (self.folder, *(self.folder / name for name in names)):
            (place / f"{module}.py").write_text(source, encoding="utf-8")
        for name in names:
            self.start(name)

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        """End a process with a signal and return its exit code; kill it if it does not end."""
        process = self.processes.pop(name)
        process.send_signal(number)
        try:
            return process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RunFailed(f"{name} did not end within {STOP_TIMEOUT:.0f} s of signal {number}") from None


@contextmanager
def federation(folder: Path) -> Iterator[Loopback]:
    """Start authority and coordinator in an empty folder; stop everything at the end."""
    loopback = Loopback(folder)
    try:
        with terminable():
            loopback.start_coordinator()
            yield loopback
    finally:
        for process in loopback.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in loopback.processes.values():
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
