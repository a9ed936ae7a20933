"""What an attack needs: a task whose updates are known, a proxy on the wire, a coordinator to instrument."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from threading import Lock, Thread
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tomli_w

from fedcore.client.state import State
from fedcore.crypto.names import Name
from fedcore.layout import Vector
from fedcore.loopback import Loopback, federation
from fedcore.messages import Ref
from fedcore.operator import submission_for
from fedcore.server.authority import Authority
from fedcore.server.coordinator import Coordinator
from fedcore.server.driver import Driver
from fedcore.server.serve import start_server
from fedcore.spec import RunSpec
from fedcore.task import client_name, resolve

TASK = '''
"""Softmax regression on one picture a client, in NumPy: whoever sees the update sees the picture."""

import numpy as np

import fedcore
from fedcore.data import ArrayDataset, Split
from fedcore.layout import Entry, Layout, Parameters
from fedcore.messages import Update
from fedcore.seeds import generator

LAYOUT = Layout((Entry("weight", (10, 64), "float32", "shared"), Entry("bias", (10,), "float32", "shared")))
RATE = np.float32(0.5)


def picture(client):
    """Return the picture (1, 64) and its class (1,) that a client holds."""
    rng = generator("secret", client)
    return rng.random((1, 64), np.float32), rng.integers(0, 10, 1)


def probabilities(shared, x):
    scores = x @ shared[:640].reshape(10, 64).T + shared[640:]
    odds = np.exp(scores - scores.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def delta(shared, x, y):
    """Return one step of SGD on the cross entropy of one picture, (650,)."""
    error = probabilities(shared, x)
    error[np.arange(len(y)), y] -= 1
    return -RATE * np.concatenate([(error.T @ x).ravel(), error.sum(0)]).astype(np.float32)


class Secretive(fedcore.Task):
    metrics = {"confidential_rate": None}  # a name that nobody else has

    def trainer(self, spec):
        return Trainer()

    def data(self, client):
        x, y = picture(client.name)
        return Split(ArrayDataset(x, y), ArrayDataset(x, y))


class Trainer:
    layout = LAYOUT

    def parameters(self):
        shared = generator("initial").standard_normal(650, np.float32) / 8
        return Parameters(shared, np.zeros(0, np.float32))

    def receive(self, parameters):
        self.shared = parameters.shared.copy()

    def train(self, ref, client, examples, kept):
        x, y = examples.batch(slice(None))
        loss = -float(np.log(probabilities(self.shared, x)[0, y[0]]))
        return Update({"delta": delta(self.shared, x, y)}, {"weight": 1.0, "loss": loss, "count": 1.0}), {}

    def evaluate(self, examples, kept):
        x, y = examples.batch(slice(None))
        found = probabilities(self.shared, x)
        scalars = {"loss": -float(np.log(found[0, y[0]])), "count": 1.0}
        return Update({}, scalars | {"confidential_rate": float(found.argmax(1)[0] == y[0])})
'''
SPEC = """
[run]
name = "confidential-run"
task = "secretive:Secretive"
rounds = {rounds}
[cohort]
size = {clients}
minimum = 3
deadline = 100.0
[encryption]
updates = "{updates}"
[simulation]
engine = "sequential"
clients = {clients}
"""


@pytest.fixture
def secretive() -> ModuleType:
    """Return the task's module, as the agents have it."""
    module = ModuleType("secretive")
    exec(compile(TASK, "secretive.py", "exec"), vars(module))
    return module


