"""A promise (`fedcore.privacy.claims.promise`) as people read it."""

from collections.abc import Iterator, Mapping
from typing import Any

TRUST = {
    "enforced": "made on the device (enforced)",
    "distributed": "made by the honest clients together (distributed)",
    "trusted": "made by the coordinator (trusted)",
}
AGAINST = {"receiver": "whoever receives the model", "coordinator": "the coordinator"}
UNITS = {"example": "one example of one client", "client": "all data of one client"}


def released(event: Mapping[str, Any]) -> str:
    """Return an event as text: how many releases, with which noise, of how many units."""
    rate = event.get("sampling_rate", 1.0)
    sampled = f" over samples at rate {rate:.4g}" if rate < 1 else ""
    return f"{event['steps']:,} × {event['event']} noise {event['noise_multiplier']:.4g}{sampled}"


def sentences(promised: Mapping[str, Any]) -> Iterator[str]:
    """Yield what holds, against whom, and what it assumes; nothing where nothing is promised."""
    for guarantee in promised["guarantees"]:
        adversary, unit = AGAINST[guarantee["adversary"]], UNITS[guarantee["unit"]]
        if guarantee["epsilon"] is None:
            yield f"Against {adversary} there is no guarantee: it sees sums before noise is added to them."
            continue
        yield (
            f"Against {adversary}, {unit} is protected with epsilon {guarantee['epsilon']:.3f} at delta "
            f"{guarantee['delta']:g} ({guarantee['adjacency']} adjacency, "
            f"{guarantee['accountant'].upper()} accountant)."
        )
    if promised["guarantees"]:
        noise = f"{promised['noise_multiplier']:g} × clip norm {promised['clip_norm']:g}"
        yield f"The noise is {noise}. {promised['assumes']}"
