"""Mail: what a ServerApp's process does with a coordinator that restarts, forgets, or repeats itself.

The coordinator is a stand-in that keeps the relay's rules; `tests/integration` has a real one.
"""

import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.supercore.run import RunNotRunningException

import fedcore.wire
from fedcore.flower import mail as module
from fedcore.flower.app import App
from fedcore.flower.letters import Letter, node_id
from fedcore.flower.mail import Mail
from fedcore.operator import Operator
from fedcore.wire.v1 import coordinator_pb2, relay_pb2

grpc = fedcore.wire.grpc
Code = grpc.StatusCode
HEAD = b'{"created":4000000000,"ttl":60}'


class Refused(grpc.RpcError):
    """A call that did not succeed."""

    def __init__(self, code: Any, details: str = "") -> None:
        super().__init__(code, details)

    def code(self) -> Any:
        return self.args[0]

    def details(self) -> str:
        return str(self.args[1])


class Stream:
    """The answers of a run, until None ends it or an error cuts it."""

    def __init__(self) -> None:
        self.parts: SimpleQueue[Any] = SimpleQueue()

    def __iter__(self) -> Iterator[Any]:
        while (part := self.parts.get()) is not None:
            if isinstance(part, Exception):
                raise part
            yield part

    def cancel(self) -> None:
        self.parts.put(Refused(Code.CANCELLED))


class Coordinator:
    """Stands for `Operator`, its stubs, and what is behind them. `trouble`: raised by the calls to come."""

    address = "here:1"

    def __init__(self) -> None:
        self.post = self
        self.trouble: list[Refused] = []
        self.contents: dict[str, bytes] = {}
        self.deposits: list[bytes] = []
        self.letters: list[Any] = []
        self.batches: list[int] = []
        self.settled: list[str] = []
        self.ends: list[tuple[str, str, str]] = []
        self.state, self.others, self.forgetful, self.renewals = "running", 0, False, 0
        self.stream = Stream()

    def call(self) -> None:
        if self.trouble:
            raise self.trouble.pop(0)

    def show(self, run: str) -> Any:
        return SimpleNamespace(state=self.state)

    def renew(self) -> float:
        self.renewals += 1
        return 600.0

    def Open(self, header: Any, timeout: float) -> Any:
        return coordinator_pb2.RunInfo(run=f"{header.name}-1")

    def Hosts(self, run: Any, timeout: float) -> Any:
        self.call()
        return relay_pb2.HostList(clients=["ann", "bob"], others=self.others)

    def Deposit(self, parts: Iterator[Any], timeout: float) -> Any:
        self.call()
        header, *chunks = parts
        content = b"".join(part.chunk.data for part in chunks)
        assert sha256(content).hexdigest() == header.header.content.sha256
        self.contents[header.header.content.sha256] = content
        self.deposits.append(content)

    def Send(self, request: Any, timeout: float) -> Any:
        self.call()
        if self.forgetful:
            self.forgetful = False
            self.contents.clear()
        named = {letter.content.sha256 for letter in request.letters if letter.content.size}
        if missing := named - self.contents.keys():
            return relay_pb2.Missing(contents=missing)
        self.letters += request.letters
        self.batches.append(len(request.letters))
        return relay_pb2.Missing()

    def Answers(self, run: Any, timeout: float) -> Stream:
        return self.stream

    def answer(self, id: str, content: bytes = b"") -> None:
        """Have a letter answered."""
        address = sha256(content).hexdigest()
        self.contents[address] = content
        blob = coordinator_pb2.Blob(sha256=address, size=len(content)) if content else None
        self.stream.parts.put(relay_pb2.Answer(id=id, head=b"{}", content=blob))
        self.last = content

    def Collect(self, taking: Any, timeout: float) -> Iterator[Any]:
        self.call()
        yield coordinator_pb2.Chunk(index=0, data=self.last[:3])
        yield coordinator_pb2.Chunk(index=1, data=self.last[3:])

    def Settle(self, names: Any, timeout: float) -> Any:
        self.call()
        self.settled += names.ids

    def Close(self, end: Any, timeout: float) -> Any:
        self.call()
        self.ends.append((end.run, end.state, end.detail))


