"""TLS 1.3 between identities, and who is at the other end.

Both sides show a certificate under the federation's root, which is the only one they trust. That alone
would let any client pose as the coordinator, so a caller also demands the DNS name of the role it wants
to talk to (`fedcore.crypto.names.server_name`); the authority gives that name, and the right to be a
server, to nobody else. The address can then be anything.
"""

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Name, Role, server_name
from fedcore.errors import AuthenticationError, SpecError
from fedcore.wire import grpc

Options = tuple[tuple[str, Any], ...]


class Context(Protocol):
    """The part of `grpc.aio.ServicerContext` that says who calls, and refuses."""

    def peer(self) -> str:
        """Return the caller's network address, for the log only."""

    def auth_context(self) -> Any:
        """Return what TLS verified: property -> values."""

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call with a status."""


def server_credentials(current: Callable[[], Identity], strangers: bool = False) -> grpc.ServerCredentials:
    """Return credentials of a server that talks only to certificates under its root.

    current: says, at every handshake, with which certificate; it may change while the server runs.
    strangers: let in callers without a certificate too.
    """
    shown = current()

    def configuration() -> grpc.ServerCertificateConfiguration:
        root = None if strangers else shown.root
        return grpc.ssl_server_certificate_configuration([(shown.key, shown.chain)], root)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Return a configuration if it is new: gRPC frees the last one, which other handshakes may use."""
        nonlocal shown
        if (identity := current()) is shown:
            return None
        shown = identity
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        changed,  # type: ignore[arg-type]  # whose stubs know no None
        require_client_authentication=not strangers,
    )


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Return credentials of a caller that trusts its own root only."""
    return grpc.ssl_channel_credentials(identity.root, identity.key, identity.chain)


def demand(federation: str, role: Role) -> Options:
    """Return the channel options that accept only a server of this role, whatever its address."""
    return (("grpc.ssl_target_name_override", server_name(federation, role)),)


def open_channel(
    address: str, identity: Identity, role: Role = "coordinator", options: Options = ()
) -> grpc.aio.Channel:
    """Return a channel to HOST:PORT that fails unless a server of `role` of the same federation answers."""
    options = (*demand(identity.name.federation, role), *options)
    return grpc.aio.secure_channel(address, channel_credentials(identity), options)


def peer_name(context: Context) -> Name:
    """Return who calls, from the verified certificate's URI and nothing else.

    Common name and metadata say what the caller likes. Raises AuthenticationError without exactly one name.
    """
    uris = context.auth_context().get("peer_uri", ())
    try:
        (uri,) = uris
        return Name.parse(uri.decode())
    except (ValueError, SpecError) as error:
        raise AuthenticationError(f"the caller's certificate names nobody in a federation: {uris}") from error


async def require(context: Context, *roles: Role) -> Name:
    """Return who calls if it has one of the roles; ends the call with a status that says why otherwise."""
    try:
        name = peer_name(context)
    except AuthenticationError as error:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
    if name.role not in roles:
        message = f"{name} is no {' or '.join(roles)}"
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, message)
    return name
