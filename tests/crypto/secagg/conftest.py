"""An attempt of secure aggregation in one process: real state machines and certificates, no network."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from random import Random

import numpy as np
import pytest
from cryptography import x509
from numpy.typing import NDArray

from fedcore.crypto import certificates
from fedcore.crypto.certificates import key_from_pem
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name, Role
from fedcore.crypto.secagg import Aborted, Client, Config, Floors, Server, Step
from fedcore.crypto.secagg.parameters import Graph
from fedcore.crypto.secagg.signing import say
from fedcore.crypto.trust import Trust
from fedcore.messages import Ref
from fedcore.wire.v1 import secagg_pb2 as pb

NOW = datetime(2030, 1, 1, tzinfo=UTC)
CONFIG = Config(
    federation="fed",
    ref=Ref("run", 3, 0, "train"),
    parameters=sha256(b"parameters").hexdigest(),
    spec=sha256(b"spec").hexdigest(),
    asked=16,
    smallest=3,
    bits=32,
    narrow=50,
    wide=3,
    corrupt=0.2,
    lost=0.1,
    rounds=10,
)
STEPS = list(Step)
Lost = Mapping[Step, Iterable[str]]  # who is gone from a step on
NOBODY: Lost = {}
VICTIM = "client-00"
Words = tuple[NDArray[np.uint32], NDArray[np.uint64]]


@cache
def authority(federation: str = "fed") -> tuple[certificates.Key, tuple[x509.Certificate, ...]]:
    """Return a federation's issuing key, its certificate and the root."""
    root_key, key = certificates.new_key(), certificates.new_key()
    root = certificates.issue_root(federation, root_key, NOW)
    return key, (certificates.issue_intermediate(federation, key.public_key(), root, root_key, NOW), root)


@cache
def identity(name: str, role: Role = "client", federation: str = "fed") -> Identity:
    """Return who somebody is: always the same."""
    issuer_key, (issuer, root) = authority(federation)
    key = certificates.new_key()
    leaf = certificates.issue_leaf(Name(federation, role, name), key.public_key(), issuer, issuer_key, NOW)
    return Identity.verified(key, [leaf, issuer], root, NOW)


def certificates_of(who: Identity) -> list[bytes]:
    """Return somebody's certificate and its issuer's, as messages carry them."""
    return [certificates.to_der(each) for each in x509.load_pem_x509_certificates(who.chain)]


@cache
def trust() -> Trust:
    return Trust(identity("main", "coordinator").root, "fed", lambda: NOW)


def client_names(n: int) -> list[str]:
    return [f"client-{i:02d}" for i in range(n)]


