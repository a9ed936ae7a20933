"""Mimic: send what an honest client sends, always the same one, so that its data counts too much."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import expect
from fedcore.layout import Vector
from fedcore.simulations.attacks.attack import Context, Deltas, centred, copies, mean


@dataclass(frozen=True)
class Mimic:
    """All attackers copy the honest client that lies farthest out in the direction in which they differ most.

    No rule can tell the copies from their model; but where data is skewed, a rule that trusts the majority
    then neglects the other clients. In the first `warmup` rounds of the attack the direction z of greatest
    variance is learned, by one step of power iteration a round, and the client with the largest z.x is
    copied. From then on it is the last of these clients whenever it takes part, and otherwise the one with
    the largest z.x of those who do.

    State: `z` and the running mean `mu`, shape (d,); `rounds` and `target`, shape (1,). The default of one
    round is what the published experiments use.

    Source: Karimireddy et al. 2022 (arXiv:2006.09365), in the online form of the authors' code.
    """

    warmup: int = 1

    def __post_init__(self) -> None:
        expect(self.warmup >= 1, self, "warmup >= 1, in rounds")

    def forge(self, honest: Deltas, own: Deltas, context: Context) -> Deltas:
        """See `Forges.forge`."""
        state, clients = context.state, list(context.clients)
        if not state:
            state["rounds"], state["mu"] = np.zeros(1), np.zeros(own.shape[1])
            state["z"] = context.rng.standard_normal(own.shape[1:])
        learning = bool(state["rounds"][0] < self.warmup)
        if learning:
            learn(honest, context)
        elif (target := int(state["target"][0])) in clients:
            return copies(honest[clients.index(target)], own)
        farthest = int(np.argmax(along(state["z"], honest, np.zeros(own.shape[1]))))
        if learning:
            state["target"] = np.array([float(clients[farthest])])
        return copies(honest[farthest], own)


def learn(honest: Deltas, context: Context) -> None:
    """Move the state's running mean and direction by one round, with t rounds seen before it.

    mu <- (t mu + mean) / (t + 1); z <- t z + step / ‖step‖, normalised; step = sum_i (x_i - mu).z (x_i - mu).
    """
    state = context.state
    t, z = float(state["rounds"][0]), state["z"]
    mu = (t * state["mu"] + mean(honest)) / (t + 1)
    weights, step = along(z, honest, mu), np.empty_like(mu)
    for block, part in centred(honest, mu):
        step[block] = weights @ part
    z = t * z + step / (np.linalg.norm(step) or 1.0)
    state["z"], state["mu"] = z / (np.linalg.norm(z) or 1.0), mu
    state["rounds"] = np.array([t + 1])


def along(z: Vector, rows: Deltas, centre: Vector) -> NDArray[np.float64]:
    """Return z.(x - centre) for each row x, shape (h,)."""
    products = np.zeros(len(rows))
    for block, part in centred(rows, centre):
        products += part @ z[block]
    return products
