"""What operators call: submit a run, look at it, stop it, fetch its model."""

import asyncio
import json
from collections.abc import AsyncIterator

from fedcore.crypto.tls import Context, require
from fedcore.errors import ProtocolError, SpecError
from fedcore.server.coordinator import Coordinator, check
from fedcore.server.driver import Driver
from fedcore.server.letters import AppRun
from fedcore.server.relay import Relay
from fedcore.server.service import received, refusing, stream_file
from fedcore.server.store import Conduct
from fedcore.wire import codec
from fedcore.wire.codec import to_wire
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.coordinator_pb2_grpc import OperatorServicer


class OperatorService(OperatorServicer):
    """The coordinator, as operators see it."""

    def __init__(self, coordinator: Coordinator) -> None:
        """Serve a coordinator."""
        self.coordinator = coordinator

    async def Submit(self, parts: AsyncIterator[pb.SubmitPart], context: Context) -> pb.RunInfo:
        """Start a run from its spec, layout and initial parameters."""
        operator = await require(context, "operator")
        async with refusing(context):
            first = await anext(parts, None)
            if first is None:
                raise ProtocolError("a submission begins with its header")
            submission = await asyncio.to_thread(codec.submission, first)  # a layout may have megabytes
            await asyncio.to_thread(check, submission)
            path = await received(self.coordinator.blobs, submission.parameters, parts)
            submitted = self.coordinator.submit(operator, submission, path)
            run = await asyncio.shield(submitted)  # begun, it is finished, as `Stop` is
        return describe(self.coordinator.drivers[run.id])

    async def List(self, request: pb.ListRequest, context: Context) -> pb.RunList:
        """Return all runs, the newest first."""
        await require(context, "operator")
        relay = self.coordinator.relay
        runs = [describe(driver) for driver in self.coordinator.drivers.values()]
        runs += [describe_app(relay, run) for run in relay.runs.values()]
        runs.sort(key=lambda info: -info.created)
        return pb.RunList(runs=runs)

    async def Show(self, request: pb.RunName, context: Context) -> pb.RunInfo:
        """Return one run with its layout and the metrics of all rounds."""
        await require(context, "operator")
        async with refusing(context):
            driver = self.found(request)
        if isinstance(driver, AppRun):
            return describe_app(self.coordinator.relay, driver)
        info = describe(driver, since=0)
        info.layout = driver.run.layout.to_json()
        return info

    async def Watch(self, request: pb.RunName, context: Context) -> AsyncIterator[pb.RunInfo]:
        """Send the run with all its rounds, then again whenever it moves, with new rounds only."""
        await require(context, "operator")
        async with refusing(context):
            driver = self.found(request)
        if isinstance(driver, AppRun):
            async for info in watch_app(self.coordinator.relay, driver.id):
                yield info
            return
        sent, running = 0, True
        while running:
            changed, seen, running = driver.changed.next, len(driver.rows), driver.run.state == "running"
            yield describe(driver, since=sent)
            sent = seen
            if running:
                await changed.wait()

    async def Stop(self, request: pb.RunName, context: Context) -> pb.RunInfo:
        """End a run, keeping its committed rounds."""
        operator = await require(context, "operator")
        async with refusing(context):
            driver, relay = self.found(request), self.coordinator.relay
            if isinstance(driver, AppRun):
                await self.coordinator.note(operator, "stop", driver.id)
                await asyncio.shield(relay.end(driver.id, "stopped", "by an operator"))
                return describe_app(relay, relay.runs[driver.id])
            await self.coordinator.note(operator, "stop", driver.run.id)
        await asyncio.shield(driver.stop())  # begun, it is finished, whatever becomes of the caller
        return describe(driver)

    async def Fetch(self, request: pb.RunName, context: Context) -> AsyncIterator[bytes]:
        """Stream the newest model."""
        await require(context, "operator")
        async with refusing(context):
            driver = self.found(request)
            if isinstance(driver, AppRun):
                raise SpecError(f"{driver.id} is a run of an app, whose models stay with its server side")
            async for chunk in stream_file(self.coordinator.blobs, driver.address, driver.model.size):
                yield chunk

    async def Clients(self, request: pb.ClientsRequest, context: Context) -> pb.ClientList:
        """Return every client that is connected, or of which something was refused, by name."""
        await require(context, "operator")
        admission, sessions = self.coordinator.admission, self.coordinator.registry.sessions
        known = sorted({*sessions, *admission.conduct, *admission.refused})
        return pb.ClientList(clients=[describe_client(self.coordinator, client) for client in known])

    async def Lift(self, request: pb.ClientName, context: Context) -> pb.ClientInfo:
        """Forget the offences of a client, which may work again then."""
        operator, client = await require(context, "operator"), request.client
        async with refusing(context):
            if client not in self.coordinator.admission.conduct:
                raise SpecError(f"no offence of a client {client!r} is known; see `fedcore clients list`")
            await self.coordinator.note(operator, "lift", client)
            await asyncio.shield(self.coordinator.lift(client))
        return describe_client(self.coordinator, client)

    def found(self, request: pb.RunName) -> Driver | AppRun:
        """Return the run of that id, or of that unique name; raises SpecError."""
        drivers, apps = self.coordinator.drivers, self.coordinator.relay.runs
        if found := drivers.get(request.run) or apps.get(request.run):
            return found
        named: list[Driver | AppRun] = [d for d in drivers.values() if d.run.spec.run.name == request.run]
        named += [run for run in apps.values() if run.name == request.run]
        if len(named) == 1:
            return named[0]
        what = f"{len(named)} runs have" if named else "no run has"
        raise SpecError(f"{what} the name {request.run!r}; `fedcore run list` shows the ids")


def describe(driver: Driver, since: int | None = None) -> pb.RunInfo:
    """Return what is told of a run, with the rows of the rounds after `since`."""
    run = driver.run
    rows = [json.dumps(row) for row in driver.rows[since:]] if since is not None else []
    return pb.RunInfo(
        run=run.id,
        name=run.spec.run.name,
        state="paused" if driver.paused else run.state,
        detail=run.detail,
        round=len(driver.committed),
        rounds=run.spec.run.rounds,
        task=run.task,
        parameters=to_wire(driver.model),
        metrics=rows,
        created=run.created,
    )


def describe_app(relay: Relay, run: AppRun) -> pb.RunInfo:
    """Return what is told of a run of an app."""
    return pb.RunInfo(
        run=run.id,
        name=run.name,
        state=run.state,
        detail=relay.described(run),
        task=run.app,
        created=run.created,
    )


async def watch_app(relay: Relay, run_id: str) -> AsyncIterator[pb.RunInfo]:
    """Yield what is told of a run of an app, again whenever that changes, until the run has ended."""
    while book := relay.books.get(run_id):
        changed = book.changed.next
        yield describe_app(relay, book.run)
        await changed.wait()
    yield describe_app(relay, relay.runs[run_id])


def describe_client(coordinator: Coordinator, client: str) -> pb.ClientInfo:
    """Return what is told of a client."""
    registry, admission = coordinator.registry, coordinator.admission
    session, known = registry.sessions.get(client), admission.conduct.get(client, Conduct())
    return pb.ClientInfo(
        client=client,
        connected=session is not None,
        evaluator=session is not None and session.hello.evaluator,
        labels=session.hello.labels if session else {},
        run=registry.leases.get(client, ""),
        refused=admission.refused[client],
        reason=admission.reasons.get(client, ""),
        offences=known.offences,
        offence=known.reason,
        offended=known.time,
        quarantined=known.quarantined,
    )
