"""A task: what is learned. The one class that a user writes."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcore.data import Split, load_split
from fedcore.errors import DataError, TaskError, nearest
from fedcore.plugins import installed

if TYPE_CHECKING:
    from torch import Tensor, nn


def client_name(index: int) -> str:
    """Return the name of a simulated client, such as `client-000017`."""
    return f"client-{index:06d}"


@dataclass(frozen=True)
class Client:
    """The client that a task makes data for.

    index: in a simulation its number, None on a device. rng: a generator of its own, the same each time.
    options: what the device's owner wrote under [data] in agent.toml, such as `path`; empty in a
    simulation.
    """

    name: str
    index: int | None
    rng: np.random.Generator
    options: Mapping[str, Any] = field(default_factory=dict)


def accuracy(output: "Tensor", target: "Tensor") -> "Tensor":
    """Return 1 for each example whose largest output is at its target; shapes (n, classes), (n,) -> (n,)."""
    return (output.argmax(1) == target).double()


class Task:
    """What is learned: a model, its loss, and where a client's examples come from.

    Subclass it and write `model`, then `dataset` (what a simulation cuts into clients), `data` (what one
    client holds), or both. Data are `fedcore.ArrayDataset`, a pair of arrays or tensors `(x, y)`, or any
    map-style torch data set of such pairs.

    >>> class Digits(Task):
    ...     def model(self):
    ...         return fedcore.models.digits_mlp()
    ...     def dataset(self):
    ...         return fedcore.data.digits().train
    """

    metrics: Mapping[str, "Callable[[Tensor, Tensor], Tensor]"] = {"accuracy": accuracy}

    @property
    def name(self) -> str:
        """The task's name on the wire and in an agent's policy; by default the class's name."""
        return type(self).__name__

    def model(self) -> "nn.Module":
        """Return a new model. It is called under the run's seed, so every client builds the same."""
        raise TaskError(f"{self.name}.model() is missing; return a torch.nn.Module from it")

    def loss(self, output: "Tensor", target: "Tensor") -> "Tensor":
        """Return the mean loss over a batch, a scalar; cross-entropy unless overridden."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(output, target)

    def shared(self, name: str) -> bool:
        """Tell whether the parameter or buffer `name` leaves the device; all do unless overridden."""
        return True

    def dataset(self) -> Any:
        """Return all examples, which `[simulation] partition` cuts into clients, or None."""
        return None

    def holdout(self) -> Any:
        """Return the central test set for `evaluation.where = "holdout"`, or None."""
        return None

    def root(self) -> Any:
        """Return a small clean data set that the operator trusts, which FLTrust trains on, or None."""
        return None

    def data(self, client: Client) -> Split[Any]:
        """Return what one client holds; by default the `.npz` file that its option `path` names.

        Such a file has x_train, y_train and, if the client can test, x_test and y_test.
        """
        path = client.options.get("path")
        if not path:
            raise DataError(
                f"client {client.name!r} has no data for {self.name}: set `path` to an .npz file under "
                f"[data] in agent.toml, or override {self.name}.data()"
            )
        return load_split(Path(path))


def resolve(reference: str, folder: Path | None = None) -> Task:
    """Import "module:object", or what an installed plug-in offers by a name, and return the task.

    The object is an instance, or a class made without arguments. folder: searched first, where a user's
    task.py lies beside the spec. Raises TaskError that says what is missing and the nearest name. It runs
    the module's code: never call it on what came from a peer.
    """
    offered = {plugin.name: plugin.reference for plugin in installed("task")} if ":" not in reference else {}
    module_name, colon, attribute = offered.get(reference, reference).partition(":")
    if not colon or not module_name or not attribute:
        raise TaskError(
            f'run.task: {reference!r}: expected "module:object", such as "task:Digits", or an installed name'
        )
    if folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        where = f" in {folder.resolve()} or" if folder else ""
        raise TaskError(
            f"run.task: {reference!r}: no module {error.name!r}{where} among the installed"
        ) from error
    except Exception as error:
        raise TaskError(
            f"run.task: {reference!r}: importing it failed: {type(error).__name__}: {error}"
        ) from error
    target = getattr(module, attribute, None)
    if target is None:
        tasks = [name for name, value in vars(module).items() if _is_task(value) and value is not Task]
        raise TaskError(f"run.task: {module_name} has no {attribute!r}{nearest(attribute, tasks)}")
    if not _is_task(target):
        raise TaskError(f"run.task: {reference!r} is a {type(target).__name__}, expected a fedcore.Task")
    try:
        task: Task = target() if isinstance(target, type) else target
    except Exception as error:
        made = f"{attribute}() failed: {type(error).__name__}: {error}"
        raise TaskError(
            f"run.task: {reference!r}: {made}; expected a class made without arguments"
        ) from error
    return task


def _is_task(value: Any) -> bool:
    return isinstance(value, Task) or (inspect.isclass(value) and issubclass(value, Task))


def digest(task: Task) -> str:
    """Return the SHA-256 over the sorted (path, SHA-256) of the task's files, in hex.

    The files are those of the innermost package that holds the task's module, or the module's own file.
    What they import from elsewhere is not covered.
    """
    module = sys.modules[type(task).__module__]
    file = getattr(module, "__file__", None)
    if file is None:
        raise TaskError(f"{task.name} is defined in no file, so it has no digest; move it into a module")
    home = Path(file).parent
    return files_digest(home, home.rglob("*.py") if module.__package__ else [Path(file)])


def files_digest(home: Path, files: Iterable[Path]) -> str:
    """Return the SHA-256 over the sorted (path from `home`, SHA-256) of some files, in hex."""
    rows = [
        f"{path.relative_to(home).as_posix()} {sha256(path.read_bytes()).hexdigest()}\n"
        for path in sorted(files)
    ]
    return sha256("".join(rows).encode()).hexdigest()
