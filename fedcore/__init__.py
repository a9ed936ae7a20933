"""Federated learning whose privacy is enforced: one task simulated, then deployed, with the same bits.

>>> import fedcore
>>> result = fedcore.simulate(task, fedcore.RunSpec.load("run.toml"))
>>> result.plot()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcore.data import ArrayDataset as ArrayDataset
    from fedcore.data import Split as Split
    from fedcore.errors import FedcoreError as FedcoreError
    from fedcore.simulations.result import Result as Result
    from fedcore.simulations.run import simulate as simulate
    from fedcore.spec import RunSpec as RunSpec
    from fedcore.strategies.strategy import Strategy as Strategy
    from fedcore.task import Client as Client
    from fedcore.task import Task as Task

_HOMES = {
    "ArrayDataset": "fedcore.data",
    "Client": "fedcore.task",
    "FedcoreError": "fedcore.errors",
    "Result": "fedcore.simulations.result",
    "RunSpec": "fedcore.spec",
    "Split": "fedcore.data",
    "Strategy": "fedcore.strategies.strategy",
    "Task": "fedcore.task",
    "simulate": "fedcore.simulations.run",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import fedcore` loads neither torch nor gRPC."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in ("data", "models", "tasks"):
        return import_module(f"fedcore.{name}")
    raise AttributeError(f"module 'fedcore' has no attribute {name!r}")
