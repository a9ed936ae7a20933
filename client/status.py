"""`fedcore client status`: what can be said about an agent from its folder alone."""

import time
from datetime import UTC, datetime
from typing import Any

from fedcore.client.config import Config, Settings
from fedcore.client.hosting import digest_of
from fedcore.client.state import State
from fedcore.crypto.identity import Certified
from fedcore.errors import FedcoreError
from fedcore.task import digest, resolve

ROUNDS = 10


def status_of(config: Config) -> dict[str, Any]:
    """Return whether an agent runs here, who it is, the digests of its tasks and apps, and its last rounds.

    What is missing or broken is described in its place, because this is what one looks at when it is.
    """
    state = State(config.state)
    running = state.running
    return {
        "agent": "running" if running else "not running",
        **_identity(state),
        "coordinator": config.settings.coordinator,
        "connection": _connection(state) if running else "-",
        "limits": _limits(config.settings),
        "tasks": {name: _digest(config, reference) for name, reference in config.settings.tasks.items()},
        "apps": {name: _digest_of_app(config, name) for name in config.settings.flower.apps},
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


def _connection(state: State) -> str:
    """Return `connected since ...`, `paused until ...` or `not connected since ...: the last reason`."""
    row = state.connection()
    if not row:
        return "none yet"
    if row.get("until", 0.0) > time.time():
        return f"paused by the coordinator until {_time(row['until'])}"
    reason = f": {row['reason']}" if "reason" in row else ""
    return f"{row['state']} since {_time(row['since'])}{reason}"


def _time(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _limits(settings: Settings) -> str:
    policy = settings.policy
    limits = {
        f"memory {settings.worker.memory}": settings.worker.memory,
        f"work begins within {policy.hours}": policy.hours,
        f"{policy.rounds_per_day} rounds a day": policy.rounds_per_day,
    }
    return ", ".join(text for text, given in limits.items() if given) or "none"


def _digest(config: Config, reference: str) -> str:
    try:
        return digest(resolve(reference, config.folder))
    except FedcoreError as error:
        return str(error)


def _digest_of_app(config: Config, name: str) -> str:
    try:
        return digest_of(config, name)
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
