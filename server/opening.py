"""How a round is opened: for updates that come in TLS alone, sealed, or masked, as the run's spec says."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from fedcore.messages import Assignment, Plan
from fedcore.server.journal import Journal, Opening
from fedcore.server.live import LiveRound
from fedcore.server.sealed import Vault
from fedcore.server.secure import SecureRound
from fedcore.server.store import Run
from fedcore.wire.secure import config_of

if TYPE_CHECKING:
    from fedcore.server.coordinator import Coordinator

Live = LiveRound | SecureRound
Assign = Callable[[str, float], Assignment]  # a client's work, given the seconds that are left


def open_round(
    coordinator: "Coordinator",
    run: Run,
    plan: Plan,
    assign: Assign,
    opening: Opening,
    journal: Journal | None = None,
) -> Live:
    """Return the round of a plan; it blocks. journal: of an attempt at secure aggregation that goes on."""
    registry, compute, identity = coordinator.registry, coordinator.compute, coordinator.identity
    # An evaluator's numbers are the operator's own, and a sum over one of them would hide nothing.
    holdout = plan.ref.kind == "evaluate" and run.spec.evaluation.where == "holdout"
    match run.spec.encryption.updates:
        case "secagg" if not holdout:
            work, federation = assign("", plan.deadline), identity.name.federation
            config = config_of(federation, work.ref, work.spec, work.parameters, work.cohort, plan.sizes)
            journal = journal or coordinator.journals.open(opening)
            assign = _with(assign, certificate=opening.certificate)
            return SecureRound(plan, registry, compute, assign, journal, config, identity, coordinator.trust)
        case "sealed":
            vault = Vault(identity, plan, run.layout)
            assign = _with(assign, key=vault.announced)
            return LiveRound(plan, run.layout, registry, compute, coordinator.spool, assign, vault)
    return LiveRound(plan, run.layout, registry, compute, coordinator.spool, assign)


def _with(assign: Assign, key: bytes = b"", certificate: bytes = b"") -> Assign:
    return lambda client, left: replace(assign(client, left), key=key, certificate=certificate)
