"""FedRep: a head of its own for every client, trained before the body."""

from dataclasses import dataclass

from fedcore.errors import expect
from fedcore.strategies.algorithms.personal import SplitModel


@dataclass(frozen=True)
class FedRep(SplitModel):
    """First the head is trained on the received body, then the body under that head (Collins et al. 2021).

    `head_epochs` on the head while the body rests, then `client.epochs` on the body while the head rests. The
    head never leaves the device. The paper takes 10 epochs for the head and 1 for the body. The loss of a
    round is that of the body's epochs. personal: as in `FedPer`. A client that never trained is tested with
    the shared body and the head that `model()` made. Raises SpecError unless head_epochs >= 1.
    """

    personal: tuple[str, ...] = ()
    head_epochs: int = 10

    def __post_init__(self) -> None:
        expect(self.head_epochs >= 1, self, "head_epochs >= 1; at 0 take FedAvg")
