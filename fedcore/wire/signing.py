"""Messages that prove who said them, wherever they are kept: content, signature, certificates."""

from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError, Message

from fedcore.crypto.certificates import from_der, key_from_pem, to_der, verify_chain
from fedcore.crypto.identity import Clock, Identity, utc_now
from fedcore.crypto.names import Name
from fedcore.errors import AuthenticationError, ProtocolError
from fedcore.wire.v1 import authority_pb2 as pb

ECDSA = ec.ECDSA(hashes.SHA256())
M = TypeVar("M", bound=Message)


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
        chain = [from_der(der) for der in signed.chain]
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
