"""Somebody on the network: records everything between agents and coordinator, and turns bits of it."""

import re
import sys
from hashlib import sha256
from types import ModuleType
from typing import Any

import pytest

from fedcore.messages import Blob, Ref, UploadHead
from fedcore.simulations.run import simulate
from fedcore.task import client_name
from fedcore.wire.codec import to_wire
from fedcore.wire.v1 import coordinator_pb2 as pb
from tests.security.conftest import Tapped, plainly

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WORDS = (
    b"confidential",
    b"secretive",
    b"Secretive",
    b"weight",
    b"loss",
    b"client-00000",
    b"fedcore://",
)


def simulated(tapped: Tapped, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(tapped.loopback.folder))
    monkeypatch.delitem(sys.modules, "secretive", raising=False)
    return simulate(spec=tapped.loopback.folder / "run.toml")


def sent_plainly(ref: Ref, vector: Any) -> bytes:
    """Return an update as the wire has it under TLS."""
    payload = vector.tobytes()
    blob = Blob(sha256(payload).hexdigest(), len(payload))
    head = UploadHead(ref, {"weight": 1.0, "confidential_rate": 1.0}, (("delta", len(vector)),), blob)
    parts = [to_wire(head), pb.UploadPart(chunk=pb.Chunk(index=0, data=payload))]
    return b"".join(part.SerializeToString() for part in parts)


def losses(log: str) -> int:
    """Return how many connections an agent lost; of those in a row it tells the first, and their number."""
    lost, before = log.count("transfer failed"), 0
    for kind, count in re.findall(r"(connection lost|connected) .*?attempts?=(\d+)", log):
        now = int(count) - (kind == "connected")
        lost += 1 if kind == "connection lost" and now == 1 else max(0, now - before)
        before = now
    return lost


def test_a_recording_proxy_sees_no_plaintext(
    tapped: Tapped, secretive: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = tapped.run(clients=3, rounds=2, updates="tls")
    heard, trainer = bytes(tapped.proxy.heard), secretive.Trainer()
    initial = trainer.parameters().shared
    updates = [secretive.delta(initial, *secretive.picture(client_name(i))) for i in range(3)]
    result = simulated(tapped, monkeypatch)

    assert digest == result.parameters.digest
    assert len(heard) > 2 * 3 * (initial.nbytes + updates[0].nbytes)  # it did hear all of it
    for vector in (initial, result.parameters.shared, *updates):
        assert not plainly(heard, vector)
    assert [word for word in WORDS if word in heard] == []

    readable = sent_plainly(Ref("confidential-run-0", 1, 0, "train"), updates[0])
    assert plainly(readable, updates[0])  # and what it looks for is what is sent
    assert b"confidential" in readable and b"weight" in readable


@pytest.mark.parametrize("updates", ["tls", "sealed", "secagg"])
@pytest.mark.parametrize("spoil", [(2500, 3500, 4500, 6000)], indirect=True)
def test_a_bit_that_is_turned_ends_the_connection_and_changes_nothing(
    tapped: Tapped, monkeypatch: pytest.MonkeyPatch, updates: str
) -> None:
    digest = tapped.run(clients=4, rounds=3, updates=updates)
    assert digest == simulated(tapped, monkeypatch).parameters.digest
    assert tapped.proxy.spoil == []
    assert tapped.proxy.connections > 4  # each turned bit has ended one
    logs = [tapped.loopback.log(client_name(i)).read_text(encoding="utf-8") for i in range(4)]
    assert sum(map(losses, logs)) >= 4
