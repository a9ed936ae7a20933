"""A curious coordinator: everything that reaches it, looked into while real agents take part."""

import asyncio
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fedcore.audit.inversion import from_update, relative_error
from fedcore.client.examples import PairExamples
from fedcore.crypto import hpke
from fedcore.crypto.secagg import Server
from fedcore.errors import UpdateRefused
from fedcore.layout import Vector
from fedcore.messages import Ref, Update, UploadHead
from fedcore.server.driver import Driver
from fedcore.server.live import LiveRound
from fedcore.server.secure import SecureRound
from fedcore.strategies.words import Accumulator, Words, encoded
from fedcore.task import Client, client_name
from fedcore.wire import sealing
from tests.security.conftest import deployed, plainly

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CLIENTS = 5
NAMES = [client_name(i) for i in range(CLIENTS)]
FIRST = ("weight", "bias")
CHANCE = 400.0  # chi-square of 255 degrees of freedom: random bytes reach it once in 60 million times


class Curious:
    """What a coordinator has of each client's update, as it arrives and again when the round has closed.

    kept: everything on its disk and within reach of the round's objects, in both moments.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.heads, self.files = folder, dict[str, UploadHead](), dict[str, bytes]()
        self.live: LiveRound | SecureRound
        self.kept = list[bytes]()
        for kind in (LiveRound, SecureRound):
            monkeypatch.setattr(kind, "accept", self.accepting(kind.accept))
        monkeypatch.setattr(LiveRound, "_finish", self.folding(LiveRound._finish))
        monkeypatch.setattr(Server, "unmask", self.folding(Server.unmask))

    def accepting(self, accept: Any) -> Any:
        def watched(live: Any, client: str, head: UploadHead) -> Any:
            if head.ref.kind == "train":
                self.live, self.heads[client] = live, head
                self.files[client] = live.journal.update(client).read_bytes()
                self.kept += [*on_disk(self.folder), *within_reach(live)]
            return accept(live, client, head)

        return watched

    def folding(self, fold: Any) -> Any:
        def watched(holder: Any, *arguments: Any) -> Any:
            self.kept += [*on_disk(self.folder), *within_reach(self.live)]
            return fold(holder, *arguments)

        return watched


@pytest.fixture
def curious(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Curious:
    return Curious(tmp_path / "coordinator", monkeypatch)


def on_disk(folder: Path) -> Iterator[bytes]:
    return (path.read_bytes() for path in folder.rglob("*") if path.is_file())


def within_reach(root: object) -> Iterator[bytes]:
    """Yield all bytes and arrays that objects hold, directly or through others, but for code."""
    seen, stack = set[int](), [root]
    while stack:
        each = stack.pop()
        if id(each) in seen or isinstance(each, ModuleType | type | FunctionType | asyncio.AbstractEventLoop):
            continue
        seen.add(id(each))
        if isinstance(each, bytes | bytearray | memoryview):
            yield bytes(each)
        elif isinstance(each, np.ndarray):
            yield each.tobytes()
        else:
            stack += gc.get_referents(each)


def played(curious: Curious, updates: str) -> Driver:
    """Play one round with real agents, and return what drove it."""

    async def play() -> Driver:
        async with deployed(curious.folder.parent) as deployment:
            deployment.start(NAMES)
            return await deployment.ended(await deployment.submit(CLIENTS, updates))

    return asyncio.run(play())


def answers(task: ModuleType) -> dict[str, Update]:
    """Return what each client answers in the first round."""
    trainer, spec = task.Trainer(), task.Secretive()
    trainer.receive(trainer.parameters())
    held = {name: spec.data(Client(name, None, np.random.default_rng())).train for name in NAMES}
    ref = Ref("run", 1, 0, "train")
    return {name: trainer.train(ref, name, PairExamples(d.x, d.y), {})[0] for name, d in held.items()}


def errors(task: ModuleType, deltas: Mapping[str, Vector]) -> list[float]:
    """Return how far off the inversion of each vector is from its client's picture."""
    guesses = {name: from_update(task.LAYOUT, delta, FIRST) for name, delta in deltas.items()}
    return [relative_error(guess, torch.from_numpy(task.picture(name)[0])) for name, guess in guesses.items()]


