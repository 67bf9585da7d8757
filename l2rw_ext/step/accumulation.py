"""From weighted gradients to ``p.grad``, at once or in one sum over several micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype
from l2rw_ext.task.task import Direction

from .weighing import Computed, Gradients


class _AccumulateGrad(torch.autograd.Function):
    """A node whose backward gives finished gradients to the parameters' accumulators.

    The gradients go through autograd, so that tensor hooks and post-accumulate hooks fire. They go
    through a Function and not through ``torch.autograd.backward(params, grads)``, because there the
    caller's references make every accumulator copy the gradient it could have kept.
    """

    @staticmethod
    def forward(ctx: Any, box: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.box = box
        # On the device of the gradients: autograd then knows the stream they were computed on.
        return torch.empty((), device=box[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.box)
        ctx.box.clear()
        return (None, *gradients)


def accumulate_grad(gradients: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Add each gradient to its parameter's ``grad``, firing the parameter's hooks.

    The list is emptied, so that a parameter without a ``grad`` takes the tensor over uncopied.
    """
    parameters = [p for p, _ in gradients]
    box = [g for _, g in gradients]
    gradients.clear()
    if parameters:
        node = _AccumulateGrad.apply(box, *parameters)
        torch.autograd.backward(node, torch.ones_like(node))


def filled_if(condition: Tensor | None, gradients: Gradients, value: float) -> Gradients:
    """The gradients, or ``value`` in each place if the condition, shape (), holds.

    The host does not read the condition. None stands for one that does not hold.
    """
    if condition is None:
        return gradients
    return [(p, _filled_if(condition, g, value)) for p, g in gradients]


def _filled_if(condition: Tensor, g: Tensor, value: float) -> Tensor:
    if not g.is_sparse:
        return g.masked_fill(condition, value)
    values = g._values().masked_fill(condition, value)
    return torch.sparse_coo_tensor(g._indices(), values, g.shape, check_invariants=False)


class Accumulation:
    """Sums Σ_i max(u_i, 0) ∇f_i over micro-batches, to be divided once by Σ_i max(u_i, 0).

    The sum is exact: a batch that is cut into micro-batches has the weights and the gradient of the
    whole. The object also holds one direction, that of the first micro-batch's clean batch, and the
    sum of the rectified scores.
    """

    def __init__(self) -> None:
        self.direction: Direction | None = None
        """The direction v of the first micro-batch, which all micro-batches use."""
        self._totals: dict[nn.Parameter, Tensor] = {}
        self._reached: dict[nn.Parameter, None] = {}
        self._rectified: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._overflow: Tensor | None = None
        self._uniform = False
        self._weights: list[Tensor] | None = None

    @property
    def weights(self) -> list[Tensor]:
        """Final weights, one tensor for each micro-batch; together they sum to one or are all zero.

        Raises:
            RuntimeError: the context has not ended, or ended with an error.
        """
        if self._weights is None:
            raise RuntimeError("the weights are known when the accumulate() context has ended")
        return self._weights

    @property
    def empty(self) -> bool:
        """Whether no weight is positive, though no gradient overflowed."""
        overflowed = self._overflow is not None and bool(self._overflow)
        return not overflowed and not any(bool(w.any()) for w in self.weights)

    def add(self, computed: Computed) -> None:
        """Add the gradient of a micro-batch, whose weights sum to one or are all zero.

        A gradient of equal weights counts as long as no score of any micro-batch was positive.
        """
        uniform = computed.uniform
        rectified, kept = computed.rectified, computed.kept
        self._rectified.append(rectified)
        self._kept.append(kept)
        self._reached.update((p, None) for p, _ in computed.gradients)
        if computed.overflow is not None:
            held = self._overflow
            self._overflow = computed.overflow if held is None else held | computed.overflow
        if self._uniform and not uniform:
            self._totals.clear()
        if uniform and self._totals and not self._uniform:
            return
        self._uniform = uniform
        factor = (kept if uniform else rectified).sum()
        for p, g in computed.gradients:
            g = g.to(accumulation_dtype(g.dtype)) * factor.to(accumulation_dtype(g.dtype))
            held = self._totals.get(p)
            self._totals[p] = g if held is None else held.add_(g)
        computed.gradients.clear()

    def finish(self) -> Gradients:
        """The weighted gradient of all micro-batches; from now on the weights are known."""
        if not self._rectified:
            self._weights = []
            return []
        parts = self._kept if self._uniform else self._rectified
        joined = torch.cat(parts)
        total = joined.sum()
        weights = joined / total if self._uniform else ops.normalize_weights(joined)
        self._weights = list(weights.split([part.numel() for part in parts]))
        total = total + (total == 0).to(total.dtype)  # Eq. 9
        gradients = [
            (p, (self._totals[p] / total.to(self._totals[p].dtype)).to(p.dtype))
            if p in self._totals
            else (p, torch.zeros_like(p))
            for p in self._reached
        ]
        return filled_if(self._overflow, gradients, float("inf"))
