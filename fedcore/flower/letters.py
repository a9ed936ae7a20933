"""What a carrier takes to a node and back: Flower's messages, as bytes.

    letter = letter_of(message, content)    message = message_of(letter)      at the node
    answer = answer_of(reply)               reply = reply_of(answer, metadata) at the server's side

A head is JSON of at most 16 KiB; a content is a packed record. An answer does not say whom it is from: that
is known from the message that it answers, with whose metadata it is read.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.app.user_config import UserConfigValue

from fedcore.errors import ProtocolError
from fedcore.flower.records import pack, unpack

HEAD_BYTES = 16 * 2**10
REASON_CHARACTERS = 2_000  # of an error: at most six bytes each in JSON


@dataclass(frozen=True)
class Letter:
    """A message to a node. Letters that share one `content` object share it on the way."""

    id: str
    node: int
    head: bytes = field(repr=False)
    content: bytes | None = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """The reply to the letter of this id."""

    id: str
    head: bytes = field(repr=False)
    content: bytes | None = field(repr=False)


def node_id(name: str) -> int:
    """Return the id of a client: 63 bits of its name's SHA-256, and never 0 or 1, which Flower keeps."""
    return max(2, int.from_bytes(sha256(name.encode()).digest()[:8], "big") >> 1)


def letter_of(
    message: Message, content: bytes | None, overrides: Mapping[str, UserConfigValue] | None = None
) -> Letter:
    """Return the letter of a message with its packed content; raises ProtocolError for too long a head.

    message: with its id; an error goes into the head. overrides: of the run config, for a node that knows
    only its own app's.
    """
    of = message.metadata
    head: dict[str, Any] = {
        "run": of.run_id,
        "from": of.src_node_id,
        "type": of.message_type,
        "group": of.group_id,
        "reply_to": of.reply_to_message_id,
        "created": of.created_at,
        "ttl": of.ttl,
        "tasks": [of.src_task_id, of.dst_task_id],
    }
    if overrides:
        head["config"] = dict(overrides)
    return Letter(of.message_id, of.dst_node_id, _written(head, message), content)


def message_of(letter: Letter) -> Message:
    """Return a new message that shares nothing with any other; raises ProtocolError where it is malformed."""
    head = _read(letter.head)
    try:
        source, target = head["tasks"]
        metadata = Metadata(
            run_id=_a(int, head["run"]),
            message_id=letter.id,
            src_node_id=_a(int, head["from"]),
            dst_node_id=letter.node,
            reply_to_message_id=_a(str, head["reply_to"]),
            group_id=_a(str, head["group"]),
            created_at=_a(float, head["created"]),
            ttl=_a(float, head["ttl"]),
            message_type=_a(str, head["type"]),
            src_task_id=None if source is None else _a(int, source),
            dst_task_id=None if target is None else _a(int, target),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the head of letter {letter.id} cannot be read: {error!r}") from error
    return make_message(metadata, *_said(head, letter.content))


def overrides_of(letter: Letter) -> dict[str, UserConfigValue]:
    """Return the run config's overrides that came with a letter; raises ProtocolError where they are none."""
    found = _read(letter.head).get("config", {})
    if type(found) is not dict or not all(isinstance(value, UserConfigValue) for value in found.values()):
        raise ProtocolError(f"the run config of letter {letter.id} is {found!r}, expected flat values")
    return found


def answer_of(reply: Message) -> Answer:
    """Return the answer that a reply is."""
    of = reply.metadata
    content = pack(reply.content) if reply.has_content() else None
    head = _written({"created": of.created_at, "ttl": of.ttl}, reply)
    return Answer(of.reply_to_message_id, head, content)


def failed(letter_id: str, code: int, reason: str) -> Answer:
    """Return the answer that a letter gets from whoever cannot have it read; code: of Flower's ErrorCode."""
    return Answer(letter_id, _sized({"created": time.time(), "error": [code, _cut(reason)]}), None)


def reply_of(answer: Answer, of: Metadata) -> Message:
    """Return the reply to the message with this metadata; raises ProtocolError where it is malformed."""
    head = _read(answer.head)
    try:
        created = _a(float, head["created"])
        ttl = _a(float, head.get("ttl", of.created_at + of.ttl - created))
    except (KeyError, TypeError) as error:
        raise ProtocolError(f"the head of the answer to {answer.id} cannot be read: {error!r}") from error
    metadata = Metadata(
        run_id=of.run_id,
        message_id=f"{answer.id}-reply",
        src_node_id=of.dst_node_id,
        dst_node_id=of.src_node_id,
        reply_to_message_id=of.message_id,
        group_id=of.group_id,
        created_at=created,
        ttl=ttl,
        message_type=of.message_type,
        src_task_id=of.dst_task_id,
        dst_task_id=of.src_task_id,
    )
    return make_message(metadata, *_said(head, answer.content))


def _written(head: dict[str, Any], message: Message) -> bytes:
    """Return a head as JSON, with the message's error if it has one."""
    if message.has_error():
        head["error"] = [message.error.code, _cut(message.error.reason or "")]
    return _sized(head)


def _sized(head: dict[str, Any]) -> bytes:
    written = json.dumps(head, separators=(",", ":")).encode()
    if len(written) > HEAD_BYTES:
        raise ProtocolError(
            f"the metadata of a message has {len(written)} bytes of at most {HEAD_BYTES}; "
            f"put what is long, such as a group_id, into its content"
        )
    return written


def _read(head: bytes) -> dict[str, Any]:
    try:
        if len(head) > HEAD_BYTES or not isinstance(read := json.loads(head), dict):
            raise ValueError(f"{len(head)} bytes, expected a JSON object of at most {HEAD_BYTES}")
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the head of a letter cannot be read: {error}") from error
    return read


def _said(head: dict[str, Any], content: bytes | None) -> tuple[RecordDict | None, Error | None]:
    """Return a message's content, or its error: one of the two."""
    if "error" not in head:
        if content is None:
            raise ProtocolError("a message has neither a content nor an error")
        return unpack(content), None
    try:
        code, reason = head["error"]
        return None, Error(_a(int, code), _cut(_a(str, reason)))
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"the error of a message cannot be read: {error!r}") from error


def _a(kind: type, value: Any) -> Any:
    """Return a value of JSON that has to be of a kind; a whole number of 64 bits does as a float."""
    if kind is float and type(value) is int and value.bit_length() <= 64:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{str(value)[:40]}, expected {kind.__name__}")
    return value


def _cut(reason: str) -> str:
    return reason if len(reason) <= REASON_CHARACTERS else f"{reason[:REASON_CHARACTERS]}... (cut)"