class Attempt:
    """One attempt of n clients: what each adds, and all that was said, by steps."""

    def __init__(
        self,
        n: int = 5,
        config: Config = CONFIG,
        names: Iterable[str] = (),
        sent: Mapping[str, bytes] | None = None,
        certificate: bytes = b"",
        seed: int = 0,
    ) -> None:
        self.config = config
        self.names = list(names) or client_names(n)
        self.records: list[bytes] = []
        self.server = Server(
            config, identity("main", "coordinator"), trust(), self.names, record=self.records.append
        )
        kept = sent or {}
        self.clients = {
            name: Client(
                config, identity(name), trust(), Floors(), sent=kept.get(name, b""), certificate=certificate
            )
            for name in self.names
        }
        generator = np.random.default_rng(seed)
        self.words = {
            name: (
                generator.integers(0, 1 << config.bits, config.narrow, f"u{config.bits // 8}"),
                generator.integers(0, 1 << 64, config.wide, np.uint64),
            )
            for name in self.names
        }
        self.masked: dict[str, Words] = {}
        self.told: dict[Step, Mapping[str, bytes]] = {}  # by the step that it opened
        self.replies: dict[Step, dict[str, bytes]] = {}
        self.order = Random(seed)

    def advertise(self, gone: Iterable[str] = ()) -> None:
        for name in sorted(set(self.names) - set(gone), key=lambda _: self.order.random()):
            self.replies.setdefault(Step.ADVERTISE, {})[name] = self.clients[name].advertise()
            self.server.receive(name, self.replies[Step.ADVERTISE][name])

    def hear(self, name: str, message: bytes) -> None:
        """Give a client a message, and the coordinator its answer or its masked words."""
        reply = self.clients[name].receive(message)
        if reply is not None:
            self.replies.setdefault(self.server.step, {})[name] = reply
            self.server.receive(name, reply)
            return
        self.masked[name] = (self.words[name][0].copy(), self.words[name][1].copy())
        self.clients[name].mask(*self.masked[name])
        self.server.uploaded(name)

    def proceed(self, lost: Lost = NOBODY) -> None:
        """End the step, and let all who are not lost by then do the next."""
        told = self.server.proceed()
        self.told[self.server.step] = told
        gone = {name for step in STEPS[: STEPS.index(self.server.step) + 1] for name in lost.get(step, ())}
        for name in sorted(set(told) - gone, key=lambda _: self.order.random()):
            self.hear(name, told[name])

    def run(self, until: Step = Step.DONE, lost: Lost = NOBODY) -> "Attempt":
        """Go on until all answers to a step are in, or to the end."""
        if not self.replies:
            self.advertise(lost.get(Step.ADVERTISE, ()))
        while self.server.step is not until:
            self.proceed(lost)
        return self

    def masked_sum(self) -> Words:
        """Return the sum of the masked words of all who are included."""
        narrow = np.zeros(self.config.narrow, f"u{self.config.bits // 8}")
        wide = np.zeros(self.config.wide, np.uint64)
        for name in self.server.included:
            narrow += self.masked[name][0]
            wide += self.masked[name][1]
        return narrow, wide

    def expected(self) -> tuple[list[int], list[int]]:
        """Return the sum of what the included add, in integers."""
        rows = [self.words[name] for name in self.server.included]
        narrow = [
            sum(int(row[0][i]) for row in rows) % 2**self.config.bits for i in range(self.config.narrow)
        ]
        return narrow, [sum(int(row[1][i]) for row in rows) % 2**64 for i in range(self.config.wide)]

    def unmasked(self, server: Server | None = None) -> tuple[list[int], list[int]]:
        narrow, wide = self.masked_sum()
        (server or self.server).unmask(narrow, wide)
        return narrow.tolist(), wide.tolist()

    @property
    def transcript(self) -> bytes:
        told = next(iter((self.told.get(Step.CHOOSE) or self.told[Step.SHARE]).values()))
        return self.config.transcript(pb.Said.FromString(told).content)

    def lie(self, step: str, content: bytes) -> bytes:
        """Return a message of the coordinator's, signed as it should be."""
        return lie(step, self.transcript, content)


def lie(step: str, context: bytes, content: bytes) -> bytes:
    return say(key_from_pem(identity("main", "coordinator").key), step, context, content)


def content(message: bytes) -> bytes:
    return pb.Said.FromString(message).content


def sparse(monkeypatch: pytest.MonkeyPatch, degree: int, threshold: int) -> None:
    """Let every cohort draw like this, too few for safety but quick."""
    monkeypatch.setattr(Config, "graph", lambda self, n: Graph(degree, threshold))


def another(attempt: int) -> Config:
    """Return the configuration of another attempt of the same round."""
    return replace(CONFIG, ref=replace(CONFIG.ref, attempt=attempt))


def votes(replies: Sequence[bytes | None]) -> bytes:
    """Return what the coordinator shows as a quorum, of the answers of all clients in their order."""
    said = [pb.Said.FromString(reply or b"") for reply in replies]
    each = [pb.Vote(position=i, signature=one.signature) for i, one in enumerate(said)]
    return pb.Votes(votes=each).SerializeToString()


def stops(attempt: Attempt, message: bytes, reason: str) -> None:
    """Assert that the victim stops for this reason, and that it says nothing more, whatever comes."""
    victim = attempt.clients[VICTIM]
    with pytest.raises(Aborted, match=reason):
        victim.receive(message)
    assert victim.step is Step.DONE and not hasattr(victim, "_secrets")
    for step in ("cohort", "edges", "included", "quorum", "abort"):
        with pytest.raises(Aborted):
            victim.receive(lie(step, CONFIG.digest, b""))
