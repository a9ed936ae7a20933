"""Whom the coordinator refuses although TLS lets them in: revoked certificates, and those that end in a call.

gRPC looks at a certificate once, when a connection is made, and knows no revocation. So a guard stands before
every call: it refuses a certificate on the authority's deny-list, and ends a call in progress at the moment
its certificate is denied or expires.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography import x509

from fedcore.crypto.certificates import serial_of
from fedcore.crypto.files import write_atomically
from fedcore.crypto.identity import Clock, Identity, utc_now
from fedcore.crypto.names import Name
from fedcore.crypto.tls import Context, demand, peer_name
from fedcore.errors import AuthenticationError, ConfigError, FedcoreError
from fedcore.wire import grpc
from fedcore.wire.signing import opened, sign
from fedcore.wire.v1.authority_pb2 import DeniedRequest, DenyList
from fedcore.wire.v1.authority_pb2_grpc import AuthorityStub

log = logging.getLogger("fedcore.server")

LONGEST = 60.0  # seconds; the authority ends a stream of deny-lists before
AGAIN = 1.0  # seconds until an authority that does not answer is asked again

Revoked = dict[str, tuple[str, float]]  # serial number -> whose, and when it ends (seconds since 1970)


class Denied(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # which only the stubs take
    """The revoked certificates, and the guard that keeps them out; lives on the event loop.

    A certificate stays denied until it expires, whatever a later list says, so no old list undoes anything.
    They are kept in a file, so that a restart without the authority refuses them too.
    """

    def __init__(self, file: Path, clock: Clock = utc_now) -> None:
        """Start with what is in `file`, if there is one; raises ConfigError where it is damaged."""
        self.file, self.clock = file, clock
        self.calls: dict[str, set[asyncio.Timeout]] = {}  # in progress, by serial number
        self.saved = file.read_bytes() if file.exists() else b"{}"
        try:
            rows = json.loads(self.saved).items()
            self.revoked: Revoked = {serial: (str(name), float(end)) for serial, (name, end) in rows}
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file} is damaged: {error}; remove it, and start the authority first"
            ) from error

    def add(self, revoked: Revoked) -> set[Name]:
        """Deny certificates, end what they have open, and return whose they are if they are new."""
        new = {serial: entry for serial, entry in revoked.items() if serial not in self.revoked}
        held, now = {**self.revoked, **new}.items(), self.clock().timestamp()
        self.revoked = {serial: entry for serial, entry in held if entry[1] > now}
        for call in [call for serial in new for call in self.calls.get(serial, ())]:
            if not call.expired():
                call.reschedule(asyncio.get_running_loop().time())
        return {Name.parse(name) for name, _ in new.values()}

    def save(self) -> None:
        """Write the file unless it is up to date; may be called from any thread."""
        content = json.dumps(self.revoked).encode()
        if content != self.saved:
            write_atomically(self.file, content, 0o600)
            self.saved = content

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Return the handler of a call, with the guard around it."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None
        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        (kind,) = (kind for kind in kinds if getattr(handler, kind))
        behaviour = getattr(handler, kind)

        async def respond(request: Any, context: Any) -> Any:
            async with self.admitted(context):
                return await behaviour(request, context)

        async def stream(request: Any, context: Any) -> None:
            # Written here and not yielded, so that a wait for a slow reader ends with the call too.
            async with self.admitted(context), aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    await context.write(response)

        guarded = stream if handler.response_streaming else respond
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(guarded, handler.request_deserializer, handler.response_serializer)

    @asynccontextmanager
    async def admitted(self, context: Context) -> AsyncIterator[None]:
        """Run a call for as long as the caller's certificate holds, and end it with a status after that."""
        serial, end = certificate_of(context.auth_context()["x509_pem_cert"][0])
        left = (end - self.clock()).total_seconds()
        if serial in self.revoked or left <= 0:
            await self._refuse(context, serial)
        call = asyncio.timeout(left)
        try:
            async with call:
                self.calls.setdefault(serial, set()).add(call)
                try:
                    yield
                finally:
                    self._forget(serial, call)
        except TimeoutError:
            if not call.expired():
                raise
            await self._refuse(context, serial)

    def _forget(self, serial: str, call: asyncio.Timeout) -> None:
        self.calls[serial].discard(call)
        if not self.calls[serial]:
            del self.calls[serial]

    async def _refuse(self, context: Context, serial: str) -> None:
        verb = "was revoked" if serial in self.revoked else "has expired"
        problem = f"the certificate of {peer_name(context)} {verb}"
        log.warning("refused", extra={"peer": context.peer(), "reason": problem, "serial": serial})
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, problem)


@lru_cache(10_000)
def certificate_of(pem: bytes) -> tuple[str, datetime]:
    """Return the serial number of a certificate, and when it ends (UTC)."""
    certificate = x509.load_pem_x509_certificate(pem)
    return serial_of(certificate), certificate.not_valid_after_utc


async def follow(current: Callable[[], Identity], denied: Denied, expel: Callable[[Name], None]) -> None:
    """Hear from the authority whom to deny, for ever; `expel` is told whose certificates those are.

    current: the coordinator's identity, which knows the authority. While that does not answer, the last list
    holds.
    """
    heard = True
    while True:
        try:
            async with aclosing(deny_lists(current())) as lists:
                async for revoked in lists:
                    if not heard:
                        log.info("the authority tells again who was revoked")
                    heard = True
                    for name in denied.add(revoked):
                        log.warning("revoked", extra={"identity": name})
                        expel(name)
                    await asyncio.to_thread(denied.save)
        except (FedcoreError, OSError, grpc.aio.AioRpcError) as error:
            if heard:
                reason = str(error.details() if isinstance(error, grpc.aio.AioRpcError) else error)
                facts = {"authority": current().authority, "reason": reason}
                log.warning("the authority does not tell who was revoked; the last list holds", extra=facts)
            heard = False
            await asyncio.sleep(AGAIN)


async def deny_lists(identity: Identity, clock: Clock = utc_now) -> AsyncGenerator[Revoked, None]:
    """Yield the deny-list as the authority of an identity tells it, until it ends the stream.

    Raises AioRpcError, and FedcoreError for what the authority has not signed.
    """
    root, options = identity.root, demand(identity.name.federation, "authority")
    credentials = grpc.ssl_channel_credentials(root)
    async with grpc.aio.secure_channel(identity.authority, credentials, options) as channel:
        request = sign(identity, DeniedRequest())
        async for signed in AuthorityStub(channel).Denied(request, timeout=LONGEST):
            name, said = opened(DenyList, signed, x509.load_pem_x509_certificate(root), clock)
            if name.role != "authority":
                raise AuthenticationError(f"the deny-list is signed by {name}, expected the authority")
            yield {
                each.serial: (str(Name.parse(each.name)), float(each.not_after)) for each in said.certificates
            }
