"""A strategy is a composition: who takes part, what a client does, how updates combine, the model moves."""

from dataclasses import dataclass

from fedcore.errors import SpecError
from fedcore.privacy.levels import OFF, Privacy
from fedcore.strategies.aggregators import Aggregator, Mean
from fedcore.strategies.algorithms import ClientAlgorithm, LocalSGD
from fedcore.strategies.conflicts import conflicts
from fedcore.strategies.modes import Mode, Synchronous
from fedcore.strategies.optimizers import SGD, ServerOptimizer
from fedcore.strategies.preaggregators import PreAggregator
from fedcore.strategies.samplers import Sampler, Uniform


@dataclass(frozen=True)
class Strategy:
    """The parts of a strategy; every part is a frozen dataclass whose fields are its configuration.

    Raises SpecError where parts cannot work together, with the conflict and a remedy.
    """

    algorithm: ClientAlgorithm = LocalSGD()
    pre: tuple[PreAggregator, ...] = ()
    aggregator: Aggregator = Mean()
    optimizer: ServerOptimizer = SGD()
    sampler: Sampler = Uniform()
    mode: Mode = Synchronous()
    privacy: Privacy = OFF

    def __post_init__(self) -> None:
        for conflict in conflicts(self):
            raise SpecError(conflict)

    @property
    def sums(self) -> bool:
        """Whether sums are enough, so that nobody has to see a single client's update."""
        return self.aggregator.needs == "sum" and not self.pre

    @property
    def sees(self) -> bool:
        """Whether the server looks at what single clients report of themselves."""
        return not self.sums or self.sampler.sees == "scalars"
