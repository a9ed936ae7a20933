"""What a trainer is, and which one a task gets. PyTorch is imported only for a task that trains with it."""

from collections.abc import Mapping
from typing import Protocol

from fedcore.client.examples import Examples
from fedcore.errors import SpecError
from fedcore.layout import Layout, Parameters, Vector
from fedcore.messages import Ref, Update
from fedcore.privacy.levels import ExampleLevel
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy
from fedcore.task import Task

Kept = Mapping[str, Vector]  # what a client keeps to itself from one folded round to the next


class Trainer(Protocol):
    """What trains: PyTorch by default, or whatever a task's `trainer(spec)` returns."""

    @property
    def layout(self) -> Layout:
        """How its model lies in flat vectors."""
        ...

    def parameters(self) -> Parameters:
        """Return initial parameters."""
        ...

    def receive(self, parameters: Parameters) -> None:
        """Take the model of a round, from which any number of clients then start."""
        ...

    def train(self, ref: Ref, client: str, examples: Examples, kept: Kept) -> tuple[Update, Kept]:
        """Train one client from the received model and what it kept; return what it sends, and keeps."""
        ...

    def evaluate(self, examples: Examples, kept: Kept) -> Update:
        """Test the received model on a client's examples, with what it kept."""
        ...


def uses_torch(task: Task) -> bool:
    """Tell whether a task trains in PyTorch, with tensors for examples, or brings a trainer of its own."""
    return getattr(task, "trainer", None) is None


def trainer_for(
    task: Task, spec: RunSpec, strategy: Strategy | None = None, entropy: int | None = None
) -> Trainer:
    """Return the task's own trainer where it has one, and a TorchTrainer otherwise.

    strategy: None builds the spec's, from parts that are ours or installed. entropy: of the batches and the
    noise of DP-SGD, from the operating system in a deployment; None is the run's seed, in simulations. Raises
    SpecError where the spec asks for DP-SGD and the task cannot have it.
    """
    if own := getattr(task, "trainer", None):
        if isinstance(spec.privacy, ExampleLevel):
            raise SpecError(
                f'privacy.level = "example": {task.name} brings a trainer of its own, whose steps cannot be '
                "accounted for; remove `trainer` from it and write `model`, or use another level"
            )
        trainer: Trainer = own(spec)
        return trainer
    from fedcore.client.trainer import TorchTrainer

    return TorchTrainer(task, spec, strategy, entropy)
