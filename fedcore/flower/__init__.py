"""Flower apps run here unchanged, and faster; our strategies run there, and theirs of sum type here.

>>> from fedcore.flower import as_flower, from_flower
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import fedcore.wire  # noqa: F401  before flwr imports grpc, which would take TLS 1.2 then
from fedcore.errors import MissingExtra

if TYPE_CHECKING:
    from fedcore.flower.ours import as_flower as as_flower
    from fedcore.flower.theirs import from_flower as from_flower

if find_spec("flwr") is None:
    raise MissingExtra("flwr", "flower")

_HOMES = {"as_flower": "fedcore.flower.ours", "from_flower": "fedcore.flower.theirs"}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: a host of Flower apps needs none of our strategies."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fedcore.flower' has no attribute {name!r}")
