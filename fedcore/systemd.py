"""A unit of systemd for a program that has to be there after every boot."""

import pwd
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from fedcore.errors import ConfigError


def unit(room: str, what: str, folder: Path, writable: Sequence[Path]) -> str:
    """Return the unit that runs `fedcore ROOM start --dir FOLDER` as the owner of the folder.

    what: the program, for people. writable: folders to which it may write. Raises ConfigError for a folder
    that is not there, or whose name a unit cannot hold.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there; make it with 'fedcore {room} init'")
    names = {
        "room": room,
        "what": what,
        "plain": _line(folder),
        "user": _owner(folder),
        "python": quoted(Path(sys.executable)),
        "folder": quoted(folder),
        "writable": " ".join(quoted(path, command=False) for path in writable),
    }
    template = files("fedcore") / "templates" / "fedcore.service"
    return Template(template.read_text(encoding="utf-8")).substitute(names)


def quoted(path: Path, command: bool = True) -> str:
    """Return a path as one word of a unit; in a command line, unlike elsewhere, a dollar is special too."""
    text = _line(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text.replace("$", "$$") if command else text}"'


def _line(path: Path) -> str:
    if not str(path).isprintable():
        raise ConfigError(f"{str(path)!r} has characters that a unit cannot hold; choose another folder")
    return str(path)


def _owner(folder: Path) -> str:
    number = folder.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # of another machine, such as of a container
        return str(number)
