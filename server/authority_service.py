"""The authority on the network: server authentication only, small messages, nothing kept between calls."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from cryptography import x509
from google.protobuf.message import Message

from fedcore.crypto.certificates import leaf_name, renewal_time, serial_of, to_der
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name
from fedcore.crypto.tls import Context, server_credentials
from fedcore.errors import AuthenticationError, ConfigError, FedcoreError, ProtocolError, UpdateRefused
from fedcore.server.authority import Authority
from fedcore.wire import grpc
from fedcore.wire.authority import MESSAGE_LIMIT
from fedcore.wire.lenient import Lenient
from fedcore.wire.signing import opened, sign
from fedcore.wire.v1 import authority_pb2, authority_pb2_grpc
from fedcore.wire.witness import head_from_wire, head_to_wire

log = logging.getLogger("fedcore.authority")

# Strangers may connect here, so whatever one of them can hold on to has a limit.
LIMITS = (
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_age_ms", 30_000),
    ("grpc.max_connection_age_grace_ms", 10_000),
    # Otherwise a second authority on the same port starts without an error and takes half of the calls.
    ("grpc.so_reuseport", 0),
)
CONCURRENT_CALLS = 1024  # whoever holds so many at once, by hundreds of connections, keeps all others out
WATCH = 25.0  # seconds of a stream of deny-lists, within a connection's age
POLL = 0.25  # seconds between looks at the books, which another process writes

M = TypeVar("M", bound=Message)

REFUSALS: dict[type[FedcoreError], grpc.StatusCode] = {
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    UpdateRefused: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@asynccontextmanager
async def refusing(context: Context, what: str) -> AsyncIterator[None]:
    """End a call with a status that says why, where its body refuses what it was asked for."""
    try:
        yield
    except tuple(REFUSALS) as error:
        log.warning("%s refused", what, extra={"peer": context.peer(), "reason": str(error)})
        await context.abort(REFUSALS[type(error)], str(error))


class AuthorityService(authority_pb2_grpc.AuthorityServicer):
    """Redeems tokens, renews and denies certificates, witnesses ledgers; the rules are `Authority`'s."""

    def __init__(self, authority: Authority) -> None:
        """Serve an authority under an identity whose key is made here and never written."""
        self._authority = authority
        self._identity = authority.new_identity(authority.name)

    def identity(self) -> Identity:
        """Return the own identity, made anew after `fedcore authority renew`."""
        if self._authority.issuer()[0].not_valid_after_utc > self._identity.not_after:
            self._identity = self._authority.new_identity(self._authority.name)
        return self._identity

    async def Enrol(
        self, request: authority_pb2.EnrolRequest, context: Context
    ) -> authority_pb2.EnrolResponse:
        """Return the chain that the token buys, or end the call with the status that says why not."""
        async with refusing(context, "enrolment"):
            redeem = self._authority.redeem
            chain = await asyncio.to_thread(redeem, request.secret, request.certificate_request)
        return self._answer("enrolled", chain, context)

    async def Renew(self, request: authority_pb2.Signed, context: Context) -> authority_pb2.EnrolResponse:
        """Return the chain that replaces the caller's, or end the call with the status that says why not."""
        async with refusing(context, "renewal"):
            chain = await asyncio.to_thread(self._renew, request)
        return self._answer("renewed", chain, context)

    def _renew(self, request: authority_pb2.Signed) -> list[x509.Certificate]:
        _, serial, said = self._opened(authority_pb2.RenewalRequest, request)
        return self._authority.renew(serial, said.certificate_request)

    def _answer(
        self, done: str, chain: list[x509.Certificate], context: Context
    ) -> authority_pb2.EnrolResponse:
        log.info(done, extra={"peer": context.peer(), "identity": leaf_name(chain[0])})
        if self._authority.clock() >= renewal_time(chain[1]):
            end = f"{chain[1].not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            log.warning("the intermediate ends soon: run 'fedcore authority renew'", extra={"ends": end})
        return authority_pb2.EnrolResponse(chain=[to_der(certificate) for certificate in chain])

    def _opened(self, kind: type[M], request: authority_pb2.Signed) -> tuple[Name, str, M]:
        """Return who said a message, the serial number of the certificate, and the message.

        Raises ProtocolError, and AuthenticationError also for a certificate that was revoked.
        """
        name, said = opened(kind, request, self._authority.root, self._authority.clock)
        serial = serial_of(x509.load_der_x509_certificate(request.chain[0]))
        self._authority.check(serial)
        return name, serial, said

    async def Denied(
        self, request: authority_pb2.Signed, context: Context
    ) -> AsyncIterator[authority_pb2.Signed]:
        """Send the list of revoked certificates, and again whenever it changes."""
        async with refusing(context, "deny-list"):
            name, _, _ = await asyncio.to_thread(self._opened, authority_pb2.DeniedRequest, request)
            if name.role != "coordinator":
                raise AuthenticationError(f"{name} is no coordinator")
        end, seen, told = time.monotonic() + WATCH, 0, None
        while time.monotonic() < end:
            changed = self._authority.changed()
            if changed != seen:
                seen, denied = changed, await asyncio.to_thread(self._denied)
                if denied != told:
                    told = denied
                    yield sign(self.identity(), denied)
            await asyncio.sleep(POLL)

    def _denied(self) -> authority_pb2.DenyList:
        revoked = [
            authority_pb2.DeniedCertificate(serial=each.serial, name=each.name, not_after=each.not_after)
            for each in self._authority.issued()
            if each.revoked is not None
        ]
        return authority_pb2.DenyList(certificates=revoked)

    async def Witness(self, request: authority_pb2.Signed, context: Context) -> authority_pb2.Signed:
        """Return a receipt for a client's ledger, or end the call with the status that says why not."""
        async with refusing(context, "ledger"):
            return await asyncio.to_thread(self._witness, request)

    def _witness(self, request: authority_pb2.Signed) -> authority_pb2.Signed:
        authority = self._authority
        name, _, said = self._opened(authority_pb2.LedgerStatement, request)
        if name.role != "client" or not re.fullmatch("[0-9a-f]{64}", said.ledger):
            raise ProtocolError(
                f"{name} shows a ledger {said.ledger[:64]!r}; expected a client and a SHA-256"
            )
        head, previous = head_from_wire(said.head), head_from_wire(said.previous)
        known = authority.witness(name, said.ledger, head, previous)
        facts = {"client": name, "ledger": said.ledger, "rows": head.sequence, "known": known.sequence}
        if head.sequence < known.sequence or (head.sequence == known.sequence and head != known):
            log.warning("the ledger is not the one that was shown before", extra=facts)
        else:
            log.info("ledger witnessed", extra=facts)
        receipt = authority_pb2.LedgerReceipt(
            name=str(name),
            ledger=said.ledger,
            head=head_to_wire(known),
            time=authority.clock().timestamp(),
        )
        return sign(self.identity(), receipt)


async def start_service(authority: Authority, listen: str) -> tuple[grpc.aio.Server, int]:
    """Return a started server and the port it listens on.

    listen: HOST:PORT, port 0 for any free one. Raises ConfigError where the address cannot be had.
    """
    service = AuthorityService(authority)
    credentials = server_credentials(service.identity, strangers=True)
    server = grpc.aio.server(
        interceptors=[Lenient()], options=LIMITS, maximum_concurrent_rpcs=CONCURRENT_CALLS
    )
    authority_pb2_grpc.add_AuthorityServicer_to_server(service, server)
    try:
        port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {listen}: {error}; choose a free port of this machine with --listen HOST:PORT"
        ) from error
    await server.start()
    return server, port
