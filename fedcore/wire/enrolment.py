"""Enrolment, as a participant does it: a token in, an identity out; the key never leaves the folder."""

import logging
from pathlib import Path

from cryptography import x509

from fedcore.crypto.certificates import certificate_request, leaf_name, to_pem
from fedcore.crypto.identity import IDENTITY, Clock, Identity, requesting, utc_now
from fedcore.crypto.names import Role
from fedcore.errors import AuthenticationError, ConfigError
from fedcore.wire.authority import DEADLINE, authority_at, chain_of
from fedcore.wire.token import Token
from fedcore.wire.v1.authority_pb2 import EnrolRequest

log = logging.getLogger("fedcore.enrolment")

ANOTHER = "ask for another token: fedcore authority token"


def enrol(
    token: str, folder: Path, role: Role = "client", clock: Clock = utc_now, passphrase: bytes = b""
) -> Identity:
    """Exchange a token for a certificate and write the identity into `folder`.

    Safe to repeat: after a crash or a lost reply the same token and folder give the same certificate.
    role: the one that is wanted. passphrase: encrypts the key on disk; empty for none.
    Raises AuthenticationError for a token or an authority that is not accepted, ConfigError where the
    token is for another role or the folder belongs to another identity, ProtocolError for a malformed
    reply, and FedcoreError where the authority cannot be reached.
    """
    ticket = Token.parse(token)
    if ticket.name.role != role:  # before the token is used up
        raise ConfigError(f"the token is for {ticket.name}; expected one of role {role}")
    _refuse_another(ticket, folder)
    with requesting(folder, passphrase) as key:
        message = EnrolRequest(secret=ticket.secret, certificate_request=certificate_request(key))
        root = to_pem(ticket.root)
        with authority_at(ticket.address, ticket.name.federation, root, ANOTHER) as authority:
            reply = authority.Enrol(message, timeout=DEADLINE)
        chain = chain_of(reply, ticket.address)
        identity = Identity.verified(key, chain, ticket.root, clock(), ticket.address, passphrase)
        if identity.name != ticket.name:
            raise AuthenticationError(
                f"the authority's certificate is for {identity.name}, not {ticket.name}"
            )
        identity.save(folder)
    log.info("enrolled", extra={"identity": identity.name, "root": identity.root_fingerprint})
    return identity


def _refuse_another(ticket: Token, folder: Path) -> None:
    """A folder is one identity for good: a wrong token must not turn one device into another."""
    path = folder / IDENTITY
    if not path.exists():
        return
    try:
        name = leaf_name(x509.load_pem_x509_certificate(path.read_bytes()))
    except (ValueError, AuthenticationError) as error:
        raise ConfigError(f"{path} is damaged: {error}; remove it and enrol again") from error
    if name != ticket.name:
        raise ConfigError(
            f"{folder} holds the identity of {name}, but the token is for {ticket.name}; use another folder"
        )
