"""The coordinator of secure aggregation as a state machine, the counterpart of `client`.

It relays, checks what clients say, and commits by its signature to the cohort, the edges and the set that is
summed. Whoever does not answer a step is lost to it; the sum needs only that enough are left. All that comes
in is recorded before it has an effect, so the same attempt goes on after a crash.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Self

import numpy as np
from cryptography import x509
from numpy.typing import NDArray

from fedcore.crypto.certificates import key_from_pem, to_der
from fedcore.crypto.identity import Identity
from fedcore.crypto.prg import Words
from fedcore.crypto.secagg import again, edges
from fedcore.crypto.secagg.cohort import Member, admitted, fixed
from fedcore.crypto.secagg.config import Config, Step
from fedcore.crypto.secagg.errors import Failed
from fedcore.crypto.secagg.keys import CIPHERTEXT, Pair, add_masks
from fedcore.crypto.secagg.parameters import quorum
from fedcore.crypto.secagg.recovery import masks_in_sum
from fedcore.crypto.secagg.signing import heard, holds, parsed, say, votes
from fedcore.crypto.shamir import SHARE
from fedcore.crypto.trust import Trust
from fedcore.errors import AuthenticationError, Blameless, ProtocolError, SpecError
from fedcore.wire.v1 import secagg_pb2 as pb

Telling = tuple[str, bytes]  # a message's step and content
ANYONE = Pair.of(bytes(32))  # whoever agrees with a key of low order agrees on zeros


def _forget(record: bytes) -> None:
    """Keep no record: what a simulation does."""


class Server:
    """One attempt, until the masks of a sum can be taken off.

    clients: who may advertise. record: keeps what it is given, in order; it must be durable when `proceed` or
    `abort` returns and when a client is told that its words have arrived. step: what is waited for. waiting:
    who may still answer. included: the set that is summed, after the mask step.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        trust: Trust,
        clients: Sequence[str],
        *,
        record: Callable[[bytes], None] = _forget,
    ) -> None:
        self.step = Step.ADVERTISE
        self.waiting = frozenset(clients)
        self.included: tuple[str, ...] = ()
        self._config, self._trust, self._record = config, trust, record
        self._key = key_from_pem(identity.key)
        self._chain = [to_der(each) for each in x509.load_pem_x509_certificates(identity.chain)]
        self._accepted: dict[str, bytes] = {}  # of this step, whole messages
        self._told: dict[str, bytes] = {}
        self._admissions: dict[str, tuple[pb.Said, Member]] = {}
        self._keys: set[bytes] = set()  # of all who are admitted
        self._answers: dict[int, bytes] = {}  # of this step, contents by position
        self._signatures: dict[int, bytes] = {}

    @classmethod
    def restored(
        cls,
        config: Config,
        identity: Identity,
        trust: Trust,
        clients: Sequence[str],
        *,
        records: Iterable[bytes],
        record: Callable[[bytes], None] = _forget,
    ) -> Self:
        """Return the server that has recorded this; raises Failed where it cannot say the same again."""
        server = cls(config, identity, trust, clients)
        try:
            for each in records:
                server._replay(pb.Recorded.FromString(each))
        except (ProtocolError, AuthenticationError) as error:
            raise Failed(f"the attempt cannot go on: {error}") from error
        server._record = record
        return server

    def _replay(self, recorded: pb.Recorded) -> None:
        """Do again what was recorded."""
        same = True
        match recorded.WhichOneof("event"):
            case "received":
                self.receive(recorded.received.client, recorded.received.message)
            case "uploaded":
                self.uploaded(recorded.uploaded)
            case "told":
                same = recorded.told == _digest(self.proceed())
            case "aborted":
                same = recorded.aborted == _digest(self.abort())
        if not same:
            raise ProtocolError(
                "what was told then is not what would be told now; the certificate is another"
            )

    def message(self, client: str) -> bytes | None:
        """Return what a client was last told, for one that is connected again."""
        return self._told.get(client)

    def receive(self, client: str, message: bytes) -> None:
        """Take a client's answer to the step; the same one again changes nothing.

        Raises ProtocolError and AuthenticationError for what is out of place or does not hold.
        """
        if self._accepted.get(client) == message:
            return
        said = heard(message)
        if client not in self.waiting or said.step != self.step or self.step is Step.MASK:
            raise Blameless(
                f"{said.step!r} of {client} is out of place: expected {self.step.value!r} of "
                f"{len(self.waiting)} clients"
            )
        recorded = pb.Recorded(received=pb.From(client=client, message=message)).SerializeToString()
        if self.step is Step.ADVERTISE:
            member = self._admitted(client, said)
            self._record(recorded)
            self._admissions[client] = (said, member)
            self._keys.update(member.keys)
        else:
            position = self._cohort.positions[client]
            self._check(position, said)
            self._record(recorded)
            self._answers[position], self._signatures[position] = said.content, said.signature
        self._accepted[client] = message
        self.waiting -= {client}

    def _admitted(self, client: str, said: pb.Said) -> Member:
        """Return who advertises itself; raises ProtocolError and AuthenticationError."""
        if len(self._admissions) == self._config.asked:
            raise Blameless(f"the cohort is full: {self._config.asked} clients have advertised")
        member = admitted(self._config, self._trust, said, [said.issuer])
        if member.name != client:
            raise AuthenticationError(f"the advertisement of {client} is {member.name}'s")
        if len({*member.keys} - self._keys) < len(member.keys):
            raise Blameless(f"a key of {client} is another's too, or is used twice")
        for public in (member.mask_key, member.channel_key):
            ANYONE.agreed(public)
        return member

    def _check(self, member: int, said: pb.Said) -> None:
        """Raise ProtocolError where an answer is not that of a member of the cohort to this step."""
        key, transcript = self._cohort.members[member].key, self._cohort.context.transcript
        if not holds(key, said.signature, said.step, transcript, said.content):
            raise ProtocolError(f"{said.step!r} is not signed by its client, for this attempt and cohort")
        self._check_content(member, said.content)

    def _check_content(self, member: int, content: bytes) -> None:
        """Raise ProtocolError where an answer is not what the step asks of this member."""
        match self.step:
            case Step.CHOOSE:
                chosen = edges.distinct(parsed(pb.Members, content).positions, self._n)
                if member in chosen or len(chosen) != self._cohort.graph.degree:
                    raise ProtocolError(
                        f"{len(chosen)} clients were drawn, expected {self._cohort.graph.degree} others"
                    )
            case Step.SHARE:
                _check_parts(parsed(pb.Ciphertexts, content).each, self._drawn[member], CIPHERTEXT)
            case Step.RECEIVE:
                if not edges.members(content, self._n) <= set(_those(self._drawn[:, member])):
                    raise ProtocolError("a client says that it holds shares of one that has not drawn it")
            case Step.REVEAL:
                _check_parts(parsed(pb.Shares, content).each, self._links[:, member], SHARE)
            case _ if content != self._asked:
                raise ProtocolError(f"{self.step.value!r} is about something else than the client was told")

    def uploaded(self, client: str) -> None:
        """Take note that a client's masked words are on disk; raises ProtocolError where they are late."""
        if self.step is not Step.MASK or client not in self.waiting:
            raise Blameless(
                f"masked words of {client} are out of place: the sum is fixed, or it has sent some"
            )
        self._record(pb.Recorded(uploaded=client).SerializeToString())
        self._answers[self._cohort.positions[client]] = b""
        self.waiting -= {client}

    def proceed(self) -> Mapping[str, bytes]:
        """End the step with those who have answered; return what to tell whom.

        Raises Failed where they are too few; the step is as it was then, and nobody has learned anything.
        """
        ends: dict[Step, Callable[[], tuple[Step, dict[int, Telling]]]] = {
            Step.ADVERTISE: self._fix,
            Step.CHOOSE: self._introduce,
            Step.SHARE: self._deliver,
            Step.RECEIVE: self._connect,
            Step.CONFIRM: self._confirm,
            Step.MASK: self._include,
            Step.AGREE: self._ask,
            Step.REVEAL: self._open,
        }
        step, tellings = ends[self.step]()
        told = self._signed(tellings)
        self._record(pb.Recorded(told=_digest(told)).SerializeToString())
        return self._enter(step, told)

    def abort(self) -> Mapping[str, bytes]:
        """Give the attempt up; return what asks every client to sign that."""
        told = self._signed(self._all("abort", b""))
        self._record(pb.Recorded(aborted=_digest(told)).SerializeToString())
        self._asked = b""
        return self._enter(Step.ABORT, told)

    @property
    def certificate(self) -> bytes:
        """The proof that the attempt was given up, for other attempts; b"" while too few have signed."""
        return again.certificate(self._cohort, self._signatures) if self.step is Step.ABORT else b""

    def unmask(self, narrow: Words, wide: NDArray[np.uint64]) -> None:
        """Take the masks off the sum of the masked words of `included`, in place, after the reveal step."""
        self._config.check_words(narrow, wide)
        add_masks(narrow, wide, *self._masks)

    def _signed(self, tellings: Mapping[int, Telling]) -> dict[str, bytes]:
        """Return what is told, by clients' names; what is told to many is signed once."""
        context = self._config.digest if self.step is Step.ADVERTISE else self._cohort.context.transcript
        said = {telling: say(self._key, telling[0], context, telling[1]) for telling in {*tellings.values()}}
        return {self._cohort.members[to].name: said[telling] for to, telling in tellings.items()}

    def _enter(self, step: Step, told: Mapping[str, bytes]) -> Mapping[str, bytes]:
        self.step, self.waiting = step, frozenset(told)
        self._told.update(told)
        self._accepted, self._answers, self._signatures = {}, {}, {}
        return told

    def _fix(self) -> tuple[Step, dict[int, Telling]]:
        """Commit to the cohort."""
        try:
            self._cohort = fixed(self._config, self._admissions, *self._chain)
            complete = self._cohort.complete
        except (ProtocolError, SpecError) as error:
            raise Failed(str(error)) from error
        self._n = len(self._cohort.members)
        self._present = frozenset(range(self._n))
        self._drawn = ~np.eye(self._n, dtype=np.bool_)
        return Step.SHARE if complete else Step.CHOOSE, self._all("cohort", self._cohort.content)

    def _all(self, step: str, content: bytes) -> dict[int, Telling]:
        return dict.fromkeys(self._present, (step, content))

    def _introduce(self) -> tuple[Step, dict[int, Telling]]:
        """Tell everybody who drew it."""
        self._present = self._enough(self._answers)
        self._drawn = np.zeros((self._n, self._n), np.bool_)
        for member, content in self._answers.items():
            self._drawn[member, list(pb.Members.FromString(content).positions)] = True
        tellings = {}
        for member in self._present:
            positions = pb.Members(positions=_those(self._drawn[:, member]))
            tellings[member] = ("neighbourhood", positions.SerializeToString())
        return Step.SHARE, tellings

    def _deliver(self) -> tuple[Step, dict[int, Telling]]:
        """Hand on what was encrypted."""
        self._present = self._enough(self._answers)
        sealed = {
            (source, target): each
            for source, content in self._answers.items()
            for target, each in zip(
                _those(self._drawn[source]), pb.Ciphertexts.FromString(content).each, strict=True
            )
        }
        tellings = {}
        for member in self._present:
            mail = [sealed.get((source, member), b"") for source in _those(self._drawn[:, member])]
            tellings[member] = ("delivery", pb.Ciphertexts(each=mail).SerializeToString())
        return Step.RECEIVE, tellings

    def _connect(self) -> tuple[Step, dict[int, Telling]]:
        """Commit to the edges, without those who would stand alone."""
        links = edges.links(self._answers, self._n)
        self._present = self._enough(edges.kept(links, self._answers, self._cohort.graph.threshold))
        left = sorted(self._present)
        self._links = edges.links({member: self._answers[member] for member in left}, self._n)
        holders = [
            pb.Holder(position=member, held=self._answers[member], signature=self._signatures[member])
            for member in left
        ]
        told = pb.Holders(holders=holders).SerializeToString()
        self._asked = self._edges = sha256(told).digest()
        return Step.CONFIRM, self._all("edges", told)

    def _confirm(self) -> tuple[Step, dict[int, Telling]]:
        """Show that a quorum knows the edges; who has not confirmed them will not mask."""
        self._present = self._enough(self._answers)
        return Step.MASK, self._quorum("confirmed")

    def _include(self) -> tuple[Step, dict[int, Telling]]:
        """Commit to the set that is summed."""
        self._summed = self._enough(edges.kept(self._links, self._answers, self._cohort.graph.threshold))
        self.included = tuple(self._cohort.members[member].name for member in sorted(self._summed))
        included = edges.bitmap(self._summed, self._n)
        self._asked = self._edges + included
        return Step.AGREE, self._all("included", included)

    def _ask(self) -> tuple[Step, dict[int, Telling]]:
        """Show that a quorum agrees on the sum, which opens the shares of everybody who signed.

        However many a sum asks for: the masked words are here, only its masks are missing.
        """
        self._present = self._enough(self._answers, quorum(self._n))
        return Step.REVEAL, self._quorum("quorum")

    def _quorum(self, step: str) -> dict[int, Telling]:
        """Return the signatures of all who have signed, for them."""
        return self._all(step, votes(self._signatures).SerializeToString())

    def _open(self) -> tuple[Step, dict[int, Telling]]:
        """Recover the seeds of the included and the mask keys of the lost, and so all masks in the sum."""
        revealed: dict[int, dict[int, bytes]] = {member: {} for member in _those(self._links.any(axis=1))}
        for holder, content in self._answers.items():
            owners = _those(self._links[:, holder])
            for owner, share in zip(owners, pb.Shares.FromString(content).each, strict=True):
                revealed[owner][holder + 1] = share
        self._masks = masks_in_sum(self._cohort, self._links, self._summed, revealed)
        return Step.DONE, {}

    def _enough(self, members: Collection[int], fewest: int = 0) -> frozenset[int]:
        """Return who is left; raises Failed where they are too few, for a sum unless said otherwise."""
        fewest = fewest or self._cohort.fewest
        if len(members) < fewest:
            raise Failed(
                f"{len(members)} of {self._n} clients are left after {self.step.value!r}, expected at least "
                f"{fewest}; nothing is known of any update"
            )
        return frozenset(members)


def _those(flags: Any) -> list[int]:
    """Return the positions of a row or a column, ascending."""
    positions: list[int] = np.flatnonzero(flags).tolist()
    return positions


def _check_parts(parts: Sequence[bytes], peers: NDArray[np.bool_], length: int) -> None:
    """Raise ProtocolError unless there is a part of that length for each of the peers."""
    count = int(peers.sum())
    if len(parts) != count or any(len(part) != length for part in parts):
        raise ProtocolError(f"{len(parts)} parts came, expected {count} of {length} bytes each")


def _digest(told: Mapping[str, bytes]) -> bytes:
    """Return what was told to whom, as one hash."""
    parts = (name.encode() + b"\0" + sha256(told[name]).digest() for name in sorted(told))
    return sha256(b"".join(parts)).digest()
