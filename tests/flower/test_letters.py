import json
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.app.user_config import UserConfig
from flwr.common.constant import ErrorCode

from fedcore.client import hosting
from fedcore.errors import ProtocolError
from fedcore.flower.letters import (
    HEAD_BYTES,
    Answer,
    Letter,
    answer_of,
    failed,
    letter_of,
    message_of,
    node_id,
    overrides_of,
    reply_of,
)
from fedcore.flower.records import pack
from fedcore.wire.relay import LetterRef

CONTENT = RecordDict({"arrays": ArrayRecord([np.arange(3.0)])})


def message(**fields: Any) -> Message:
    of = {
        "run_id": 2**62,
        "message_id": "m-1",
        "src_node_id": 1,
        "dst_node_id": 2**63 - 1,
        "reply_to_message_id": "",
        "group_id": "round 3",
        "created_at": 1700000000.123456,
        "ttl": 3600.5,
        "message_type": "train.warm_up",
        "src_task_id": 1,
    }
    return make_message(Metadata(**{**of, **fields}), content=CONTENT)


def test_a_message_arrives_as_it_was_sent() -> None:
    sent = message()
    content = pack(CONTENT)
    letter = letter_of(sent, content)
    came = message_of(letter)
    assert came.metadata == sent.metadata and came.content == CONTENT
    assert letter.content is content and came.content is not message_of(letter).content
    assert (letter.id, letter.node) == ("m-1", 2**63 - 1)


def test_a_reply_comes_back_and_only_what_it_says_of_itself_is_believed() -> None:
    sent = message()
    reply = Message(CONTENT, reply_to=message_of(letter_of(sent, pack(CONTENT))))
    back = reply_of(answer_of(reply), sent.metadata)
    assert back.content == CONTENT
    mine, theirs = dict(vars(back.metadata)), dict(vars(reply.metadata))
    assert mine.pop("_message_id") == "m-1-reply" and theirs.pop("_message_id") == ""
    assert mine == theirs
    # Whatever node is in its head: it is from the node that was asked.
    head = json.dumps({**json.loads(answer_of(reply).head), "from": 5, "src_node_id": 5}).encode()
    assert reply_of(Answer("m-1", head, pack(CONTENT)), sent.metadata).metadata.src_node_id == 2**63 - 1


def test_errors_travel_and_a_long_reason_is_cut() -> None:
    sent = message()
    reply = Message(Error(2, "division by zero"), reply_to=sent)
    back = reply_of(answer_of(reply), sent.metadata)
    assert back.has_error() and not back.has_content() and back.error == Error(2, "division by zero")
    long = reply_of(failed("m-1", 8, "\x00" * 100_000), sent.metadata)
    assert (
        long.error.code == 8 and long.error.reason is not None and long.error.reason.endswith("\x00... (cut)")
    )
    assert abs(long.metadata.created_at - time.time()) < 60 and long.metadata.reply_to_message_id == "m-1"
    assert long.metadata.created_at + long.metadata.ttl == pytest.approx(1700000000.123456 + 3600.5)


def test_what_an_agent_says_instead_of_the_app_is_read_as_an_error_of_flower() -> None:
    codes = hosting.UNKNOWN, hosting.UNAVAILABLE, hosting.CRASHED
    named = ErrorCode.UNKNOWN, ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED
    assert codes == named
    said = hosting.failed(LetterRef("run", "m-1"), hosting.CRASHED, "killed by signal 9")
    back = reply_of(Answer(said.ref.id, said.head, None), message().metadata)
    assert back.error == Error(ErrorCode.CLIENT_APP_CRASHED, "killed by signal 9")


def test_the_run_config_is_overridden_by_flat_values_only() -> None:
    changed: UserConfig = {"lr": 0.5, "name": "x", "on": True, "n": 3}
    assert overrides_of(letter_of(message(), None, changed)) == changed
    assert overrides_of(letter_of(message(), b"")) == {}
    for wrong in ([1], {"a": [1]}, {"a": None}, {"a": {"b": 1}}):
        with pytest.raises(ProtocolError, match="run config"):
            overrides_of(Letter("m", 2, json.dumps({"config": wrong}).encode(), None))


def test_a_head_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="put what is long, such as a group_id, into its content"):
        letter_of(message(group_id="x" * HEAD_BYTES), None)


@pytest.mark.parametrize(
    "change",
    [
        {"run": "7"},
        {"run": True},
        {"created": "now"},
        {"ttl": None},
        {"ttl": 10**400},
        {"type": "eat"},
        {"tasks": [1]},
        {"tasks": [1, "x"]},
        {"error": [1]},
        {"error": ["1", "x"]},
        {"error": [1, None]},
    ],
)
def test_a_malformed_head_is_refused(change: dict[str, Any]) -> None:
    letter = letter_of(message(), pack(CONTENT))
    head = json.dumps({**json.loads(letter.head), **change}).encode()
    with pytest.raises(ProtocolError, match="cannot be read"):
        message_of(Letter(letter.id, letter.node, head, letter.content))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"[]",
        b"{",
        b"{}",
        b'{"created":"x"}',
        b'{"created":1%s}' % (b"0" * 400),
        b"[" * 9000,
        b" " * (HEAD_BYTES + 1),
    ],
)
def test_an_answer_with_a_malformed_head_is_refused(head: bytes) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        reply_of(Answer("m-1", head, pack(CONTENT)), message().metadata)


def test_a_message_with_neither_content_nor_error_is_refused() -> None:
    with pytest.raises(ProtocolError, match="neither a content nor an error"):
        message_of(letter_of(message(), None))


def test_a_node_has_the_id_of_its_name() -> None:
    assert node_id("client-000017") == 2888923662963111337  # as deployed, so it may never change
    ids = {node_id(f"client-{index:06d}") for index in range(1000)}
    assert len(ids) == 1000 and all(1 < id < 2**63 for id in ids)
