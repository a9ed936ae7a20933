"""What the coordinator knows for good: runs and their committed rounds, clients' conduct, the audit trail.

One transaction a round holds the addresses of the new model and of the strategy's state, what has become of
the clients, and the round's metrics, so a restart finds either the round before or the round after, never
something between. The functions block; the coordinator calls them from its writer thread. All of them raise
StoreUnavailable where the database cannot be used now; asked again, each does what it would have done.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import bindparam, select
from sqlalchemy.engine import Row
from sqlalchemy.exc import DBAPIError

from fedcore.errors import ConfigError, FedcoreError
from fedcore.layout import Layout
from fedcore.messages import Submission
from fedcore.server.database import connect, migrate, snapshot, transaction, url_of
from fedcore.server.tables import CLIENTS, CONDUCT, PARTICIPANTS, ROUNDS, RUNS
from fedcore.server.trail import Entry, append, begin, entries
from fedcore.spec import RunSpec


@dataclass(frozen=True)
class Run:
    """A run as it was submitted, and how far it has come."""

    id: str
    spec: RunSpec
    task: str
    digest: str
    layout: Layout
    metrics: tuple[str, ...]
    initial: str
    model: str
    state: str
    detail: str
    created: float


@dataclass(frozen=True)
class Committed:
    """A committed round: addresses of its parameters and of the strategy's vectors, and its row of metrics.

    model: the digest of the parameters without what is broadcast beside the model.
    """

    round: int
    parameters: str
    model: str
    vectors: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Known:
    """What is known of a client in a run.

    round, attempt: of its last update that was folded into a committed round, round 0 before the first.
    memory: the sampler's.
    """

    round: int = 0
    attempt: int = 0
    memory: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Participant:
    """A client that was asked for a committed round, and what became of it.

    status: folded, late, refused or lost, with a reason. kind, attempt: of the work. seconds: that it took,
    0 where nothing came. bytes: of its update. staleness: rounds committed while it worked.
    """

    client: str
    status: str
    kind: str = "train"
    attempt: int = 0
    reason: str = ""
    seconds: float = 0.0
    bytes: int = 0
    staleness: int = 0


@dataclass(frozen=True)
class Conduct:
    """How a client behaves: its offences since an operator last lifted them, and when the last one was.

    time: in seconds since 1970.
    """

    offences: int = 0
    reason: str = ""
    time: float = 0.0
    quarantined: bool = False


class Store:
    """The coordinator's database."""

    def __init__(self, folder: Path, url: str = "") -> None:
        """Open or create the database of a coordinator's folder, as `url_of` has it, and bring it up to date.

        Raises ConfigError where that is impossible, and MissingExtra.
        """
        where = url_of(folder, url)
        self.engine, name = connect(where), where.database if not url else where.render_as_string()
        try:
            with transaction(self.engine) as db:
                migrate(db)
                self.key = begin(db, folder)
        except (FedcoreError, DBAPIError) as error:
            self.close()
            cause = str(getattr(error.__cause__, "orig", "")).partition("\n")[0]
            because = f"{error} ({cause})" if cause else str(error)
            raise ConfigError(f"{name}: the database cannot be opened: {because}") from error

    def close(self) -> None:
        """Close the connection."""
        self.engine.dispose()

    def add_run(self, run_id: str, submission: Submission, initial: str) -> Run:
        """Record a submitted run as running; `initial` is the address of its initial parameters."""
        spec, task, digest, layout = submission.spec, submission.task, submission.digest, submission.layout
        model, now = submission.parameters.sha256, time.time()
        run = Run(run_id, spec, task, digest, layout, submission.metrics, initial, model, "running", "", now)
        texts = {
            "spec": spec.model_dump_json(),
            "layout": layout.to_json(),
            "metrics": json.dumps(run.metrics),
        }
        with transaction(self.engine) as db:
            db.execute(RUNS.insert().values(**{**vars(run), **texts}))
        return run

    def runs(self) -> list[Run]:
        """Return all runs, the newest first."""
        with snapshot(self.engine) as db:
            return [_run(row) for row in db.execute(select(RUNS).order_by(RUNS.c.created.desc()))]

    def set_state(self, run_id: str, state: str, detail: str = "") -> None:
        """Record that a run is running, finished, stopped or failed."""
        with transaction(self.engine) as db:
            db.execute(RUNS.update().where(RUNS.c.id == run_id).values(state=state, detail=detail))

    def commit_round(
        self,
        run_id: str,
        committed: Committed,
        clients: Mapping[str, Known],
        participants: Sequence[Participant] = (),
    ) -> None:
        """Record a round, what is new of the `clients`, and who took part, in the order of folding.

        Once and for all: another round of that number is refused, and the very same changes nothing.
        """
        values = {"run": run_id, **vars(committed), "row": json.dumps(committed.row)}
        known = [
            {"run": run_id, "client": client, **vars(of), "memory": json.dumps(of.memory)}
            for client, of in clients.items()
        ]
        asked = [
            {"run": run_id, "round": committed.round, "place": place, **vars(participant)}
            for place, participant in enumerate(participants)
        ]
        here = (ROUNDS.c.run == run_id) & (ROUNDS.c.round == committed.round)
        older = (CLIENTS.c.run == run_id) & (CLIENTS.c.client == bindparam("client_"))
        with transaction(self.engine) as db:
            if (found := db.execute(select(ROUNDS).where(here)).first()) and found._asdict() == values:
                return  # the database had committed it when its word of that was lost
            db.execute(ROUNDS.insert().values(**values))
            if known:
                db.execute(CLIENTS.delete().where(older), [{"client_": client} for client in clients])
                db.execute(CLIENTS.insert(), known)
            if asked:
                db.execute(PARTICIPANTS.insert(), asked)

    def add_metrics(self, run_id: str, round: int, metrics: Mapping[str, float]) -> None:
        """Add what an evaluation measured to a committed round's row."""
        here = (ROUNDS.c.run == run_id) & (ROUNDS.c.round == round)
        with transaction(self.engine) as db:
            row = json.loads(db.execute(select(ROUNDS.c.row).where(here)).scalar_one())
            db.execute(ROUNDS.update().where(here).values(row=json.dumps(row | dict(metrics))))

    def rounds(self, run_id: str) -> list[Committed]:
        """Return a run's committed rounds in order."""
        query = select(ROUNDS).where(ROUNDS.c.run == run_id).order_by(ROUNDS.c.round)
        with snapshot(self.engine) as db:
            rows = db.execute(query).all()
        return [Committed(r.round, r.parameters, r.model, r.vectors, json.loads(r.row)) for r in rows]

    def clients(self, run_id: str) -> dict[str, Known]:
        """Return what is known of a run's clients, by name."""
        query = select(CLIENTS).where(CLIENTS.c.run == run_id)
        with snapshot(self.engine) as db:
            rows = db.execute(query).all()
        return {r.client: Known(r.round, r.attempt, json.loads(r.memory)) for r in rows}

    def participants(self, run_id: str, round: int) -> list[Participant]:
        """Return who took part in a committed round, in the order of folding."""
        here = (PARTICIPANTS.c.run == run_id) & (PARTICIPANTS.c.round == round)
        with snapshot(self.engine) as db:
            rows = db.execute(select(PARTICIPANTS).where(here).order_by(PARTICIPANTS.c.place)).all()
        return [Participant(*row[3:]) for row in rows]

    def held(self) -> dict[str, set[str]]:
        """Return the addresses of the blobs that are each run's newest parameters and vectors."""
        held = dict[str, set[str]]()
        with snapshot(self.engine) as db:
            for run_id, initial in db.execute(select(RUNS.c.id, RUNS.c.initial)).all():
                query = select(ROUNDS).where(ROUNDS.c.run == run_id).order_by(ROUNDS.c.round.desc()).limit(1)
                newest = db.execute(query).first()
                held[run_id] = {newest.parameters, newest.vectors} - {""} if newest else {initial}
        return held

    def conduct(self) -> dict[str, Conduct]:
        """Return how clients behave that have ever offended, by name."""
        with snapshot(self.engine) as db:
            return {row.client: Conduct(*row[1:]) for row in db.execute(select(CONDUCT))}

    def offend(self, client: str, reason: str, quarantine: bool = False) -> Conduct:
        """Count an offence of a client, quarantine it if so decided, and return its conduct."""
        here = CONDUCT.c.client == client
        with transaction(self.engine) as db:
            row = db.execute(select(CONDUCT).where(here)).first()
            before = Conduct(*row[1:]) if row else Conduct()
            after = Conduct(before.offences + 1, reason, time.time(), before.quarantined or quarantine)
            db.execute(CONDUCT.delete().where(here))
            db.execute(CONDUCT.insert().values(client=client, **vars(after)))
            if after.quarantined > before.quarantined:
                append(db, self.key, "coordinator", "quarantine", f"{client}: {reason}")
        return after

    def lift(self, client: str) -> None:
        """Forget a client's offences, and with them its quarantine."""
        with transaction(self.engine) as db:
            db.execute(CONDUCT.delete().where(CONDUCT.c.client == client))

    def note(self, actor: str, action: str, detail: str) -> None:
        """Add to the audit trail what an actor is about to do."""
        with transaction(self.engine) as db:
            append(db, self.key, actor, action, detail)

    def trail(self) -> list[Entry]:
        """Return the audit trail, the oldest first; raises ChainBroken where a row was altered."""
        with snapshot(self.engine) as db:
            return list(entries(db, self.key))


def _run(row: Row[Any]) -> Run:
    read = {
        "spec": RunSpec.model_validate_json(row.spec),
        "layout": Layout.from_json(row.layout),
        "metrics": tuple(json.loads(row.metrics)),
    }
    return Run(**{**row._asdict(), **read})
