"""A carrier to devices: letters and answers go through a coordinator's relay, and outlive its restarts.

    mail = Mail.open(operator, app)    a run on the coordinator
    mail.send(letters)                 returns when they are on its disk
    mail.receive(seconds)              answers, as devices send them
    mail.close(...)                    ends the run there, and all that was kept of it

While the coordinator cannot be reached, calls wait and try again. A letter has its id for good, so what is
sent twice is one letter.
"""

import io
import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import chain, count
from logging import INFO, WARNING
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from flwr.supercore import log
from flwr.supercore.run import RunNotRunningException

from fedcore.errors import ProtocolError
from fedcore.flower.app import App
from fedcore.flower.grid import End
from fedcore.flower.letters import Answer, Letter, node_id
from fedcore.messages import Blob
from fedcore.operator import DEADLINE, TRANSFER_DEADLINE, Operator, explained
from fedcore.waits import doubling
from fedcore.wire import grpc
from fedcore.wire.chunks import chunks
from fedcore.wire.codec import to_wire
from fedcore.wire.relay import MAX_LETTERS, AppLetter, LetterRef, answer_from_wire
from fedcore.wire.v1 import relay_pb2 as pb
from fedcore.wire.v1.coordinator_pb2 import RunName, TaskName

AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
SHORTEST, LONGEST = 0.1, 5.0  # seconds between two tries, twice as long each time
BATCH_BYTES = 2**21  # of heads in one message; gRPC takes 4 MiB
FAREWELL, LAST_TRY = 30.0, 1.0  # seconds for which the end of a run is told: its own end, and after Ctrl-C


