"""Named places in the code where a test ends this process, or has the disk fail.

The environment variable FEDCORE_FAULTS says which: `NAME[:COUNT]=FAULT`, separated by commas. From the
COUNTth time (the first where nothing is said) that the process comes by NAME, FAULT happens: `kill`, which is
SIGKILL, or an error of the operating system by its name, such as `ENOSPC`. Where nothing is set, a point
costs the look into an empty dictionary. The places are part of no interface and may change with the code.
"""

import errno
import os
import signal
from dataclasses import dataclass

from fedcore.errors import ConfigError, nearest

COORDINATOR = (
    "store.commit.before",  # of every transaction
    "store.commit.after",
    "blob.write",
    "blob.rename.before",
    "blob.rename.after",
    "transfer.rename.before",  # of a file that has come over the wire, at either side
    "transfer.rename.after",
    "update.note.before",
    "update.note.after",  # before the acknowledgement
    "update.acknowledged",
    "journal.keep.before",
    "journal.keep.after",
    "round.folded",
    "round.closed",
    "round.commit.before",
    "round.commit.after",
    "verdicts.told",
)
AGENT = (
    "transfer.rename.before",
    "transfer.rename.after",
    "agent.reserved",
    "agent.spooled",
    "agent.upload.sent",
    "agent.receipt",
    "agent.verdict.before",
    "agent.kept.rename",
    "agent.verdict.after",
)
APPS = (  # passed where an app's letters are, and nowhere else
    "agent.letter.spooled",
    "agent.letter.sent",
    "letter.sent",  # before the coordinator's acknowledgement
    "answer.noted",
)
POINTS = tuple(dict.fromkeys((*COORDINATOR, *AGENT, *APPS)))


@dataclass
class Fault:
    """What happens at a point: "kill", or an error by its name. left: how often it does not happen yet."""

    action: str
    left: int = 0

    def strike(self) -> None:
        """End this process, raise OSError, or let it pass."""
        self.left -= 1
        if self.left >= 0:
            return
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.action)
        raise OSError(number, os.strerror(number))


def parse(text: str) -> dict[str, Fault]:
    """Return the faults that FEDCORE_FAULTS asks for; raises ConfigError for what makes no sense."""
    faults = dict[str, Fault]()
    for item in filter(None, text.split(",")):
        place, _, action = item.partition("=")
        name, _, count = place.partition(":")
        if name not in POINTS:
            raise ConfigError(f"FEDCORE_FAULTS: there is no point {name!r}{nearest(name, POINTS)}")
        if action != "kill" and action not in errno.errorcode.values():
            raise ConfigError(f"FEDCORE_FAULTS: {name} = {action!r}, expected kill, ENOSPC, EROFS or EIO")
        if count and not (count.isdecimal() and int(count)):
            raise ConfigError(f"FEDCORE_FAULTS: {name} is to be passed {count!r} times, expected 1 or more")
        faults[name] = Fault(action, int(count or 1) - 1)
    return faults


FAULTS = parse(os.environ.get("FEDCORE_FAULTS", ""))


def point(name: str) -> None:
    """Let happen here what was asked for, if anything was."""
    if fault := FAULTS.get(name):
        fault.strike()
