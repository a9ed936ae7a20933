"""The passphrase of an identity's key: from a person at the terminal, or from a service's environment.

It is never an argument of a command, which other users of the machine could read.
"""

import os
import sys
from getpass import getpass
from pathlib import Path

from fedcore.crypto.files import read_private
from fedcore.crypto.identity import Identity, is_locked
from fedcore.errors import ConfigError

VARIABLE, FILE = "FEDCORE_PASSPHRASE", "FEDCORE_PASSPHRASE_FILE"


def passphrase(new: bool = False) -> bytes:
    """Return FEDCORE_PASSPHRASE, or what FEDCORE_PASSPHRASE_FILE holds, or what is typed, a `new` one twice.

    Raises ConfigError where there is no terminal, and for an empty passphrase, two that differ, or a file
    that others can read.
    """
    text = os.environ.pop(VARIABLE, "")  # so that no child of this process gets it
    if path := os.environ.get(FILE):
        try:
            text = read_private(Path(path)).decode().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", "it is no UTF-8 text")
            raise ConfigError(f"{FILE}: {path}: {reason}") from error
    if not text:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"the key has a passphrase, and there is no terminal to ask for it; set {VARIABLE}, "
                f"or {FILE} to a file of mode 0600"
            )
        text = getpass("Passphrase: ")
        if new and text != getpass("The same again: "):
            raise ConfigError("the two passphrases differ; nothing was done, try again")
    if not text:
        raise ConfigError("the passphrase is empty; choose one, or leave --passphrase away")
    return text.encode()


def unlocked(folder: Path) -> Identity:
    """Return the identity in a folder, with the passphrase asked for where its key has one.

    Raises what `Identity.load` and `passphrase` raise.
    """
    return Identity.load(folder, passphrase=passphrase() if is_locked(folder) else b"")
