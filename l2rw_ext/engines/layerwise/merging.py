"""Whether training and clean batch may go through the model as one batch.

The gradients of a merged forward show coupling between examples (see ``probe``). A statistic of the
batch that carries no gradient (``x - x.mean(0)`` on the inputs, a detached mean) would differ from
that of two forwards, and only values show that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from l2rw_ext.data.batch import forward_with, split, tensors
from l2rw_ext.layers.torch_functions import inside
from l2rw_ext.task.isolation import Generators, Snapshot
from l2rw_ext.task.task import Task


class NotMergeableError(Exception):
    """The two batches cannot go through one forward; the message says why.

    ``permanent``: whether the same is to be expected of the next batches.
    """

    def __init__(self, message: str, *, permanent: bool = True) -> None:
        super().__init__(message)
        self.permanent = permanent


def check_mergeable(
    task: Task,
    snapshot: Snapshot,
    inputs: Any,
    losses: Tensor,
    clean_losses: Tensor,
    precision: float,
) -> None:
    """Check, by values, that neither batch affects the other.

    With other clean rows, the same masks and the same buffers, the training losses must stay the
    same, and the clean losses with other training rows. Two separate forwards must give the losses
    of the merged one, which shows a dependence on the size of the batch. Parameters that are zero,
    as those of a last layer often are at first, would hide what they multiply, so other values
    replace them.

    Args:
        task: the step.
        snapshot: the state that the merged forward started from.
        inputs: the merged inputs.
        losses: training losses of the merged forward.
        clean_losses: its clean losses.
        precision: the largest machine epsilon among the dtypes that the forward computed in.

    Raises:
        NotMergeableError: they do not, or the forward writes to the model.
    """
    name = snapshot.state.changed(values=True)
    if name is not None:
        raise NotMergeableError(f"the forward writes to {name!r}")
    if _shares_examples(inputs, task.n, task.m):
        raise NotMergeableError("the two batches share examples", permanent=False)
    draws = not snapshot.generators.unchanged()
    after, generators = snapshot.now(), Generators(task.members.devices())
    try:
        # With grad, as in the step, but without the memory of a graph.
        with torch.autograd.graph.saved_tensors_hooks(_drop, _refuse):
            same = _Trial(task, snapshot, precision).agrees(
                inputs, losses, clean_losses, draws=draws
            )
    except _BackwardInsideError:
        raise NotMergeableError("the forward runs a backward of its own") from None
    except Exception as error:
        raise NotMergeableError(
            f"{type(error).__name__} on other rows of the merged batch", permanent=False
        ) from error
    finally:
        generators.restore()
        after.restore()
    if not same:
        raise NotMergeableError("an example's output depends on the rest of its batch")


class _Trial:
    """Forwards from the same state as the step's, with other rows or other sizes."""

    def __init__(self, task: Task, snapshot: Snapshot, precision: float) -> None:
        self._task = task
        self._snapshot = snapshot
        self._precision = precision
        generator = torch.Generator("cpu").manual_seed(0)
        self._stand_ins = {
            id(p): (
                torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu")
                .mul(0.1)
                .to(p)
                .requires_grad_(p.requires_grad)
            )
            for _, p in task.members.parameters
            if p.numel() and p.is_floating_point() and not p.any()
        }

    def agrees(self, inputs: Any, losses: Tensor, clean_losses: Tensor, *, draws: bool) -> bool:
        """Whether all forwards give the losses of the merged one, row by row."""
        n, m = self._task.n, self._task.m
        eps = self._precision
        # Same rows in a batch of the same shape: equal but for atomic additions on some devices.
        tight = min(256 * eps, 2.0**-12)
        loose = max(16 * eps, tight)
        train, clean = losses.detach(), clean_losses.detach()
        if self._stand_ins:
            train, clean = self._merged(inputs)
        with_other_clean = _rows_taken(inputs, [*range(n), *(j % n for j in range(m))])
        if not _same(train, self._merged(with_other_clean)[0], tight):
            return False
        with_other_train = _rows_taken(inputs, [*(n + i % m for i in range(n)), *range(n, n + m)])
        if not _same(clean, self._merged(with_other_train)[1], tight):
            return False
        if not draws:
            return _same(train, self._train(), loose) and _same(clean, self._clean(), loose)
        with _WithoutDropout():
            train, clean = self._merged(inputs)
            if not self._snapshot.generators.unchanged():
                return True  # two forwards draw other numbers, and nothing can be compared
            return _same(train, self._train(), loose) and _same(clean, self._clean(), loose)

    def _merged(self, inputs: Any) -> tuple[Tensor, Tensor]:
        parts = split(self._forward(inputs), self._task.n, self._task.m)
        assert parts is not None
        return self._task.losses(parts[0]).detach(), self._task.clean_losses(parts[1]).detach()

    def _train(self) -> Tensor:
        return self._task.losses(self._forward(self._task.inputs)).detach()

    def _clean(self) -> Tensor:
        return self._task.clean_losses(self._forward(self._task.clean_inputs)).detach()

    def _forward(self, inputs: Any) -> Any:
        self._snapshot.restore()
        if not self._stand_ins:
            return self._task.forward(inputs)
        with self._task.autocast:
            return forward_with(self._task.model, self._stand_ins, inputs)


class _WithoutDropout(TorchFunctionMode):
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


class _BackwardInsideError(Exception):
    """A backward needs a tensor that :func:`_drop` did not keep."""


def _drop(saved: Tensor) -> None:
    """Keep no saved tensor, because no backward follows."""


def _refuse(saved: None) -> Tensor:
    raise _BackwardInsideError


def _rows_taken(inputs: Any, order: list[int]) -> Any:
    def take(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() and x.size(0) == len(order):
            return x.index_select(0, torch.tensor(order, device=x.device))
        return x

    return pytree.tree_map(take, inputs)


def _shares_examples(inputs: Any, n: int, m: int) -> bool:
    """Whether some clean example of merged inputs is also a training example.

    The mean or the largest value of such a batch may be the same as without its clean rows.
    """
    batched = [
        x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        for x in tensors(inputs)
        if x.dim() and x.size(0) == n + m
    ]
    for j in range(n, n + m):
        same = torch.stack([(x[:n] == x[j]).all(1) for x in batched]).all(0)
        if bool(same.any()):
            return True
    return False


def _same(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two results of the same rows agree, relative to the largest value."""
    finite = a.isfinite() & b.isfinite()
    error = (a - b).abs().masked_fill(~finite, 0).max()
    scale = a.abs().masked_fill(~finite, 0).max()
    return torch.equal(a.isfinite(), b.isfinite()) and bool(error <= tolerance * scale)
