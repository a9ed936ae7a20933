"""The Fleet: Flower's own Grid, message for message, over a carrier that answers in this process."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.server.superlink.linkstate import utils
from flwr.supercore.run import Run, RunNotRunningException

from fedcore.flower import grid as module
from fedcore.flower.grid import Fleet
from fedcore.flower.guards import Limits
from fedcore.flower.letters import Answer, message_of, overrides_of
from tests.flower.desk import Desk, echo


def fleet(desk: Desk, **options: Any) -> Fleet:
    """Return the grid of run 5 over a carrier."""
    return Fleet(desk, Run.create_empty(5), **options)


def messages(*nodes: int, ttl: float | None = None, **content: Any) -> list[Message]:
    """Return a message to each node; all share one content."""
    record = RecordDict({"config": ConfigRecord(content or {"server-round": 1})})
    return [Message(record, node, "train", group_id="1", ttl=ttl) for node in nodes]


def test_nodes_come_in_the_carriers_order() -> None:
    assert fleet(Desk()).get_node_ids() == [30, 10, 20]
    assert [node.node_id for node in fleet(Desk()).get_nodes()] == [30, 10, 20]


def test_replies_come_in_the_order_of_their_messages() -> None:
    of = fleet(Desk())
    sent = messages(20, 30, 10)
    replies = of.send_and_receive(sent)
    assert [reply.metadata.src_node_id for reply in replies] == [20, 30, 10]
    for message, reply in zip(sent, replies, strict=True):
        assert reply.metadata.reply_to_message_id == message.metadata.message_id
        assert (reply.metadata.run_id, reply.metadata.group_id, reply.metadata.message_type) == (
            5,
            "1",
            "train",
        )
        assert reply.metadata.dst_node_id == 1 and reply.metadata.delivered_at
    assert (of.tally.sent, of.tally.answered, of.tally.settled) == (3, 3, 3)


def test_a_shared_content_is_packed_once_and_unpacked_for_each() -> None:
    desk = Desk()
    of = fleet(desk)
    of.push_messages(messages(10, 20))
    first, second = desk.letters
    assert first.content is second.content
    assert message_of(first).content is not message_of(second).content


def test_overrides_go_with_every_letter() -> None:
    desk = Desk()
    fleet(desk, overrides={"lr": 0.5}).push_messages(messages(10))
    assert overrides_of(desk.letters[0]) == {"lr": 0.5}


def test_pull_gives_each_reply_once() -> None:
    of = fleet(Desk())
    ids = of.push_messages(messages(10, 20, 30))
    assert len(set(ids)) == 3
    first = of.pull_messages(ids)
    assert [reply.metadata.src_node_id for reply in first] == [30]
    assert of.pull_messages(ids[:1]) == []
    of.pull_messages([])
    assert [reply.metadata.src_node_id for reply in of.pull_messages(ids[:2])] == [10, 20]
    (again,) = of.pull_messages(ids[:1])
    assert again.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def test_nobody_waits_longer_than_asked() -> None:
    desk = Desk(lambda message: None if message.metadata.dst_node_id == 20 else echo(message))
    of = fleet(desk)
    began = time.monotonic()
    replies = of.send_and_receive(messages(10, 20, 30), timeout=0.2)
    assert 0.2 <= time.monotonic() - began < 1
    assert [reply.metadata.src_node_id for reply in replies] == [10, 30]
    assert len(desk.forgotten) == of.tally.lost == 1
    assert of.send_and_receive(messages(10), timeout=0) == []
    assert of.send_and_receive([]) == []


def test_a_message_that_cannot_be_sent_has_no_id() -> None:
    of = fleet(Desk())
    late = messages(10, ttl=0.001)
    other = messages(10)
    other[0].metadata.__dict__["_run_id"] = 6
    time.sleep(0.01)
    assert len(of.push_messages([*messages(10, 99), *late, *other])) == 1
    assert of.tally.sent == 1
    (answered,) = messages(10)
    of.push_messages([answered])
    with pytest.raises(ValueError, match="Invalid message"):
        of.push_messages([Message(RecordDict(), reply_to=answered)])


def test_errors_of_the_store_are_flowers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP", 0.01)
    monkeypatch.setattr(module, "LOOK", 0.0)
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    desk = Desk(lambda message: None)
    of = fleet(desk)
    sent = [*messages(10, ttl=0.05), *messages(20)]
    of.get_node_ids()
    desk.present = [10, 30]
    expired, away = of.send_and_receive(sent)
    theirs = utils.create_message_error_unavailable_ins_message(sent[0].metadata.message_id, 5)
    compare(expired, theirs)
    theirs = utils.create_message_error_unavailable_res_message(sent[1].metadata, "node_unavail")
    compare(away, theirs)
    assert sorted(desk.forgotten) == sorted(message.metadata.message_id for message in sent)
    assert of.tally.lost == of.tally.settled == 2


def test_a_message_expires_before_anybody_looks_for_nodes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The round timeout of ServerApps of the older kind is their messages' time to live."""
    monkeypatch.setattr(module, "STEP", 0.01)
    of = fleet(Desk(lambda message: None))
    began = time.monotonic()
    (expired,) = of.send_and_receive(messages(10, ttl=0.05))
    assert expired.error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert time.monotonic() - began < module.LOOK / 2


