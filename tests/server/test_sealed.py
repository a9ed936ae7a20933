"""Sealed updates: opened in memory alone, the same bits as in TLS, and bound to where they belong."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fedcore.crypto import hpke
from fedcore.crypto.identity import Identity
from fedcore.crypto.names import Role
from fedcore.messages import Assignment, Ref, Update
from fedcore.server.sealed import KeyLost, Vault, wrapped_key
from fedcore.strategies import from_table
from fedcore.strategies.rounds import train_plan
from fedcore.wire import grpc, sealing
from tests.server.conftest import (
    LAYOUT,
    Agent,
    Federation,
    Running,
    reference,
    same,
    silent,
    spec_of,
    until,
    upload_parts,
)
from tests.server.devices import Sealing, hidden_parts, plan_of

NAMES = ["client-0", "client-1", "client-2"]
SEALED = {"updates": "sealed"}


async def devices(federation: Federation, names: list[str] = NAMES) -> list[Agent]:
    return [await federation.agent(name, sealing_of(federation, name).work) for name in names]


def sealing_of(federation: Federation, name: str) -> Sealing:
    return Sealing(federation.identity("client", name))


@pytest.mark.parametrize("rule", [{"name": "mean"}, {"name": "krum", "f": 0}])
def test_sealed_updates_give_the_same_bits(running: Running, rule: dict[str, object]) -> None:
    strategy, cohort = {"name": "fedavg", "aggregator": rule}, {"minimum": 3}
    spec = spec_of(strategy=strategy, cohort=cohort, encryption=SEALED)

    async def run() -> None:
        async with running() as federation:
            agents = await devices(federation)
            name = await federation.submit(spec)
            info = await federation.ended(name)
            assert (info.state, info.detail) == ("finished", "")
            state, _ = reference(spec, LAYOUT, NAMES)
            assert same(federation.parameters(name).shared, state.parameters.shared)
            assert same(federation.parameters(name).buffers, state.parameters.buffers)
            keys = [work.key for work in agents[0].assignments]
            assert len(set(keys)) == len(keys) == 6  # a new one for every attempt, of evaluations too
            await until(lambda: not list(federation.coordinator.journals.folder.iterdir()))

    asyncio.run(run())


def test_what_lies_on_the_disk_stays_sealed_until_the_round_closes(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = [*await devices(federation, NAMES[:2]), await federation.agent(NAMES[2], silent)]
            await federation.submit(spec_of(rounds=1, encryption=SEALED))
            await until(lambda: all(agent.assignments for agent in agents))
            ref = agents[0].assignments[0].ref
            live = federation.coordinator.live[ref]
            await until(lambda: len(live.round.folded) == 2)  # they are judged already
            files = [live.journal.update(agent.name).read_bytes() for agent in agents[:2]]
            for agent in agents[:2]:
                update = await agent.update(agent.assignments[0])
                plain = b"".join(sealing.packed(live.plan, update))
                assert {len(file) for file in files} == {sealing.sealed_size(live.plan)}
                for start in range(0, len(plain) - 8, 8):
                    assert not any(plain[start : start + 8] in file for file in files)
            assert not any(np.any(words) for words in vars(live.round.sums.words).values())

    asyncio.run(run())


def other(update: Update) -> Update:
    return replace(update, scalars={**update.scalars, "weight": -1.0})


Forge = Callable[[Sealing, Agent, Assignment, Update], bytes]
FORGED: dict[str, tuple[Forge, str]] = {
    "altered": (lambda d, a, w, u: d.sealed(a, w, u)[:-1] + b"\0", "does not open"),
    "another round's": (lambda d, a, w, u: bound_to(d, a, w, u, 2, a.name), "does not open"),
    "another's": (lambda d, a, w, u: bound_to(d, a, w, u, 1, "client-0"), "does not open"),
    "out of its bounds": (lambda d, a, w, u: d.sealed(a, w, other(u)), "weight is -1"),
}


def bound_to(
    device: Sealing, agent: Agent, work: Assignment, update: Update, round: int, client: str
) -> bytes:
    public = sealing.announced(work.key, work.ref, device.identity)
    bound = sealing.binding("fed", replace(work.ref, round=round), client, agent.layout.digest)
    return b"".join(sealing.seal(public, sealing.packed(plan_of(work, agent.layout), update), bound))


@pytest.mark.parametrize(("forge", "said"), FORGED.values(), ids=FORGED)
def test_what_does_not_open_or_fit_is_refused_and_the_others_make_the_round(
    running: Running, forge: Forge, said: str
) -> None:
    async def run() -> None:
        async with running() as federation:
            device = sealing_of(federation, NAMES[2])

            async def hostile(agent: Agent, work: Assignment) -> None:
                update = await agent.update(work)
                train = work.ref.kind == "train"
                payload = forge(device, agent, work, update) if train else device.sealed(agent, work, update)
                await agent.upload(hidden_parts(work.ref, payload))

            await devices(federation, NAMES[:2])
            bad = await federation.agent(NAMES[2], hostile)
            info = await federation.ended(await federation.submit(spec_of(rounds=1, encryption=SEALED)))
            assert (info.state, '"folded": 2, "refused": 1' in info.metrics[0]) == ("finished", True)
            await until(lambda: len(bad.outcomes) == 2)
            assert said in bad.outcomes[0].verdict.reason
            assert bad.outcomes[1].verdict.status == "folded"

    asyncio.run(run())


def test_a_plain_update_is_not_taken_where_sealed_ones_are_asked(running: Running) -> None:
    async def run() -> None:
        async with running() as federation:
            agents = [*await devices(federation, NAMES[:2]), await federation.agent(NAMES[2], silent)]
            await federation.submit(spec_of(rounds=1, encryption=SEALED))
            await until(lambda: agents[2].assignments)
            work = agents[2].assignments[0]
            update = await agents[2].update(work)
            for parts, said in (
                (upload_parts(work.ref, update), "tells of ['buffers', 'count', 'delta', 'loss', 'weight']"),
                (hidden_parts(work.ref, b"short"), "payload has 5 bytes, expected 1396"),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await agents[2].upload(parts)
                assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert said in (error.value.details() or "")

    asyncio.run(run())


def test_the_key_beside_the_files_opens_for_this_attempt_and_this_identity_alone(
    identity: Callable[[Role, str], Identity],
) -> None:
    """As the journal has it: of use to the coordinator after a restart, and to no thief of its disk."""
    spec, names = spec_of(encryption=SEALED), tuple(NAMES)
    ref = Ref("run", 1, 0, "train")
    plan = train_plan(from_table(spec.strategy), spec, LAYOUT, ref, names, 3)
    own = identity("coordinator", "main")
    wrapped = wrapped_key(own, ref)
    first, again = (Vault(own, plan, LAYOUT, wrapped) for _ in range(2))
    assert hpke.private_bytes(first.key) == hpke.private_bytes(again.key)
    assert hpke.private_bytes(first.key) not in wrapped
    renewed = replace(own, key=identity("coordinator", "renewed").key)
    other = replace(plan, ref=replace(ref, attempt=1))
    for holder, of, key in ((renewed, plan, wrapped), (own, other, wrapped), (own, plan, b"")):
        with pytest.raises(KeyLost, match="does not open with this identity"):
            Vault(holder, of, LAYOUT, key)
