"""The ledger: what it grants, that it forgets nothing, and that tampering is found."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.chain import Head
from fedcore.errors import ConfigError, SpecError, UpdateRefused
from fedcore.privacy.account import Claim, event_from_json, event_to_json
from fedcore.privacy.accounting import epsilon
from fedcore.privacy.discrete import DiscreteGaussian, Skellam
from fedcore.privacy.events import Event, Gaussian, Laplace, Unit
from fedcore.privacy.ledger import (
    BudgetExceeded,
    Ledger,
    LedgerDamaged,
    LedgerRefused,
    Receipt,
    key_path,
    ledger_id,
)

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
ROUND = Gaussian(1.0, 0.01, 100)
Tamper = Callable[[sqlite3.Connection], object]


def opened(folder: Path, limit: float = 3.0, dataset: str = "clinic-a", unit: Unit = "example") -> Ledger:
    return Ledger.open(folder / "a.ledger", dataset, unit, limit, 1e-5, lambda: NOW)


def claim(*history: Event, run: str = "run", round: int = 1, rounds: int = 0, by: str = "a") -> Claim:
    """Return a claim on one round of a run, whose whole schedule is so many of them."""
    done = history or (ROUND,)
    return Claim(f"fed/{run}", f"{run}/{round}.0/train", by, "example", "enforced", done, done * rounds)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    yield opened(tmp_path)


# --- what is granted


def test_entries_add_up_as_one_history(ledger: Ledger) -> None:
    """The mixed history of the reference; a sum of epsilons would be far above."""
    events = [Gaussian(1.0, 0.01, 200), Gaussian(1.2, 0.02, 200), Gaussian(1.0, 0.01, 300)]
    spent = [ledger.reserve(claim(event, round=n)).spent for n, event in enumerate(events)]
    assert spent[-1] == pytest.approx(2.05, abs=0.01)
    assert spent == [pytest.approx(epsilon(events[: n + 1], 1e-5, "rdp")) for n in range(3)]
    assert [entry.history for entry in ledger.entries()] == [(event,) for event in events]
    assert ledger.entries()[0].time == NOW.timestamp()


def test_each_start_of_training_is_reserved_anew(ledger: Ledger) -> None:
    once, again = ledger.reserve(claim()), ledger.reserve(claim())
    assert again.sequence == once.sequence + 1 and again.spent > once.spent


def test_what_has_no_room_is_refused_with_what_remains_and_writes_nothing(tmp_path: Path) -> None:
    ledger = opened(tmp_path, limit=1.3)
    spent = ledger.reserve(claim()).spent
    big = claim(Gaussian(1.0, 0.01, 900), round=2)
    for ask in (ledger.judge, ledger.reserve):
        with pytest.raises(BudgetExceeded) as refused:
            ask(big)
        assert f"spent epsilon {spent:.3f} of 1.3 at delta 1e-05, {1.3 - spent:.3f} remains" in str(
            refused.value
        )
        assert "this piece of work would bring it to 2.1" in str(refused.value)
        assert refused.value.public == "budget"
    assert len(ledger.entries()) == 1
    assert ledger.reserve(claim(Gaussian(8.0), round=2)).spent < 1.3


def test_a_run_is_refused_when_it_begins_unless_all_of_it_has_room(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceeded, match="the whole run would bring it to"):
        ledger.reserve(claim(rounds=30))
    ledger.reserve(claim(rounds=10))
    ledger.reserve(claim(rounds=30, round=2))  # of a run that is under way, every piece is judged by itself
    with pytest.raises(BudgetExceeded, match="the whole run"):
        ledger.reserve(claim(rounds=30, by="b"))  # another identity begins it for itself


def test_a_run_that_is_reserved_whole_is_reserved_once(ledger: Ledger) -> None:
    whole = replace(claim(Gaussian(4.0, 0.1, 50)), trust="trusted", once=True)
    first = ledger.reserve(whole)
    assert ledger.reserve(replace(whole, ref="run/2.0/train")) == first
    changed = replace(whole, history=(Gaussian(4.0, 0.1, 60),))
    assert ledger.reserve(changed).spent > first.spent  # another schedule under the run's name costs anew
    with pytest.raises(LedgerRefused, match="a takes part in fed/run with this data set"):
        ledger.reserve(replace(whole, by="b"))
    assert ledger.reserve(replace(whole, run="fed/other", by="b")).sequence == first.sequence + 2


def test_noise_of_many_clients_is_paid_for_by_participation(tmp_path: Path) -> None:
    """Rate 1 and one piece per round; another identity's data would need noise of their own."""
    ledger, piece = opened(tmp_path, limit=8.0, unit="client"), Skellam(4.0)
    run = replace(claim(piece, rounds=20), unit="client", trust="distributed")
    spent = [ledger.reserve(replace(run, ref=f"run/{n}.0/train")).spent for n in (1, 5, 9)]
    assert spent == [pytest.approx(epsilon([Skellam(4.0, n)], 1e-5)) for n in (1, 2, 3)]
    assert ledger.entries()[0].history == (piece,) and ledger.entries()[0].trust == "distributed"
    with pytest.raises(LedgerRefused, match="noise that is shared by all clients covers one part of it"):
        ledger.reserve(replace(run, by="b"))
    with pytest.raises(BudgetExceeded, match="the whole run would bring it to"):
        ledger.reserve(replace(run, run="fed/long", whole=(Skellam(4.0, 60),)))
    with pytest.raises(BudgetExceeded, match="this piece of work"):
        ledger.reserve(replace(run, history=(Skellam(4.0, 60),)))


