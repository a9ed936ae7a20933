"""What the coordinator knows for good of apps: their runs, and the letters that nobody has settled.

A letter is one row all its life: it waits, then it has its answer in the letter's place, then only its id is
left, by which it is known when it is sent again. As in `fedcore.server.store`, the functions block, raise
StoreUnavailable, and asked again each does what it would have done.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.engine import Engine, Row

from fedcore.errors import UpdateRefused
from fedcore.messages import Blob
from fedcore.server.database import snapshot, transaction
from fedcore.server.tables import APP_RUNS, LETTERS
from fedcore.wire.relay import Answer, LetterRef


@dataclass(frozen=True)
class AppRun:
    """A run of an app; `digest` is of its files, `created` in seconds since 1970."""

    id: str
    name: str
    app: str
    digest: str
    state: str
    detail: str
    created: float


@dataclass(frozen=True)
class Posted:
    """A letter to a client, or its answer once it is answered.

    place: orders the letters of all runs. expires: in seconds since 1970.
    """

    ref: LetterRef
    client: str
    state: Literal["waiting", "answered", "settled"]
    place: int
    expires: float
    head: bytes = field(repr=False)
    content: Blob | None

    @property
    def answer(self) -> Answer:
        """What was answered."""
        return Answer(self.ref, self.head, self.content)


class Letters:
    """The runs of apps and their letters, in a coordinator's database."""

    def __init__(self, engine: Engine) -> None:
        """Use a database that is up to date."""
        self.engine = engine

    def open(self, run: AppRun) -> None:
        """Record a new run."""
        with transaction(self.engine) as db:
            db.execute(APP_RUNS.insert().values(**vars(run)))

    def runs(self) -> list[AppRun]:
        """Return all runs."""
        with snapshot(self.engine) as db:
            return [AppRun(**row._asdict()) for row in db.execute(select(APP_RUNS))]

    def end(self, run_id: str, state: str, detail: str) -> AppRun:
        """End a run unless it has ended, forget its letters, and return it."""
        here = APP_RUNS.c.id == run_id
        with transaction(self.engine) as db:
            running = APP_RUNS.update().where(here & (APP_RUNS.c.state == "running"))
            db.execute(running.values(state=state, detail=detail))
            db.execute(LETTERS.delete().where(LETTERS.c.run == run_id))
            return AppRun(**db.execute(select(APP_RUNS).where(here)).one()._asdict())

    def letters(self) -> list[Posted]:
        """Return the letters that are not settled, in the order of sending."""
        query = select(LETTERS).where(LETTERS.c.state != "settled").order_by(LETTERS.c.place)
        with snapshot(self.engine) as db:
            return [_posted(row) for row in db.execute(query)]

    def last(self) -> int:
        """Return the last place that a letter has, 0 where there is none."""
        with snapshot(self.engine) as db:
            return db.execute(select(func.max(LETTERS.c.place))).scalar() or 0

    def send(self, run_id: str, letters: Sequence[Posted]) -> set[str]:
        """Record letters of a run that are not known yet; return the ids of those that are settled.

        Raises UpdateRefused where the run has ended.
        """
        known = select(LETTERS.c.id, LETTERS.c.state).where(
            (LETTERS.c.run == run_id) & LETTERS.c.id.in_([letter.ref.id for letter in letters])
        )
        with transaction(self.engine) as db:
            state = db.execute(select(APP_RUNS.c.state).where(APP_RUNS.c.id == run_id)).scalar_one()
            if state != "running":
                raise ended(run_id, state)
            before = {row.id: row.state for row in db.execute(known)}
            if new := [_row(letter) for letter in letters if letter.ref.id not in before]:
                db.execute(LETTERS.insert(), new)
        return {id for id, state in before.items() if state == "settled"}

    def answer(self, answer: Answer) -> Posted | None:
        """Record an answer unless the letter has one; return what is known of it, None where nothing is."""
        here = (LETTERS.c.run == answer.ref.run) & (LETTERS.c.id == answer.ref.id)
        with transaction(self.engine) as db:
            waiting = LETTERS.update().where(here & (LETTERS.c.state == "waiting"))
            db.execute(waiting.values(state="answered", head=answer.head, **_address(answer.content)))
            row = db.execute(select(LETTERS).where(here)).first()
        return _posted(row) if row else None

    def settle(self, run_id: str, ids: Collection[str]) -> None:
        """Forget letters but for their ids."""
        here = (LETTERS.c.run == run_id) & LETTERS.c.id.in_(ids)
        with transaction(self.engine) as db:
            db.execute(LETTERS.update().where(here).values(state="settled", head=b"", **_address(None)))


def ended(run_id: str, state: str) -> UpdateRefused:
    """Return what is told of a run that has ended."""
    return UpdateRefused(f"the run {run_id} has ended: {state}")


def _address(content: Blob | None) -> dict[str, Any]:
    return {"content": content.sha256 if content else "", "size": content.size if content else 0}


def _row(letter: Posted) -> dict[str, Any]:
    return {**vars(letter), **vars(letter.ref), **_address(letter.content)}


def _posted(row: Row[Any]) -> Posted:
    content = Blob(row.content, row.size) if row.size else None
    ref = LetterRef(row.run, row.id)
    return Posted(ref, row.client, row.state, row.place, row.expires, bytes(row.head), content)
