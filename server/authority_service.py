"""The authority on the network: server authentication only, small messages, nothing kept between calls."""

import asyncio
import logging
import re

from fedcore.crypto.certificates import leaf_name, to_der
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name
from fedcore.crypto.tls import Context
from fedcore.errors import AuthenticationError, ConfigError, FedcoreError, ProtocolError, UpdateRefused
from fedcore.server.authority import Authority
from fedcore.wire import grpc
from fedcore.wire.enrolment import MESSAGE_LIMIT
from fedcore.wire.v1 import authority_pb2, authority_pb2_grpc
from fedcore.wire.witness import head_from_wire, head_to_wire, opened, sign

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
CONCURRENT_CALLS = 64


REFUSALS: dict[type[FedcoreError], grpc.StatusCode] = {
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    AuthenticationError: grpc.StatusCode.UNAUTHENTICATED,
    UpdateRefused: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class AuthorityService(authority_pb2_grpc.AuthorityServicer):
    """Redeems tokens and witnesses ledgers; the rules are `Authority`'s."""

    def __init__(self, authority: Authority, identity: Identity) -> None:
        """Sign receipts as `identity`."""
        self._authority, self._identity = authority, identity

    async def Enrol(
        self, request: authority_pb2.EnrolRequest, context: Context
    ) -> authority_pb2.EnrolResponse:
        """Return the chain that the token buys, or end the call with the status that says why not."""
        redeem, peer = self._authority.redeem, context.peer()
        try:
            chain = await asyncio.to_thread(redeem, request.secret, request.certificate_request)
        except (AuthenticationError, ProtocolError) as error:
            log.warning("refused", extra={"peer": peer, "reason": str(error)})
            await context.abort(REFUSALS[type(error)], str(error))
        log.info("enrolled", extra={"peer": peer, "identity": leaf_name(chain[0])})
        return authority_pb2.EnrolResponse(chain=[to_der(certificate) for certificate in chain])

    async def Witness(self, request: authority_pb2.Signed, context: Context) -> authority_pb2.Signed:
        """Return a receipt for a client's ledger, or end the call with the status that says why not."""
        try:
            return await asyncio.to_thread(self._witness, request)
        except (AuthenticationError, ProtocolError, UpdateRefused) as error:
            log.warning("ledger refused", extra={"peer": context.peer(), "reason": str(error)})
            await context.abort(REFUSALS[type(error)], str(error))

    def _witness(self, request: authority_pb2.Signed) -> authority_pb2.Signed:
        authority = self._authority
        name, said = opened(authority_pb2.LedgerStatement, request, authority.root, authority.clock)
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
        return sign(self._identity, receipt)


async def start_service(authority: Authority, listen: str) -> tuple[grpc.aio.Server, int]:
    """Return a started server and the port it listens on.

    listen: HOST:PORT, port 0 for any free one. Its key is made here and never written.
    Raises ConfigError where the address cannot be had.
    """
    identity = authority.new_identity(Name(authority.federation, "authority", "enrolment"))
    credentials = grpc.ssl_server_credentials([(identity.key, identity.chain)])
    server = grpc.aio.server(options=LIMITS, maximum_concurrent_rpcs=CONCURRENT_CALLS)
    authority_pb2_grpc.add_AuthorityServicer_to_server(AuthorityService(authority, identity), server)
    try:
        port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {listen}: {error}; choose a free port of this machine with --listen HOST:PORT"
        ) from error
    await server.start()
    return server, port
