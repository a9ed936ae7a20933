"""DP-SGD on the device, by Opacus: the privacy of single examples (Abadi et al. 2016, Algorithm 1).

    every step   each example is in the batch with probability q, independently of all others
                 g = (sum of g_i min(1, C / ‖g_i‖) + N(0, (z C)²)) / B
                 g += the algorithm's correction, then the optimiser's step

q, C, z, B and the number of steps are public constants of the run spec. The number of examples is none, so
it divides nothing: a client without any takes all steps on noise alone. `PrivacyEngine.make_private` is not
used, because it takes B and q from the length of a loader's data set, and makes a loader a client.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import hypot, inf

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.optim import Optimizer

from fedcore.client.algorithms.base import AnyHalf, Half, Losses
from fedcore.client.examples import Batch, Examples
from fedcore.client.losses import precision, single_losses
from fedcore.errors import SpecError, TaskError
from fedcore.messages import Ref
from fedcore.privacy.claims import steps
from fedcore.privacy.levels import ExampleLevel
from fedcore.seeds import generator
from fedcore.spec import RunSpec
from fedcore.task import Task

REFUSED = 'privacy.level = "example"'
UNSEEN = 0.01  # of an example's gradient norm; TF32 leaves less between two ways to compute it


@dataclass
class Draws:
    """What a client's Poisson batches and noise are drawn from."""

    rate: float
    batches: np.random.Generator
    noise: torch.Generator

    def batch(self, count: int) -> NDArray[np.int64]:
        """Return the next batch: each of so many examples with probability `rate`, by its place."""
        return np.flatnonzero(self.batches.random(count) < self.rate)