class Proxy:
    """Somebody on the network: passes on what it hears, keeps a record, and may turn a bit of it.

    spoil: places in what callers send, in bytes from a connection's begin; each is used once, by whichever
    connection first gets there, and each by another one.
    """

    def __init__(self, target: str, spoil: Sequence[int] = ()) -> None:
        host, _, port = target.rpartition(":")
        self.target, self.spoil = (host, int(port)), list(spoil)
        self.heard, self.connections, self.lock = bytearray(), 0, Lock()
        self.sockets: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                caller, _ = self.listener.accept()
                server = socket.create_connection(self.target)
                self.connections += 1
                self.sockets += [caller, server]
                Thread(target=self.pump, args=(caller, server, True), daemon=True).start()
                Thread(target=self.pump, args=(server, caller, False), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket, altered: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                with self.lock:
                    places = [p for p in self.spoil if altered and passed <= p < passed + len(data)]
                    for place in places[:1]:
                        self.spoil.remove(place)
                        data[place - passed] ^= 1
                        altered = False
                    self.heard += data
                passed += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in [self.listener, *self.sockets]:
            end.close()


class Tapped:
    """A federation of processes whose agents reach the coordinator through a proxy."""

    def __init__(self, loopback: Loopback, proxy: Proxy) -> None:
        self.loopback, self.proxy = loopback, proxy

    def run(self, clients: int, rounds: int, updates: str) -> str:
        """Play a run to its end and return the hash of its model."""
        loopback, names = self.loopback, [client_name(i) for i in range(clients)]
        spec = SPEC.format(clients=clients, rounds=rounds, updates=updates)
        (loopback.folder / "run.toml").write_text(spec, encoding="utf-8")
        loopback.address = self.proxy.address
        loopback.make_agents(names, lambda _: {"tasks": {"Secretive": "secretive:Secretive"}})
        for name in names:
            (loopback.folder / name / "secretive.py").write_text(TASK, encoding="utf-8")
            loopback.start(name)
        return loopback.fedcore("run", "submit", "run.toml", "--watch").split()[-1]


@pytest.fixture
def spoil(request: pytest.FixtureRequest) -> Sequence[int]:
    """Return where the proxy turns a bit; parametrize it indirectly."""
    return getattr(request, "param", ())


@pytest.fixture
def tapped(tmp_path: Path, spoil: Sequence[int]) -> Iterator[Tapped]:
    """A federation of processes with a proxy before its coordinator."""
    (tmp_path / "secretive.py").write_text(TASK, encoding="utf-8")
    with federation(tmp_path) as loopback:
        proxy = Proxy(loopback.address, spoil)
        yield Tapped(loopback, proxy)
        proxy.close()


def plainly(heard: bytes | bytearray, vector: Vector) -> bool:
    """Tell whether any eight numbers of a vector, one after the other, are among the bytes."""
    raw = np.ascontiguousarray(vector).astype(vector.dtype.newbyteorder("<")).tobytes()
    width = 8 * vector.dtype.itemsize
    return any(raw[start : start + width] in heard for start in range(0, len(raw) - width + 1, width))


class Deployment:
    """A coordinator in this process, to be looked into or made to lie, and agents as processes."""

    def __init__(self, folder: Path, authority: Authority, coordinator: Coordinator, port: int) -> None:
        self.folder, self.authority, self.coordinator = folder, authority, coordinator
        self.address = f"127.0.0.1:{port}"
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, names: Sequence[str], **policy: Any) -> None:
        """Start agents that are enrolled, with the same policy each."""
        for name in names:
            folder = self.folder / name
            folder.mkdir()
            table = {"coordinator": self.address, "tasks": {"Secretive": "secretive:Secretive"}}
            (folder / "agent.toml").write_text(tomli_w.dumps({**table, "policy": policy}), encoding="utf-8")
            (folder / "secretive.py").write_text(TASK, encoding="utf-8")
            self.authority.new_identity(Name("fed", "client", name)).save(folder / "state" / "identity")
            command = [sys.executable, "-m", "fedcore", "client", "start", "--dir", str(folder)]
            with (folder / "log").open("wb") as log:
                self.agents[name] = subprocess.Popen(command, stdout=log, stderr=log)

    async def submit(self, clients: int, updates: str, *sets: str) -> Driver:
        """Hand in a run of the secretive task with a round, and return what drives it."""
        path, blob = self.folder / "run.toml", self.coordinator.blobs.folder / "initial"
        path.write_text(SPEC.format(clients=clients, rounds=1, updates=updates), encoding="utf-8")
        spec = RunSpec.load(path, ["evaluation.every=0", 'encryption.encoding="exact"', *sets])
        submission, parameters = submission_for(resolve("secretive:Secretive", self.folder), spec)
        blob.write_bytes(parameters.shared.tobytes())
        run = await self.coordinator.submit(Name("fed", "operator", "alice"), submission, blob)
        return self.coordinator.drivers[run.id]

    async def ended(self, driver: Driver) -> Driver:
        """Wait for the end of a run."""
        async with asyncio.timeout(120):
            while driver.run.state == "running":
                await driver.changed.next.wait()
        return driver

    def aborted(self, name: str) -> dict[Ref, str]:
        """Return which attempts at secure aggregation an agent has left, and why."""
        rows = State(self.folder / name / "state").journal(100)
        return {parsed(row["ref"]): row["reason"] for row in rows if row["event"] == "aborted"}

    def stop(self) -> None:
        for agent in self.agents.values():
            agent.terminate()
        for agent in self.agents.values():
            agent.wait(15)


def parsed(ref: str) -> Ref:
    """Return a ref as a journal has it."""
    run, number, kind = ref.split("/")
    round, attempt = number.split(".")
    return Ref(run, int(round), int(attempt), kind)  # type: ignore[arg-type]


@asynccontextmanager
async def deployed(folder: Path) -> AsyncIterator[Deployment]:
    """Run a coordinator in a folder, and end it with all agents."""
    authority = Authority.create(folder / "authority", "fed", "127.0.0.1:8700")
    (folder / "coordinator").mkdir()
    (folder / "secretive.py").write_text(TASK, encoding="utf-8")
    identity = authority.new_identity(Name("fed", "coordinator", "main"))
    coordinator = Coordinator(folder / "coordinator", identity)
    server, port = await start_server(coordinator, "127.0.0.1:0")
    deployment = Deployment(folder, authority, coordinator, port)
    before = list(sys.path)
    try:
        await coordinator.start()
        yield deployment
    finally:
        await asyncio.to_thread(deployment.stop)
        await server.stop(1.0)
        await coordinator.close()
        sys.path[:] = before
        sys.modules.pop("secretive", None)
