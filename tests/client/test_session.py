"""Transfers over mutual TLS, and what their failures mean."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from fedcore.client.session import ConnectionLost, Session
from fedcore.errors import FedcoreError, ProtocolError, UpdateRefused
from fedcore.messages import SMALL, Blob, Hello, Ref, UploadHead
from fedcore.wire import grpc

Federation = Any  # of conftest, which importlib mode cannot import
Work = Callable[[Any, Session], Awaitable[None]]
REF = Ref("run", 1, 0, "train")


def meet(federation: Federation, work: Work) -> None:
    """Run `work` between a coordinator and an agent's session."""

    async def run() -> None:
        async with federation.coordinator() as fake:
            identity = federation.identity("client", "client-000000")
            async with Session(federation.address, identity) as session:
                await work(fake, session)

    asyncio.run(run())


def head(data: bytes) -> UploadHead:
    blob = Blob(sha256(data).hexdigest(), len(data))
    return UploadHead(REF, {"weight": 2.0}, (("delta", len(data) // 4),), blob)


@pytest.mark.parametrize("size", [0, 4, 2**20, 3 * 2**20 + 8])
def test_what_is_sent_arrives_and_comes_back(federation: Federation, tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "payload").write_bytes(data)

    async def work(fake: Any, session: Session) -> None:
        await session.upload(head(data), tmp_path / "payload", 10.0)
        assert await fake.uploads.get() == (head(data), data)
        await session.download(fake.blob(data), tmp_path / "blob", 10.0)
        assert (tmp_path / "blob").read_bytes() == data

    meet(federation, work)


MEANINGS = [
    (grpc.StatusCode.FAILED_PRECONDITION, UpdateRefused),
    (grpc.StatusCode.PERMISSION_DENIED, UpdateRefused),
    (grpc.StatusCode.INVALID_ARGUMENT, ProtocolError),
    (grpc.StatusCode.UNAVAILABLE, ConnectionLost),
    (grpc.StatusCode.INTERNAL, ConnectionLost),
]


@pytest.mark.parametrize(("code", "error"), MEANINGS)
def test_a_status_says_what_to_do(
    federation: Federation, tmp_path: Path, code: grpc.StatusCode, error: type[FedcoreError]
) -> None:
    (tmp_path / "payload").write_bytes(b"1234")

    async def work(fake: Any, session: Session) -> None:
        fake.refusal = (code, "because")
        with pytest.raises(error, match=f"{code.name}: because"):
            await session.upload(head(b"1234"), tmp_path / "payload", 10.0)
        with pytest.raises(error, match=f"{code.name}: because"):
            await session.download(fake.blob(b"1234"), tmp_path / "blob", 10.0)
        await federation.until(lambda: not list(tmp_path.glob("blob*")))

    meet(federation, work)


class Stream:
    """What a session hears on its stream, which is open while the block lasts."""

    def __init__(self, session: Session) -> None:
        self.session, self.heard = session, list[object]()

    async def __aenter__(self) -> Self:
        self.reading = asyncio.create_task(self.read())
        return self

    async def read(self) -> None:
        async with aclosing(self.session.messages(Hello({}))) as messages:
            async for message in messages:
                self.heard.append(message)

    async def __aexit__(self, *_: object) -> None:
        self.reading.cancel()
        await asyncio.wait([self.reading])


@pytest.mark.parametrize("size", [0, 4, SMALL, SMALL + 4])
def test_a_small_update_goes_on_the_stream(federation: Federation, tmp_path: Path, size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "payload").write_bytes(data)

    async def work(fake: Any, session: Session) -> None:
        async with Stream(session) as stream:
            await fake.hellos.get()
            await federation.until(lambda: bool(stream.heard))
            await session.upload(head(data), tmp_path / "payload", 10.0)
            assert fake.uploads.get_nowait() == (head(data), data)
            assert (fake.streamed == [REF]) == (size <= SMALL)
            await session.upload(head(data), tmp_path / "payload", 10.0, again=True)
            assert fake.asked == [REF] and fake.uploads.empty()  # all of it is there
            assert stream.heard == [None] and not session.receipts  # a receipt is nothing to act on

    meet(federation, work)


@pytest.mark.parametrize(("code", "error"), MEANINGS)
def test_a_receipt_says_what_to_do_as_a_status_does(
    federation: Federation, tmp_path: Path, code: grpc.StatusCode, error: type[FedcoreError]
) -> None:
    (tmp_path / "payload").write_bytes(b"1234")

    async def work(fake: Any, session: Session) -> None:
        async with Stream(session):
            await fake.hellos.get()
            fake.refusal = (code, "because")
            with pytest.raises(error, match=f"{code.name}: because"):
                await session.upload(head(b"1234"), tmp_path / "payload", 10.0)
            assert fake.streamed == [REF] and fake.uploads.empty()

    meet(federation, work)


def test_whose_stream_ends_before_the_receipt_tries_again(federation: Federation, tmp_path: Path) -> None:
    (tmp_path / "payload").write_bytes(b"1234")

    async def work(fake: Any, session: Session) -> None:
        fake.permits.clear()
        async with Stream(session):
            await fake.hellos.get()
            sending = asyncio.create_task(session.upload(head(b"1234"), tmp_path / "payload", 10.0))
            await fake.uploads.get()
            fake.hang_up()
            with pytest.raises(ConnectionLost, match="before the receipt came"):
                await sending
        async with Stream(session):
            await fake.hellos.get()
            with pytest.raises(ConnectionLost, match="no receipt came in time"):
                await session.upload(head(b"1234"), tmp_path / "payload", 0.2)
            fake.permits.set()  # its receipt comes after all, and nobody waits for it
            await federation.until(lambda: not fake.keeping)
            await session.upload(head(b"1234"), tmp_path / "payload", 10.0)
            await session.upload(head(b"1234"), tmp_path / "payload", 10.0, again=True)
            assert not session.receipts

    meet(federation, work)


def test_a_payload_that_cannot_be_read_is_an_error_of_its_own(federation: Federation, tmp_path: Path) -> None:
    async def work(fake: Any, session: Session) -> None:
        with pytest.raises(FileNotFoundError):
            await session.upload(head(b"1234"), tmp_path / "payload", 10.0)

    meet(federation, work)


@pytest.mark.parametrize("arrived", [b"12345", b"4321"])
def test_a_blob_that_is_another_is_not_kept(federation: Federation, tmp_path: Path, arrived: bytes) -> None:
    async def work(fake: Any, session: Session) -> None:
        blob = fake.blob(b"1234")
        fake.blobs[blob.sha256] = arrived
        with pytest.raises(ProtocolError):
            await session.download(blob, tmp_path / "blob", 10.0)
        await federation.until(lambda: not list(tmp_path.glob("blob*")))

    meet(federation, work)


@pytest.mark.parametrize("arrived", [b"", b"123"])
def test_a_blob_of_which_a_part_came_is_completed(
    federation: Federation, tmp_path: Path, arrived: bytes
) -> None:
    async def work(fake: Any, session: Session) -> None:
        blob = fake.blob(b"1234")
        fake.blobs[blob.sha256] = arrived
        with pytest.raises(ConnectionLost, match=f"{len(arrived)} of 4 bytes came"):
            await session.download(blob, tmp_path / "blob", 10.0)
        fake.blobs[blob.sha256] = b"1234"
        await session.download(blob, tmp_path / "blob", 10.0)
        assert (tmp_path / "blob").read_bytes() == b"1234"

    meet(federation, work)


def test_a_coordinator_that_does_not_answer_in_time_counts_as_lost(
    federation: Federation, tmp_path: Path
) -> None:
    (tmp_path / "payload").write_bytes(b"1234")

    async def work(fake: Any, session: Session) -> None:
        fake.permits.clear()
        with pytest.raises(ConnectionLost, match="DEADLINE_EXCEEDED"):
            await session.upload(head(b"1234"), tmp_path / "payload", 0.3)

    meet(federation, work)


def test_whoever_is_no_coordinator_of_the_federation_is_not_talked_to(federation: Federation) -> None:
    async def run() -> None:
        async with federation.coordinator(role="client") as fake:
            identity = federation.identity("client", "client-000000")
            async with Session(federation.address, identity) as session:
                with pytest.raises(ConnectionLost, match="UNAVAILABLE"):
                    async for _ in session.messages(Hello({})):
                        pass
            assert fake.hellos.empty()

    asyncio.run(run())
