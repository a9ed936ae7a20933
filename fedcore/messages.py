"""What travels between a round and its clients, as plain data: plans, updates, verdicts.

These are the same objects in a simulation and behind the wire; `fedcore.wire.codec` turns them into
protobuf and back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fedcore.encoding import narrow_shift_for, shift_for
from fedcore.errors import SpecError
from fedcore.layout import Layout, Vector
from fedcore.privacy.distributed import Parameters
from fedcore.seeds import digest
from fedcore.spec import RunSpec

# root: training on the data that the server trusts. offer: none yet, but to reserve what a run may cost.
Work = Literal["train", "evaluate", "root", "offer"]


@dataclass(frozen=True)
class Ref:
    """Which piece of work a message belongs to; everything on the wire carries one."""

    run: str
    round: int
    attempt: int
    kind: Work

    def __str__(self) -> str:
        return f"{self.run}/{self.round}.{self.attempt}/{self.kind}"


@dataclass(frozen=True)
class VectorSpec:
    """A vector that an update carries: its length, dtype and the bound on each |coordinate|.

    factor: name of the scalar that weighs it in a mean; None where every client counts once. norm: the L2
    norm to which it is scaled down when it enters a sum, before it is weighed; 0: it enters as it is.
    """

    length: int
    dtype: np.dtype[Any]
    bound: float
    factor: str | None = None
    norm: float = 0.0


@dataclass(frozen=True)
class ScalarSpec:
    """A scalar that an update carries, and the range in which it is accepted."""

    low: float
    high: float


@dataclass(frozen=True)
class Term:
    """One summand of the round: `factor * vector`, where a missing part counts as 1.

    name: of the sum. vector: name of a vector of the update, or None. factor: name of a scalar of the
    update, or None. `Term("delta", "delta", "weight")` is FedAvg's numerator.
    """

    name: str
    vector: str | None = None
    factor: str | None = None


@dataclass(frozen=True)
class Plan:
    """What one round asks of its cohort and how the answers are combined.

    cohort: stable client names; at most `len(cohort)` updates are taken. goal: the round closes when so
    many are in. minimum: fewer at the deadline abandon the attempt. deadline: seconds after the start.
    metrics: the scalars that are sums over examples, `count` among them. rows: vectors that are kept client
    by client, for a rule that must see them; all others are summed. sees: whether the scalars of single
    clients are kept. population: how many clients the run has, present or not.

    Private rounds: clip is the largest L2 norm of all vectors together, 0 where there is none. expected: by
    what the sum is divided, whoever came; 0: by what came. timed: the round closes at its deadline, even
    where nobody is waited for any more, since an earlier close would tell how many took part. distributed:
    how clients encode their vectors with a part of the noise, so that an update has words in their place; the
    vectors lie one after the other.
    """

    ref: Ref
    cohort: tuple[str, ...]
    goal: int
    minimum: int
    deadline: float
    vectors: Mapping[str, VectorSpec]
    scalars: Mapping[str, ScalarSpec]
    metrics: tuple[str, ...] = ()
    rows: frozenset[str] = frozenset()
    sees: bool = False
    population: int = 0
    clip: float = 0.0
    expected: float = 0.0
    timed: bool = False
    bits: int = 64
    seed: int = 0
    distributed: Parameters | None = None

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The sums: of every vector that is not kept as rows, and of every scalar."""
        vectors = [Term(name, name, v.factor) for name, v in self.vectors.items() if name not in self.rows]
        return (*vectors, *(Term(name, None, name) for name in self.scalars))

    def length(self, term: Term) -> int:
        """Number of coordinates of a term."""
        return self.vectors[term.vector].length if term.vector else 1

    def is_narrow(self, term: Term) -> bool:
        """Whether a term is summed in narrow words."""
        vector = self.vectors.get(term.vector or "")
        return self.bits < 64 and vector is not None and vector.norm > 0 and vector.length > 0

    @cached_property
    def places(self) -> Mapping[str, slice]:
        """Where each term lies among the narrow words, or among the wide ones, each in the terms' order."""
        ends, places = {True: 0, False: 0}, {}
        for term in self.terms:
            kind = self.is_narrow(term)
            start, ends[kind] = ends[kind], ends[kind] + self.length(term)
            places[term.name] = slice(start, ends[kind])
        return places

    @cached_property
    def narrow(self) -> int:
        """How many narrow words a sum has."""
        return sum(self.length(term) for term in self.terms if self.is_narrow(term))

    @cached_property
    def wide(self) -> int:
        """How many words of 64 bits a sum has."""
        return sum(self.length(term) for term in self.terms) - self.narrow

    @property
    def word(self) -> np.dtype[Any]:
        """Of the narrow words, of which there may be none."""
        return np.dtype(np.uint16 if self.bits == 16 else np.uint32)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The bits of a narrow word, and how many narrow and wide ones a sum has."""
        return 8 * self.word.itemsize, self.narrow, self.wide

    @property
    def payload(self) -> int:
        """Bytes of all words: the narrow ones, then the wide ones."""
        return self.narrow * self.word.itemsize + self.wide * 8

    def rotation(self, term: Term) -> int:
        """Return the seed that fixes the rotation of a term: public, the same for all clients of a round."""
        return digest(self.seed, "rotation", self.ref.round, term.name)

    def most(self, factor: str | None) -> float:
        """Return the largest |factor| by which a vector is multiplied."""
        return max(abs(self.scalars[factor].low), abs(self.scalars[factor].high)) if factor else 1.0

    def shift(self, term: Term) -> int:
        """Binary digits after the point of a term, from the bounds and the size of the cohort.

        A cohort that is secret counts as the population, so that the rounding does not tell its size. Raises
        SpecError where the sum would be too coarse.
        """
        clients, factor = max(self.population if self.timed else 1, len(self.cohort)), self.most(term.factor)
        if term.vector is None:
            return shift_for(factor, clients)
        if self.distributed:
            return 0
        vector = self.vectors[term.vector]
        if not self.is_narrow(term):
            return shift_for(vector.bound * factor, clients)
        if self.bits == 16 and term.factor:
            raise SpecError(
                f"sums of 16 bits have no room for weights, but `{term.name}` is multiplied by "
                f'`{term.factor}`, up to {factor:g}; set encryption.encoding = "q32"'
            )
        return narrow_shift_for(vector.norm, factor, vector.length, clients, self.bits)


@dataclass(frozen=True)
class Update:
    """What one client answers: named flat vectors and named scalars.

    Trained parameters travel as a delta, `trained - received`. Vectors have the layout's dtype.
    """

    vectors: Mapping[str, Vector]
    scalars: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """What became of a client's work: folded into the sum, too late, or refused with a reason."""

    status: Literal["folded", "late", "refused"]
    reason: str = ""


