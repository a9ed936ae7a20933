"""A carrier to nodes that are simulated here: worker processes that live on, and take whichever node is next.

hosts = Hosts(app, nodes, ...)   starts them; they import the app while the ServerApp's side gets ready
hosts.send(letters)              returns at once: a thread hands letters to whichever worker is free
hosts.receive(seconds)           answers, as they come
hosts.close(...)                 ends them; so does the end of this process, however it ends

What a node keeps lies here, packed, and goes with its letters. Letters to one node go one after another.
"""

import os
import selectors
import signal
import socket
import time
import weakref
from collections import Counter, deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Condition, Thread

from flwr.common.constant import ErrorCode

from fedcore.cores import cores
from fedcore.errors import FedcoreError, RunFailed, TaskError
from fedcore.flower.app import App
from fedcore.flower.host import ANSWER, BURY, FORK, NOTE, PID, Setup, put, take
from fedcore.flower.letters import Answer, Letter, failed, node_id
from fedcore.seeds import integer
from fedcore.task import client_name

AHEAD = 0.02  # seconds of work that a worker has before it, so that it never waits for this process
PAUSE = 0.002  # seconds between two looks for answers while all workers are busy: a look costs them a core
AHEAD_LETTERS = 32  # which fit into the buffer of a socket, so that handing them out never blocks
AHEAD_BYTES = 1024  # of a letter that may be handed out ahead, beside the content that the worker has


@dataclass(eq=False)
class Worker:
    """A worker process.

    content: which it has. letters: that it has, the first of them at work. pace: seconds a letter, lately;
    since: when its last answer came, or its first letter went.
    """

    end: socket.socket
    pid: int
    content: bytes | None = None
    letters: deque[Letter] = field(default_factory=deque)
    pace: float = 1.0
    since: float = 0.0


