"""Parameters down and finished updates up, over a connection that may break at any byte."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fedcore.client.connection import Connection, Retries
from fedcore.client.process import WorkFailed
from fedcore.client.session import ConnectionLost, Session
from fedcore.client.state import State
from fedcore.errors import ProtocolError, UpdateRefused
from fedcore.faults import point
from fedcore.messages import Blob, UploadHead

log = logging.getLogger("fedcore.client")


@dataclass
class Transfers:
    """What an agent fetches and sends; each is tried until it works or its deadline (monotonic) has passed.

    Raises WorkFailed for a coordinator that is away for too long. sending: whether an update is on its way.
    """

    session: Session
    state: State
    connection: Connection
    sending: bool = False

    async def fetch(self, blob: Blob, deadline: float, content: bytes = b"") -> None:
        """Have parameters in the cache; raises UpdateRefused and ProtocolError as `Session.download` does.

        content: they themselves, if they have come with the assignment.
        """
        path = self.state.blob(blob.sha256)
        if path.exists():
            return
        if content:
            self.state.keep_blob(blob, content)
        else:
            await self.persist(lambda left: self.session.download(blob, path, left), deadline)
        self.state.trim_cache(path)

    async def send(self, head: UploadHead, deadline: float, again: bool = False) -> None:
        """Send an update, which the coordinator may refuse; raises ProtocolError where it is malformed.

        again: some of it may be with the coordinator already, or all.
        """
        path = self.state.payload(head.ref)

        async def upload(left: float) -> None:
            nonlocal again
            sent_before, again = again, True
            await self.session.upload(head, path, left, sent_before)

        self.sending = True
        try:
            await self.persist(upload, deadline)
        except ProtocolError:  # the bytes are at fault, so they must not be sent again
            self.state.drop(head.ref)
            raise
        except UpdateRefused as error:  # the coordinator went on without it, so there is nobody to decline to
            log.warning("update refused", extra={"ref": head.ref, "reason": str(error)})
            self.state.record(head.ref, "refused", str(error))
        else:
            point("agent.receipt")
            self.connection.worked()
            self.state.record(head.ref, "sent")
        finally:
            self.sending = False

    async def persist(self, transfer: Callable[[float], Awaitable[None]], deadline: float) -> None:
        """Try a transfer, given the seconds that are left, until it works or the deadline has passed."""
        retries = Retries("transfer failed")
        while (left := deadline - time.monotonic()) > 0:
            try:
                return await transfer(left)
            except ConnectionLost as error:
                await asyncio.sleep(max(retries.after(str(error)), self.connection.pause))
        raise WorkFailed("the coordinator could not be reached before the deadline")
