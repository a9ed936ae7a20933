"""Calls to the authority, and what their failures mean."""

from collections.abc import Iterator
from contextlib import contextmanager

from cryptography import x509

from fedcore.crypto.certificates import fingerprint, from_der
from fedcore.crypto.tls import demand
from fedcore.errors import AuthenticationError, ConfigError, FedcoreError, ProtocolError
from fedcore.wire import grpc
from fedcore.wire.v1.authority_pb2 import EnrolResponse
from fedcore.wire.v1.authority_pb2_grpc import AuthorityStub

MESSAGE_LIMIT = 64 * 1024  # bytes, either way; a request has about 2,000, a reply about 1,200
DEADLINE = 10.0  # seconds
# gRPC has one status for every failed connection; its text tells an impostor from a closed port.
IMPOSTOR = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification", "Peer name")


@contextmanager
def authority_at(address: str, federation: str, root: bytes, hint: str) -> Iterator[AuthorityStub]:
    """Give a connection to the authority at HOST:PORT that fails unless it is under `root` (PEM).

    Raises ConfigError for an empty address, AuthenticationError where either side does not accept the other,
    with `hint` as the next step, FedcoreError where the authority cannot be reached, and ProtocolError where
    it refuses the request.
    """
    if not address:
        raise ConfigError(
            "the authority's address is not known; write HOST:PORT into the file authority, by ca.pem"
        )
    options = (*demand(federation, "authority"), ("grpc.max_receive_message_length", MESSAGE_LIMIT))
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(root), options) as channel:
        try:
            yield AuthorityStub(channel)
        except grpc.RpcError as error:
            raise _explain(error.code(), error.details() or "", address, root, hint) from error


def chain_of(reply: EnrolResponse, address: str) -> list[x509.Certificate]:
    """Return the certificates of a reply; raises ProtocolError where they are malformed."""
    try:
        return [from_der(der) for der in reply.chain]
    except ValueError as error:
        raise ProtocolError(f"the authority at {address} sent no certificate: {error}") from error


def _explain(code: grpc.StatusCode, details: str, address: str, root: bytes, hint: str) -> FedcoreError:
    """Return the error that tells a person what to do about a failed call."""
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return AuthenticationError(f"{details}; {hint}")
    if any(sign in details for sign in IMPOSTOR):
        return AuthenticationError(
            f"what answers at {address} is not the authority under this root, whose SHA-256 is "
            f"{fingerprint(x509.load_pem_x509_certificate(root))}; compare it with what "
            f"'fedcore authority init' printed, and check this machine's clock ({details})"
        )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return FedcoreError(
            f"the authority at {address} cannot be reached within {DEADLINE:.0f} s ({details}); "
            f"is 'fedcore authority start' running there, and the port open?"
        )
    return ProtocolError(f"the authority at {address} refused the request: {code.name}: {details}")
