"""What an engine is, which answers a plan for virtual clients some at a time, and what these keep."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from fedcore.client.training import Kept
from fedcore.layout import Parameters
from fedcore.messages import Plan, Verdict
from fedcore.simulations.states_file import StatesFile
from fedcore.strategies.rounds import Round, receive_rows
from fedcore.strategies.terms import Rows
from fedcore.strategies.words import Words

MEMORY = 1 << 28  # bytes of clients' states


@dataclass(frozen=True)
class Answers:
    """The updates of k clients, one a row, and what each keeps if its update is folded."""

    clients: Sequence[str]
    rows: Rows
    kept: Sequence[Kept]


@dataclass(frozen=True)
class Summed:
    """Answers that were checked and summed where they were made, in the words of the round.

    verdicts: of every client, in the order in which they were checked.
    """

    verdicts: Mapping[str, Verdict]
    words: Words
    kept: Sequence[Kept]

    @classmethod
    def of(cls, plan: Plan, answers: Answers) -> "Summed":
        """Check and sum the answers of some of a plan's cohort."""
        part = Round(plan)
        receive_rows(part, answers.clients, answers.rows)
        return cls(part.verdicts, part.sums.words, answers.kept)

    @property
    def clients(self) -> Sequence[str]:
        """Who has answered."""
        return list(self.verdicts)

    def enter(self, round: Round) -> None:
        """Enter a round, which has then received the answers."""
        round.sums.add_words(self.words)
        for client, verdict in self.verdicts.items():
            round.settle(client, verdict)


class Engine(Protocol):
    """What trains and evaluates virtual clients, so many at once, in so many processes or threads (or 0)."""

    name: str
    chunk: int
    workers: int

    def answer(self, plan: Plan, parameters: Parameters) -> Iterator[Answers | Summed]:
        """Yield the answers of a plan's whole cohort, in any order; lazily, so that one may stop early."""
        ...


class ClientStates:
    """What virtual clients keep from one folded round to the next: the latest in memory, the rest on disk.

    A round commits what its clients keep, which its own evaluation sees, and is settled when it has ended.
    What is not settled is never written, so an interrupted round leaves no trace.
    """

    def __init__(self, memory: int = MEMORY, path: Path | None = None) -> None:
        """Know nothing of any client.

        memory: bytes of states that are kept there, over which those committed first go to disk. path: where
        to; None is a temporary file, made when it is needed.
        """
        self.memory, self.path = memory, path
        self.states: dict[str, Kept] = {}  # by the time of the last commit
        self.size = 0  # bytes of the settled ones among them
        self.before: dict[str, Kept] = {}  # what the states that are not settled replace in memory
        self.unsaved: set[str] = set()

    @cached_property
    def file(self) -> StatesFile:
        """Where states lie that are not in memory."""
        return StatesFile(self.path)

    def __getitem__(self, client: str) -> Kept:
        if client in self.states:
            return self.states[client]
        return self.file.get(client) if "file" in vars(self) else {}

    def commit(self, kept: Mapping[str, Kept]) -> None:
        """Take over what clients keep whose updates were folded."""
        for client, state in kept.items():
            if state:
                self.before.setdefault(client, self.states.get(client, {}))
                self.states.pop(client, None)
                self.states[client] = state

    def settle(self) -> None:
        """End the round: what was committed stays, and memory is kept within its bounds."""
        self.size += sum(_bytes(self.states[client]) - _bytes(old) for client, old in self.before.items())
        self.unsaved.update(self.before)
        self.before.clear()
        while self.size > self.memory:
            client, state = next(iter(self.states.items()))
            if client in self.unsaved:
                self.file.put([(client, state)])
                self.unsaved.discard(client)
            self.size -= _bytes(self.states.pop(client))

    def save(self, round: int) -> None:
        """Write all that is settled, as it is after this round."""
        self.file.put((client, self.before.get(client) or self.states[client]) for client in self.unsaved)
        self.file.commit(round)
        self.unsaved.clear()

    def close(self) -> None:
        """Let go of the file; nothing can be read from it any more."""
        if "file" in vars(self):
            self.file.close()


def _bytes(kept: Kept) -> int:
    return sum(vector.nbytes for vector in kept.values())
