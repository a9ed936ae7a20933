"""A carrier that needs no processes: a function of this process answers for every node."""

import time
from collections.abc import Callable, Collection, Sequence

from flwr.app import Message

from fedcore.flower.grid import End
from fedcore.flower.letters import Answer, Letter, answer_of, message_of

Node = Callable[[Message], Message | None]


def echo(message: Message) -> Message:
    """Reply with what came."""
    return Message(message.content, reply_to=message)


class Desk:
    """A carrier that has each letter answered, the last one first, when somebody listens."""

    def __init__(self, node: Node = echo, nodes: Sequence[int] = (30, 10, 20)) -> None:
        self.node, self.present = node, list(nodes)
        self.letters: list[Letter] = []
        self.forgotten: list[str] = []
        self.closed: list[tuple[End, str]] = []

    def nodes(self) -> Sequence[int]:
        return self.present

    def send(self, letters: Sequence[Letter]) -> None:
        self.letters += letters

    def receive(self, seconds: float) -> list[Answer]:
        if not self.letters:
            time.sleep(min(seconds, 0.01))
            return []
        reply = self.node(message_of(self.letters.pop()))
        return [answer_of(reply)] if reply else []

    def forget(self, ids: Collection[str]) -> None:
        self.forgotten += ids

    def close(self, state: End, detail: str) -> None:
        self.closed.append((state, detail))
