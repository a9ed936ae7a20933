"""What a closed round leaves: new parameters in a blob, a row of figures, what is known of its clients."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedcore.messages import Ref, Verdict
from fedcore.server.blobs import gone_if_it_fails
from fedcore.server.opening import Live
from fedcore.server.store import Committed, Known, Participant
from fedcore.strategies.rounds import Round, State, advance, tally
from fedcore.strategies.samplers import Memory

if TYPE_CHECKING:
    from fedcore.server.driver import Driver

log = logging.getLogger("fedcore.server")


def close(driver: "Driver", round: Round, state: State, *root: Round) -> tuple[State, Committed]:
    """Aggregate a round into a new parameter blob (on the compute thread).

    root: the evaluator's round beside it, for rules that ask for one.
    """
    blobs, run = driver.coordinator.blobs, driver.run
    for trusted in root:
        round.root = trusted.rows.packed()["delta"][0]
    path, draft = blobs.draft(driver.address, run.layout, driver.extra)
    with gone_if_it_fails(path):
        after = advance(driver.strategy, round, state, run.spec.run.seed, lambda _: draft, driver.entropy())
    model = draft.digest if driver.extra else ""
    blob = blobs.adopt(path, run.id)
    vectors = blobs.save_state(after.vectors, run.id)
    after = replace(after, vectors=blobs.load_state(vectors))  # its drafts go
    row = {"round": after.round, **tally(round)}
    return after, Committed(after.round, blob.sha256, model or blob.sha256, vectors, row)


def skip(driver: "Driver", live: Live, state: State) -> tuple[State, Committed]:
    """Leave out a round that clients would not enter again: the model stays (on the compute thread)."""
    number = state.round + 1
    refused = sum(verdict.status == "refused" for verdict in live.round.verdicts.values())
    row: dict[str, float] = {"round": number, "skipped": 1, "folded": 0, "refused": refused}
    vectors = driver.coordinator.blobs.save_state(state.vectors, driver.run.id)
    log.warning("round skipped", extra={"ref": live.plan.ref, "reason": live.lacks})
    return replace(state, round=number), Committed(number, driver.address, driver.model.sha256, vectors, row)


def news(
    known: Mapping[str, Known], folded: Mapping[str, Ref], memory: Memory, ready: Sequence[str]
) -> dict[str, Known]:
    """Return what a round changes in what is `known` of clients.

    folded: whose update, and of which work. memory: the sampler's. ready: who was there.
    """
    changed = dict[str, Known]()
    for client in known.keys() | folded.keys() | set(ready):
        before = known.get(client, Known())
        ref = folded.get(client)
        last = (ref.round, ref.attempt) if ref else (before.round, before.attempt)
        after = Known(*last, memory.get(client, {}))
        if client not in known or after != before:
            changed[client] = after
    return changed


def participants(*lives: Live) -> list[Participant]:
    """Return who was asked in an attempt, and what became of it."""
    return [participant(live, *each) for live in lives for each in live.round.verdicts.items()]


def participant(live: Live, client: str, verdict: Verdict, staleness: int = 0) -> Participant:
    """Return the record of what became of a client's work."""
    size, ref = live.bytes_of(client), live.plan.ref
    status = "lost" if verdict.status == "refused" and not size else verdict.status
    seconds = live.round.seconds.get(client, 0.0)
    return Participant(client, status, ref.kind, ref.attempt, verdict.reason, seconds, size, staleness)
