"""One normalisation of the weights over several micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype
from l2rw_ext.task.clean_gradient import Direction

from .weighing import Gradients, Weighed, infinite_if


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
        self._sum: Tensor | None = None
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

    def add(self, weighed: Weighed, gradients: Gradients) -> None:
        """Add the gradient of a micro-batch, whose weights sum to one or are all zero.

        A gradient of equal weights counts as long as no score of any micro-batch was positive.
        """
        uniform = weighed.uniform
        rectified = weighed.rectified
        positive = rectified.sum()
        self._rectified.append(rectified)
        self._kept.append(weighed.kept)
        self._sum = positive if self._sum is None else self._sum + positive
        self._reached.update((p, None) for p, _ in gradients)
        if weighed.overflow is not None:
            held = self._overflow
            self._overflow = weighed.overflow if held is None else held | weighed.overflow
        if self._uniform and not uniform:
            self._totals.clear()
        if uniform and self._totals and not self._uniform:
            return
        self._uniform = uniform
        factor = weighed.kept.sum() if uniform else positive
        for p, g in gradients:
            g = g.to(accumulation_dtype(g.dtype)) * factor.to(accumulation_dtype(g.dtype))
            held = self._totals.get(p)
            self._totals[p] = g if held is None else held.add_(g)
        gradients.clear()

    def finish(self) -> Gradients:
        """The weighted gradient of all micro-batches; from now on the weights are known."""
        if self._sum is None:
            self._weights = []
            return []
        counts = [kept.to(self._sum.dtype) for kept in self._kept]
        count = torch.stack([c.sum() for c in counts]).sum()
        if self._uniform:
            self._weights = [c / count for c in counts]
            total = count
        else:
            joined = ops.normalize_weights(torch.cat(self._rectified))
            self._weights = list(joined.split([r.numel() for r in self._rectified]))
            total = self._sum + (self._sum == 0).to(self._sum.dtype)  # Eq. 9
        gradients = [
            (p, (self._totals[p] / total.to(self._totals[p].dtype)).to(p.dtype))
            if p in self._totals
            else (p, torch.zeros_like(p))
            for p in self._reached
        ]
        return infinite_if(self._overflow, gradients)
