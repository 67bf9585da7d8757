"""Whether training and clean batch may go through the model as one batch.

The example map says whether data of one example reaches another's loss. What is left is a forward
that computes with the size of its batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext.data.batch import split
from l2rw_ext.errors import NotCapturableError, NotExactError
from l2rw_ext.layers.torch_functions import inside
from l2rw_ext.task.isolation import Generators, Snapshot
from l2rw_ext.task.task import Task
from l2rw_ext.tracing.fast_path import StepMode
from l2rw_ext.tracing.numbers import Numbers


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
) -> tuple[Tensor, Tensor]:
    """Training and clean losses of one forward; ``part`` gives the context of each of its parts.

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
    except (NotCapturableError, NotExactError, NotMergeableError):
        raise
    except Exception as error:
        # A loss function that writes to its part of the outputs does so in each step.
        writes = "modified inplace" in str(error)
        raise NotMergeableError(
            f"{type(error).__name__} on the merged batch", permanent=writes
        ) from error
    return losses, clean_losses


def check_mergeable(task: Task, snapshot: Snapshot, inputs: Any, precision: float) -> None:
    """Check that two separate forwards do what the merged one does.

    They have to compute with the same numbers, whatever these multiply, and give the same losses.

    Args:
        task: the step.
        snapshot: the state that the merged forward started from.
        inputs: the merged inputs.
        precision: the largest machine epsilon among the dtypes that the forward computed in.

    Raises:
        NotMergeableError: they do not, or the forward writes to the model.
    """
    name = snapshot.state.changed(values=True)
    if name is not None:
        raise NotMergeableError(f"the forward writes to {name!r}")
    draws = not snapshot.generators.unchanged()
    after, generators = snapshot.now(), Generators(task.members.devices())
    try:
        # With grad, as in the step, but without the memory of a graph.
        with torch.autograd.graph.saved_tensors_hooks(_drop, _refuse):
            same = _agree(task, snapshot, inputs, precision, draws=draws)
    except NotMergeableError:
        raise
    except Exception as error:
        raise NotMergeableError(
            f"{type(error).__name__} in another forward of the step", permanent=False
        ) from error
    finally:
        generators.restore()
        after.restore()
    if not same:
        raise NotMergeableError("an example's output depends on the size of its batch")


def _agree(task: Task, snapshot: Snapshot, inputs: Any, eps: float, *, draws: bool) -> bool:
    """Whether the forward of each batch does what the merged forward does."""
    merged = functools.partial(merged_losses, task, inputs)
    runs: tuple[Callable[[], Any], ...] = (merged, task.forward_train, task.forward_clean)
    found = []
    numbers = []
    with _WithoutDropout() if draws else contextlib.nullcontext():
        for run in runs:
            snapshot.restore()
            with Numbers() as read:
                found.append(run())
            numbers.append(read.found)
        drawn = not snapshot.generators.unchanged()
    (train, clean), own_train, own_clean = found
    tolerance = max(16 * eps, min(256 * eps, 2.0**-12))
    return numbers[0] == numbers[1] == numbers[2] and (
        drawn  # other numbers in each forward, and nothing can be compared
        or (_same(train, own_train, tolerance) and _same(clean, own_clean, tolerance))
    )


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


def _drop(saved: Tensor) -> None:
    """Keep no saved tensor, because no backward follows."""


def _refuse(saved: None) -> Tensor:
    raise NotMergeableError("the forward runs a backward of its own")


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two results of the same rows agree, relative to the largest value."""
    a, b = a.detach(), b.detach()
    finite = a.isfinite() & b.isfinite()
    error = (a - b).abs().masked_fill(~finite, 0).max()
    scale = a.abs().masked_fill(~finite, 0).max()
    return torch.equal(a.isfinite(), b.isfinite()) and bool(error <= tolerance * scale)