class Hosts:
    """Simulated nodes of an app, by worker processes of this machine."""

    def __init__(self, app: App, nodes: int, *, seed: int, workers: int = 0) -> None:
        """Start them; what cannot be imported is told when letters are sent or answers received.

        nodes: how many; they are named as the clients of our simulations are. seed: of what an app draws from
        the global generators, with the node and how many letters it has had. workers: how many processes, 0
        for one a core.
        """
        self.partitions = {node_id(client_name(index)): index for index in range(nodes)}
        self.seed, self.workers = seed, min(workers or cores(), nodes)
        self._changed = Condition()  # guards the next four
        self._ready: deque[Letter] = deque()
        self._void: set[str] = set()  # ids of letters that nobody waits for
        self._answers: list[Answer] = []
        self._failure: FedcoreError | None = None
        # What follows is the thread's own.
        self._states: dict[int, bytes] = {}
        self._had: Counter[int] = Counter()  # letters, by node
        self._busy: dict[int, deque[Letter]] = {}  # nodes at work, and what waits for each
        self._members: list[Worker] = []
        self._came: list[Answer] = []
        self._control, far = socket.socketpair()
        self._bell, self._ear = socket.socketpair()
        setup = Setup(str(app.folder), app.client, dict(app.config), nodes)
        self._zygote = setup.command("zygote", far)
        self._stop = weakref.finalize(self, _kill, self._zygote.pid)
        self._thread = Thread(target=self._serve, name="hosts", daemon=True)
        self._thread.start()

    def nodes(self) -> Sequence[int]:
        """Return all nodes, by partition."""
        return list(self.partitions)

    def send(self, letters: Sequence[Letter]) -> None:
        """Hand letters out as soon as workers are free; raises what `receive` does."""
        with self._changed:
            self._check()
            self._ready.extend(letters)
            self._bell.send(b"!")

    def receive(self, seconds: float) -> list[Answer]:
        """Return answers, each once, as soon as there are any; none where the time is over.

        Raises TaskError where the app cannot be imported, and RunFailed where its processes are gone.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._answers or self._failure, seconds)
            self._check()
            answers, self._answers = self._answers, []
            return answers

    def forget(self, ids: Collection[str]) -> None:
        """Hand out none of these letters any more, and let no answer to them come."""
        with self._changed:
            self._void.update(ids)

    def close(self, state: str, detail: str) -> None:
        """End all processes. They hold nothing that a kill could harm."""
        self._stop()
        self._zygote.wait()
        self._thread.join()
        self._bell.close()

    def _check(self) -> None:
        if self._failure:
            raise self._failure

    def _serve(self) -> None:
        """Hand out and collect until the processes are gone: the thread."""
        try:
            (refused,) = take(self._control, 1)
            if refused:
                raise TaskError(f"the ClientApp cannot be loaded: {refused.decode()}")
            with selectors.DefaultSelector() as selector:
                selector.register(self._ear, selectors.EVENT_READ)
                selector.register(self._control, selectors.EVENT_READ)
                while True:
                    while len(self._members) < self.workers:
                        self._members.append(member := self._new())
                        selector.register(member.end, selectors.EVENT_READ, member)
                    self._hand_out()
                    if all(len(member.letters) > 1 for member in self._members):
                        time.sleep(PAUSE)
                    events = selector.select()
                    while events:
                        for key, _ in events:
                            if key.fileobj is self._ear:
                                self._ear.recv(4096)
                            elif key.fileobj is self._control:
                                raise EOFError  # it speaks only when asked
                            elif not self._hear(key.data):
                                selector.unregister(key.fileobj)
                                self._bury(key.data)
                        events = selector.select(0)
                    self._publish()
        except FedcoreError as error:
            self._failure = error
        except (EOFError, OSError):
            self._failure = RunFailed(
                "the process that starts the ClientApp's workers has ended; its log may say why"
            )
        finally:
            with self._changed:
                self._failure = self._failure or RunFailed("handing out messages to the ClientApp failed")
                for end in (self._control, self._ear, *(member.end for member in self._members)):
                    end.close()
                self._changed.notify_all()

    def _new(self) -> Worker:
        """Return a new worker."""
        near, far = socket.socketpair()
        with far:
            socket.send_fds(self._control, [FORK], [far.fileno()])
            return Worker(near, self._asked())

    def _asked(self) -> int:
        """Return the zygote's reply; raises EOFError where it is gone."""
        if len(reply := self._control.recv(PID.size, socket.MSG_WAITALL)) < PID.size:
            raise EOFError
        return int(PID.unpack(reply)[0])

    def _hand_out(self) -> None:
        """Give letters to the workers that have the fewest, as long as one can take another."""
        while True:
            with self._changed:
                letter = self._ready.popleft() if self._ready else None
                left = len(self._ready)
            if letter is None:
                return
            if letter.id in self._void:
                continue
            if letter.node in self._busy:
                self._busy[letter.node].append(letter)
                continue
            member = min(self._members, key=lambda member: len(member.letters))
            if member.letters and not self._ahead(member, letter, left):
                with self._changed:
                    self._ready.appendleft(letter)
                return
            self._give(member, letter)

    def _ahead(self, member: Worker, letter: Letter, left: int) -> bool:
        """Return whether a worker that has letters takes another before it has answered them."""
        most = min(AHEAD_LETTERS, int(AHEAD / member.pace), left // (2 * self.workers))
        size = len(letter.head) + len(self._states.get(letter.node, b""))
        return len(member.letters) <= most and letter.content is member.content and size <= AHEAD_BYTES

    def _give(self, member: Worker, letter: Letter) -> None:
        """Send a worker a letter; where it has died, its socket will say so."""
        self._busy[letter.node] = deque()
        had = self._had[letter.node]
        same = letter.content is not None and letter.content is member.content
        seed = integer("flower", self.seed, self.partitions[letter.node], had)
        note = NOTE.pack(letter.node, self.partitions[letter.node], seed, same)
        if not member.letters:
            member.since = time.perf_counter()
        member.letters.append(letter)
        member.content = letter.content
        state = self._states.get(letter.node, b"")
        with suppress(OSError):
            put(member.end, letter.id.encode(), note, letter.head, None if same else letter.content, state)

    def _hear(self, member: Worker) -> bool:
        """Take a worker's answer; return False where it has died."""
        try:
            id, head, content, state = take(member.end, ANSWER)
        except (EOFError, OSError):
            return False
        assert id is not None and head is not None
        letter = member.letters.popleft()
        now = time.perf_counter()
        member.pace += 0.2 * (now - member.since - member.pace)
        member.since = now
        if state is not None:
            self._states[letter.node] = state
        self._had[letter.node] += 1
        self._settle(letter, Answer(letter.id, head, content))
        return True

    def _settle(self, letter: Letter, answer: Answer) -> None:
        """Keep an answer that is waited for, and let the node's next letter go."""
        if letter.id not in self._void:
            self._came.append(answer)
        with self._changed:
            self._ready.extendleft(reversed(self._busy.pop(letter.node)))

    def _publish(self) -> None:
        """Let `receive` have the answers that came."""
        if self._came:
            with self._changed:
                self._answers += self._came
                self._changed.notify_all()
            self._came.clear()

    def _bury(self, member: Worker) -> None:
        """Answer for the letter that a dead worker was at; what else it had goes to others."""
        self._members.remove(member)
        member.end.close()
        self._control.send(BURY + PID.pack(member.pid))
        code = self._asked()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if not member.letters:
            raise RunFailed(f"a worker process of the ClientApp {how} while it had nothing to do")
        first, *others = member.letters
        with self._changed:
            for letter in reversed(others):
                self._ready.extendleft(reversed([letter, *self._busy.pop(letter.node)]))
        self._had[first.node] += 1
        reason = f"the worker process {how} while it ran this message"
        self._settle(first, failed(first.id, ErrorCode.CLIENT_APP_CRASHED, reason))


def _kill(group: int) -> None:
    """End a zygote, and all that it and its workers have started."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
