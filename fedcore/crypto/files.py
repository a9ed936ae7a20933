"""Files that are complete or absent, with their mode from the first moment on."""

import os
import secrets
from pathlib import Path

from fedcore.errors import ConfigError


def make_private_folder(folder: Path) -> None:
    """Create a folder that only its owner can enter, unless it exists."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_atomically(path: Path, content: bytes, mode: int) -> None:
    """Write a file so that a crash or power loss leaves the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # The mode belongs to the creation: a chmod after it leaves a moment in which others can open the file.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename survive power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_private(path: Path) -> bytes:
    """Return the content of a file that only its owner can touch; raises ConfigError otherwise."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(
                f"{path} has mode {mode:04o}, so others can get at this secret; expected 0600; run: "
                f"chmod 600 {path}, and make another one if anyone may have read it"
            )
        return file.read()
