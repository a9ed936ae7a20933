"""Devices that encrypt what they send, for tests of the coordinator; they train as `Agent` does."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import sha256

from fedcore.crypto.identity import Identity
from fedcore.crypto.secagg import Client, Floors, Step
from fedcore.crypto.trust import Trust
from fedcore.layout import Layout
from fedcore.messages import Accept, Assignment, Blob, Plan, Ref, Secure, Update, UploadHead, Work
from fedcore.strategies import from_table
from fedcore.strategies.privacy import private
from fedcore.strategies.rounds import evaluate_plan, train_plan
from fedcore.strategies.words import encoded
from fedcore.wire import sealing
from fedcore.wire.codec import to_wire
from fedcore.wire.secure import config_of
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.server.conftest import LAYOUT, METRICS, Agent, chunk_parts


def plan_of(work: Assignment, layout: Layout) -> Plan:
    """Return a client's own copy of the plan that it takes part in."""
    names = tuple(str(i) for i in range(work.cohort))
    if work.ref.kind == "evaluate":
        return evaluate_plan(work.spec, work.ref, names, METRICS)
    strategy = private(from_table(work.spec.strategy), work.spec)
    return train_plan(strategy, work.spec, layout, work.ref, names, work.cohort, work.clip)


def hidden_parts(ref: Ref, payload: bytes) -> list[pb.UploadPart]:
    """Return encrypted bytes as they are uploaded."""
    head = UploadHead(ref, {}, (), Blob(sha256(payload).hexdigest(), len(payload)))
    return [to_wire(head), *chunk_parts(payload)]


@dataclass
class Sealing:
    """A device that seals its updates."""

    identity: Identity

    def sealed(self, agent: Agent, work: Assignment, update: Update) -> bytes:
        public = sealing.announced(work.key, work.ref, self.identity)
        bound = sealing.binding("fed", work.ref, agent.name, agent.layout.digest)
        content = sealing.packed(plan_of(work, agent.layout), update)
        return b"".join(sealing.seal(public, content, bound))

    async def work(self, agent: Agent, work: Assignment) -> None:
        await agent.upload(hidden_parts(work.ref, self.sealed(agent, work, await agent.update(work))))


@dataclass
class Masking:
    """A device that takes part in secure aggregation, over any number of connections.

    stop: the round, and the step of its own, in which it hears the coordinator and does not answer. kind: of
    the work in which it does so.
    """

    identity: Identity
    layout: Layout = LAYOUT
    train: Callable[[Agent, Assignment], Awaitable[Update]] = Agent.update
    stop: tuple[int, Step] | None = None
    kind: Work = "train"
    clients: dict[Ref, Client] = field(default_factory=dict)
    masked: dict[Ref, bytes] = field(default_factory=dict)
    updates: dict[Ref, tuple[Plan, Update]] = field(default_factory=dict)
    steps: list[tuple[Ref, Step]] = field(default_factory=list)  # that it came to, each with its work

    @property
    def heard(self) -> list[Step]:
        """The steps that it came to, of any work."""
        return [step for _, step in self.steps]

    async def work(self, agent: Agent, work: Assignment) -> None:
        """Take part in every run; train, and advertise; the same again for the same work."""
        if work.ref.kind == "offer":
            await agent.call.write(to_wire(Accept(work.ref)))
            return
        if work.ref not in self.clients:
            plan = plan_of(work, self.layout)
            config = config_of("fed", work.ref, work.spec, work.parameters, work.cohort, plan.sizes)
            self.updates[work.ref] = plan, await self.train(agent, work)
            trust = Trust(self.identity.root, "fed")
            self.clients[work.ref] = Client(
                config, self.identity, trust, Floors(), certificate=work.certificate
            )
        if not self.stops(work.ref, Step.ADVERTISE):
            await agent.say(work.ref, self.clients[work.ref].advertise())

    def stops(self, ref: Ref, step: Step) -> bool:
        self.steps.append((ref, step))
        return self.stop == (ref.round, step) and ref.kind == self.kind

    async def heed(self, agent: Agent, said: Secure) -> None:
        """Answer a message of the coordinator's."""
        client = self.clients[said.ref]
        if self.stops(said.ref, client.step):
            return
        reply = client.receive(said.message)
        if reply is not None:
            await agent.say(said.ref, reply)
            return
        if said.ref not in self.masked:
            plan, update = self.updates[said.ref]
            words = encoded(plan, update)
            client.mask(words.narrow, words.wide)
            self.masked[said.ref] = words.narrow.tobytes() + words.wide.tobytes()
        await agent.upload(hidden_parts(said.ref, self.masked[said.ref]))