class Mail:
    """A run of an app on a coordinator. `run` is its id there."""

    def __init__(self, operator: Operator, run: str) -> None:
        """Listen to the answers of a run, in a thread that ends with it."""
        self.operator, self.run = operator, run
        self._names: dict[int, str] = {}  # of every node that was ever seen
        self._present: list[int] = []
        self._others = 0
        self._sent: set[str] = set()  # letters whose answers are waited for
        self._done: deque[str] = deque()  # those that can be settled
        self._arrived: SimpleQueue[Answer | BaseException] = SimpleQueue()
        self._over, self._reached = Event(), Event()
        self._reached.set()
        self._stream: Any = None
        Thread(target=self._listen, daemon=True).start()

    @classmethod
    def open(cls, operator: Operator, app: App) -> "Mail":
        """Begin a run of an app."""
        header = pb.AppHeader(app=TaskName(name=app.name, digest=app.digest), name=app.name.split("/")[-1])
        return cls(operator, operator.post.Open(header, timeout=DEADLINE).run)

    def nodes(self) -> Sequence[int]:
        """Return the devices that are connected and host the app, by name; those of before in an outage."""
        try:
            found = self.operator.post.Hosts(RunName(run=self.run), timeout=DEADLINE)
        except grpc.RpcError as error:
            if error.code() not in AGAIN:
                raise self._reason(error) from error
            self._lose(error)
            return self._present
        self._tell(found.others)
        self._names |= (named := {node_id(name): name for name in found.clients})
        self._present = list(named)
        return self._present

    def send(self, letters: Sequence[Letter]) -> None:
        """Hand in letters, after the contents that they name.

        Raises RunNotRunningException where the run was ended from elsewhere.
        """
        blobs: dict[int, Blob | None] = {id(None): None}
        contents: dict[str, bytes] = {}
        for letter in letters:
            if (content := letter.content) is not None and id(content) not in blobs:
                blobs[id(content)] = blob = self._deposit(content)
                contents[blob.sha256] = content
        self._sent.update(letter.id for letter in letters)
        for batch in _batches(letters):
            parts = [to_wire(self._addressed(letter, blobs[id(letter.content)])) for letter in batch]
            request = pb.LetterList(run=self.run, letters=parts)
            while missing := self._send(request):
                for address in missing:  # the coordinator was restarted since, or what named it is settled
                    self._deposit(contents[address])

    def receive(self, seconds: float) -> list[Answer]:
        """Return the answers that have come, after at most some seconds.

        Raises RunNotRunningException where the run was ended from elsewhere.
        """
        self._settle()
        answers: list[Answer] = []
        with suppress(Empty):
            item = self._arrived.get(timeout=seconds) if seconds > 0 else self._arrived.get_nowait()
            while isinstance(item, Answer):
                answers.append(item)
                item = self._arrived.get_nowait()
            if not answers:
                raise item
            self._arrived.put(item)  # it is the last one
        self._done.extend(answer.id for answer in answers)
        return answers

    def forget(self, ids: Collection[str]) -> None:
        """Have letters withdrawn."""
        self._sent.difference_update(ids)
        self._done.extend(ids)

    def close(self, state: End, detail: str) -> None:
        """End the run on the coordinator; where that cannot be reached, say how to do it later."""
        self._over.set()
        if self._stream is not None:
            self._stream.cancel()
        end = time.monotonic() + (LAST_TRY if state == "stopped" else FAREWELL)
        request = pb.AppEnd(run=self.run, state=state, detail=detail)
        while True:
            try:
                self.operator.post.Close(request, timeout=max(LAST_TRY, end - time.monotonic()))
                return
            except grpc.RpcError as error:
                if error.code() not in AGAIN or time.monotonic() > end:
                    problem = explained(error, self.operator.address)
                    log(WARNING, "%s; end the run with: fedcore run stop %s", problem, self.run)
                    return
                time.sleep(SHORTEST)

    # --- sending

    def _addressed(self, letter: Letter, content: Blob | None) -> AppLetter:
        head = json.loads(letter.head)
        ttl = max(head["created"] + head["ttl"] - time.time(), 1e-3)
        return AppLetter(LetterRef(self.run, letter.id), self._names[letter.node], letter.head, content, ttl)

    def _deposit(self, content: bytes) -> Blob:
        """Hand in a content; it is sent only where the coordinator does not have it."""
        blob = Blob(sha256(content).hexdigest(), len(content))
        header = pb.DepositPart(header=pb.DepositHeader(run=self.run, content=to_wire(blob)))

        def parts() -> Iterator[pb.DepositPart]:
            return chain([header], (pb.DepositPart(chunk=chunk) for chunk in chunks(io.BytesIO(content))))

        self._surely(lambda: self.operator.post.Deposit(parts(), timeout=TRANSFER_DEADLINE))
        return blob

    def _send(self, request: pb.LetterList) -> Sequence[str]:
        """Hand in letters, or return which of their contents are missing."""
        answered: pb.Missing = self._surely(lambda: self.operator.post.Send(request, timeout=DEADLINE))
        return answered.contents

    def _settle(self) -> None:
        """Have the coordinator forget letters, if it can hear it now; otherwise later."""
        while ids := [self._done.popleft() for _ in range(min(len(self._done), MAX_LETTERS))]:
            try:
                self.operator.post.Settle(pb.LetterNames(run=self.run, ids=ids), timeout=DEADLINE)
            except grpc.RpcError as error:
                self._done.extend(ids)
                if error.code() not in AGAIN:
                    raise self._reason(error) from error
                return

    def _surely(self, call: Callable[[], Any]) -> Any:
        """Make a call, again and again while the coordinator cannot take it; return what it returns."""
        for attempt in count():
            try:
                answered = call()
            except grpc.RpcError as error:
                if error.code() not in AGAIN:
                    raise self._reason(error) from error
                self._lose(error)
            else:
                self._find()
                return answered
            if self._over.wait(doubling(attempt, SHORTEST, LONGEST)):
                raise RunNotRunningException

    # --- listening

    def _listen(self) -> None:
        """Take answers, until the run is over."""
        attempts = 0
        while not self._over.is_set():
            try:
                due = self.operator.renew()
                self._stream = self.operator.post.Answers(RunName(run=self.run), timeout=due)
                for message in self._stream:
                    attempts = 0
                    self._take(message)
                self._arrived.put(RunNotRunningException())
                return
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:  # of this side
                    continue
                if error.code() not in AGAIN:
                    self._arrived.put(self._reason(error))
                    return
                self._lose(error)
            except ProtocolError as error:
                self._arrived.put(error)
                return
            self._over.wait(doubling(attempts, SHORTEST, LONGEST))
            attempts += 1

    def _take(self, message: pb.Answer) -> None:
        """Fetch the content of an answer, unless it came before or is not waited for."""
        self._find()
        answer = answer_from_wire(message, self.run)
        id = answer.ref.id
        if id not in self._sent:
            self._done.append(id)
            return
        try:
            content = self._collect(answer.ref, answer.content) if answer.content else None
        except grpc.RpcError:
            if id in self._sent:
                raise
            return  # it was settled meanwhile, since nobody waits for it any more
        self._sent.discard(id)
        self._arrived.put(Answer(id, answer.head, content))

    def _collect(self, ref: LetterRef, blob: Blob) -> bytes:
        taking = pb.Taking(letter=to_wire(ref))
        received = self.operator.post.Collect(taking, timeout=TRANSFER_DEADLINE)
        content = b"".join(chunk.data for chunk in received)
        if sha256(content).hexdigest() != blob.sha256:
            raise ProtocolError(f"the answer to {ref} came with another SHA-256 than announced")
        return content

    # --- what a person should know

    def _tell(self, others: int) -> None:
        """Say how many agents have other files of the app, whenever that changes."""
        if others and others != self._others:
            log(
                WARNING,
                "agents with other files: %d; 'fedcore client status' tells the digest of theirs",
                others,
            )
        self._others = others

    def _lose(self, error: grpc.RpcError) -> None:
        """Say that the coordinator cannot be reached, once."""
        if self._reached.is_set() and not self._over.is_set():
            self._reached.clear()
            log(WARNING, "%s; trying again", explained(error, self.operator.address))

    def _find(self) -> None:
        if not self._reached.is_set():
            self._reached.set()
            log(INFO, "the coordinator at %s is back", self.operator.address)

    def _reason(self, error: grpc.RpcError) -> BaseException:
        """Return what a refused call means: the run is over, or what the coordinator said."""
        with suppress(grpc.RpcError):
            if self.operator.show(self.run).state != "running":
                return RunNotRunningException()
        return explained(error, self.operator.address)


def _batches(letters: Sequence[Letter]) -> Iterator[list[Letter]]:
    """Yield letters in lists that fit into one message."""
    batch: list[Letter] = []
    size = 0
    for letter in letters:
        if batch and (len(batch) == MAX_LETTERS or size + len(letter.head) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(letter)
        size += len(letter.head)
    if batch:
        yield batch
