"""How a round is opened: for updates that come in TLS alone, sealed, or masked, as the run's spec says."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from fedcore.messages import Assignment, Plan
from fedcore.server.journal import Journal, Opening
from fedcore.server.live import LiveRound
from fedcore.server.sealed import KeyLost, Vault, wrapped_key
from fedcore.server.secure import SecureRound
from fedcore.server.store import Run
from fedcore.wire.secure import config_of

if TYPE_CHECKING:
    from fedcore.server.coordinator import Coordinator

log = logging.getLogger("fedcore.server")

Live = LiveRound | SecureRound
Assign = Callable[[str, float], Assignment]  # a client's work, given the seconds that are left


def open_round(
    coordinator: "Coordinator",
    run: Run,
    plan: Plan,
    assign: Assign,
    opening: Opening,
    journal: Journal | None = None,
    moved: Callable[[], None] | None = None,
) -> Live:
    """Return the round of a plan; it blocks.

    journal: of an attempt that goes on. moved: as in `LiveRound`; such rounds go on side by side.
    """
    identity, journals = coordinator.identity, coordinator.journals
    where = (coordinator.registry, coordinator.compute, coordinator.refuse)
    # An evaluator's numbers are the operator's own, and a sum over one of them would hide nothing.
    holdout = plan.ref.kind == "evaluate" and run.spec.evaluation.where == "holdout"
    match run.spec.encryption.updates:
        case "secagg" if not holdout:
            work, federation = assign("", plan.deadline), identity.name.federation
            config = config_of(federation, work.ref, work.spec, work.parameters, work.cohort, plan.sizes)
            journal = journal or journals.open(opening)
            assign = _with(assign, certificate=opening.certificate)
            return SecureRound(plan, *where, assign, journal, config, identity, coordinator.trust)
        case "sealed":
            vault = _vault(coordinator, run, plan, journal) if journal else None
            if not journal or not vault:
                wrapped = wrapped_key(identity, plan.ref)
                journal = journals.open(replace(opening, key=wrapped), beside=moved is not None)
                vault = Vault(identity, plan, run.layout, wrapped)
            assign = _with(assign, key=vault.announced)
            return LiveRound(plan, run.layout, *where, journal, assign, vault, moved)
    journal = journal or journals.open(opening, beside=moved is not None)
    return LiveRound(plan, run.layout, *where, journal, assign, None, moved)


def _vault(coordinator: "Coordinator", run: Run, plan: Plan, journal: Journal) -> Vault | None:
    """Return what opens the updates of an attempt that goes on; None where nothing does any more."""
    try:
        return Vault(coordinator.identity, plan, run.layout, journal.opening.key)
    except KeyLost as error:
        log.warning("attempt begun anew", extra={"ref": plan.ref, "reason": str(error)})
        return None


def _with(assign: Assign, key: bytes = b"", certificate: bytes = b"") -> Assign:
    return lambda client, left: replace(assign(client, left), key=key, certificate=certificate)
