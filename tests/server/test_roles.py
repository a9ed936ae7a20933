"""Who may call what: the certificate decides, for every call."""

import asyncio
from typing import Any

import pytest

from fedcore.messages import Blob
from fedcore.wire import grpc
from fedcore.wire.codec import to_wire
from fedcore.wire.sending import sending
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.coordinator_pb2_grpc import CoordinatorStub, OperatorStub
from tests.server.conftest import Running, each, silent, spec_of, until

CODE = grpc.StatusCode


async def status(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return the status with which a call, of one answer or a stream of them, was refused."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        if hasattr(call, "read"):
            async for _ in call:
                pass
        else:
            await call
    return error.value.code(), error.value.details() or ""


def test_a_role_may_call_its_own_service_only(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            for role in ("operator", "coordinator", "authority"):
                stub = CoordinatorStub(await federation.channel(role, "x"))
                parts: list[pb.UploadPart] = []
                for call in (stub.Connect(), stub.Upload(iter(parts)), stub.Download(pb.Wanted())):
                    said = (CODE.PERMISSION_DENIED, f"fedcore://fed/{role}/x is no client")
                    assert await status(call) == said
            for role in ("client", "coordinator", "authority"):
                operator = OperatorStub(await federation.channel(role, "x"))
                run = pb.RunName(run="x")
                submission: list[pb.SubmitPart] = []
                calls = [operator.Submit(iter(submission)), operator.List(pb.ListRequest())]
                calls += [
                    method(run) for method in (operator.Show, operator.Watch, operator.Stop, operator.Fetch)
                ]
                for call in calls:
                    said = (CODE.PERMISSION_DENIED, f"fedcore://fed/{role}/x is no operator")
                    assert await status(call) == said

    asyncio.run(run())


def test_nobody_calls_without_a_certificate(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            root = federation.identity("client", "x").root
            options = (("grpc.ssl_target_name_override", "coordinator.fed.fedcore"),)
            address = f"127.0.0.1:{federation.port}"
            async with grpc.aio.secure_channel(
                address, grpc.ssl_channel_credentials(root), options=options
            ) as channel:
                call = CoordinatorStub(channel).Download(pb.Wanted(), timeout=5)
                assert (await status(call))[0] is CODE.UNAVAILABLE
            async with grpc.aio.insecure_channel(address) as channel:
                call = CoordinatorStub(channel).Download(pb.Wanted(), timeout=5)
                assert (await status(call))[0] is CODE.UNAVAILABLE

    asyncio.run(run())


def test_a_client_reads_only_the_model_it_has_work_with(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = await federation.agents(2, silent)
            await federation.submit(spec_of(size=2))
            await until(lambda: agents[0].assignments)
            work = agents[0].assignments[0]
            await agents[0].model(work)
            stranger = await federation.agent("client-9", silent)
            code, details = await status(stranger.stub.Download(pb.Wanted(blob=to_wire(work.parameters))))
            assert code is CODE.PERMISSION_DENIED
            assert details == f"client-9 has no work with blob {work.parameters.sha256}"
            other = Blob("0" * 64, work.parameters.size)
            code, details = await status(agents[0].stub.Download(pb.Wanted(blob=to_wire(other))))
            assert code is CODE.PERMISSION_DENIED
            code, details = await status(
                agents[0].stub.Download(pb.Wanted(blob=pb.Blob(sha256="../coordinator.db")))
            )
            assert code is CODE.INVALID_ARGUMENT

    asyncio.run(run())


def test_a_stream_that_does_not_begin_with_a_hello_is_ended(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            stub = CoordinatorStub(await federation.channel("client", "x"))
            decline = pb.Decline(ref=pb.Ref(run="r", round=1, kind=pb.KIND_TRAIN))
            hello = pb.FromAgent(hello=pb.Hello(version=1))
            for messages, said in (
                ([], "no hello"),
                ([pb.FromAgent()], "empty or of a newer version"),
                ([pb.FromAgent(decline=decline)], "begins with a hello"),
                ([pb.FromAgent(hello=pb.Hello(version=7))], "version 7, expected 1"),
                ([hello, hello], "one hello"),
                ([hello, pb.FromAgent()], "empty or of a newer version"),
            ):
                call = stub.Connect()
                async with sending(call, each(messages)):
                    code, details = await status(call)
                expected = CODE.INVALID_ARGUMENT if messages else CODE.FAILED_PRECONDITION
                assert (code, said in details) == (expected, True), details
            assert federation.coordinator.registry.sessions == {}

    asyncio.run(run())
