"""DP-SGD of a chunk of clients: the steps of `fedcore.client.dpsgd`, all clients side by side.

    every step   batch (k, b)       each client's own Poisson sample, padded to the largest
                 g (k, c, d)        one gradient an example, c columns of the batch at a time
                 (sum of g_i min(1, C / ‖g_i‖) + N(0, (z C)²)) / B

Batches and noise come from the generators that the client has when it trains by itself, so both engines take
the same steps but for the order of sums. Every client takes all steps, on noise alone where it has nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad_and_value, vmap

from fedcore.client.dpsgd import DPSGD
from fedcore.messages import Ref

if TYPE_CHECKING:
    from fedcore.simulations.vectorized import Past, Stack

ROOM = 64 << 20  # bytes of gradients of single examples; more would leave the processor's caches in vain
Example = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]  # weights, x, y -> the loss of one example


class PrivateSteps:
    """The gradients that a chunk's private steps follow, and what they saw."""

    def __init__(self, private: DPSGD, example: Example, ref: Ref, clients: Sequence[str]) -> None:
        """Draw nothing yet. example: the loss of one example, which `torch.func` can batch twice."""
        self.private, self.draws = private, [private.draws(ref, client) for client in clients]
        inner = vmap(grad_and_value(example), in_dims=(None, 0, 0), randomness="different")
        self.gradients = vmap(inner, randomness="different")

    def __call__(
        self, weights: Sequence[Tensor], order: Sequence[int], stack: "Stack", past: "Past"
    ) -> Iterator[list[Tensor]]:
        """Yield each step's gradients, (k, *shape) a parameter, at what the weights are by then.

        order: the places in `weights` of the module's parameters, in whose order noise is drawn.
        """
        for _ in range(self.private.steps):
            past.steps += 1
            batches = [draws.batch(count) for draws, count in zip(self.draws, stack.counts, strict=True)]
            sums = self._clipped(weights, batches, stack, past)
            for row, draws in enumerate(self.draws):
                for place in order:
                    sums[place][row] += self.private.noise(draws, sums[place][row])
            yield [rows.div_(self.private.expected) for rows in sums]

    def _clipped(
        self,
        weights: Sequence[Tensor],
        batches: Sequence[NDArray[np.int64]],
        stack: "Stack",
        past: "Past",
    ) -> list[Tensor]:
        """Return the sums of the clipped gradients; clients with the largest batches come first inside."""
        sizes = np.array([len(batch) for batch in batches])
        rows = np.argsort(-sizes, kind="stable")
        table = np.zeros((len(rows), sizes.max(initial=0)), np.int64)
        for line, row in zip(table, rows, strict=True):
            line[: sizes[row]] = batches[row]
        place, index = torch.from_numpy(rows).to(stack.x.device), torch.from_numpy(table).to(stack.x.device)
        mine, sums = [w[place] for w in weights], [torch.zeros_like(w) for w in weights]
        size = sum(w[0].numel() * w.element_size() for w in weights)
        width = self._width(len(rows), size)
        for start in range(0, table.shape[1], width):
            active = int((sizes > start).sum())
            here, at = index[:active, start : start + width], place[:active, None]
            mask = torch.from_numpy(np.arange(start, start + here.shape[1]) < sizes[rows[:active], None])
            parts, losses = self.gradients([w[:active] for w in mine], stack.x[at, here], stack.y[at, here])
            factor, mask = self._factor(parts, mask.to(stack.x.device))
            for total, part in zip(sums, parts, strict=True):
                total[:active] += torch.einsum("kc,kc...->k...", factor, part)
            past.losses.index_add_(0, place[:active], losses.double().where(mask, 0).sum(1))
            past.seen[rows[:active]] += mask.sum(1).cpu().numpy()
        return [torch.empty_like(total).index_copy_(0, place, total) for total in sums]

    def _width(self, clients: int, size: int) -> int:
        """Return how many examples of each client are taken at once."""
        return max(1, min(ROOM // (clients * size), self.private.privacy.at_once or ROOM))

    def _factor(self, parts: Sequence[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return min(1, C / ‖g‖) of each example, (k, c), 0 for padding; and which examples count.

        One without a finite gradient must not show in what is sent, so its gradient becomes 0 in place.
        """
        norms = torch.stack([part.flatten(2).norm(2, -1) for part in parts], -1).norm(2, -1)
        finite = norms.isfinite()
        if not bool(finite.all()):
            for part in parts:
                part[~finite] = 0
        # 1e-6 as in Opacus, whose numbers these are.
        factor = (self.private.privacy.clip_norm / (norms + 1e-6)).clamp(max=1.0)
        return factor.where(mask & finite, 0), mask & finite
