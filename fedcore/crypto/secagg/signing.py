"""Messages of secure aggregation, signed by who says them.

    signed = "fedcore secagg 1" 0 step 0 context content

context: 32 bytes, the digest of the configuration up to the message that tells the cohort, and from there
the transcript, which has that message in it. So nothing said in another attempt, to another cohort, or at
another step is taken for this. ECDSA on P-256 with SHA-256 and nonces that are derived (RFC 6979): the same
words are signed by the same bytes, also after a restart.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError, Message

from fedcore.crypto.certificates import Key, PublicKey
from fedcore.crypto.secagg.config import LABEL
from fedcore.crypto.secagg.parameters import quorum
from fedcore.errors import ProtocolError
from fedcore.wire.v1 import secagg_pb2 as pb

SIGN = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
VERIFY = ec.ECDSA(hashes.SHA256())
M = TypeVar("M", bound=Message)


def say(key: Key, step: str, context: bytes, content: bytes, issuer: bytes = b"") -> bytes:
    """Return a signed message."""
    signature = key.sign(_signed(step, context, content), SIGN)
    return pb.Said(step=step, content=content, signature=signature, issuer=issuer).SerializeToString()


def heard(message: bytes) -> pb.Said:
    """Return a signed message, its signature unchecked; raises ProtocolError where it is none."""
    said = parsed(pb.Said, message)
    if len(said.step) > 16:
        raise ProtocolError(f"the message names a step of {len(said.step)} letters")
    return said


def holds(key: PublicKey, signature: bytes, step: str, context: bytes, content: bytes) -> bool:
    """Return whether a signature is the key's, on these words."""
    try:
        key.verify(signature, _signed(step, context, content), VERIFY)
    except InvalidSignature:
        return False
    return True


def parsed(kind: type[M], content: bytes) -> M:
    """Return a message; raises ProtocolError where the bytes are none."""
    try:
        return kind.FromString(content)
    except DecodeError as error:
        raise ProtocolError(f"the message is no {kind.DESCRIPTOR.name}: {error}") from error


def _signed(step: str, context: bytes, content: bytes) -> bytes:
    return LABEL + step.encode() + b"\0" + context + content


def votes(signatures: Mapping[int, bytes]) -> pb.Votes:
    """Return signatures, by the positions of who made them."""
    each = [pb.Vote(position=position, signature=signatures[position]) for position in sorted(signatures)]
    return pb.Votes(votes=each)


def agree(keys: Sequence[PublicKey], votes: pb.Votes, step: str, context: bytes, content: bytes) -> bool:
    """Return whether a quorum of the members with these keys has signed the same words."""
    asked = quorum(len(keys))
    signatures = {vote.position: vote.signature for vote in votes.votes if vote.position < len(keys)}
    if len(signatures) < asked:
        return False
    valid = (holds(keys[position], each, step, context, content) for position, each in signatures.items())
    return all(islice(valid, asked))
