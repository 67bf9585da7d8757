"""Whether training and clean batch may go through the model as one batch.

The example map says whether data of one example reaches another's loss. What is left is a forward
that computes with the size of its batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext.data.batch import split, tensors
from l2rw_ext.engines.proof import comparable
from l2rw_ext.errors import NotCompilableError, NotExactError
from l2rw_ext.layers.torch_functions import inside
from l2rw_ext.task.isolation import Generators, HostGenerators, Snapshot
from l2rw_ext.task.task import Task, direction_of
from l2rw_ext.tracing.fast_path import StepMode
from l2rw_ext.tracing.numbers import Numbers, agree


class NotMergeableError(Exception):
    """The two batches cannot go through one forward; the message says why.

    ``permanent``: whether the same is to be expected of the next batches.
    """

    def __init__(self, message: str, *, permanent: bool = True) -> None:
        super().__init__(message)
        self.permanent = permanent


def merged_losses(
    task: Task,
    inputs: Any,
    part: Callable[[str], AbstractContextManager[None]] = lambda name: contextlib.nullcontext(),
) -> tuple[Tensor, Tensor, Any]:
    """Training and clean losses of one forward, and its outputs.

    Args:
        task: the step.
        inputs: the merged inputs.
        part: gives the context of each part of the forward.

    Raises:
        NotMergeableError: the model or a loss function cannot work on the merged batch. (An error
            that is the model's own comes back from the two passes.)
    """
    n, m = task.n, task.m
    try:
        with part("merged"):
            outputs = task.forward(inputs)
        parts = split(outputs, n, m)
        if parts is None:
            raise NotMergeableError("an output has no dimension 0 that counts examples")
        with part("train"):
            losses = task.losses(parts[0])
        with part("clean"):
            clean_losses = task.clean_losses(parts[1])
        if (losses.numel(), clean_losses.numel()) != (n, m):
            raise NotMergeableError("the batches hold other numbers of examples than rows")
    except (NotCompilableError, NotExactError, NotMergeableError):
        raise
    except Exception as error:
        # A loss function that writes to its part of the outputs does so in each step.
        writes = "modified inplace" in str(error)
        raise NotMergeableError(
            f"{type(error).__name__} on the merged batch", permanent=writes
        ) from error
    return losses, clean_losses, outputs


def check_mergeable(task: Task, snapshot: Snapshot, inputs: Any) -> None:
    """Check that two separate forwards do what the merged one does.

    They have to compute with the same numbers and constants, whatever these multiply, and to give
    the same losses, scores and gradients.

    Args:
        task: the step.
        snapshot: the state that the merged forward started from.
        inputs: the merged inputs.

    Raises:
        NotMergeableError: they do not, or the forward writes to the model.
    """
    name = snapshot.state.changed(values=True)
    if name is not None:
        raise NotMergeableError(f"the forward writes to {name!r}")
    draws = not snapshot.generators.unchanged()
    after, generators = snapshot.now(), Generators(task.members.devices())
    host = HostGenerators()
    try:
        with _WithoutDropout() if draws else contextlib.nullcontext():
            same = _agree(task, snapshot, inputs, host)
    except NotMergeableError:
        raise
    except Exception as error:
        raise NotMergeableError(
            f"{type(error).__name__} in another forward of the step", permanent=False
        ) from error
    finally:
        host.restore()
        generators.restore()
        after.restore()
    if not same:
        raise NotMergeableError("an example's output depends on the size of its batch")


def _agree(task: Task, snapshot: Snapshot, inputs: Any, host: HostGenerators) -> bool:
    """Whether the forward of each batch does what the merged forward does."""
    n, m = task.n, task.m
    given = ((inputs, n + m), (task.inputs, n), (task.clean_inputs, m))
    merged, train, clean = (Numbers(size, task.members.permanent) for _, size in given)
    for numbers, (batch, _) in zip((merged, train, clean), given, strict=True):
        for x in tensors(batch):
            numbers.enter(x)

    def restart() -> None:
        snapshot.restore()
        host.restore()

    def alone(numbers: Numbers, inputs: Any, losses: Callable[[Any], Tensor], part: str) -> Tensor:
        restart()
        with numbers.part("merged"):
            outputs = task.forward(inputs)
        with numbers.part(part):
            return losses(outputs)

    def part(name: str) -> AbstractContextManager[None]:
        first, size = {"merged": (0, n + m), "train": (0, n), "clean": (n, m)}[name]
        return merged.part(name, first, size)

    restart()
    together = comparable(task, *merged_losses(task, inputs, part)[:2])
    own_clean = alone(clean, task.clean_inputs, task.clean_losses, "clean")
    direction = None if together is None else direction_of(task, own_clean)
    own_train = alone(train, task.inputs, task.losses, "train")
    drawn = not snapshot.generators.unchanged()
    apart = None if direction is None else comparable(task, own_train, direction)
    if not agree(*(numbers.found["merged"] for numbers in (merged, train, clean))):
        return False
    for name, numbers in (("train", train), ("clean", clean)):
        if not agree(merged.found[name], numbers.found[name]):
            return False
    # Forwards that draw have other numbers each, and nothing can be compared.
    return drawn or together is None or apart is None or not together.differs(apart)


class _WithoutDropout(StepMode):
    """Makes dropout the identity, so that forwards of different sizes can be compared."""

    _IDENTITY = (
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        torch.dropout,
        torch.dropout_,
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._IDENTITY:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs = {k: v for k, v in kwargs.items() if k != "dropout_p"}
        if func is F.multi_head_attention_forward:
            with self:
                return inside(func)(*args, **kwargs)
        return func(*args, **kwargs)
