"""FedProx: local training that is held near the received model."""

from dataclasses import dataclass

from fedcore.errors import expect
from fedcore.strategies.algorithms.base import LocalSGD


@dataclass(frozen=True)
class FedProx(LocalSGD):
    """Clients minimise F_i(w) + mu/2 ‖w - x‖², so that they drift less apart (Li et al. 2020, equation 2).

    Every gradient becomes g + mu (w - x), for the received model x; the server's half is FedAvg's. The paper
    tunes mu in {0.001, 0.01, 0.1, 1}; at 0 this is FedAvg. Its clients may stop early, and what they send is
    used as it is: nothing to do here. Raises SpecError unless mu >= 0.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        expect(0 <= self.mu < float("inf"), self, "mu >= 0, such as 0.01")