def test_the_other_unit_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(
        UpdateRefused, match="protects one client, the data set's ledger counts for one example"
    ):
        ledger.reserve(replace(claim(), unit="client"))
    other = opened(tmp_path / "other", unit="client")
    assert other.reserve(replace(claim(), unit="client")).spent > 0


def test_no_noise_to_speak_of_is_over_any_budget(tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded):
        opened(tmp_path, limit=1e6).reserve(claim(Gaussian(1e-9)))


EVENT = st.builds(Gaussian, st.floats(0.5, 8.0), st.sampled_from([0.01, 0.1, 1.0]), st.integers(1, 300))


@settings(max_examples=25)
@given(st.lists(st.tuples(st.booleans(), EVENT | st.builds(Laplace, st.floats(2.0, 50.0))), max_size=8))
def test_the_filter_grants_what_fits_and_nothing_else(asked: list[tuple[bool, Event]]) -> None:
    """Two agents that take turns decide as one accountant that sees everything."""
    with TemporaryDirectory() as folder:
        agents = [opened(Path(folder)), opened(Path(folder))]
        granted: list[Event] = []
        for number, (which, event) in enumerate(asked):
            fits = epsilon([*granted, event], 1e-5, "rdp") <= 3.0
            try:
                agents[which].reserve(claim(event, run=f"r{number}"))
            except BudgetExceeded:
                assert not fits
            else:
                assert fits
                granted.append(event)
        assert [entry.history for entry in agents[0].entries()] == [(event,) for event in granted]


PROCESS = """
import sys
from pathlib import Path
from fedcore.privacy.ledger import Ledger, BudgetExceeded
from fedcore.privacy.account import Claim
from fedcore.privacy.events import Gaussian
ledger = Ledger.open(Path(sys.argv[1]), "clinic-a", "example", 3.0, 1e-5)
event, granted = (Gaussian(1.0, 0.01, 100),), 0
for number in range(15):
    try:
        ref = f"run/{number}.0/train"
        ledger.reserve(Claim("fed/run", ref, sys.argv[2], "example", "enforced", event, event))
    except BudgetExceeded:
        break
    granted += 1
print(granted)
"""