class DPSGD:
    """Trains one resident model, for any number of clients one after another.

    Guarantee: all that a client's training leaves in the trained parameters, shared or local, is one history
    of `steps` subsampled Gaussians (`fedcore.privacy.claims`), for one example of that client.

    Assumption: the model and the loss treat examples apart and remember none; what is known to do otherwise
    is refused, and so is a gradient that Opacus does not see whole. The noise is not cryptographic: a
    generator that can be run backwards, and sums in floating point (Mironov 2012). Opacus's secure mode needs
    a package that is no longer maintained.
    """

    def __init__(
        self, task: Task, spec: RunSpec, module: nn.Module, optimizer: Optimizer, entropy: int
    ) -> None:
        """Watch a module, whose parameters the optimiser moves.

        entropy: of batches, noise and dropout; from the operating system in a deployment. Raises SpecError
        for a layer that cannot be private.
        """
        assert isinstance(spec.privacy, ExampleLevel)
        check_layers(module)
        self.task, self.module, self.privacy, self.entropy = task, module, spec.privacy, entropy
        self.inner, self.steps, self.expected = optimizer, steps(spec), spec.client.batch_size
        self.client = spec.client
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.losses = single_losses(task)
        self.seen_whole = False
        self.ghost = spec.privacy.clipping == "ghost"
        if self.ghost:
            limit = spec.privacy.clip_norm
            self.hooks = GradSampleModuleFastGradientClipping(
                module, loss_reduction="sum", max_grad_norm=limit
            )
        else:
            self.hooks = GradSampleModule(module, loss_reduction="sum")

    def begin(self, ref: Ref, client: str, *, careful: bool = False) -> None:
        """Prepare for one client's work, with batches and noise of its own; a new attempt has new ones.

        careful: take examples one by one and leave out those whose gradient is not finite.
        """
        device = self.trained[0].device
        self.drawn = self.draws(ref, client)
        self.careful, self.at_once = careful, 1 if careful else self.privacy.at_once
        kind = DPOptimizerFastGradientClipping if self.ghost else DPOptimizer
        self.optimizer = kind(  # a new one: what an interrupted client accumulated must not go on
            self.inner,
            noise_multiplier=self.privacy.noise_multiplier,
            max_grad_norm=self.privacy.clip_norm,
            expected_batch_size=self.expected,
            generator=self.drawn.noise,
        )
        # An example shifts the dropout masks of those after it, which must not show: nobody knows the masks.
        place = (ref.round, ref.attempt, client)
        masks = noise_generator(device, generator(self.entropy, "dp dropout", *place)).get_state()
        torch.set_rng_state(masks) if device.type == "cpu" else torch.cuda.set_rng_state(masks, device)

    def draws(self, ref: Ref, client: str) -> Draws:
        """Return what one client's batches and noise are drawn from; a new attempt has another one."""
        place, device = (ref.round, ref.attempt, client), self.trained[0].device
        noise = noise_generator(device, generator(self.entropy, "dp noise", *place))
        return Draws(self.privacy.sampling_rate, generator(self.entropy, "dp batches", *place), noise)

    def noise(self, draws: Draws, like: Tensor) -> Tensor:
        """Return N(0, (z C)²) in the shape of a parameter, as Opacus draws it."""
        std = self.privacy.noise_multiplier * self.privacy.clip_norm
        return torch.normal(0.0, std, like.shape, generator=draws.noise, device=like.device, dtype=like.dtype)

    def batches(self, examples: Examples) -> Iterator[Batch]:
        """Yield every step's batch, in parts of at most `at_once` examples; it may be empty.

        The optimiser is told which part completes a batch, as Opacus's BatchMemoryManager does.
        """
        for _ in range(self.steps):
            batch = torch.from_numpy(self.drawn.batch(len(examples)))
            parts = torch.split(batch, self.at_once or max(len(batch), 1))
            for number, part in enumerate(parts, 1):
                self.optimizer.signal_skip_step(number < len(parts))
                yield examples.batch(part) if len(part) else (torch.empty(0), torch.empty(0))

    def descend(self, batches: Iterable[Batch], correct: Callable[[], None] | None) -> Losses:
        """Take a step on each batch from where the model is; return each loss, with the size of its batch.

        correct: adds to the gradients what owes nothing to the examples of this step, hence after the noise.
        Raises TaskError where training changes a buffer, or Opacus does not see a gradient whole.
        """
        losses, seen, total = Losses(), 0, torch.zeros(())
        before = self._buffers()
        with quiet():
            for x, y in batches:
                if not self.seen_whole:
                    self.look(x[:1], y[:1])
                self.optimizer.zero_grad(set_to_none=True)
                loss, count = self._differentiate(x, y)
                seen, total = seen + count, total + loss
                if self.optimizer.pre_step():  # the batch is complete: its sum is clipped, noised and divided
                    if correct:
                        correct()
                    self.inner.step()
                    losses.append((total / max(seen, 1), seen))
                    seen, total = 0, torch.zeros(())
        if changed := [name for name, state in self._buffers().items() if state != before[name]]:
            raise TaskError(
                f"{self.task.name}: training changed the buffer {changed[0]!r}, through which examples would "
                f"reach later steps without noise ({REFUSED}); make it constant, or a trained parameter"
            )
        return losses

    def _differentiate(self, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """Leave the gradients of a batch's part where the optimiser looks; return its loss and its size."""
        if len(x):
            with precision(self.client, str(x.device)):
                each = self.losses(self.module(x), y)
            if self.ghost:
                DPTensorFastGradientClipping(self.hooks, self.optimizer, each, "sum").backward()
            else:
                each.sum().backward()  # type: ignore[no-untyped-call]
            if not self.careful or all(
                bool(p.grad.isfinite().all()) for p in self.trained if p.grad is not None
            ):
                return each.detach().sum(), len(x)
        for p in self.trained:  # of no examples, because not every model takes an empty batch
            p.grad = torch.zeros_like(p)
            p.grad_sample = None if self.ghost else p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
        return torch.zeros(()), 0

    def look(self, x: Tensor, y: Tensor) -> None:
        """Check that Opacus sees all of a gradient, on one example if there is one."""
        if len(x):
            self.seen_whole = self._sees_whole(x, y)

    def _sees_whole(self, x: Tensor, y: Tensor) -> bool:
        """Tell whether Opacus sees all of an example's gradient; False if there is none, or not a finite one.

        It looks at the calls of layers. What a model does with a parameter beside them is in the gradient of
        ghost clipping and not in its norms, so that an example would add more than the clip norm. Raises
        TaskError, naming the parameter.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with quiet(), torch.random.fork_rng([x.device] if x.is_cuda else []):
            try:
                self.losses(self.module(x), y).sum().backward()  # type: ignore[no-untyped-call]
            except NotImplementedError as error:
                raise TaskError(f'{self.task.name}: {error}; set privacy.clipping = "hooks"') from error
        norms: dict[str, tuple[float, float]] = {}
        for name, p in self.module.named_parameters():
            if p.grad is not None:
                part = getattr(p, "_norm_sample" if self.ghost else "grad_sample", None)
                norms[name] = float(p.grad.norm()), 0.0 if part is None else float(part.norm())
            elif p.requires_grad:
                raise TaskError(
                    f"{self.task.name}: the loss does not depend on the parameter {name!r}, and {REFUSED} "
                    "takes a gradient of every one; use it, or set its requires_grad to False"
                )
        total = hypot(*(whole for whole, _ in norms.values()))
        for name, (whole, seen) in norms.items():
            if abs(whole - seen) > UNSEEN * total:
                raise TaskError(
                    f"{self.task.name}: the parameter {name!r} is used beside the calls of its layer, where "
                    f"Opacus does not see its gradient ({REFUSED}); call the layer, or give the parameter a "
                    "layer of its own"
                )
        return 0 < total < inf

    def _buffers(self) -> dict[str, tuple[int, int]]:
        """Return each buffer's identity and version, which counts the writes to it."""
        return {name: (id(buffer), buffer._version) for name, buffer in self.module.named_buffers()}

    @property
    def sound(self) -> bool:
        """Whether all trained parameters are finite."""
        return all(bool(p.isfinite().all()) for p in self.trained)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold torch's warning back that the input of the first layer needs no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        yield


def noise_generator(device: torch.device, rng: np.random.Generator) -> torch.Generator:
    """Return a torch generator on a device in a state drawn from `rng`.

    Of a seed, torch's generator on the CPU uses 32 bits, and in hours all of them can be tried against an
    update. So all its 19,937 bits of state are drawn, from the 128-bit key of `rng`. On a GPU it takes 63.
    """
    noise = torch.Generator(device)
    if noise.device.type != "cpu":
        return noise.manual_seed(int(rng.integers(2**63)))
    state = noise.get_state()  # as int64: seed, flags, position, the 624 words of MT19937, a spare normal
    state.view(torch.int64)[3:627] = torch.from_numpy(rng.integers(0, 2**32, 624))
    return noise.set_state(state)


def check_half(half: AnyHalf) -> None:
    """Raise SpecError for an algorithm whose training is more than the steps of DP-SGD."""
    name = type(half.algorithm).__name__
    if type(half).train is not Half.train:
        raise SpecError(
            f"strategy.algorithm: {name} {half.alone or 'trains in a way of its own'}, and {REFUSED} "
            "accounts for one phase of training of one model; use another algorithm, such as "
            '"local_sgd" or "fedper"'
        )
    if half.measures:
        raise SpecError(
            f"strategy.algorithm: {name} measures the loss on a client's examples, which {REFUSED} does not "
            'account for; use another algorithm, such as "local_sgd" or "fedprox"'
        )


def check_layers(module: nn.Module) -> None:
    """Raise SpecError, naming the layer, where a model in training mode cannot be trained by DP-SGD."""
    for name, layer in module.train().named_modules():
        if reason := _unfit(layer):
            raise SpecError(f"{REFUSED}: layer {name!r} ({type(layer).__name__}) {reason}")
    for error in ModuleValidator.validate(module):
        raise SpecError(f"{REFUSED}: {error}")


def _unfit(layer: nn.Module) -> str:
    """Return why a layer cannot be trained by DP-SGD, "" where nothing speaks against it."""
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None):
        return (
            "normalises over the batch, so that examples change each other's gradients; "
            f"use nn.GroupNorm(groups, {layer.num_features}) in its place"
        )
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.training:
        if layer.track_running_stats:
            return "keeps statistics of examples without noise; set track_running_stats=False"
    if not any(p.requires_grad for p in layer.parameters(recurse=False)):
        return ""
    if isinstance(layer, nn.RNNBase | nn.MultiheadAttention):
        return f"has no gradients of single examples; use opacus.layers.DP{type(layer).__name__} in its place"
    if buffer := next((name for name, _ in layer.named_buffers()), ""):
        return (
            f"has trained parameters and the buffer {buffer!r}, and Opacus cannot know what it remembers; "
            "put the buffer into a layer without parameters, beside this one"
        )
    return ""