def compare(ours: Message, theirs: Message) -> None:
    """Two errors are the same but for their own ids and times."""
    assert ours.error == theirs.error
    for name in ("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "message_type"):
        assert getattr(ours.metadata, name) == getattr(theirs.metadata, name)


def test_a_reply_that_came_too_late_is_an_error() -> None:
    of = fleet(Desk(lambda message: Message(message.content, reply_to=message, ttl=0.01)))
    ids = of.push_messages(messages(10))
    assert of.pull_messages(()) == []
    time.sleep(0.02)
    (late,) = of.pull_messages(ids)
    assert (late.error.code, late.error.reason) == (4, utils.REPLY_MESSAGE_UNAVAILABLE_ERROR_REASON)


def test_every_reply_passes_the_guards() -> None:
    def poison(message: Message) -> Message:
        arrays = ArrayRecord({"w": Array(np.array([np.nan if message.metadata.dst_node_id == 10 else 1.0]))})
        metrics = MetricRecord({"num-examples": 5 if message.metadata.dst_node_id == 30 else 10**12})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    of = fleet(Desk(poison), limits=Limits(100))
    replies = of.send_and_receive(messages(10, 20, 30))
    assert [reply.has_error() for reply in replies] == [True, True, False]
    assert (of.tally.refused, of.tally.failed, of.tally.answered) == (2, 0, 1)


def test_an_answer_that_cannot_be_read_is_an_error() -> None:
    desk = Desk()
    of = fleet(desk)
    ids = of.push_messages(messages(10))
    desk.receive = lambda seconds: [Answer(ids[0], b"{}", None), Answer("unknown", b"", None)]  # type: ignore[method-assign]
    (reply,) = of.pull_messages(ids)
    assert reply.error.code == ErrorCode.UNKNOWN and of.tally.failed == 1


def test_threads_may_share_it() -> None:
    def slow(message: Message) -> Message:
        time.sleep(0.002)
        return echo(message)

    of = fleet(Desk(slow, range(2, 42)))
    found: dict[int, list[int]] = {}

    def ask(node: int) -> None:
        for number in range(3):
            (reply,) = of.send_and_receive(messages(node, number=number))
            config = reply.content["config"]
            found.setdefault(reply.metadata.src_node_id, []).append(config["number"])  # type: ignore[arg-type]

    threads = [threading.Thread(target=ask, args=(node,)) for node in of.get_node_ids()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {node: [0, 1, 2] for node in range(2, 42)}


def test_a_run_that_is_over_lets_nobody_wait() -> None:
    of = fleet(Desk(lambda message: None))
    threading.Timer(0.1, of.stop).start()
    began = time.monotonic()
    with pytest.raises(RunNotRunningException):
        of.send_and_receive(messages(10))
    assert time.monotonic() - began < 1.5
    for call in (of.get_node_ids, lambda: of.push_messages([]), lambda: of.pull_messages([])):
        with pytest.raises(RunNotRunningException):
            call()
