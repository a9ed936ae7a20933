"""The loss of a task, example by example: for gradients of single examples and for batches with padding."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import cross_entropy

from fedcore.spec import Client
from fedcore.task import Task

REGISTER = 16  # float32s; rows that fill no register are slow on a CPU, unless they are few
MANY = 256  # rows


def precision(spec: Client, device: str) -> AbstractContextManager[object]:
    """Return the context in which a client's losses are computed, in bfloat16 where the spec asks for it."""
    if not spec.autocast:
        return nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def single_losses(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from outputs (n, ...) and targets (n, ...) to the loss of each example, (n,).

    The loss is taken of one example at a time. A mean over the batch may be normalised by all of it, as with
    class weights, and one example would then change the gradients of the others after they were clipped.
    """
    vectorized = vmap(lambda output, target: task.loss(output[None], target[None]), randomness="different")
    plain = type(task).loss is Task.loss

    def losses(output: Tensor, target: Tensor) -> Tensor:
        if not plain or output.dim() != 2:
            each: Tensor = vectorized(output, target)
            return each
        slow = output.is_cpu and output.shape[1] < REGISTER and len(output) > MANY
        if slow and target.dim() == 1:  # classes first, which takes a third of the time
            return cross_entropy(output.t().contiguous()[None], target[None], reduction="none")[0]
        return cross_entropy(output, target, reduction="none")  # the same in a fifth of the time

    return losses
