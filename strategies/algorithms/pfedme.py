"""pFedMe: the global model is where the personal ones are a proximal step away."""

from dataclasses import dataclass

from fedcore.errors import expect
from fedcore.strategies.algorithms.base import LocalSGD
from fedcore.strategies.algorithms.personal import require_positive


@dataclass(frozen=True)
class PFedMe(LocalSGD):
    """Clients minimise the Moreau envelope min_theta F_i(theta) + lam/2 ‖theta - w‖² (Dinh et al. 2020).

    Algorithm 1. On each batch theta takes `steps` gradient steps of that inner problem by client.optimizer,
    whose lr is the paper's personal rate, and then w -= eta lam (w - theta). Both begin a round at x. What
    is sent is w - x; theta stays on the device, and the client is tested with it. A client that never trained
    is tested with the global model. The paper's x = (1 - beta) x + beta mean w is the server's
    optimizer = {name = "sgd", lr = beta}.

    The defaults are the paper's; w moves slowly with them, and eta lam of 0.5 is better where rounds are few.
    Raises SpecError unless lam, steps and eta are above 0 and eta lam is at most 1.
    """

    lam: float = 15.0
    steps: int = 5
    eta: float = 0.005

    def __post_init__(self) -> None:
        require_positive(self, lam=self.lam, steps=self.steps, eta=self.eta)
        expect(self.eta * self.lam <= 1, self, "eta * lam <= 1, or w would pass theta")