def chi_square(content: bytes) -> float:
    """Return the chi-square of bytes against all being equally likely; about 255 for random ones."""
    counts, expected = np.bincount(np.frombuffer(content, np.uint8), minlength=256), len(content) / 256
    return float(((counts - expected) ** 2 / expected).sum())


def model(curious: Curious, driver: Driver) -> Vector:
    return np.fromfile(curious.folder / "blobs" / driver.address, np.float32)


def test_under_tls_the_coordinator_reads_the_pictures(curious: Curious, secretive: ModuleType) -> None:
    played(curious, "tls")
    assert max(errors(secretive, {n: np.frombuffer(curious.files[n], np.float32) for n in NAMES})) < 1e-4
    assert curious.heads[NAMES[0]].scalars == answers(secretive)[NAMES[0]].scalars
    for update in answers(secretive).values():
        assert any(plainly(each, update.vectors["delta"]) for each in curious.kept)


def test_what_is_sealed_says_nothing_until_the_round_has_closed(
    curious: Curious, secretive: ModuleType
) -> None:
    updates = answers(secretive)
    driver = played(curious, "sealed")
    live, true = curious.live, [update.vectors["delta"] for update in updates.values()]
    assert isinstance(live, LiveRound) and live.vault
    size = sealing.size(live.plan)
    assert {len(file) for file in curious.files.values()} == {sealing.sealed_size(live.plan)}
    assert all(not head.scalars and not head.vectors for head in curious.heads.values())

    assert all(file in curious.kept for file in curious.files.values())  # it was on the disk all the time
    assert not any(plainly(each, delta) for each in curious.kept for delta in true)
    read = {n: np.frombuffer(file[-true[0].nbytes :], np.float32) for n, file in curious.files.items()}
    assert min(errors(secretive, read)) > 0.9
    for name, file in curious.files.items():
        bound = sealing.binding("fed", live.plan.ref, name, live.layout.digest)
        sealed, content = np.frombuffer(file, np.uint8), b"".join(sealing.packed(live.plan, updates[name]))
        with pytest.raises(UpdateRefused):
            sealing.Sealed(hpke.new_key(), sealed, bound)
        assert sealing.Sealed(live.vault.key, sealed, bound).read(0, size) == content

    assert list((curious.folder / "attempts").iterdir()) == []
    initial = secretive.Trainer().parameters().shared
    assert model(curious, driver) == pytest.approx(initial + np.mean(true, 0), abs=1e-6)


def test_masked_words_look_random_and_only_their_sum_is_known(
    curious: Curious, secretive: ModuleType
) -> None:
    updates = answers(secretive)
    driver = played(curious, "secagg")
    plan, true = curious.live.plan, [update.vectors["delta"] for update in updates.values()]
    plain = {name: encoded(plan, update).wide.tobytes() for name, update in updates.items()}
    assert {len(file) for file in curious.files.values()} == {plan.payload}
    assert all(not head.scalars and not head.vectors for head in curious.heads.values())

    assert max(map(chi_square, curious.files.values())) < CHANCE
    assert min(map(chi_square, plain.values())) > 10 * CHANCE
    assert all(file in curious.kept for file in curious.files.values())
    assert not any(plainly(each, delta) for each in curious.kept for delta in true)
    assert not any(words[:64] in each for each in curious.kept for words in plain.values())
    read = {}
    for name, file in curious.files.items():
        sums = Accumulator(plan)
        sums.add_words(Words.read(plan, np.frombuffer(file, np.uint8)))
        read[name] = sums.vector("delta", slice(None))
    assert min(errors(secretive, read)) > 0.9

    initial = secretive.Trainer().parameters().shared
    assert model(curious, driver) == pytest.approx(initial + np.mean(true, 0), abs=1e-6)
