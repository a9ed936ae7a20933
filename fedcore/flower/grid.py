"""The Grid that a ServerApp is given: its messages go by a carrier, and every reply passes the guards.

    ServerApp -> Fleet -> carrier -> ClientApp

The carrier is what differs: `Hosts` are worker processes of this machine, `Mail` is a coordinator.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from logging import ERROR, WARNING
from threading import Condition
from typing import Literal, Protocol
from uuid import uuid4

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.app.user_config import UserConfigValue
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    HEARTBEAT_PATIENCE,
    SUPERLINK_NODE_ID,
    ErrorCode,
)
from flwr.serverapp import Grid
from flwr.supercore import date, log
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from fedcore.errors import ProtocolError
from fedcore.flower.guards import FINITE, Limits, check
from fedcore.flower.letters import Answer, Letter, letter_of, reply_of
from fedcore.flower.records import pack

End = Literal["finished", "stopped", "failed"]

STEP = 1.0  # seconds after which one that waits looks whether the run is over, or a message has expired
LOOK = 5.0  # seconds between two looks at which nodes are there
PATIENCE = HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL  # seconds that a node may be away, as in Flower


class Carrier(Protocol):
    """Takes letters to nodes and brings their answers back.

    `receive` is called by one thread at a time; the others may be called meanwhile.
    """

    def nodes(self) -> Sequence[int]:
        """Return the nodes that can be reached now, always in the same order."""

    def send(self, letters: Sequence[Letter]) -> None:
        """Take letters on; returns at once. Letters that share a content object share it on the way."""

    def receive(self, seconds: float) -> list[Answer]:
        """Return answers, each once, as soon as there are any; none where the time is over.

        Raises RunNotRunningException where the run was ended from elsewhere.
        """

    def forget(self, ids: Collection[str]) -> None:
        """Nobody waits for the answers to these letters any more."""

    def close(self, state: End, detail: str) -> None:
        """The ServerApp has ended; nothing is sent or received any more."""


@dataclass
class Tally:
    """What has become of a run's messages so far.

    answered: with a content. failed: an error came back. refused: by the guards. lost: not answered in time.
    seconds: from the first that was sent to the last that was answered.
    """

    sent: int = 0
    answered: int = 0
    failed: int = 0
    refused: int = 0
    lost: int = 0
    seconds: float = 0.0

    @property
    def settled(self) -> int:
        """How many are not waited for any more."""
        return self.answered + self.failed + self.refused + self.lost

    @property
    def speed(self) -> float:
        """Messages a second."""
        return self.settled / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        """Return it as a person reads it, without troubles that there were none of."""
        troubles = {"errors": self.failed, "refused": self.refused, "lost": self.lost}
        rare = "".join(f", {count:,} {name}" for name, count in troubles.items() if count)
        return f"{self.sent:,} sent, {self.answered:,} answered{rare}, {self.speed:,.0f}/s"


class Fleet(Grid):
    """Flower's Grid over a carrier; replies come back in the order in which their messages were sent.

    It may be used by several threads, as ServerApps of the older kind do.
    """

    def __init__(
        self,
        carrier: Carrier,
        run: Run,
        limits: Limits = FINITE,
        overrides: Mapping[str, UserConfigValue] | None = None,
        notice: Callable[[Tally], None] = lambda tally: None,
    ) -> None:
        """Make this process the ServerApp's, as `Message(...)` needs it.

        overrides: of the run config, for nodes that know only their own app's. notice: is called whenever
        messages have been sent or answered.
        """
        self.carrier, self.limits, self.overrides, self.notice = carrier, limits, overrides or {}, notice
        self.tally = Tally()
        self.over = False
        self._run = run
        self._began = 0.0  # when the first message was sent
        self._changed = Condition()  # guards all below
        self._listening = False
        self._waiting: dict[str, Metadata] = {}
        self._replies: dict[str, Message] = {}
        self._seen: dict[int, float] = {}  # when a node was last there, in seconds of time.monotonic
        self._listed = self._looked = 0.0  # when it was last looked which nodes are there, what has expired
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """A copy of the run."""
        return copy(self._run)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new message, as `Message(...)` makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the nodes that can be reached now, always in the same order."""
        self._go_on()
        nodes = list(self.carrier.nodes())
        self._listed = time.monotonic()
        self._seen.update(dict.fromkeys(nodes, self._listed))
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their ids; one that cannot be sent is logged and has none.

        A content that several messages share is packed once. Raises ValueError for a reply, and for a message
        that has a time to live of zero.
        """
        self._go_on()
        letters: list[Letter] = []
        packed: dict[int, tuple[RecordDict, bytes]] = {}  # with the record, or its id could be another's
        sent: dict[str, Metadata] = {}
        for message in messages:
            of = message.metadata
            of.__dict__["_message_id"] = str(uuid4())
            if of.reply_to_message_id or of.ttl <= 0:
                raise ValueError(f"Invalid message: {message}")
            if reason := self._unfit(of):
                log(ERROR, reason)
                continue
            record = message.content
            if id(record) not in packed:
                packed[id(record)] = record, pack(record)
            letters.append(letter_of(message, packed[id(record)][1], self.overrides))
            sent[of.message_id] = copy(of)
        with self._changed:
            self._began = self._began or time.monotonic()
            self._waiting.update(sent)
            self.tally.sent += len(sent)
        self.carrier.send(letters)
        self.notice(self.tally)
        return list(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, each once; an error for an id that is unknown or expired."""
        self._go_on()
        with self._changed:
            self._listen(0.0)
            return [self._take(id) for id in dict.fromkeys(message_ids) if id not in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return their replies, or those that came within `timeout` seconds.

        Messages without a reply by then are withdrawn, or a slow node would go through old rounds one after
        another; with Flower they stay valid, though nobody asks for their replies.
        """
        ids = self.push_messages(messages)
        del messages
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        with self._changed:
            for id in ids:
                while id in self._waiting and (left := end - time.monotonic()) > 0:
                    self._go_on()
                    self._listen(min(left, STEP))
            late = [id for id in ids if self._waiting.pop(id, None)]
            replies = [self._take(id) for id in ids if id in self._replies]
        if late:
            self.tally.lost += len(late)
            self.carrier.forget(late)
        return replies

    def stop(self) -> None:
        """Let every call from now on, and those that wait, raise RunNotRunningException within a second."""
        self.over = True

    def _go_on(self) -> None:
        if self.over:
            raise RunNotRunningException

    def _unfit(self, of: Metadata) -> str | None:
        """Return why a message cannot be sent, in Flower's words, or None."""
        if of.run_id != self._run.run_id:
            return f"Invalid run ID for Message: {of.run_id}"
        if _expired(of):
            return "Message TTL has expired"
        if of.dst_node_id not in self._seen and of.dst_node_id not in self.get_node_ids():
            return f"Invalid destination node ID for Message: {of.dst_node_id}"
        return None

    def _listen(self, seconds: float) -> None:
        """Take what comes within some seconds, or let the thread that listens already do it for all."""
        if self._listening:
            self._changed.wait(seconds)
            return
        self._listening = True
        try:
            self._changed.release()
            answers = self.carrier.receive(seconds)
        except RunNotRunningException:
            self.stop()
            raise
        finally:
            self._changed.acquire()
            self._listening = False
            self._changed.notify_all()
        for answer in answers:
            self._note(answer)
        self._give_up()
        if answers:
            self.tally.seconds = time.monotonic() - self._began
            self.notice(self.tally)

    def _note(self, answer: Answer) -> None:
        """Keep an answer that is waited for, if it passes the guards."""
        of = self._waiting.pop(answer.id, None)
        if of is None:
            return
        try:
            reply = reply_of(answer, of)
        except ProtocolError as error:
            sent = make_message(of, RecordDict())
            reply = Message(Error(ErrorCode.UNKNOWN, str(error)), reply_to=sent)
        checked = check(reply, self.limits)
        self.tally.refused += checked is not reply
        self.tally.failed += reply.has_error()
        self.tally.answered += checked.has_content()
        if checked is not reply:
            log(WARNING, "Node %s: %s", of.dst_node_id, checked.error.reason)
        self._replies[answer.id] = checked

    def _give_up(self) -> None:
        """Answer for messages that have expired, and for nodes that have been away for too long."""
        now = time.monotonic()
        if now - self._looked < STEP or not self._waiting:
            return
        self._looked = now
        if now - self._listed >= LOOK:
            self.get_node_ids()
        lost = {}
        for id, of in self._waiting.items():
            if _expired(of):
                lost[id] = _unavailable(id, of.run_id)
            elif now - self._seen[of.dst_node_id] > PATIENCE:
                lost[id] = _away(of)
        for id in lost:
            del self._waiting[id]
        self._replies |= lost
        self.tally.lost += len(lost)
        if lost:
            self.carrier.forget(lost)

    def _take(self, id: str) -> Message:
        """Return the reply to a message, which is forgotten."""
        reply = self._replies.pop(id, None)
        if reply is None:
            return _unavailable(id, self._run.run_id)
        if _expired(reply.metadata) and not reply.has_error():
            return _late(reply)
        reply.metadata.delivered_at = date.now().isoformat()
        return reply


def _expired(of: Metadata) -> bool:
    return of.created_at + of.ttl <= time.time()


# What is lost is told in Flower's words, as apps may know them. Their module takes a second to import.


def _unavailable(id: str, run_id: int) -> Message:
    """Return the reply to a message that nothing is known of any more."""
    from flwr.server.superlink.linkstate import utils

    return utils.create_message_error_unavailable_ins_message(id, run_id)


def _away(of: Metadata) -> Message:
    """Return the reply in place of a node that has gone."""
    from flwr.server.superlink.linkstate import utils

    return utils.create_message_error_unavailable_res_message(of, "node_unavail")


def _late(reply: Message) -> Message:
    """Return what is left of a reply that has expired."""
    from flwr.server.superlink.linkstate import utils

    error = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, utils.REPLY_MESSAGE_UNAVAILABLE_ERROR_REASON)
    return make_message(reply.metadata, error=error)