@pytest.fixture
def coordinator() -> Coordinator:
    return Coordinator()


def operator(coordinator: Coordinator) -> Operator:
    """Return the stand-in as what it stands for."""
    return cast(Operator, coordinator)


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORTEST", 0.005)


@pytest.fixture
def mail(coordinator: Coordinator) -> Iterator[Mail]:
    running = Mail(operator(coordinator), "tiny-1")
    running.nodes()
    yield running
    coordinator.trouble.clear()
    running.close("finished", "")


def letter(id: str, content: bytes | None = None, client: str = "ann") -> Letter:
    """Return a letter to a client."""
    return Letter(id, node_id(client), HEAD, content)


def soon(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_run_is_opened_under_the_apps_name(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(App, "digest", "d" * 64)
    mail = Mail.open(coordinator, App(None, "lab/tiny", "", ""))  # type: ignore[arg-type]
    assert mail.run == "tiny-1"
    mail.close("stopped", "enough")
    assert coordinator.ends == [("tiny-1", "stopped", "enough")]


def test_letters_go_to_clients_and_answers_come_back(mail: Mail, coordinator: Coordinator) -> None:
    assert mail.nodes() == [node_id("ann"), node_id("bob")]
    shared = b"model" * 10
    mail.send([letter("1", shared), letter("2", shared, "bob"), letter("3", b"other"), letter("4")])
    assert coordinator.deposits == [shared, b"other"]
    assert [(sent.id, sent.client) for sent in coordinator.letters] == [
        ("1", "ann"),
        ("2", "bob"),
        ("3", "ann"),
        ("4", "ann"),
    ]
    assert coordinator.letters[0].ttl > 60 and coordinator.letters[3].content.size == 0
    coordinator.answer("2", b"trained")
    (answer,) = mail.receive(5)
    assert (answer.id, answer.head, answer.content) == ("2", b"{}", b"trained")
    assert mail.receive(0) == []
    assert coordinator.settled == ["2"]


def test_agents_with_other_files_are_told_of_once(
    mail: Mail, coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    for coordinator.others in (0, 1, 1, 0):
        mail.nodes()
    (record,) = caplog.records
    assert record.getMessage().startswith("agents with other files: 1;")


def test_an_outage_is_waited_out_and_told_once(
    mail: Mail, coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    down = Refused(Code.UNAVAILABLE, "refused")
    coordinator.trouble = [down, down, Refused(Code.RESOURCE_EXHAUSTED), down]
    mail.send([letter("1", b"model")])
    assert [sent.id for sent in coordinator.letters] == ["1"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("the coordinator at here:1 cannot be reached") and "trying again" in said[0]
    assert said[1] == "the coordinator at here:1 is back"
    coordinator.trouble = [down]
    assert mail.nodes() == [node_id("ann"), node_id("bob")]  # of before


def test_what_a_coordinator_forgot_is_deposited_again(mail: Mail, coordinator: Coordinator) -> None:
    coordinator.forgetful = True
    mail.send([letter("1", b"model"), letter("2", b"model")])
    assert coordinator.deposits == [b"model", b"model"]
    assert [sent.id for sent in coordinator.letters] == ["1", "2"]


def test_a_stream_that_breaks_is_opened_again_and_no_answer_comes_twice(
    mail: Mail, coordinator: Coordinator
) -> None:
    mail.send([letter("1"), letter("2")])
    coordinator.answer("1")
    soon(lambda: not mail._arrived.empty())
    coordinator.stream.parts.put(Refused(Code.UNAVAILABLE))
    coordinator.answer("1")  # not settled yet, so it comes again
    coordinator.answer("2")
    assert [answer.id for answer in mail.receive(5)] == ["1"]
    assert [answer.id for answer in mail.receive(5)] == ["2"]
    assert mail.receive(0.05) == []
    assert set(coordinator.settled) == {"1", "2"}


def test_an_answer_whose_content_is_cut_comes_again(mail: Mail, coordinator: Coordinator) -> None:
    mail.send([letter("1")])
    coordinator.trouble = [Refused(Code.UNAVAILABLE)]
    coordinator.answer("1", b"trained")
    coordinator.answer("1", b"trained")
    soon(lambda: not mail._arrived.empty())
    assert [answer.content for answer in mail.receive(5)] == [b"trained"]


def test_a_letter_that_is_forgotten_is_settled_and_its_answer_dropped(
    mail: Mail, coordinator: Coordinator
) -> None:
    mail.send([letter("1"), letter("2")])
    mail.forget(["1"])
    coordinator.answer("1")
    coordinator.answer("2")
    assert [answer.id for answer in mail.receive(5)] == ["2"]
    coordinator.trouble = [Refused(Code.UNAVAILABLE)]
    mail.receive(0)
    mail.receive(0)
    assert set(coordinator.settled) == {"1", "2"}


def test_an_answer_that_is_forgotten_while_it_comes_harms_nobody(
    mail: Mail, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = coordinator.Collect

    def settled(taking: Any, timeout: float) -> Iterator[Any]:
        monkeypatch.setattr(coordinator, "Collect", collect)
        mail.forget(["1"])  # as another thread does at its time-out
        raise Refused(Code.FAILED_PRECONDITION, "it is settled")

    monkeypatch.setattr(coordinator, "Collect", settled)
    mail.send([letter("1"), letter("2")])
    coordinator.answer("1", b"late")
    coordinator.answer("2", b"in time")
    assert [answer.id for answer in mail.receive(5)] == ["2"]


def test_a_long_run_looks_after_its_certificate(mail: Mail, coordinator: Coordinator) -> None:
    soon(lambda: coordinator.renewals == 1)
    coordinator.stream.parts.put(Refused(Code.DEADLINE_EXCEEDED))  # the stream's own, when a look is due
    soon(lambda: coordinator.renewals == 2)
    mail.send([letter("1")])
    coordinator.answer("1")
    assert [answer.id for answer in mail.receive(5)] == ["1"]


def test_a_run_that_was_ended_elsewhere_is_over(mail: Mail, coordinator: Coordinator) -> None:
    mail.send([letter("1")])
    coordinator.answer("1")
    coordinator.stream.parts.put(None)
    soon(lambda: mail._arrived.qsize() == 2)
    assert [answer.id for answer in mail.receive(1)] == ["1"]  # what came before counts
    with pytest.raises(RunNotRunningException):
        mail.receive(1)
    coordinator.state = "stopped"
    for call in (lambda: mail.send([letter("2")]), mail.nodes):
        coordinator.trouble = [Refused(Code.FAILED_PRECONDITION, "the run has ended")]
        with pytest.raises(RunNotRunningException):
            call()


def test_many_letters_go_in_batches(mail: Mail, coordinator: Coordinator) -> None:
    mail.send([letter(str(number)) for number in range(2500)])
    assert coordinator.batches == [1000, 1000, 500]
    big = HEAD + b" " * 15_000
    mail.send([Letter(f"big-{number}", node_id("ann"), big, None) for number in range(200)])
    assert coordinator.batches[3:] == [139, 61]
    assert [sent.id for sent in coordinator.letters[:2500]] == [str(number) for number in range(2500)]


def test_an_end_that_cannot_be_told_is_left_to_a_person(
    coordinator: Coordinator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST_TRY", 0.1)
    mail = Mail(operator(coordinator), "tiny-1")
    coordinator.trouble = [Refused(Code.UNAVAILABLE, "refused")] * 1000
    began = time.monotonic()
    mail.close("stopped", "")
    assert time.monotonic() - began < 1
    assert caplog.records[-1].getMessage().endswith("end the run with: fedcore run stop tiny-1")