@pytest.mark.slow
def test_processes_at_once_make_one_ledger_and_never_overspend(tmp_path: Path) -> None:
    path = tmp_path / "shared" / "a.ledger"
    command = [sys.executable, "-c", PROCESS, str(path)]
    with ThreadPoolExecutor(4) as pool:
        done = pool.map(lambda name: subprocess.run([*command, name], capture_output=True, text=True), "abcd")
    granted = [int(one.stdout or one.stderr) for one in done]
    fits = max(n for n in range(100) if epsilon([replace(ROUND, steps=100 * n)], 1e-5, "rdp") <= 3.0)
    account = Ledger(path).account()
    assert sum(granted) == account.entries == fits
    assert account.epsilon_with() <= 3.0


def test_threads_of_one_agent_never_overspend(ledger: Ledger) -> None:
    def attempt(number: int) -> bool:
        try:
            return bool(ledger.reserve(claim(Gaussian(1.0, 0.01, 500), run=f"r{number}")))
        except BudgetExceeded:
            return False

    with ThreadPoolExecutor(8) as pool:
        granted = sum(pool.map(attempt, range(12)))
    fits = max(n for n in range(1, 12) if epsilon([Gaussian(1.0, 0.01, 500 * n)], 1e-5, "rdp") <= 3.0)
    assert granted == fits == len(ledger.entries())


def test_a_file_that_stays_locked_is_told(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcore.privacy.ledger.PATIENCE", 0.1)
    with closing(sqlite3.connect(ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerRefused, match="locked by another process"):
            ledger.reserve(claim())
    assert ledger.reserve(claim()).sequence == 3


# --- the owner's limit and names


def test_another_limit_is_a_row_that_holds_from_then_on(tmp_path: Path) -> None:
    opened(tmp_path).reserve(claim())
    rows = len(opened(tmp_path).rows())
    lower = opened(tmp_path, limit=0.5)
    assert len(lower.rows()) == rows + 1 and "budget" in lower.rows()[-1].content
    with pytest.raises(BudgetExceeded, match=r"of 0\.5 .* -"):
        lower.reserve(claim(round=2))
    assert opened(tmp_path, limit=4.0).reserve(claim(round=2)).sequence == rows + 3


@pytest.mark.parametrize("changes", [("clinic-b", "example"), ("clinic-a", "client")])
def test_another_name_or_unit_is_an_error(tmp_path: Path, changes: tuple[str, Unit]) -> None:
    opened(tmp_path)
    with pytest.raises(ConfigError, match="is the ledger of data set 'clinic-a' with unit 'example', not of"):
        opened(tmp_path, 3.0, *changes)


def test_files_are_private_and_one_without_the_other_is_an_error(ledger: Ledger, tmp_path: Path) -> None:
    key = key_path(ledger.path)
    assert [path.stat().st_mode & 0o777 for path in (ledger.path, key)] == [0o600, 0o600]
    kept = key.read_bytes()
    key.unlink()
    with pytest.raises(ConfigError, match=r"its key .*a\.ledger\.key is not; restore the key"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match=r"a\.ledger\.key"):
        Ledger(ledger.path)
    key.write_bytes(kept)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="0644"):
        opened(tmp_path)
    key.chmod(0o600)
    ledger.path.unlink()
    with pytest.raises(ConfigError, match=r"a.ledger is gone, .*cannot be forgotten"):
        opened(tmp_path)
    assert not ledger.path.exists()


def test_events_are_their_json() -> None:
    for event in (ROUND, Laplace(0.1, 3), Skellam(1.0, 7), DiscreteGaussian(0.5)):
        assert event_from_json(event_to_json(event)) == event
    with pytest.raises(SpecError, match="a ledger cannot hold it; expected one of Gaussian, Laplace"):
        event_to_json("magic")  # type: ignore[arg-type]


# --- tampering


@pytest.fixture
def filled(tmp_path: Path) -> Ledger:
    """Return a ledger of six rows: name, limit, four entries."""
    ledger = opened(tmp_path)
    for number in range(4):
        ledger.reserve(claim(round=number + 1))
    return Ledger(ledger.path)


def resigned(books: sqlite3.Connection) -> None:
    """Take an entry out of the middle, and number the rest as if it had never been."""
    books.execute("DELETE FROM rows WHERE sequence = 4")
    books.execute("UPDATE rows SET sequence = sequence - 1 WHERE sequence > 4")


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (
            lambda books: books.execute(
                "UPDATE rows SET content = replace(content, '100', '1') WHERE sequence = 4"
            ),
            "row 4 has been altered",
        ),
        (
            lambda books: books.execute("UPDATE rows SET content = replace(content, '3.0', '99.0')"),
            "row 2 has been altered",
        ),
        (lambda books: books.execute("DELETE FROM rows WHERE sequence = 4"), "row 4 is missing"),
        (resigned, "row 4 has been altered"),
        (lambda books: books.execute("DELETE FROM rows"), "another key"),
        (lambda books: books.execute("DROP TABLE rows"), "no such table"),
    ],
)
def test_edited_and_deleted_rows_are_found(filled: Ledger, tamper: Tamper, found: str) -> None:
    with closing(sqlite3.connect(filled.path)) as books, books:
        tamper(books)
    for use in (filled.account, lambda: filled.reserve(claim()), lambda: opened(filled.path.parent)):
        with pytest.raises(LedgerDamaged, match=found):
            use()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_truncated_file_is_found(filled: Ledger, share: float) -> None:
    size = filled.path.stat().st_size
    with filled.path.open("r+b") as file:
        file.truncate(int(share * size))
    with pytest.raises(LedgerDamaged, match=r"restore the newest copy|the file is damaged"):
        filled.account()
    with pytest.raises(LedgerDamaged):
        filled.reserve(claim())


