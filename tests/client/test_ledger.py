"""An agent and the ledger of its data: what it reserves, what it refuses, and what people see of it."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from fedcore.client.cli import app
from fedcore.client.config import Config
from fedcore.client.ledger import open_ledger
from fedcore.errors import ConfigError
from fedcore.messages import Ref
from fedcore.privacy.account import Claim, Entry
from fedcore.privacy.accounting import epsilon
from fedcore.privacy.events import Gaussian
from fedcore.privacy.ledger import Ledger, LedgerDamaged
from fedcore.server.authority_service import start_service
from fedcore.spec import RunSpec

Federation = Any  # of conftest, which importlib mode cannot import

ROUNDS = 3
SPEC = RunSpec.parse({"run": {"rounds": ROUNDS}, "privacy": {"level": "local", "noise_multiplier": 4.0}})
TRAINING = Gaussian(4.0)
WHOLE = epsilon([Gaussian(4.0, 1.0, ROUNDS)], 1e-5, "rdp")


def terms(limit: float = 8.0, **changes: Any) -> dict[str, Any]:
    table = {"path": "../data/a.ledger", "dataset": "clinic-a", "unit": "client", "epsilon": limit}
    return {"ledger": {**table, **changes}}


def ledger_of(federation: Federation) -> Ledger:
    return Ledger(federation.folder / "data" / "a.ledger")


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 60)


@asynccontextmanager
async def playing(federation: Federation, **settings: Any) -> AsyncIterator[tuple[Any, str]]:
    """Run a coordinator and an agent, and yield the coordinator and the digest of the agent's task."""
    async with federation.coordinator() as fake, federation.agent(**settings):
        yield fake, (await soon(fake.hellos.get())).tasks["Moody"]


@asynccontextmanager
async def serving(federation: Federation, port: int = 0) -> AsyncIterator[int]:
    """Run the authority, and yield its port; it stops even if the test fails, or gRPC's server hides why."""
    server, port = await start_service(federation.authority, f"127.0.0.1:{port}")
    try:
        yield port
    finally:
        await server.stop(0)


def test_each_piece_of_work_is_reserved_before_it_is_done(federation: Federation) -> None:
    async def run() -> None:
        async with playing(federation, **terms()) as (fake, digest):
            for number in (1, 2):
                fake.push(fake.assignment(number, digest, spec=SPEC))
                await soon(fake.uploads.get())
                entry = ledger_of(federation).entries()[-1]
                assert (entry.run, entry.ref) == ("fed/run", f"run/{number}.0/train")
                assert (entry.by, entry.trust) == ("fedcore://fed/client/client-000000", "enforced")
                assert entry.history == (TRAINING,)
            await federation.until(lambda: ("run/2.0/train", "sent") in federation.journal())
            fake.arrived.clear()
            fake.push(
                fake.assignment(2, digest, spec=SPEC)
            )  # it is finished, so it is sent and costs nothing
            await soon(fake.uploads.get())
            assert len(ledger_of(federation).entries()) == 2
            fake.push(fake.assignment(3, digest, spec=SPEC))
            await soon(fake.uploads.get())
        assert ledger_of(federation).account().epsilon_with() == pytest.approx(WHOLE)

    asyncio.run(run())


def test_what_is_left_stays_on_the_device(federation: Federation) -> None:
    """The coordinator hears "budget"; how much remains is in the agent's journal only."""

    async def run() -> None:
        async with playing(federation, **terms(WHOLE + 0.01)) as (fake, digest):
            long = SPEC.with_(f"run.rounds={ROUNDS + 1}")
            fake.push(fake.assignment(1, digest, spec=long))
            assert (await soon(fake.declines.get())).reason == "budget"
            assert fake.fetched == []  # nothing was downloaded for it
            for number in range(1, ROUNDS + 1):
                fake.push(fake.assignment(number, digest, spec=SPEC))
                await soon(fake.uploads.get())
            fake.push(fake.assignment(ROUNDS, digest, spec=SPEC, attempt=1))
            assert (await soon(fake.declines.get())).reason == "budget"

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["1.0", "2.0", "3.0"]
    journal = (federation.folder / "agent" / "state" / "rounds.jsonl").read_text()
    assert (
        "the whole run would bring it to" in journal and "0.010 remains; this piece of work would" in journal
    )


def test_work_that_fails_has_cost_what_it_costs(federation: Federation) -> None:
    async def run() -> None:
        async with playing(federation, **terms(100.0)) as (fake, digest):
            spec = SPEC.with_("run.rounds=200")
            for _ in range(2):
                fake.push(fake.assignment(104, digest, spec=spec))  # whose training process is killed
                assert "killed by signal 9" in (await soon(fake.declines.get())).reason

    asyncio.run(run())
    assert len(ledger_of(federation).entries()) == 2


