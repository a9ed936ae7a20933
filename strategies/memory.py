"""What the server remembers of single clients, for samplers that choose by it."""

from collections.abc import Mapping

from fedcore.messages import Plan
from fedcore.strategies.samplers import Memory, Sampler
from fedcore.strategies.terms import RowStore


def remember(
    sampler: Sampler, plan: Plan, rows: RowStore, seconds: Mapping[str, float], memory: Memory
) -> Memory:
    """Return the memory after a round; the old one is left as it is.

    Every client that was asked has taken part. Of those whose update was folded a sampler that sees scalars
    also knows the weight, the mean training loss, and the `seconds` that they took.
    """
    if sampler.sees == "none":
        return memory
    after = dict(memory)
    for client in plan.cohort:
        known = dict(after.get(client, {}))
        known["round"], known["rounds"] = float(plan.ref.round), known.get("rounds", 0.0) + 1.0
        if said := rows.reported.get(client):  # nothing, where the run is private
            known["weight"] = said["weight"]
            known["loss"] = said["loss"] / said["count"] if said["count"] else 0.0
            known["seconds"] = seconds.get(client, 0.0)
        after[client] = known
    return after