def test_a_ledger_that_shrinks_under_a_running_agent_is_found(filled: Ledger) -> None:
    copy = filled.path.with_suffix(".copy")
    shutil.copy(filled.path, copy)
    filled.reserve(claim(round=5))
    shutil.copy(copy, filled.path)
    with pytest.raises(LedgerDamaged, match="row 7 is not the one that was there a moment ago"):
        filled.reserve(claim(round=6))


def test_a_newest_row_that_goes_is_missed_before_anything_is_written(filled: Ledger) -> None:
    filled.account()
    with closing(sqlite3.connect(filled.path)) as books, books:
        books.execute("DELETE FROM rows WHERE sequence = (SELECT max(sequence) FROM rows)")
    rows = len(filled.rows())
    for call in (filled.account, lambda: filled.judge(claim()), lambda: filled.reserve(claim())):
        with pytest.raises(LedgerDamaged, match=f"row {rows + 1} is not the one that was there a moment ago"):
            call()
    assert len(filled.rows()) == rows


def test_rows_that_an_authority_has_seen_must_be_there_for_ever(filled: Ledger) -> None:
    copy = filled.path.with_suffix(".copy")
    shutil.copy(filled.path, copy)
    filled.reserve(claim(round=5))
    receipt = Receipt("fedcore://fed/client/a", filled.account().head, 1.0, b"proof")
    filled.keep(receipt)
    assert filled.receipt(receipt.name) == receipt and filled.receipt("b") is None
    shutil.copy(copy, filled.path)
    restored = Ledger(filled.path)
    assert restored.account().entries == 4  # by itself it looks whole
    for _ in range(2):
        with pytest.raises(
            LedgerDamaged, match=r"rolled back: the authority of .*client/a has seen another row 7"
        ):
            restored.keep(receipt)
    with pytest.raises(LedgerDamaged, match="rolled back"):
        opened(filled.path.parent)
    with pytest.raises(LedgerDamaged, match="rolled back"):
        Ledger(filled.path).reserve(claim(round=6))


def test_a_receipt_for_another_row_is_a_rollback(filled: Ledger) -> None:
    """A ledger that was rolled back and has grown since has a row of that number, but not that row."""
    with pytest.raises(LedgerDamaged, match="rolled back"):
        filled.keep(Receipt("a", Head(3, bytes(32)), 1.0, b""))


def test_the_witness_knows_a_ledger_by_its_data_sets_name_alone() -> None:
    assert ledger_id("clinic-a") == ledger_id("clinic-a") != ledger_id("clinic-b")
    assert "clinic" not in ledger_id("clinic-a")
