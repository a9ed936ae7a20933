"""The cohort of an attempt: whose advertisements the coordinator has fixed, and what follows from them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedcore.crypto.certificates import PublicKey
from fedcore.crypto.secagg import edges
from fedcore.crypto.secagg.config import Config
from fedcore.crypto.secagg.edges import Matrix
from fedcore.crypto.secagg.keys import SECRET, Context
from fedcore.crypto.secagg.parameters import Graph, quorum
from fedcore.crypto.secagg.signing import holds, parsed
from fedcore.crypto.trust import Trust
from fedcore.errors import AuthenticationError, ProtocolError
from fedcore.wire.v1 import secagg_pb2 as pb

ISSUERS = 8  # intermediates that certificates of one cohort may come from
LONGEST = 1024  # bytes of an advertisement, which the whole cohort gets


@dataclass(frozen=True)
class Member:
    """One client as it advertised itself: the key that it signs with, and its keys of this attempt.

    signer: the former as bytes, compressed (33).
    """

    name: str
    key: PublicKey
    signer: bytes
    mask_key: bytes
    channel_key: bytes
    commitment: bytes

    @property
    def keys(self) -> tuple[bytes, bytes, bytes]:
        """All its public keys; no two in a cohort are the same."""
        return self.mask_key, self.channel_key, self.signer


@dataclass(frozen=True)
class Cohort:
    """All members in the order of their names; `content` is the message that says so."""

    config: Config
    members: tuple[Member, ...]
    content: bytes

    @cached_property
    def context(self) -> Context:
        """To what keys and signatures are bound from here on."""
        return Context(self.config.digest, self.config.transcript(self.content))

    @cached_property
    def graph(self) -> Graph:
        """Who draws how many, and how many shares open a secret."""
        return self.config.graph(len(self.members))

    @property
    def complete(self) -> bool:
        """Whether everybody draws everybody, so that nothing has to be said about it."""
        return self.graph.degree == len(self.members) - 1

    def advertised(self, position: int) -> bytes:
        """Return what a member said of itself."""
        return pb.Cohort.FromString(self.content).advertisements[position].content

    @property
    def fewest(self) -> int:
        """How many clients must be left at every step: a quorum, and as many as the configuration asks."""
        return max(self.config.smallest, quorum(len(self.members)))

    def check_left(self, left: Collection[int], links: Matrix) -> None:
        """Raise ProtocolError where too few members are left, or one of them would stand alone."""
        if len(left) < self.fewest:
            raise ProtocolError(
                f"{len(left)} of {len(self.members)} clients are left, expected at least {self.fewest}"
            )
        threshold = self.graph.threshold
        for member in edges.alone(links, left, threshold):
            raise ProtocolError(
                f"{self.members[member].name} would stand alone: it is linked to fewer than {threshold} of "
                f"the {len(left)} clients that are left"
            )

    def acknowledged(self, told: pb.Holders) -> dict[int, bytes]:
        """Return whose shares members hold, as bitmaps; raises ProtocolError where they have not said it."""
        edges.distinct([each.position for each in told.holders], len(self.members))
        for each in told.holders:
            member = self.members[each.position]
            if not holds(member.key, each.signature, "receive", self.context.transcript, each.held):
                raise ProtocolError(f"{member.name} has not signed that it holds these shares")
        return {each.position: each.held for each in told.holders}

    @cached_property
    def positions(self) -> dict[str, int]:
        """Where a client stands."""
        return {member.name: position for position, member in enumerate(self.members)}


def admitted(config: Config, trust: Trust, said: pb.Said, issuers: Collection[bytes]) -> Member:
    """Return who advertises itself.

    Raises ProtocolError where the message is malformed or its signature is not the certificate's, and
    AuthenticationError where the certificate is not a client's of the federation.
    """
    if len(said.content) > LONGEST:
        raise ProtocolError(f"an advertisement has {len(said.content)} bytes, expected at most {LONGEST}")
    advertisement = parsed(pb.Advertisement, said.content)
    public = (advertisement.mask_key, advertisement.channel_key)
    if {len(each) for each in (*public, advertisement.commitment, advertisement.nonce)} != {SECRET}:
        raise ProtocolError(f"keys, commitment and nonce of an advertisement have {SECRET} bytes each")
    peer = trust.peer(advertisement.leaf, issuers)
    if peer.name.role != "client":
        raise AuthenticationError(f"{peer.name} is no client")
    if said.step != "advertise" or not holds(
        peer.key, said.signature, "advertise", config.digest, said.content
    ):
        raise ProtocolError(
            f"the advertisement of {peer.name.name} is not signed by its key for this attempt"
        )
    signer = peer.key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    return Member(peer.name.name, peer.key, signer, *public, advertisement.commitment)


def check(config: Config, members: tuple[Member, ...]) -> None:
    """Raise ProtocolError unless members are enough, in order, and distinct in their names and keys."""
    if not config.smallest <= len(members) <= config.asked:
        raise ProtocolError(
            f"the cohort has {len(members)} clients, expected {config.smallest} to {config.asked}"
        )
    names = [member.name for member in members]
    if any(one >= other for one, other in pairwise(names)):
        raise ProtocolError("the cohort is not in the order of its names, or one is in it twice")
    if len({key for member in members for key in member.keys}) < 3 * len(members):
        raise ProtocolError("two clients of the cohort have the same key")


def fixed(
    config: Config, admissions: Mapping[str, tuple[pb.Said, Member]], leaf: bytes, issuer: bytes
) -> Cohort:
    """Return the cohort of all who were admitted, as the coordinator of that certificate fixes it.

    Raises ProtocolError where they do not make a cohort.
    """
    ordered = [admissions[name] for name in sorted(admissions)]
    members = tuple(member for _, member in ordered)
    check(config, members)
    issuers = sorted({issuer, *(said.issuer for said, _ in ordered)})
    signed = [pb.Said(step=said.step, content=said.content, signature=said.signature) for said, _ in ordered]
    content = pb.Cohort(advertisements=signed, issuers=issuers, leaf=leaf)
    return Cohort(config, members, content.SerializeToString())


def read(config: Config, trust: Trust, said: pb.Said) -> tuple[Cohort, PublicKey]:
    """Return the cohort that a coordinator tells, and the coordinator's key.

    Raises ProtocolError and AuthenticationError where anything about it does not hold.
    """
    told = parsed(pb.Cohort, said.content)
    if len(told.issuers) > ISSUERS or len(told.advertisements) > config.asked:
        raise ProtocolError(
            f"the cohort has {len(told.advertisements)} clients and {len(told.issuers)} issuers, expected at "
            f"most {config.asked} and {ISSUERS}"
        )
    coordinator = trust.peer(told.leaf, told.issuers)
    if coordinator.name.role != "coordinator":
        raise AuthenticationError(f"the cohort was told by {coordinator.name}, who is no coordinator")
    if not holds(coordinator.key, said.signature, "cohort", config.digest, said.content):
        raise ProtocolError("the cohort is not signed by the coordinator for this attempt")
    members = tuple(admitted(config, trust, each, told.issuers) for each in told.advertisements)
    check(config, members)
    return Cohort(config, members, said.content), coordinator.key
