"""One client's local work: train from the received model, or evaluate it. The reference for all engines."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fedcore.client.algorithms import Column, Correction, End, Losses, Start, half_of
from fedcore.client.examples import Batch, Examples
from fedcore.client.losses import precision
from fedcore.client.module import Resident
from fedcore.client.training import Kept
from fedcore.errors import SpecError, TaskError
from fedcore.layout import Layout, Parameters, Vector
from fedcore.messages import Ref, Update
from fedcore.metrics import EXAMPLE_BOUND, MAX_METRICS, means
from fedcore.privacy.levels import ExampleLevel
from fedcore.seeds import generator, integer
from fedcore.spec import SGD as SGDSpec
from fedcore.spec import Client as ClientSpec
from fedcore.spec import RunSpec
from fedcore.strategies import Strategy, from_table
from fedcore.task import Task

if TYPE_CHECKING:
    from fedcore.client.dpsgd import DPSGD

TOGETHER = 128  # examples that are evaluated at once; of 1,024, a CNN for MNIST held 300 MB in activations


def device_of(spec: ClientSpec) -> str:
    """Return the torch device that a spec asks for; `auto` is CUDA where there is one.

    Raises SpecError for a GPU that is not there.
    """
    if spec.device == "cpu":  # and nothing of CUDA is touched, which worker processes are not to inherit
        return "cpu"
    gpus = torch.cuda.device_count()
    if spec.device == "auto":
        return "cuda" if gpus else "cpu"
    if (torch.device(spec.device).index or 0) >= gpus:
        raise SpecError(
            f"client.device = {spec.device!r}, but torch {torch.__version__} finds {gpus or 'no'} CUDA GPUs "
            "here; set it to 'auto' or 'cpu', or install a torch that is built for CUDA"
        )
    return spec.device


def initial_seed(seed: int) -> int:
    """Return the seed under which every party of a run builds the model."""
    return integer(seed, "model")


class TorchTrainer:
    """Local training in PyTorch: one resident model for all the clients of a process."""

    def __init__(
        self, task: Task, spec: RunSpec, strategy: Strategy | None = None, entropy: int | None = None
    ) -> None:
        """Build the task's model on the spec's device; a strategy of None is the spec's.

        entropy: of the batches and the noise of DP-SGD; None is the run's seed. Raises SpecError where the
        spec asks for DP-SGD and the model or the algorithm cannot have it.
        """
        if len(task.metrics) > MAX_METRICS:
            raise TaskError(f"{task.name} has {len(task.metrics)} metrics; at most {MAX_METRICS} are taken")
        self.task, self.seed, self.run, self.spec = task, spec.run.seed, spec, spec.client
        self.strategy = strategy or from_table(spec.strategy)
        self.half = half_of(self.strategy.algorithm, spec)
        self.max_weight = spec.limits.weight
        self.device = device_of(spec.client)
        self.model = Resident(task, initial_seed(spec.run.seed), self.device, self.half.personal)
        self.trained = [p for p in self.model.module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.spec, self.trained)
        self.private = self._private(spec, spec.run.seed if entropy is None else entropy)
        self.receive(self.model.parameters())

    def _private(self, spec: RunSpec, entropy: int) -> "DPSGD | None":
        if not isinstance(spec.privacy, ExampleLevel):
            return None
        from fedcore.client.dpsgd import DPSGD, check_half  # Opacus takes 2 s to import

        check_half(self.half)
        return DPSGD(self.task, spec, self.model.module, self.optimizer, entropy)

    @property
    def layout(self) -> Layout:
        """How the model lies in flat vectors."""
        return self.model.layout

    def parameters(self) -> Parameters:
        """Return the received parameters, the initial ones at first."""
        return self.received

    def receive(self, parameters: Parameters) -> None:
        """Take the model of a round."""
        self.received = parameters
        self.shared, self.buffers = (
            torch.from_numpy(np.array(vector)).to(self.device) for vector in parameters.vectors().values()
        )
        self.shared = self.model.flat["shared"].rounded(self.shared)
        self.extra = {
            name: self._vector(parameters.extra.get(name)) for name in self.strategy.algorithm.receives
        }

    def _vector(self, values: Vector | None) -> Tensor:
        """Return a vector that goes with the shared parameters on the device; None is zero."""
        zeros = torch.zeros_like(self.shared)
        return zeros if values is None else zeros.copy_(torch.from_numpy(np.array(values)))

    def pace(self, round: int) -> None:
        """Take the learning rate of a round, for the optimiser and for what the algorithm makes of it."""
        spec = self.run.at(round)
        if spec.client != self.spec:
            self.spec, self.half = spec.client, replace(self.half, spec=spec)
            for group in self.optimizer.param_groups:
                group["lr"] = self.spec.optimizer.lr

    def train(self, ref: Ref, client: str, examples: Examples, kept: Kept) -> tuple[Update, Kept]:
        """Train one client; return its update, with the `loss` sum over `count` examples, and what it keeps.

        Batches and dropout are drawn from (seed, round, client), so a repeated attempt repeats the work. A
        client with more examples than [limits] weight counts, and its loss too, as if it had that many.
        """
        self.pace(ref.round)
        start = self.start([kept], self.mean_loss(examples) if self.half.measures else None)
        self._in_mode(training=True)
        losses, own = self._local(ref, client, examples, start, kept)
        if self.private and not self.private.sound:
            # One example without a finite gradient must not show in what is sent. The same steps without it:
            losses, own = self._local(ref, client, examples, start, kept, careful=True)
        self.model.reclaim()
        size = len(examples)
        weight, share = self.weight(size)
        passes = sum(n for _, n in losses) / max(size, 1) if self.private else self.spec.passes(size)
        total = sum(float(loss) * n for loss, n in losses)  # here, so that a GPU is waited for once
        count = weight * passes
        told = {"weight": weight, "loss": clipped(total * share, count), "count": count}
        delta = (self.model.flat["shared"].read() - self.shared).unsqueeze(0)
        end = End(delta, np.array([float(len(losses))]), np.array([1.0 if self.private else weight]))
        vectors, scalars, (kept,) = self.finish(start, end)
        sent = {name: rows[0] for name, rows in vectors.items()}
        if self.layout.buffer_size:
            sent["buffers"] = self.model.flat["buffer"].numpy()
        said = {name: float(column[0]) for name, column in scalars.items()}
        return Update(sent, {**told, **said}), {**kept, **own}

    def _local(
        self, ref: Ref, client: str, examples: Examples, start: Start, kept: Kept, careful: bool = False
    ) -> tuple[Losses, Kept]:
        """Do the local steps, with fresh moments and draws that (seed, round, client) name."""
        self.optimizer.state.clear()
        if self.private:
            self.private.begin(ref, client, careful=careful)
        else:
            seed_device(self.device, integer(self.seed, "dropout", ref.round, client))
        return self.half.train(self, start, kept, partial(self.batches, ref, client, examples))

    def load(self, kept: Kept) -> None:
        """Put the received model into place, or those parts of a personal one that a client has kept."""
        if not kept:
            return self.model.load(self.shared, self.buffers)
        names = ("model.shared", "model.buffers", "model.local")
        own = {name: torch.from_numpy(np.array(kept[name])).to(self.device) for name in names if name in kept}
        shared, buffers = own.get(names[0], self.shared), own.get(names[1], self.buffers)
        return self.model.load(shared, buffers, own.get(names[2]))

    def descend(
        self,
        batches: Iterable[Batch],
        correction: Correction | None = None,
        objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Losses:
        """Take a step on each batch from where the model is; return each loss, with the size of its batch.

        objective: from x and y to the loss; None is the task's loss of the model's output.
        """
        if self.private:
            return self.private.descend(batches, correction and partial(self.correct, correction))
        module, losses = self.model.module, Losses()
        for x, y in batches:
            for parameter in self.trained:  # what zero_grad() does, at a tenth of its price
                parameter.grad = None
            with precision(self.spec, self.device):
                loss = objective(x, y) if objective else self.task.loss(module(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            if correction:
                self.correct(correction)
            self.optimizer.step()
            losses.append((loss.detach(), len(x)))
        return losses

    @torch.no_grad()
    def correct(self, correction: Correction) -> None:
        """Add an algorithm's correction to the gradients of the shared parameters."""
        flat = self.model.flat["shared"]
        for parameter, part in flat.parts(correction(flat.read()[None])[0]):
            if parameter.grad is not None:  # the loss depends on it
                parameter.grad.add_(part)

    def start(self, kept: Sequence[Kept], loss: Column | None) -> Start:
        """Return what k clients begin with, given what each has kept."""
        rows = {
            name: torch.stack([self._vector(state.get(name)) for state in kept])
            for name in self.strategy.algorithm.keeps
        }
        return Start(self.shared, self.extra, rows, loss)

    def finish(
        self, start: Start, end: End
    ) -> tuple[Mapping[str, Vector], Mapping[str, Column], Sequence[Kept]]:
        """Return what the algorithm and the server's optimiser have k clients send, and what each keeps."""
        sent = self.half.finish(start, end)
        vectors = {name: rows.cpu().numpy() for name, rows in sent.vectors.items()}
        scalars = dict(sent.scalars)
        if "square" in self.strategy.optimizer.scalars:
            rows = vectors["delta"]
            scalars["square"] = np.einsum("kd,kd->k", rows, rows, dtype=np.float64)
        kept = {name: rows.cpu().numpy() for name, rows in sent.kept.items()}
        # Copies: a client's row lives as long as the client keeps it, and the chunk should not live with it.
        mine = [{name: rows[i].copy() for name, rows in kept.items()} for i in range(len(end.steps))]
        return vectors, scalars, mine

    def mean_loss(self, examples: Examples) -> Column:
        """Return the received model's mean loss on a client's examples, (1,); 0 where it has none."""
        return np.array([means(self.evaluate(examples, {}).scalars).get("loss", 0.0)])

    def weight(self, count: int) -> tuple[float, float]:
        """Return the number of examples, or the most that is accepted, and what one example then counts."""
        weight = min(float(count), self.max_weight)
        return weight, weight / max(count, 1)

    def _in_mode(self, training: bool) -> torch.nn.Module:
        """Return the module in a mode; switching walks all its layers, so it is done when it has to be."""
        module = self.model.module
        return module if module.training == training else module.train(training)

    def batches(
        self, ref: Ref, client: str, examples: Examples, *, epochs: int | None = None, phase: str = "batches"
    ) -> Iterator[Batch]:
        """Yield the batches of all epochs, in an order drawn from (seed, phase, round, client).

        Those of DP-SGD are Poisson samples instead, of a fixed number of steps.
        """
        if self.private:
            yield from self.private.batches(examples)
            return
        size, count = self.spec.batch_size, len(examples)
        rng = generator(self.seed, phase, ref.round, client) if self.spec.shuffle else None
        for _ in range(self.spec.epochs if epochs is None else epochs):
            order = torch.from_numpy(rng.permutation(count)) if rng else None
            for start in range(0, count, size)[: self.spec.steps or None]:
                place = slice(start, min(start + size, count))
                yield examples.batch(place if order is None else order[place])

    @torch.no_grad()
    def evaluate(self, examples: Examples, kept: Kept) -> Update:
        """Return the sums of the loss and of each metric over all examples, and their `count`.

        Where examples are private, each moves the sum of a metric by 0..metric_bound, and the count by one.
        """
        module, count = self._in_mode(training=False), len(examples)
        low, high = (
            (0.0, self.private.privacy.metric_bound) if self.private else (-EXAMPLE_BOUND, EXAMPLE_BOUND)
        )
        self.load(kept)
        sums = dict.fromkeys(("loss", *self.task.metrics), 0.0)
        for start in range(0, count, TOGETHER):
            x, y = examples.batch(slice(start, min(start + TOGETHER, count)))
            output = module(x)
            sums["loss"] += clipped(float(self.task.loss(output, y).double()) * len(x), len(x))
            for name, metric in self.task.metrics.items():
                values = metric(output, y)
                if self.private and values.shape != (len(x),):
                    raise TaskError(
                        f"{self.task.name}: metric {name!r} returned shape {tuple(values.shape)}; noise "
                        f"covers one value an example, of shape ({len(x)},)"
                    )
                sums[name] += float(values.double().nan_to_num(high).clamp(low, high).sum())
        weight, share = (float(count), 1.0) if self.private else self.weight(count)
        scaled = {name: clipped(value * share, weight) for name, value in sums.items()}
        return Update({}, {**scaled, "count": weight})


def seed_device(device: str, seed: int) -> None:
    """Seed the generator that dropout draws from; `torch.manual_seed` takes 300 times as long on a CPU."""
    if device == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.cuda.manual_seed_all(seed)


def clipped(total: float, count: float) -> float:
    """Return a sum over `count` examples within the bound of a metric; NaN becomes the bound."""
    bound = EXAMPLE_BOUND * count
    return max(-bound, min(bound, total)) if total == total else bound


def make_optimizer(spec: ClientSpec, parameters: list[torch.nn.Parameter]) -> Optimizer:
    """Return the torch optimiser that a spec describes."""
    options = spec.optimizer.model_dump(exclude={"name"})
    if isinstance(spec.optimizer, SGDSpec):
        return SGD(parameters, **options)
    return (Adam if spec.optimizer.name == "adam" else AdamW)(parameters, **options)
