"""The vectorised engine: a chunk of clients is one model with a leading axis, and a step trains them all.

    flat      (k, d)       one row of parameters a client, the largest clients first
    x, y      (k, n, ...)  examples, padded to the largest client of the chunk
    mask      (a, b)       1 where a batch holds an example, 0 where it is padding

The loss of a task is a mean over a batch; here it is taken example by example and averaged under the mask,
so a ragged last batch counts exactly its own examples. Whoever has no example left for a step is among the
last rows, and only the first `a` take it. Clients do not touch each other: the gradient of the sum of their
losses has each client's gradient in its own row.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from fedcore.client.algorithms import Column, End
from fedcore.client.examples import Examples
from fedcore.client.losses import precision, single_losses
from fedcore.client.module import Resident
from fedcore.client.trainer import TorchTrainer, initial_seed, seed_device
from fedcore.layout import Parameters
from fedcore.messages import Plan, Ref
from fedcore.metrics import EXAMPLE_BOUND
from fedcore.seeds import generator, integer
from fedcore.simulations.answers import Answers, ClientStates
from fedcore.simulations.batchable import Batchable, unbatchable
from fedcore.simulations.borrowed import threads
from fedcore.simulations.memory import Cache, Room
from fedcore.simulations.population import Population
from fedcore.simulations.sequential import Sequential
from fedcore.simulations.steppers import stepper_for
from fedcore.strategies.terms import Rows

if TYPE_CHECKING:
    from fedcore.client.dpsgd import DPSGD

log = logging.getLogger("fedcore.simulations")


def obstacle(trainer: TorchTrainer) -> str:
    """Return what keeps a task from being vectorised, "" where nothing is known to."""
    if trainer.half.alone:
        return f"{type(trainer.strategy.algorithm).__name__} {trainer.half.alone}"
    if problem := unbatchable(trainer.model, trainer.half):
        return problem
    cast = any(flat.cast for flat in trainer.model.flat.values())
    return "parameters have several dtypes" if cast else ""


@dataclass(frozen=True)
class Stack:
    """The examples of a chunk: x (k, n, ...), y (k, n, ...), counts (k,)."""

    x: Tensor
    y: Tensor
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, parts: Sequence[Examples]) -> "Stack":
        """Pad the examples of several clients with zeros to the same number."""
        x, y = zip(*(part.batch(slice(0, len(part))) for part in parts), strict=True)
        return cls(pad_sequence(list(x), True), pad_sequence(list(y), True), np.array([len(r) for r in x]))

    def taken(self, order: Sequence[int]) -> "Stack":
        """Return the clients in another order."""
        return Stack(self.x[order], self.y[order], self.counts[order])

    @property
    def nbytes(self) -> int:
        """The bytes of the examples."""
        return self.x.nbytes + self.y.nbytes

    @cached_property
    def mask(self) -> Tensor:
        """Which places hold an example, shape (k, n)."""
        counts = torch.from_numpy(self.counts).to(self.x.device)
        return torch.arange(self.x.shape[1], device=self.x.device) < counts[:, None]

    def batch(self, here: slice, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, y and mask of a batch, (a, b, ...), of the first a clients, which have examples in it.

        order: of each client's examples, (k, n); None is the stored one. Clients come largest first.
        """
        active = int((self.counts > here.start).sum())
        mask = self.mask[:active, here]
        if order is None:
            return self.x[:active, here], self.y[:active, here], mask
        place = (torch.arange(active, device=order.device)[:, None], order[:active, here])
        return self.x[place], self.y[place], mask


@dataclass
class Past:
    """What the steps of a chunk have seen, (k,) each: summed losses, examples, steps."""

    losses: Tensor
    seen: Column
    steps: Column

    @classmethod
    def of(cls, clients: int, device: torch.device) -> "Past":
        """Return that of clients which have taken no step."""
        return cls(torch.zeros(clients, dtype=torch.float64, device=device), *np.zeros((2, clients)))


