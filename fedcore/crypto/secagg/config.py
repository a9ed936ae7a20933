"""What one attempt of secure aggregation is about, and what a device asks of it."""

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from fedcore.crypto.prg import Words
from fedcore.crypto.secagg.errors import Aborted
from fedcore.crypto.secagg.parameters import Graph, graph
from fedcore.errors import SpecError
from fedcore.messages import Ref

LABEL = b"fedcore secagg 1\0"  # opens whatever is hashed, signed or derived
SMALLEST = 3  # of two summands each knows the other's from the sum
ATTEMPTS = 2**12  # of a sum: each has its own draw, and a coordinator that lies may have it repeated
KINDS = ("train", "evaluate")  # what is summed in a round
LARGEST = 3000  # clients: the certificates of a cohort fit one message of 3 MiB


class Step(StrEnum):
    """What a client says next, and what the coordinator waits for."""

    ADVERTISE = "advertise"
    CHOOSE = "choose"
    SHARE = "share"
    RECEIVE = "receive"
    CONFIRM = "confirm"
    MASK = "mask"
    AGREE = "agree"
    REVEAL = "reveal"
    ABORT = "aborted"
    DONE = "done"


@dataclass(frozen=True)
class Config:
    """One attempt, as both sides know it before it begins.

    parameters: SHA-256 of the parameters that the round starts from, hex. spec: SHA-256 of the spec's JSON as
    it travels, hex. asked: the most clients; the encoding leaves room for so many. smallest: the fewest, in
    the cohort and in the sum. bits: of a narrow word, 16 or 32. narrow, wide: how many narrow and how many
    64-bit words a client adds. corrupt, lost: declared shares of a cohort that may collude with the
    coordinator, and that may be lost after sharing. rounds: of the run.

    Raises SpecError where a number is out of its range.
    """

    federation: str
    ref: Ref
    parameters: str
    spec: str
    asked: int
    smallest: int
    bits: int
    narrow: int
    wide: int
    corrupt: float
    lost: float
    rounds: int

    def __post_init__(self) -> None:
        if not SMALLEST <= self.smallest <= self.asked <= LARGEST:
            raise SpecError(
                f"secure aggregation among {self.smallest} to {self.asked} clients does not fit: expected at "
                f"least {SMALLEST} and at most {LARGEST}; change the cohort, or encryption.updates"
            )
        if self.bits not in (16, 32) or self.narrow < 0 or self.wide < 0 or self.rounds < 1:
            raise SpecError(
                f"{self.narrow} words of {self.bits} bits, {self.wide} of 64 and {self.rounds} rounds do not "
                f"fit: expected words of 16 or 32 bits, no negative number, and at least one round"
            )
        if self.ref.round > self.rounds or self.ref.attempt >= ATTEMPTS or self.ref.kind not in KINDS:
            raise SpecError(
                f"{self.ref} is no sum of a run of {self.rounds} rounds, at most {ATTEMPTS} attempts each"
            )

    @cached_property
    def digest(self) -> bytes:
        """32 bytes, to which every signature, key and ciphertext of the attempt is bound."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return sha256(LABEL + b"config\0" + text.encode()).digest()

    def graph(self, n: int) -> Graph:
        """Return who draws how many in a cohort of n; raises SpecError where none is safe."""
        return graph(n, self.corrupt, self.lost, self.rounds * len(KINDS) * ATTEMPTS)

    def check_words(self, narrow: Words, wide: NDArray[np.uint64]) -> None:
        """Raise ValueError for words that are not of the numbers and sizes that the attempt sums."""
        asked = [((self.narrow,), f"uint{self.bits}"), ((self.wide,), "uint64")]
        if [(words.shape, words.dtype.name) for words in (narrow, wide)] != asked:
            raise ValueError(
                f"the words are {narrow.dtype}{narrow.shape} and {wide.dtype}{wide.shape}, expected {asked}"
            )

    def transcript(self, cohort: bytes) -> bytes:
        """Return 32 bytes that bind the attempt and its cohort, the content of that message."""
        return sha256(LABEL + b"transcript\0" + self.digest + cohort).digest()


@dataclass(frozen=True)
class Floors:
    """What a device's owner asks: clients in a cohort, and the share of them that may be corrupt."""

    cohort: int = SMALLEST
    corrupt: float = 0.0

    def check(self, config: Config) -> None:
        """Raise Aborted where an attempt offers less."""
        if config.smallest < self.cohort:
            raise Aborted(
                f"the round may close with {config.smallest} clients; this device asks for {self.cohort}"
            )
        if config.corrupt < self.corrupt:
            raise Aborted(
                f"the round bears that {config.corrupt:g} of the clients collude with the coordinator; this "
                f"device asks for {self.corrupt:g}"
            )
