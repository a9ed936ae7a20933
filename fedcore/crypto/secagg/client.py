"""A client of secure aggregation: Bell et al. (2020), the malicious variant, as a state machine.

Messages in, messages out; whatever the coordinator says is checked before it is answered. Of each peer's two
secrets a client gives at most one share away, and only after a quorum has signed the same set.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
from cryptography import x509
from numpy.typing import NDArray

from fedcore.crypto.certificates import key_from_pem, to_der
from fedcore.crypto.identity import Identity
from fedcore.crypto.prg import Words
from fedcore.crypto.secagg import again, edges
from fedcore.crypto.secagg.cohort import read
from fedcore.crypto.secagg.config import Config, Floors, Step
from fedcore.crypto.secagg.errors import Aborted
from fedcore.crypto.secagg.keys import CIPHERTEXT, SECRET, Pair, add_masks, commitment
from fedcore.crypto.secagg.parameters import quorum
from fedcore.crypto.secagg.signing import agree, heard, holds, parsed, say
from fedcore.crypto.shamir import SHARE, split
from fedcore.crypto.trust import Trust
from fedcore.errors import AuthenticationError, ProtocolError, SpecError
from fedcore.wire.v1 import secagg_pb2 as pb

Random = Callable[[int], bytes]


@dataclass(repr=False)
class _Secrets:
    """What is forgotten when an attempt is over.

    shared: what it has agreed on with the channel key of a peer. held: a peer's shares, of seed and mask key.
    plus, minus: the keys of the masks to add to its words and to subtract.
    """

    masks: Pair
    channel: Pair
    seed: bytes
    shared: dict[int, bytes] = field(default_factory=dict)
    held: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    plus: list[bytes] = field(default_factory=list)
    minus: list[bytes] = field(default_factory=list)


class Client:
    """One attempt, from the advertisement of fresh keys to the shares that are revealed.

    floors: what this device asks of a cohort. sent: `receipt` of the newest attempt of this round and kind in
    which this device sent masked words, b"" if it never did; such a device enters only with a `certificate`
    that the attempt was given up. random: gives so many random bytes. Every method raises Aborted where the
    coordinator asks for what is not safe; the attempt is over then and its keys are gone.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        trust: Trust,
        floors: Floors,
        *,
        sent: bytes = b"",
        certificate: bytes = b"",
        random: Random = secrets.token_bytes,
    ) -> None:
        floors.check(config)
        again.enter(config.ref, sent, certificate)
        self.step = Step.ADVERTISE
        self._config, self._trust, self._random = config, trust, random
        self._name, self._key = identity.name.name, key_from_pem(identity.key)
        leaf, self._issuer = (to_der(each) for each in x509.load_pem_x509_certificates(identity.chain))
        masks, channel, seed = (random(SECRET) for _ in range(3))
        self._secrets = _Secrets(Pair.of(masks), Pair.of(channel), seed)
        self._advertisement = pb.Advertisement(
            mask_key=self._secrets.masks.public,
            channel_key=self._secrets.channel.public,
            commitment=commitment(config.digest, seed),
            nonce=random(SECRET),
            leaf=leaf,
        ).SerializeToString()
        self._expected: tuple[str, ...] = ()
        self._replies: dict[bytes, bytes | None] = {}
        self._masked = False

    def advertise(self) -> bytes:
        """Return this client's keys of the attempt: the same bytes whenever it is asked."""
        if self.step is Step.ADVERTISE:
            self.step, self._expected = Step.SHARE, ("cohort",)
        return say(self._key, "advertise", self._config.digest, self._advertisement, self._issuer)

    def receive(self, message: bytes) -> bytes | None:
        """Return the answer to a message of the coordinator's; None for `confirmed`: now mask and upload.

        The same bytes get the same answer again. Raises Aborted.
        """
        known = sha256(message).digest()
        if known not in self._replies:
            try:
                said = heard(message)
                if said.step not in self._expected:
                    expected = " or ".join(self._expected) or "nothing: the attempt is over"
                    raise Aborted(f"the coordinator says {said.step!r}, expected {expected}")
                self._replies[known] = self._answer(said)
            except (Aborted, AuthenticationError, ProtocolError, SpecError) as error:
                self._end()
                raise Aborted(str(error)) from error
        return self._replies[known]

    def _answer(self, said: pb.Said) -> bytes | None:
        """Return the answer to a message that is in its place, checked and signed."""
        if said.step == "cohort":
            return self._cohort_told(said)
        transcript = self._cohort.context.transcript
        if not holds(self._coordinator, said.signature, said.step, transcript, said.content):
            raise Aborted(f"{said.step!r} is not signed by the coordinator, for this attempt and cohort")
        answers = {
            "neighbourhood": self._neighbourhood_told,
            "delivery": self._delivered,
            "edges": self._edges_told,
            "confirmed": self._confirmed,
            "included": self._included_told,
            "quorum": self._reveal,
            "abort": self._abort,
        }
        return answers[said.step](said.content)

    def _say(self, step: Step, content: bytes) -> bytes:
        return say(self._key, step, self._cohort.context.transcript, content)

    def _cohort_told(self, said: pb.Said) -> bytes:
        """Check who takes part; choose peers, or where everybody is a peer share with them."""
        self._cohort, self._coordinator = read(self._config, self._trust, said)
        if self._name not in self._cohort.positions:
            raise Aborted("the cohort does not have this client in it")
        self._me = self._cohort.positions[self._name]
        if self._cohort.advertised(self._me) != self._advertisement:
            raise Aborted("the cohort has keys for this client that are not its own")
        others = [position for position in range(len(self._cohort.members)) if position != self._me]
        if self._cohort.complete:
            self._drawn = self._incoming = frozenset(others)
            return self._share()
        order = {position: self._random(16) for position in others}
        self._drawn = frozenset(sorted(others, key=order.__getitem__)[: self._cohort.graph.degree])
        self.step, self._expected = Step.CHOOSE, ("neighbourhood", "abort")
        return self._say(Step.CHOOSE, pb.Members(positions=sorted(self._drawn)).SerializeToString())

    def _neighbourhood_told(self, content: bytes) -> bytes:
        """Check who drew this client, and share."""
        positions, graph = list(parsed(pb.Members, content).positions), self._cohort.graph
        self._incoming = edges.distinct(positions, len(self._cohort.members)) - {self._me}
        if len(self._incoming) > graph.incoming or len(self._incoming) < len(positions):
            raise Aborted(
                f"{len(positions)} clients are said to have drawn this one, expected others and at most "
                f"{graph.incoming}"
            )
        return self._share()

    def _share(self) -> bytes:
        """Return for each peer that was drawn a share of seed and mask key, which only it can read."""
        held, threshold = sorted(self._drawn), self._cohort.graph.threshold
        points = [peer + 1 for peer in held]
        seeds = split(self._secrets.seed, threshold, points, self._random)
        private = self._secrets.masks.private.private_bytes_raw()
        keys = split(private, threshold, points, self._random)
        context = self._cohort.context
        sealed = [
            context.sealed(self._shared(peer), self._me, peer, seed + key)
            for peer, seed, key in zip(held, seeds, keys, strict=True)
        ]
        self.step, self._expected = Step.RECEIVE, ("delivery", "abort")
        return self._say(Step.SHARE, pb.Ciphertexts(each=sealed).SerializeToString())

    def _shared(self, peer: int) -> bytes:
        """Return what the channel keys of this client and a peer agree on."""
        shared = self._secrets.shared
        if peer not in shared:
            shared[peer] = self._secrets.channel.agreed(self._cohort.members[peer].channel_key)
        return shared[peer]

    def _delivered(self, content: bytes) -> bytes:
        """Take the shares of others, and say whose opened."""
        delivered, incoming = parsed(pb.Ciphertexts, content).each, sorted(self._incoming)
        if len(delivered) != len(incoming):
            raise Aborted(f"{len(delivered)} ciphertexts came from {len(incoming)} clients")
        for peer, sealed in zip(incoming, delivered, strict=True):
            if len(sealed) != CIPHERTEXT:
                continue
            shares = self._cohort.context.opened(self._shared(peer), peer, self._me, sealed)
            if shares is not None:
                self._secrets.held[peer] = (shares[:SHARE], shares[SHARE:])
        self.step, self._expected = Step.CONFIRM, ("edges", "abort")
        return self._say(Step.RECEIVE, edges.bitmap(self._secrets.held, len(self._cohort.members)))

    def _edges_told(self, content: bytes) -> bytes:
        """Check who is left and holds whose shares, as all of them have signed it; confirm it."""
        n, me = len(self._cohort.members), self._me
        held = self._cohort.acknowledged(parsed(pb.Holders, content))
        links = edges.links(held, n)
        self._cohort.check_left(held.keys(), links)
        if me not in held:
            raise Aborted("the edges leave this client out")
        if not frozenset(np.flatnonzero(links[me]).tolist()) <= self._drawn:
            raise Aborted("a client says that it holds shares of this one, which gave it none")
        self._links, self._present, self._edges = links, frozenset(held), sha256(content).digest()
        self.step, self._expected = Step.MASK, ("confirmed", "abort")
        return self._say(Step.CONFIRM, self._edges)

    def _confirmed(self, content: bytes) -> None:
        """Check that a quorum was told of the same edges, so that everybody who masks masks over these."""
        self._check_quorum(content, Step.CONFIRM, self._edges)
        context, me, secrets = self._cohort.context, self._me, self._secrets
        secrets.plus.append(context.self_mask(secrets.seed, me))
        for peer in np.flatnonzero(self._links[me] | self._links[:, me]).tolist():
            agreed = secrets.masks.agreed(self._cohort.members[peer].mask_key)
            (secrets.plus if peer > me else secrets.minus).append(context.pair_mask(agreed, me, peer))
        self._expected = ("included", "abort")

    @property
    def receipt(self) -> bytes:
        """What the device has to keep, durably, before the first masked word leaves it; see `sent`."""
        return again.receipt(self._cohort)

    def mask(self, narrow: Words, wide: NDArray[np.uint64]) -> None:
        """Add this client's masks to its words, in place: uint16 or uint32, and uint64, of the sizes asked.

        Once only, after the edges are confirmed; raises ValueError otherwise.
        """
        self._config.check_words(narrow, wide)
        if self.step is not Step.MASK or self._expected != ("included", "abort") or self._masked:
            raise ValueError(
                "words are masked once, after the edges are confirmed and before the sum is fixed"
            )
        self._masked, self.step = True, Step.AGREE
        add_masks(narrow, wide, self._secrets.plus, self._secrets.minus)

    def _included_told(self, content: bytes) -> bytes:
        """Check the set that is summed, for everyone in it, and sign it: the only one in this attempt."""
        included = edges.members(content, len(self._cohort.members))
        if not included <= self._present:
            raise Aborted("a client is said to be in the sum that has no edges")
        self._cohort.check_left(included, self._links)
        if self._me in included and not self._masked:
            raise Aborted("this client is said to be in the sum, and has masked nothing")
        self._included, self._agreed = included, self._edges + content
        self.step, self._expected = Step.REVEAL, ("quorum",)
        return self._say(Step.AGREE, self._agreed)

    def _reveal(self, content: bytes) -> bytes:
        """Return one share for each link, once a quorum has signed what this client has signed."""
        self._check_quorum(content, Step.AGREE, self._agreed)
        linked = np.flatnonzero(self._links[:, self._me]).tolist()
        shares = [self._secrets.held[peer][peer not in self._included] for peer in linked]
        self._end()
        return self._say(Step.REVEAL, pb.Shares(each=shares).SerializeToString())

    def _check_quorum(self, content: bytes, step: Step, signed: bytes) -> None:
        """Raise Aborted unless a quorum of the cohort has signed what this client has signed in a step."""
        keys = [member.key for member in self._cohort.members]
        if not agree(keys, parsed(pb.Votes, content), step, self._cohort.context.transcript, signed):
            raise Aborted(
                f"fewer than {quorum(len(keys))} of {len(keys)} clients have signed what this one has: the "
                f"coordinator told others of other edges or another sum"
            )

    def _abort(self, content: bytes) -> bytes:
        """Sign that the attempt is given up: no set that is summed will be signed."""
        if content:
            raise Aborted(f"'abort' has {len(content)} bytes of content, expected none")
        self._end()
        return self._say(Step.ABORT, b"")

    def _end(self) -> None:
        """Forget all keys; nothing is answered any more but what was answered before."""
        self.step, self._expected = Step.DONE, ()
        vars(self).pop("_secrets", None)