class Vectorized:
    """Trains `chunk` clients at a time, to the sequential engine's result but for the order of sums.

    Dropout draws other masks than the sequential engine, from the same distribution.
    """

    name = "vectorized"

    def __init__(
        self,
        population: Population,
        trainer: TorchTrainer,
        states: ClientStates,
        chunk: int,
        workers: int = 1,
    ) -> None:
        """Share the sequential engine's trainer: its model, its seeds, its device.

        workers: the threads that torch divides the chunk's work among.
        """
        self.population, self.trainer, self.chunk, self.workers = population, trainer, chunk, workers
        self.states, self.sequential = states, Sequential(population, trainer, states)
        # Opacus's hooks on the trainer's module, of DP-SGD, know nothing of rows.
        seed, personal = initial_seed(trainer.seed), trainer.half.personal
        twin = Resident(trainer.task, seed, trainer.device, personal) if trainer.private else None
        self.spec, self.model = trainer.spec, Batchable(twin or trainer.model)
        self.single = single_losses(trainer.task)
        keep_memory()
        kinds = {entry.name: entry.kind for entry in trainer.layout.entries}
        trained = [(n, p) for n, p in trainer.model.module.named_parameters() if p.requires_grad]
        order = {name: place for place, (name, _) in enumerate(trained)}
        trained.sort(key=lambda item: kinds[item[0]] != "shared")  # stable: as in the layout
        self.names = [name for name, _ in trained]
        self.drawn = np.argsort([order[name] for name in self.names]).tolist()  # in the order of the module
        self.shapes = [p.shape for _, p in trained]
        self.local = [trainer.model.fresh[name].reshape(-1) for name, _ in trained if kinds[name] != "shared"]
        run = population.spec
        drawn = run.cohort.size < run.simulation.clients  # anew in every round, so that no chunk comes again
        room = Room(0) if drawn else population.room
        self.stacks = Cache(self._stack, lambda stack: stack.nbytes, room)

    def answer(self, plan: Plan, parameters: Parameters) -> Iterator[Answers]:
        """Yield the answers of a chunk at a time, the largest clients first.

        An evaluation has no steps to share and is done client by client.
        """
        if plan.ref.kind == "evaluate":
            yield from self.sequential.answer(plan, parameters)
            return
        self.trainer.receive(parameters)
        order = sorted(plan.cohort, key=lambda client: -self.population.size(client))
        while order:
            clients = tuple(order[: self.chunk])
            try:
                answers = self.train(plan.ref, clients, self.stack(clients))
            except (MemoryError, RuntimeError) as error:
                if self.chunk == 1 or not out_of_memory(error):
                    raise
                self.shrink()
            else:
                del order[: self.chunk]
                yield answers

    def shrink(self) -> None:
        """Go on with half the chunk, which has run out of memory."""
        log.warning("out of memory with chunk %d; going on with %d", self.chunk, self.chunk // 2)
        self.chunk //= 2
        self.stacks.clear()
        if self.trainer.device != "cpu":
            torch.cuda.empty_cache()

    def train(self, ref: Ref, clients: Sequence[str], stack: Stack) -> Answers:
        """Train a chunk from the received parameters and what its clients have kept; largest first."""
        if (np.diff(stack.counts) > 0).any():
            order = np.argsort(-stack.counts, kind="stable").tolist()
            clients, stack = [clients[i] for i in order], stack.taken(order)
        cast = precision(self.spec, self.trainer.device)
        # The fused attention kernels have no batching rule.
        with threads(self.workers), sdpa_kernel(SDPBackend.MATH), cast:
            return self._train(ref, clients, stack)

    def _train(self, ref: Ref, clients: Sequence[str], stack: Stack) -> Answers:
        trainer = self.trainer
        trainer.pace(ref.round)
        # A task that the sequential engine refuses is refused.
        if trainer.private and not trainer.private.seen_whole:
            trainer.load({})
            trainer.private.begin(ref, clients[0])
            trainer.private.look(stack.x[0, :1], stack.y[0, :1])
        states = [self.states[client] for client in clients]
        flat = torch.cat([trainer.shared, *self.local]).repeat(len(clients), 1)
        shared, local = flat[:, : trainer.layout.shared_size], flat[:, trainer.layout.shared_size :]
        for place, state in enumerate(states):
            if "model.local" in state:
                local[place].copy_(torch.from_numpy(state["model.local"][: local.shape[1]]))
        views = self.views(flat)
        remembered = self.model.statistics(trainer.buffers, states)
        first = self.mean_losses(views, remembered, stack) if trainer.half.measures else None
        start = trainer.start(states, first)
        correction = trainer.half.correction(start)
        self.model.module.train()
        seed_device(trainer.device, integer(trainer.seed, "dropout", ref.round, *clients))
        step = stepper_for(trainer.spec.optimizer, views)
        past = Past.of(len(clients), flat.device)
        if trainer.private:
            gradients = self.private_gradients(trainer.private, ref, clients, stack, views, past)
        else:
            gradients = self.gradients(ref, clients, stack, views, remembered, past)
        for parts in gradients:
            step(self.corrected(parts, correction(shared)[: len(parts[0])]) if correction else parts)
        told = self.scalars(past, stack.counts)
        weight = np.ones(len(clients)) if trainer.private else told["weight"]
        end = End(shared.sub_(trainer.shared), past.steps, weight)  # in place: memory is dear
        vectors, scalars, kept = trainer.finish(start, end)
        if trainer.half.splits:
            own = torch.cat([local.double(), *self.model.own(remembered)], 1).cpu().numpy()
            kept = [{**k, "model.local": row.copy()} for k, row in zip(kept, own, strict=True)]
        if trainer.layout.buffer_size:
            vectors = {**vectors, "buffers": self.model.sent(remembered).cpu().numpy()}
        return Answers(clients, Rows(vectors, {**told, **scalars}), kept)

    def gradients(
        self,
        ref: Ref,
        clients: Sequence[str],
        stack: Stack,
        views: list[Tensor],
        remembered: dict[str, Tensor],
        past: Past,
    ) -> Iterator[Sequence[Tensor]]:
        """Yield each step's gradients, (a, *shape) a parameter, at what the weights are by then."""
        for x, y, mask in self.batches(ref, clients, stack):
            active = len(mask)
            weights = [view[:active].detach().requires_grad_() for view in views]
            self.model.fewest = int(mask[-1].sum()) if self.model.masks else 2
            each = self.losses(weights, remembered, x, y, mask)
            yield torch.autograd.grad(each, weights, mask / mask.sum(1, keepdim=True))  # of each one's mean
            past.steps[:active] += 1
            past.losses[:active] += (each.detach() * mask).sum(1)
        past.seen += [self.spec.passes(n) * n for n in stack.counts.tolist()]

    def private_gradients(
        self,
        private: "DPSGD",
        ref: Ref,
        clients: Sequence[str],
        stack: Stack,
        views: list[Tensor],
        past: Past,
    ) -> Iterator[Sequence[Tensor]]:
        """Yield each step's gradients under DP-SGD, (k, *shape), which all clients take."""
        from fedcore.simulations.private import PrivateSteps  # which imports Opacus, 2 s

        yield from PrivateSteps(private, self.example, ref, clients)(views, self.drawn, stack, past)

    def example(self, weights: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of one example under one client's weights."""
        output = self.model(dict(zip(self.names, weights, strict=True)), x[None], x.new_ones(1))
        return self.single(output, y[None])[0]

    def corrected(self, gradients: Sequence[Tensor], correction: Tensor) -> list[Tensor]:
        """Return the gradients, those of shared parameters with their part of a correction (k, d)."""
        parts = self.views(correction)
        both = [gradient + part for gradient, part in zip(gradients, parts, strict=False)]
        return both + list(gradients[len(parts) :])

    @torch.no_grad()
    def mean_losses(self, weights: list[Tensor], remembered: dict[str, Tensor], stack: Stack) -> Column:
        """Return the mean loss of each client's model on its examples, (k,); 0 where it has none."""
        self.model.module.eval()
        total = torch.zeros(len(stack.counts), dtype=torch.float64, device=stack.x.device)
        for start in range(0, stack.x.shape[1], self.spec.batch_size):
            x, y, mask = self.numbers(stack.batch(slice(start, start + self.spec.batch_size)))
            active = len(mask)
            each = self.losses([w[:active] for w in weights], remembered, x, y, mask)
            total[:active] += (each * mask).sum(1)
        mean: Column = total.cpu().numpy() / stack.counts.clip(min=1)
        return np.where(np.isnan(mean), EXAMPLE_BOUND, mean.clip(-EXAMPLE_BOUND, EXAMPLE_BOUND))

    def scalars(self, past: Past, counts: NDArray[np.int64]) -> dict[str, Column]:
        """Return weight, loss sum and count of each client, as the trainer states them."""
        weight = np.minimum(counts.astype(np.float64), self.trainer.max_weight)
        share = weight / counts.clip(min=1)
        seen = past.seen * share
        bound, sums = EXAMPLE_BOUND * seen, past.losses.cpu().numpy() * share
        loss = np.where(np.isnan(sums), bound, sums.clip(-bound, bound))
        return {"weight": weight, "loss": loss, "count": seen}

    def views(self, rows: Tensor) -> list[Tensor]:
        """Return each parameter's place in the rows, (k, *shape); rows may end after the shared ones."""
        views, start = [], 0
        for shape in self.shapes:
            if start < rows.shape[1]:
                views.append(rows[:, start : start + shape.numel()].view(len(rows), *shape))
            start += shape.numel()
        return views

    def losses(
        self, weights: list[Tensor], remembered: dict[str, Tensor], x: Tensor, y: Tensor, mask: Tensor
    ) -> Tensor:
        """Return each example's loss under its client's weights (a, *shape); (a, b), padding included."""
        rows = {name: tensor[: len(mask)] for name, tensor in remembered.items()}
        rows |= zip(self.names, weights, strict=True)
        outputs = vmap(self.model, randomness="different")(rows, x, mask)
        return self.single(outputs.flatten(0, 1), y.flatten(0, 1)).view(mask.shape)

    def batches(
        self, ref: Ref, clients: Sequence[str], stack: Stack
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batches that each client would see by itself, side by side."""
        size, longest = self.spec.batch_size, stack.x.shape[1]
        rngs = (
            [generator(self.trainer.seed, "batches", ref.round, c) for c in clients]
            if self.spec.shuffle
            else []
        )
        for _ in range(self.spec.epochs):
            order = orders(rngs, stack.counts.tolist(), longest).to(stack.x.device) if rngs else None
            for start in range(0, longest, size)[: self.spec.steps or None]:
                yield self.numbers(stack.batch(slice(start, start + size), order))

    def numbers(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch with a mask of the model's dtype."""
        x, y, mask = batch
        return x, y, mask.to(self.trainer.shared.dtype)

    def stack(self, clients: tuple[str, ...]) -> Stack:
        """Return a chunk's examples."""
        return self._stack(clients) if self.population.poison else self.stacks(clients)

    def _stack(self, clients: tuple[str, ...]) -> Stack:
        return Stack.of([self.population.training(client) for client in clients])


def orders(rngs: list[np.random.Generator], counts: list[int], longest: int) -> Tensor:
    """Return each client's next permutation, padded to the longest; shape (k, longest)."""
    table = np.zeros((len(rngs), longest), np.int64)
    for row, rng, count in zip(table, rngs, counts, strict=True):
        row[:count] = rng.permutation(count)
    return torch.from_numpy(table)


def out_of_memory(error: Exception) -> bool:
    """Tell whether an error says so; on a CPU, torch has no type for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def keep_memory() -> None:
    """Let the C library keep what a step frees for the next one: a fifth of the time goes into new pages.

    glibc gives memory back at once where more than a threshold is free, twice the largest block that was ever
    freed, which it counts up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). Elsewhere this does nothing.
    """
    torch.empty((32 << 20) - (1 << 13), dtype=torch.uint8)