@pytest.mark.parametrize(
    ("work", "changes", "reason"),
    [
        ({"spec": RunSpec()}, {}, "the run has no differential privacy"),
        ({"spec": SPEC, "kind": "evaluate"}, {}, "evaluate would send numbers without noise"),
        (
            {"spec": SPEC},
            {"unit": "example"},
            "protects one client, the data set's ledger counts for one example",
        ),
    ],
)
def test_what_no_budget_allows_is_declined(
    federation: Federation, work: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    async def run() -> None:
        async with playing(federation, **terms(**changes)) as (fake, digest):
            fake.push(fake.assignment(1, digest, **work))
            assert reason in (await soon(fake.declines.get())).reason

    asyncio.run(run())
    assert ledger_of(federation).entries() == [] and federation.lines("trained.txt") == []


CENTRAL = SPEC.with_('privacy={level = "client", noise_multiplier = 40.0, population = 10}')


def test_offers_are_considered_beside_the_work(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many at once, and the work in progress goes on; each is reserved once."""
    many, reserve, active, most = 100, Ledger.reserve, set[str](), 0

    def noting(ledger: Ledger, claim: Claim) -> Entry:
        nonlocal most
        active.add(claim.ref)
        most = max(most, len(active))
        try:
            return reserve(ledger, claim)
        finally:
            active.discard(claim.ref)

    monkeypatch.setattr(Ledger, "reserve", noting)

    async def run() -> None:
        trusting = terms(accept_trusted=True)
        async with playing(federation, **trusting) as (fake, digest):
            offer = fake.assignment(1, digest, spec=CENTRAL, kind="offer")
            fake.push(offer)
            assert (await soon(fake.accepts.get())).ref == offer.ref
            for number in range(many):
                ref = Ref(f"run-{number}", 1, 0, "offer")
                fake.push(fake.assignment(1, digest, spec=CENTRAL, ref=ref))
            fake.push(work := fake.assignment(1, digest, spec=CENTRAL))
            head, _ = await soon(fake.uploads.get())
            assert head.ref == work.ref
            assert fake.accepts.qsize() < many, "the offers were not all considered first"
            for _ in range(many):
                await soon(fake.accepts.get())
        async with playing(federation, **trusting) as (fake, digest):
            fake.push(offer)
            assert (await soon(fake.accepts.get())).ref == offer.ref

    asyncio.run(run())
    entries = ledger_of(federation).entries()
    assert [entry.ref for entry in entries if entry.run == "fed/run"] == ["run/1.0/offer"]
    assert len(entries) == many + 1
    assert most <= 2, "one offer and the work"


@pytest.mark.parametrize(
    ("changes", "level"), [({"accept_trusted": True}, SPEC), ({}, CENTRAL)], ids=["enforced", "untrusted"]
)
def test_an_offer_that_reserves_nothing_is_declined(
    federation: Federation, changes: dict[str, Any], level: RunSpec
) -> None:
    async def run() -> None:
        async with playing(federation, **terms(**changes)) as (fake, digest):
            fake.push(fake.assignment(1, digest, spec=level, kind="offer"))
            reason = (await soon(fake.declines.get())).reason
            assert ("round by round" if changes else "accept_trusted") in reason

    asyncio.run(run())
    assert ledger_of(federation).entries() == []


def test_more_rounds_than_a_day_allows_are_declined(federation: Federation) -> None:
    async def run() -> None:
        settings = {"policy": {"rounds_per_day": 2}}
        for first in (1, 3):  # the second time, the agent has been started again
            async with playing(federation, **settings) as (fake, digest):
                for number in range(first, 4):
                    fake.push(work := fake.assignment(number, digest))
                    if number < 3:
                        await soon(fake.uploads.get())
                        continue
                    declined = await soon(fake.declines.get())
                    assert (
                        declined.ref == work.ref
                        and "training has begun 2 times in 24 hours" in declined.reason
                    )

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["1.0", "2.0"]


def test_a_ledger_without_a_witness_works_and_one_that_was_rolled_back_does_not(
    federation: Federation,
) -> None:
    path = federation.folder / "data" / "a.ledger"
    copy = path.with_suffix(".copy")

    async def declined(number: int, shown: bool = False) -> str:
        """Play a round and return why the agent declined it, if it did."""
        async with playing(federation, **terms()) as (fake, digest):
            fake.push(fake.assignment(number, digest, spec=SPEC))
            answers = [asyncio.ensure_future(queue.get()) for queue in (fake.uploads, fake.declines)]
            done, late = await asyncio.wait(answers, timeout=60, return_when=asyncio.FIRST_COMPLETED)
            for task in late:
                task.cancel()
            if shown:
                rows = len(ledger_of(federation).rows())
                await federation.until(lambda: ledger_of(federation).receipts()[0].head.sequence == rows)
        return getattr(done.pop().result(), "reason", "")

    async def run() -> None:
        assert await declined(1) == ""  # the authority's address is not known
        shutil.copy(path, copy)
        async with serving(federation) as port:
            (federation.agent_folder() / "state" / "identity" / "authority").write_text(f"127.0.0.1:{port}")
            assert await declined(2, shown=True) == ""
            shutil.copy(copy, path)
            assert await declined(3) == "ledger"
        with pytest.raises(LedgerDamaged, match="rolled back"):  # the next start, even without the authority
            open_ledger(Config.load(federation.agent_folder(**terms())))

    asyncio.run(run())
    assert federation.lines("trained.txt") == ["1.0", "2.0"]


def test_an_authority_that_was_away_is_shown_the_ledger_when_it_is_back(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.client.ledger.AGAIN", 0.05)

    async def run() -> None:
        async with serving(federation) as port:
            pass
        federation.address = "127.0.0.1:1"
        (federation.agent_folder() / "state" / "identity" / "authority").write_text(f"127.0.0.1:{port}")
        async with playing(federation, **terms()) as (fake, digest):
            fake.push(fake.assignment(1, digest, spec=SPEC))
            await soon(fake.uploads.get())  # nobody waits for the authority
            ledger = ledger_of(federation)
            assert ledger.receipts() == [] and len(ledger.entries()) == 1
            async with serving(federation, port):
                await federation.until(lambda: bool(ledger.receipts()))
                assert ledger.receipts()[0].head == ledger.account().head

    asyncio.run(run())


# --- what people see


def run(*arguments: object) -> str:
    """Return what a command prints on standard output."""
    result = CliRunner().invoke(app, ["ledger", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    """Return the folder of an agent that was never enrolled, whose ledger has the reference's entries."""
    folder = tmp_path / "agent"
    folder.mkdir()
    (folder / "agent.toml").write_text(tomli_w.dumps(terms(3.0, unit="example")))
    ledger = open_ledger(Config.load(folder))
    assert ledger
    for number, event in enumerate(
        [Gaussian(1.0, 0.01, 200), Gaussian(1.2, 0.02, 200), Gaussian(1.0, 0.01, 300)]
    ):
        ref = f"run/{number}.0/train"
        ledger.reserve(Claim("fed/run", ref, "me", "example", "enforced", (event,), (event,)))
    return folder


def test_show_reports_both_accountants(agent: Path) -> None:
    found = json.loads(run("show", "--dir", agent, "--json"))
    assert found["spent"] == pytest.approx(2.05, abs=0.01)
    assert found["spent_pld"] == pytest.approx(1.7914, abs=0.02)
    assert found["remaining"] == pytest.approx(3.0 - found["spent"])
    assert [entry["ref"] for entry in found["entries"]] == [f"run/{n}.0/train" for n in range(3)]
    assert found["entries"][1]["history"] == [
        {"event": "Gaussian", "noise_multiplier": 1.2, "sampling_rate": 0.02, "steps": 200}
    ]
    printed = run("show", "--dir", agent)
    assert "run/1.0/train  enforced  Gaussian 1.2 0.02 200  -> " in printed
    assert "data set   clinic-a; for one example, adjacency add/remove" in printed
    assert "witness    none; unwitnessed since 20" in printed


def test_verify_checks_everything(agent: Path) -> None:
    found = json.loads(run("verify", "--dir", agent, "--json"))
    assert found["rows"] == 5 and "not asked now: no identity in" in found["witness"]
    assert "rows       5; their hashes, signatures and sums hold" in run("verify", "--dir", agent)
    path = agent.parent / "data" / "a.ledger"
    path.write_bytes(path.read_bytes().replace(b'"steps":300', b'"steps":100'))
    with pytest.raises(LedgerDamaged, match="row 5 has been altered"):
        run("verify", "--dir", agent)
    assert LedgerDamaged.exit_code == 1


def test_an_export_can_be_checked_by_others(agent: Path) -> None:
    rows = [json.loads(line) for line in run("export", "--dir", agent).splitlines()]
    before = bytes(32)
    for number, row in enumerate(rows, start=1):
        assert row["sequence"] == number
        assert row["hash"] == (before := sha256(before + row["content"].encode()).digest()).hex()
    assert json.loads(rows[0]["content"])["dataset"] == "clinic-a"


def test_commands_without_a_ledger_say_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('[ledger]\npath = ""\n')
    for command in ("show", "verify", "export"):
        with pytest.raises(ConfigError, match=r"agent.toml:2: ledger.path: '': expected the file"):
            run(command, "--dir", tmp_path)
    (tmp_path / "agent.toml").write_text(tomli_w.dumps(terms()))
    with pytest.raises(
        ConfigError, match=r"an agent whose agent.toml has a \[ledger\] makes one when it starts"
    ):
        run("show", "--dir", tmp_path)
