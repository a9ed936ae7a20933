"""Which clients of a buffered run are at work, since when and with which model; as a file has it, too."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedcore.client.training import Kept
from fedcore.layout import Parameters
from fedcore.strategies.checkpoint import Arrays
from fedcore.strategies.terms import Rows

Tree = Mapping[str, Any]  # arrays by name, in trees by name


@dataclass
class Version:
    """A model that clients were given: who has yet to train from it, and what the others will send."""

    parameters: Parameters
    untrained: set[str] = field(default_factory=set)
    trained: dict[str, tuple[Rows, Kept]] = field(default_factory=dict)

    def tree(self) -> Tree:
        """Return all but `untrained` as a tree of arrays."""
        return {
            "shared": self.parameters.shared,
            "buffers": self.parameters.buffers,
            "extra": self.parameters.extra,
            "trained": {
                client: {"vectors": rows.vectors, "scalars": rows.scalars, "kept": kept}
                for client, (rows, kept) in self.trained.items()
            },
        }

    @classmethod
    def of(cls, tree: Tree, untrained: set[str]) -> "Version":
        """Return the version that a tree was made of; one that was flat has lost its empty branches."""
        trained = {
            client: (Rows(each.get("vectors", {}), each["scalars"]), each.get("kept", {}))
            for client, each in tree.get("trained", {}).items()
        }
        return cls(Parameters(tree["shared"], tree["buffers"], tree.get("extra", {})), untrained, trained)


@dataclass
class AtWork:
    """Who is at work at a virtual second, and with which model.

    queue: when who arrives, a heap. started: client -> the version it has. versions: by their numbers.
    """

    clock: float = 0.0
    queue: list[tuple[float, str]] = field(default_factory=list)
    started: dict[str, int] = field(default_factory=dict)
    versions: dict[int, Version] = field(default_factory=dict)

    def copy(self) -> "AtWork":
        """Return what later steps leave as it is; vectors are shared, since nobody writes into them."""
        versions = {
            number: Version(each.parameters, set(each.untrained), dict(each.trained))
            for number, each in self.versions.items()
        }
        return AtWork(self.clock, list(self.queue), dict(self.started), versions)

    def arrays(self) -> Arrays:
        """Return it as arrays by name, numbers and names as JSON in one of them."""
        untrained = {number: sorted(each.untrained) for number, each in self.versions.items()}
        book = {"clock": self.clock, "queue": self.queue, "started": self.started, "untrained": untrained}
        versions = {str(number): each.tree() for number, each in self.versions.items()}
        return {"book": np.frombuffer(json.dumps(book).encode(), np.uint8), **_flat(versions)}

    @classmethod
    def of(cls, arrays: Arrays) -> "AtWork":
        """Return what `arrays` was made of."""
        tree = _tree(arrays)
        book = json.loads(tree["book"].tobytes())
        versions = {int(n): Version.of(tree[n], set(names)) for n, names in book["untrained"].items()}
        return cls(book["clock"], [(s, client) for s, client in book["queue"]], book["started"], versions)


def _flat(tree: Tree, path: str = "") -> dict[str, Any]:
    """Return the arrays of a tree by their paths."""
    flat: dict[str, Any] = {}
    for name, branch in tree.items():
        flat |= _flat(branch, f"{path}{name}/") if isinstance(branch, Mapping) else {path + name: branch}
    return flat


def _tree(flat: Arrays) -> dict[str, Any]:
    """Return the tree whose arrays have these paths."""
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *above, name = path.split("/")
        place = tree
        for each in above:
            place = place.setdefault(each, {})
        place[name] = array
    return tree
