"""Structured log lines: a time, a level, an event, and its fields.

Use `logging.getLogger("fedcore.<room>")` and `log.info("round closed", extra={"round": 3})`.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what the caller passed as `extra`; a name that begins with _ is some library's own."""
    return {key: value for key, value in vars(record).items() if key not in STANDARD and key[0] != "_"}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000+00:00 info  server  round closed  round=3 accepted=4`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, with a traceback below it where there is one."""
        room = record.name.removeprefix("fedcore.")
        fields = " ".join(f"{key}={value}" for key, value in _fields(record).items())
        line = f"{_time(record)} {record.levelname.lower():7} {room}: {record.getMessage()}"
        line = f"{line}  {fields}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON; values that JSON does not know become text."""
        head = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        row = {**head, "event": record.getMessage(), **_fields(record)}
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, default=str)


def configure(json: bool = False) -> None:
    """Send fedcore's log lines to standard error, as text or as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json else TextFormatter())
    log = logging.getLogger("fedcore")
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