@dataclass(frozen=True)
class Blob:
    """Bytes by their address: SHA-256 in hex, and how many there are."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Hello:
    """An agent's first words: tasks that may run there, name -> digest, and whether it is an evaluator.

    pending: training whose verdict it has not heard, and waits for, since it would keep something.
    instance: random, the same for as long as this agent runs. labels: what runs may choose devices by.
    """

    tasks: Mapping[str, str]
    evaluator: bool = False
    pending: tuple[Ref, ...] = ()
    instance: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)


SMALL = 64 * 1024  # bytes of parameters, or of an update, that travel on the stream, which saves a call


@dataclass(frozen=True)
class Assignment:
    """A piece of work for one agent; `spec` is the run's, `layout` a digest, `deadline` seconds from now.

    folded: the client's last training that went into the run's model, so that it knows what it has kept.
    clip: the clip norm of a private round, 0 where there is none. key: the coordinator's signed AggregatorKey
    of this attempt, where updates are sealed. certificate: of secure aggregation, why another attempt at the
    round may be entered; empty in the first. content: the bytes of the parameters, where they are at most
    SMALL; else empty, and they are fetched.
    """

    ref: Ref
    task: str
    digest: str
    spec: RunSpec
    layout: str
    parameters: Blob
    cohort: int
    deadline: float
    folded: Ref | None = None
    clip: float = 0.0
    key: bytes = b""
    certificate: bytes = b""
    content: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Secure:
    """A step of secure aggregation, of either side; `fedcore.crypto.secagg` reads the message."""

    ref: Ref
    message: bytes


@dataclass(frozen=True)
class Decline:
    """An agent's word that it will not, or cannot, do an assignment."""

    ref: Ref
    reason: str


@dataclass(frozen=True)
class Accept:
    """An agent's word that its device takes part in a run, and has reserved what that may cost."""

    ref: Ref


@dataclass(frozen=True)
class Outcome:
    """What became of an agent's work."""

    ref: Ref
    verdict: Verdict


@dataclass(frozen=True)
class Pause:
    """The coordinator's word that an agent should hang up, and be back after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class UploadHead:
    """An update but for its vectors' numbers, the `payload`: name and length of each, in order.

    offset: how many bytes of the payload the receiver has already, and are not sent.
    """

    ref: Ref
    scalars: Mapping[str, float]
    vectors: tuple[tuple[str, int], ...]
    payload: Blob
    offset: int = 0


@dataclass(frozen=True)
class SmallUpdate:
    """An update as a whole: its head, and a payload of at most SMALL bytes."""

    head: UploadHead
    payload: bytes = field(repr=False)


@dataclass(frozen=True)
class Receipt:
    """What the coordinator says to an update that came on the stream: 0, it is on the disk; else why not.

    code: the number of the gRPC status with which an upload would have ended.
    """

    ref: Ref
    code: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Submission:
    """A run as an operator hands it in; `parameters` are the initial ones."""

    spec: RunSpec
    task: str
    digest: str
    layout: Layout
    metrics: tuple[str, ...]
    parameters: Blob
