"""The processes of `Hosts`: `python -P -m fedcore.flower.host PART FD`, with a `Setup` on standard input.

    zygote   imports the app once, and forks a worker for each socket that it is given
    worker   gives the app one letter after another

A fork shares what was imported: it starts in milliseconds and costs little memory. It is safe only in a
process with one thread and without CUDA; where an app's import leaves more, every worker imports for itself.
The zygote leads a process group that ends with it, and it ends with the process that started it.
"""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from struct import Struct
from typing import Literal

from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import LoadClientAppError

from fedcore.flower import arrays
from fedcore.flower.app import App
from fedcore.flower.hosting import answer, load
from fedcore.flower.letters import Letter
from fedcore.forks import cuda_begun, forked

FORK, BURY = b"f", b"b"  # what a zygote is told: fork for the socket that comes along; say how a child ended
PID = Struct("<q")
NOTE = Struct("<QQQ?")  # of a letter: node, partition, seed, whether its content is the last one's
LETTER, ANSWER = 5, 4  # parts of a frame: id, note, head, content, state; id, head, content, state


@dataclass(frozen=True)
class Setup:
    """What the processes are told: an app and its run, and how many nodes there are."""

    folder: str
    client: str
    config: Mapping[str, UserConfigValue]
    nodes: int

    def command(self, part: Literal["zygote", "worker"], end: socket.socket) -> subprocess.Popen[bytes]:
        """Start a part at one end of a pair of sockets, which is closed here."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fedcore.flower.host", part, str(end.fileno())],
            stdin=subprocess.PIPE,
            stdout=2,  # what an app prints is no result
            pass_fds=[end.fileno()],
            start_new_session=part == "zygote",  # no Ctrl-C
            env={
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",  # which starts its threads at import
                "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # to look for a GPU must not make a fork unsafe
                **os.environ,
                "PYTHONUNBUFFERED": "1",  # a worker is killed, not asked: what it printed must be out
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
        )
        end.close()
        assert process.stdin
        with process.stdin:
            process.stdin.write(json.dumps(asdict(self)).encode())
        return process

    def load(self) -> ClientApp:
        """Import the app; raises LoadClientAppError."""
        return load(App(Path(self.folder), "", "", self.client))


def put(end: socket.socket, *parts: bytes | None) -> None:
    """Send a frame: how long each part is, -1 for None, and the parts."""
    lengths = Struct(f"<{len(parts)}q").pack(*(-1 if part is None else len(part) for part in parts))
    buffers = [lengths, *(part for part in parts if part)]
    sent = end.sendmsg(buffers)
    for buffer in buffers:
        if sent < len(buffer):
            end.sendall(memoryview(buffer)[sent:])
        sent = max(0, sent - len(buffer))


def take(end: socket.socket, count: int) -> list[bytes | None]:
    """Return the parts of the next frame; raises EOFError where the other end is closed."""
    lengths = Struct(f"<{count}q").unpack(_read(end, 8 * count))
    return [None if length < 0 else _read(end, length) for length in lengths]


def _read(end: socket.socket, length: int) -> bytes:
    data = end.recv(length, socket.MSG_WAITALL) if length else b""
    while len(data) < length:
        more = end.recv(length - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError
        data += more
    return data


def zygote(control: socket.socket, setup: Setup) -> None:
    """Import the app, say so, and start workers until the other end is gone."""
    try:
        app = setup.load()
    except LoadClientAppError as error:
        traceback.print_exc()
        put(control, str(error).encode())
        return
    put(control, b"")
    forks, started = forkable(), []  # Popen would collect a child whose object is gone
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, all that is shared
    while True:
        order, fds, _, _ = socket.recv_fds(control, 1 + PID.size, 1)
        if not order:
            os.killpg(0, signal.SIGKILL)
        if order == FORK:
            end = socket.socket(fileno=fds[0])
            if forks:
                pid = _fork(control, end, app, setup)
            else:
                started.append(setup.command("worker", end))
                pid = started[-1].pid
            control.sendall(PID.pack(pid))
        else:
            (pid,) = PID.unpack(order[1:])
            os.kill(pid, signal.SIGKILL)  # should it live on without its socket; how it died stays known
            control.sendall(PID.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def forkable() -> bool:
    """Return whether this process has one thread, as Linux counts them, and has not begun to use CUDA."""
    tasks = Path("/proc/self/task")
    return tasks.is_dir() and len(list(tasks.iterdir())) == 1 and not cuda_begun()


def _fork(control: socket.socket, end: socket.socket, app: ClientApp, setup: Setup) -> int:
    """Return the id of a new process that works at one end, which is closed here."""

    def work() -> None:
        control.close()
        worker(end, app, setup)

    pid = forked(work)
    end.close()
    return pid


def worker(end: socket.socket, app: ClientApp, setup: Setup) -> None:
    """Answer letters until the other end is gone."""
    content: bytes | None = None
    while True:
        try:
            id, note, head, new, state = take(end, LETTER)
        except (EOFError, ConnectionError):
            return
        assert id is not None and note is not None and head is not None and state is not None
        node, partition, seed, same = NOTE.unpack(note)
        content = content if same else new
        config = {"partition-id": partition, "num-partitions": setup.nodes}
        letter = Letter(id.decode(), node, head, content)
        said, after = answer(app, letter, config, setup.config, state, seed)
        put(end, said.id.encode(), said.head, said.content, None if after == state else after)


def main(part: str, fd: int) -> None:
    """Run a part in this process."""
    with sys.stdin.buffer as given:
        setup = Setup(**json.load(given))
    arrays.install()
    sys.stdin = open(os.devnull)
    end = socket.socket(fileno=fd)
    if part == "zygote":
        zygote(end, setup)
    else:
        worker(end, setup.load(), setup)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
