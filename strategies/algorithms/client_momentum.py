"""Momentum on the client, the server's half."""

from dataclasses import dataclass
from typing import ClassVar

from fedcore.errors import expect
from fedcore.strategies.algorithms.base import LocalSGD


@dataclass(frozen=True)
class ClientMomentum(LocalSGD):
    """Clients send m_i <- beta m_i + (1 - beta) delta_i, kept from round to round (Karimireddy et al. 2021).

    With client.steps = 1 delta_i is -lr times a gradient, and this is their Algorithm 2: averaging over time
    shrinks the noise in which a Byzantine client can hide, so that a robust rule comes closer to the mean of
    the honest. A client that was not asked keeps its old m_i.
    """

    beta: float = 0.9

    keeps: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        expect(0 <= self.beta < 1, self, "0 <= beta < 1")
