"""`fedcore client status`: what can be said about an agent from its folder alone."""

from typing import Any

from fedcore.client.config import Config
from fedcore.client.state import State
from fedcore.crypto.identity import Certified
from fedcore.errors import FedcoreError
from fedcore.task import digest, resolve

ROUNDS = 10


def status_of(config: Config) -> dict[str, Any]:
    """Return whether an agent runs here, who it is, the digests of its tasks, and its last rounds.

    What is missing or broken is described in its place, because this is what one looks at when it is.
    """
    state = State(config.state)
    return {
        "agent": "running" if state.running else "not running",
        **_identity(state),
        "coordinator": config.settings.coordinator,
        "tasks": {name: _digest(config, reference) for name, reference in config.settings.tasks.items()},
        "rounds": _last_rounds(state),
    }


def _identity(state: State) -> dict[str, str]:
    try:
        identity = Certified.load(state.identity)
    except FedcoreError as error:
        return {"name": "-", "federation": "-", "root": "-", "certificate": str(error)}
    return {
        "name": identity.name.name,
        "federation": identity.name.federation,
        "root": identity.root_fingerprint,
        "certificate": f"until {identity.not_after:%Y-%m-%d %H:%M} UTC",
    }


def _digest(config: Config, reference: str) -> str:
    try:
        return digest(resolve(reference, config.folder))
    except FedcoreError as error:
        return str(error)


def _last_rounds(state: State) -> list[dict[str, Any]]:
    """Return the last thing known of each of the last rounds.

    A verdict outranks that the update was sent, and an attack that was seen outranks the verdict.
    """
    last: dict[str, dict[str, Any]] = {}
    for row in state.journal(4 * ROUNDS):
        known = last.get(row["ref"], row)
        if row["event"] != "sent" and known["event"] != "aborted":
            known = row
        last[row["ref"]] = known
    return list(last.values())[-ROUNDS:]
