"""Every error that fedcore raises on purpose.

    FedcoreError                 anything below; `str()` is one message a person can act on
    ├── SpecError                a run spec, an option or a name that does not fit      (exit code 2)
    ├── TaskError                a task that cannot be imported or breaks its contract  (exit code 2)
    ├── DataError                a data set that is missing or does not fit             (exit code 2)
    ├── ConfigError              a folder or configuration file of an agent or server   (exit code 2)
    ├── MissingExtra             a library that an extra installs                       (exit code 2)
    ├── UpdateRefused            an update, or what a peer sent, that a check turned down
    ├── Interrupted              a transfer that was cut; the rest can follow
    ├── ProtocolError            a message that is malformed, oversized or out of place
    │   └── Blameless            one that its sender may have sent in good faith
    ├── Overloaded               more than is taken now, though nothing is wrong with it
    ├── AuthenticationError      a certificate, token or identity that was not accepted
    └── RunFailed                a run that cannot go on

A message says what is wrong, the value, what was expected, and the next step.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class FedcoreError(Exception):
    """Base of every error raised on purpose; the command line prints it without a traceback."""

    exit_code = 1


class SpecError(FedcoreError):
    """A run spec, an option or a name that does not fit; names the key and what was expected."""

    exit_code = 2


class TaskError(FedcoreError):
    """A task that cannot be imported or that breaks the contract of `fedcore.Task`."""

    exit_code = 2


class DataError(FedcoreError):
    """A data set that is missing, unreadable, or too small for what was asked."""

    exit_code = 2


class ConfigError(FedcoreError):
    """A folder or a configuration file of an agent, a server or an authority that does not fit."""

    exit_code = 2


class MissingExtra(FedcoreError):
    """A library that is not installed; the message tells the command that installs it."""

    exit_code = 2

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; run: pip install 'fedcore[{extra}]'")


class UpdateRefused(FedcoreError):
    """An update that a check turned down; `str()` is the reason that the client is told."""


class Interrupted(FedcoreError):
    """A transfer that was cut; whoever sends asks how far it came, and goes on from there."""


class ProtocolError(FedcoreError):
    """A message that is malformed, oversized, truncated, replayed or out of place."""


class Blameless(ProtocolError):
    """A message that is not taken, but is no offence: of another version, or crossed with another one."""


class Overloaded(FedcoreError):
    """More than the coordinator takes now; nothing is wrong with it, and it may be sent again later."""


class AuthenticationError(FedcoreError):
    """A certificate, a token or an identity that was not accepted."""


class RunFailed(FedcoreError):
    """A run that cannot go on, with the reason."""


def expect(holds: bool, part: object, expected: str) -> None:
    """Raise SpecError that shows a part with its fields and what was expected of them, unless it holds."""
    if not holds:
        raise SpecError(f"{part}: expected {expected}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest valid name, or the list of all valid names."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid names: {', '.join(names)}"
