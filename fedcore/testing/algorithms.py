"""What a client algorithm owes: halves that agree, a step in any blocks, clients apart from each other."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedcore.layout import Entry, Layout, Vector
from fedcore.seeds import generator
from fedcore.spec import RunSpec
from fedcore.strategies.algorithms import ClientAlgorithm
from fedcore.testing.laws import Array, check_configuration, demand, same_bits

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 24
CLIENTS = 5
EVERYBODY = slice(0, CLIENTS)
LAYOUT = Layout((Entry("weight", (4, 5), "float32", "shared"), Entry("bias", (4,), "float32", "shared")))


def check_algorithm(part: ClientAlgorithm, spec: RunSpec | None = None) -> None:
    """Check a client algorithm; raises AssertionError with the law that it breaks and the numbers.

    spec: a run for which it is made, by default plain SGD. The half that trains is checked as far as it
    stands apart from training: what it adds to gradients, what it sends and what it keeps. Needs PyTorch.
    """
    spec = spec or RunSpec()
    check_configuration(part)
    part.check(spec)
    _an_update_is_well_named(part, spec)
    _blocks_agree_with_the_whole(part, spec)
    _an_empty_round_is_finite(part, spec)
    _halves_agree_on_names(part, spec)
    _clients_are_apart(part, spec)


class Closed:
    """A closed round in which the aggregator made a random vector of every one, or zeros of an empty one."""

    round = 1

    def __init__(self, part: ClientAlgorithm, spec: RunSpec, clients: int = CLIENTS) -> None:
        self.clients, self.population = clients, 2 * CLIENTS
        rng = generator("testing", "aggregate")
        some = float(clients > 0)
        self.vectors = {name: some * rng.normal(size=SIZE) for name in part.vectors(LAYOUT, spec)}
        self.scalars = {name: some * rng.uniform(1, 2) * clients for name in part.scalars(spec)}

    def scalar(self, name: str) -> float:
        """Return the sum of a scalar over the clients."""
        return self.scalars[name]

    def vector(self, name: str, block: slice) -> NDArray[np.float64]:
        """Return a block of what the aggregator made of a vector."""
        return self.vectors[name][block]


def _an_update_is_well_named(part: ClientAlgorithm, spec: RunSpec) -> None:
    vectors, scalars = part.vectors(LAYOUT, spec), part.scalars(spec)
    demand("delta" in vectors, part, "expected the vector `delta` in an update", vectors=list(vectors))
    demand("weight" in scalars, part, "expected the scalar `weight` in an update", scalars=list(scalars))
    for name, vector in vectors.items():
        known = vector.factor is None or vector.factor in scalars
        law = f"{name} is weighed by {vector.factor!r}, expected one of the update's scalars"
        demand(known, part, law, scalars=list(scalars))
        sane = vector.length > 0 and 0 < vector.bound < np.inf
        demand(sane, part, f"expected a length and a finite bound above 0 for {name}", vector=vector)
    for name in part.trusts:
        demand(name in scalars, part, f"trusts {name!r}, which is none of its scalars", scalars=list(scalars))


def _server(part: ClientAlgorithm) -> dict[str, Vector]:
    rng = generator("testing", "server")
    return {name: rng.normal(size=SIZE).astype("float32") for name in (*part.receives, *part.remembers)}


def _blocks_agree_with_the_whole(part: ClientAlgorithm, spec: RunSpec) -> None:
    closed = Closed(part, spec)
    whole, blocked = _server(part), _server(part)
    expected = part.direction(closed, slice(0, SIZE), whole)
    pieces = [
        part.direction(closed, block, {name: vector[block] for name, vector in blocked.items()})
        for block in (slice(0, 7), slice(7, 8), slice(8, SIZE))
    ]
    came = np.concatenate(pieces)
    law = "expected the same direction in three blocks as at once; it must be elementwise"
    demand(same_bits(expected, came), part, law, expected=expected, came=came)
    for name, vector in whole.items():
        law = f"expected the same {name} in three blocks as at once, moved in place"
        demand(same_bits(vector, blocked[name]), part, law, expected=vector, came=blocked[name])


def _an_empty_round_is_finite(part: ClientAlgorithm, spec: RunSpec) -> None:
    """Nothing is divided by the zero weight of a round in which no client had an example."""
    server = _server(part)
    direction = part.direction(Closed(part, spec, clients=0), slice(0, SIZE), server)
    for name, vector in {"direction": direction, **server}.items():
        law = f"expected a finite {name} from a round in which nobody had an example"
        demand(bool(np.isfinite(vector).all()), part, law, **{name: vector})


def _rows(name: str) -> "Tensor":
    import torch

    drawn = generator("testing", name).normal(size=(CLIENTS, SIZE))
    return torch.tensor(drawn, dtype=torch.float32)


def _trained(part: ClientAlgorithm, spec: RunSpec, clients: slice = EVERYBODY) -> dict[str, Array]:
    """Return what the half that trains makes for some of five clients; the last had no examples.

    By name: what is added to gradients, what is sent and what is kept, one client a row.
    """
    from fedcore.client.algorithms import End, Start, half_of

    half = half_of(part, spec)
    extra = {name: _rows(name)[0] for name in part.receives}
    kept = {name: _rows(f"kept {name}")[clients] for name in part.keeps}
    loss = np.array([0.5, 2.0, 1.0, 0.1, 0.0])[clients] if half.measures else None
    steps, delta = np.array([4.0, 1.0, 9.0, 2.0, 0.0]), _rows("delta")
    delta[-1] = 0.0
    start = Start(_rows("received")[0], extra, kept, loss)
    correction = half.correction(start)
    added = {"correction": correction(_rows("weights")[clients])} if correction else {}
    sent = half.finish(start, End(delta[clients], steps[clients], 8 * steps[clients]))
    return {
        **{f"the {name}": np.asarray(value) for name, value in added.items()},
        **{f"the vector {name}": np.asarray(value) for name, value in sent.vectors.items()},
        **{f"the scalar {name}": np.asarray(value) for name, value in sent.scalars.items()},
        **{f"the kept {name}": np.asarray(value) for name, value in sent.kept.items()},
    }


def _halves_agree_on_names(part: ClientAlgorithm, spec: RunSpec) -> None:
    asked = {f"the vector {name}" for name in part.vectors(LAYOUT, spec)}
    asked |= {f"the scalar {name}" for name in part.scalars(spec) if name != "weight"}
    asked |= {f"the kept {name}" for name in part.keeps}
    made = _trained(part, spec)
    came = made.keys() - {"the correction"}
    law = "its half that trains makes other things than the server's half names"
    demand(came == asked, part, law, expected=sorted(asked), came=sorted(came))
    for name, rows in made.items():
        law = f"expected {name} finite, a row a client, also for a client without examples"
        demand(len(rows) == CLIENTS and bool(np.isfinite(rows).all()), part, law, rows=rows)


def _clients_are_apart(part: ClientAlgorithm, spec: RunSpec) -> None:
    """What a client does depends on nobody who is trained in the same chunk."""
    together = _trained(part, spec)
    for i in range(CLIENTS):
        alone = _trained(part, spec, slice(i, i + 1))
        for name, rows in together.items():
            close = np.allclose(rows[i], alone[name][0], rtol=1e-5, atol=1e-7)
            law = f"expected {name} of a client the same alone as among others"
            demand(close, part, law, alone=alone[name][0], among_others=rows[i])
