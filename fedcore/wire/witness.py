"""The witness of a ledger: an agent shows its head, the authority answers what it remembers, both signed.

The authority's port asks callers for no certificate, because they enrol there; so who shows a ledger signs
what it says with the key of its certificate. The authority takes a new head only from one who knows the head
that it remembers. A ledger that was rolled back does not know it, and finds it in the answer.
"""

from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError, Message

from fedcore.chain import Head
from fedcore.crypto.certificates import key_from_pem, to_der, verify_chain
from fedcore.crypto.identity import Clock, Identity, utc_now
from fedcore.crypto.names import Name
from fedcore.crypto.tls import demand
from fedcore.errors import AuthenticationError, FedcoreError, ProtocolError
from fedcore.privacy.ledger import Receipt
from fedcore.wire import grpc
from fedcore.wire.enrolment import MESSAGE_LIMIT
from fedcore.wire.v1 import authority_pb2 as pb
from fedcore.wire.v1.authority_pb2_grpc import AuthorityStub

DEADLINE = 5.0  # seconds
ECDSA = ec.ECDSA(hashes.SHA256())
M = TypeVar("M", bound=Message)


class WitnessUnreachable(FedcoreError):
    """The authority does not answer; trying again later is right."""


@dataclass(frozen=True)
class Statement:
    """A client's word on its ledger: its head, and that of the last receipt."""

    ledger: str
    head: Head
    previous: Head


def sign(identity: Identity, message: Message) -> pb.Signed:
    """Return a message with a proof of who said it."""
    content = message.SerializeToString()
    signature = key_from_pem(identity.key).sign(_signed_bytes(type(message), content), ECDSA)
    chain = x509.load_pem_x509_certificates(identity.chain)
    return pb.Signed(content=content, signature=signature, chain=[to_der(each) for each in chain])


def opened(
    kind: type[M], signed: pb.Signed, root: x509.Certificate, clock: Clock = utc_now
) -> tuple[Name, M]:
    """Return who said a message, and the message.

    Raises ProtocolError where it is malformed, and AuthenticationError where its certificate does not lead to
    the root or its signature does not hold.
    """
    try:
        chain = [x509.load_der_x509_certificate(der) for der in signed.chain]
        message = kind.FromString(signed.content)
    except (ValueError, DecodeError) as error:
        raise ProtocolError(f"the signed message is malformed: {error}") from error
    if not chain:
        raise ProtocolError("the signed message has no certificate")
    name, key = verify_chain(chain, root, clock()), chain[0].public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)  # the authority issues nothing else
    try:
        key.verify(signed.signature, _signed_bytes(kind, signed.content), ECDSA)
    except InvalidSignature as error:
        raise AuthenticationError(f"the signature is not that of {name}") from error
    return name, message


def _signed_bytes(kind: type[Message], content: bytes) -> bytes:
    return kind.DESCRIPTOR.full_name.encode() + b"\0" + content


def head_to_wire(head: Head) -> pb.LedgerHead:
    """Return a head as a message."""
    return pb.LedgerHead(sequence=head.sequence, hash=head.hash)


def head_from_wire(message: pb.LedgerHead) -> Head:
    """Return the head; raises ProtocolError unless it can be one."""
    if len(message.hash) != 32 or message.sequence >= 2**63:
        raise ProtocolError(f"a head has {message.sequence} rows and {len(message.hash)} bytes of hash")
    return Head(message.sequence, message.hash)


def ask(address: str, identity: Identity, statement: Statement, clock: Clock = utc_now) -> Receipt:
    """Show a head to the authority at HOST:PORT and return what it remembers.

    Raises WitnessUnreachable, AuthenticationError where either side does not accept the other, and
    ProtocolError for an answer that makes no sense.
    """
    credentials = grpc.ssl_channel_credentials(identity.root)
    options = (
        *demand(identity.name.federation, "authority"),
        ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    )
    head, previous = head_to_wire(statement.head), head_to_wire(statement.previous)
    request = sign(identity, pb.LedgerStatement(ledger=statement.ledger, head=head, previous=previous))
    with grpc.secure_channel(address, credentials, options) as channel:
        try:
            signed = AuthorityStub(channel).Witness(request, timeout=DEADLINE)
        except grpc.RpcError as error:
            raise _explain(error.code(), error.details() or "", address) from error
    said_by, answer = opened(pb.LedgerReceipt, signed, x509.load_pem_x509_certificate(identity.root), clock)
    about = (said_by.role, answer.name, answer.ledger)
    if about != ("authority", str(identity.name), statement.ledger):
        raise ProtocolError(f"the receipt of {said_by} is for {answer.name}'s ledger {answer.ledger}")
    return Receipt(answer.name, head_from_wire(answer.head), answer.time, signed.SerializeToString())


def _explain(code: grpc.StatusCode, details: str, address: str) -> FedcoreError:
    """Return what a failed call means."""
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return AuthenticationError(f"the authority at {address} does not accept this identity: {details}")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return WitnessUnreachable(f"the authority at {address} does not answer: {details}")
    return ProtocolError(f"the authority at {address} refused the ledger: {code.name}: {details}")
