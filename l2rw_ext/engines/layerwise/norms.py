"""Norms of the gradients of single examples, from the z and g that scores are computed from."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext.layers.base import Outer, Roots, Single, Use
from l2rw_ext.ops.arithmetic import accumulation_dtype, product
from l2rw_ext.task.isolation import BelowAutograd
from l2rw_ext.tracing.graph import sources

from .derived import Leaves


@dataclass
class _Held:
    """What uses have reported of the gradients of one root, which add up."""

    root: Tensor
    formed: Tensor | None = None
    """(n, ...) with the root's elements, accumulation dtype."""
    products: list[Outer] = field(default_factory=list)

    def add(self, single: Single) -> None:
        """Take the part of one more use."""
        if not isinstance(single, Tensor):
            self.products.append(single)
            return
        shape = single.shape[0], *self.root.shape
        single = single.reshape(shape).to(accumulation_dtype(single.dtype))
        self.formed = single if self.formed is None else self.formed + single

    def form(self) -> Tensor:
        """G_i, shape (n, *root.shape)."""
        while self.products:
            a, b = self.products.pop()
            dtype = accumulation_dtype(b.dtype)
            if a.dim() == b.dim():
                self.add(product(a.mT, b, dtype))
            else:
                zeros = b.new_zeros(b.shape[0], *self.root.shape, dtype=dtype)
                self.add(zeros.scatter_add(1, a.unsqueeze(-1).expand_as(b), b.to(dtype)))
        assert self.formed is not None
        return self.formed

    def norms(self) -> Tensor:
        """|G_i|, shape (n,), float64; G_i need not be formed if it is nothing but Σ_t a_t b_tᵀ.

        Squares are of numbers near one, so that none of them overflows or vanishes.
        """
        if self.formed is not None:
            G = self.form()
            power = _power(G)
            return _over(G, power).flatten(1).square().sum(1).double().sqrt() * power
        rows = _joined([(a, b) for a, b in self.products if a.dim() == b.dim()])
        looked_up = _joined([(a, b) for a, b in self.products if a.dim() < b.dim()])
        powers = [_power(c) for c in looked_up[1:]]
        if rows:
            p, q = map(_power, rows)
            powers.append(p * q)
        power = functools.reduce(torch.maximum, powers)
        squares = []
        if rows:
            a, b = _over(rows[0], p), _over(_over(rows[1], q), power / (p * q))
            if looked_up:  # which may be the opposite of what the rows are
                a, b = a.double(), b.double()
            squares.append(_of_rows(a, b))
        if looked_up:
            index, c = looked_up[0], _over(looked_up[1], power)
            c = c.double() if rows else c
            squares.append(_of_indices(index, c))
            if rows:
                squares.append(2 * _between(index, c, a, b))
        total = torch.stack(squares).sum(0, dtype=torch.float64)
        return total.clamp(min=0).sqrt() * power  # below zero rounding may leave it


def _power(x: Tensor) -> Tensor:
    """The power of two next to the largest number of each example, shape (n,), float64."""
    largest = x.abs().flatten(1).amax(1).double()
    usual = (largest > 0) & largest.isfinite()
    return torch.where(usual, largest / torch.frexp(largest).mantissa, torch.ones_like(largest))


def _over(x: Tensor, power: Tensor) -> Tensor:
    """Each example over its power of two, which is exact."""
    dtype = accumulation_dtype(x.dtype)
    return x.to(dtype) / power.to(dtype).view(-1, *[1] * (x.dim() - 1))


def _joined(products: list[Outer]) -> Outer | tuple[()]:
    """One sum of products that has the terms of all."""
    if not products:
        return ()
    a, b = zip(*products, strict=True)
    return torch.cat(a, 1), torch.cat(b, 1)


def _of_rows(a: Tensor, b: Tensor) -> Tensor:
    """|Σ_t a_t b_tᵀ|² for a (n, T, i), b (n, T, k), in the form that is cheaper."""
    dtype = accumulation_dtype(b.dtype)
    (T, i), k = a.shape[1:], b.shape[2]
    if T == 1:
        return a.to(dtype).square().sum((1, 2)) * b.to(dtype).square().sum((1, 2))
    if T * (i + k) > i * k:
        return product(a.mT, b, dtype).square().sum((1, 2))
    # Σ_{t,t'} (a_t·a_t') (b_t·b_t'), whose terms may cancel as those of the sum do not.
    a, b, dtype = a.double(), b.double(), torch.float64
    return (product(a, a.mT, dtype) * product(b, b.mT, dtype)).sum((1, 2))


def _of_indices(a: Tensor, b: Tensor) -> Tensor:
    """|Σ_t e(a_t) b_tᵀ|² for indices a (n, T), b (n, T, k): rows of equal indices are summed."""
    a, order = a.sort(1)
    b = b.to(accumulation_dtype(b.dtype)).gather(1, order.unsqueeze(-1).expand_as(b))
    place = F.pad((a[:, 1:] != a[:, :-1]).cumsum(1), (1, 0))
    sums = torch.zeros_like(b).scatter_add(1, place.unsqueeze(-1).expand_as(b), b)
    return sums.square().sum((1, 2))


def _between(index: Tensor, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """<Σ_t e(index_t) c_tᵀ, Σ_s a_s b_sᵀ> = Σ_{s,t} a_s[index_t] (b_s·c_t), shape (n,)."""
    dtype = accumulation_dtype(b.dtype)
    picked = a.gather(2, index.unsqueeze(1).expand(-1, a.shape[1], -1))
    return (picked.to(dtype) * (b.to(dtype) @ c.to(dtype).mT)).sum((1, 2))


class Norms:
    """|∇f_i| over some parameters, added up while the backward runs.

    The gradients of uses that share a parameter add up, and not their squares: they wait for the
    last of them. A tensor that is derived from parameters waits too: its gradients go back to these
    at the end, all examples at once.

    Args:
        over: the ids of the parameters.
        leaves: the trainable parameters.
        uses: those that the training losses reach.
        scores: zeros for the scores, shape (n,).
    """

    def __init__(
        self, over: Collection[int], leaves: Leaves, uses: Sequence[Use], scores: Tensor
    ) -> None:
        self._norms = torch.zeros_like(scores)
        roots = [root for use in uses for root in use.roots if root is not None]
        self._derived = {id(root) for root in roots if root not in leaves}
        self._parameters = [p for p in leaves.parameters if id(p) in over]
        found = {id(root): sources(root) for root in roots}
        self._number = Counter(key for root in roots for key in found[id(root)])
        self._counted = {key for key, own in found.items() if not own.isdisjoint(over)}
        self._held: dict[int, _Held] = {}

    def add(self, use: Use, singles: tuple[Single | None, Single | None] | Roots) -> None:
        """Take the gradients of a use's (weight, bias) of single examples."""
        for root, single in zip(use.roots, singles, strict=True):
            if root is None or single is None or id(root) not in self._counted:
                continue
            held = self._held.setdefault(id(root), _Held(root))
            held.add(single)
            if self._number[id(root)] == 1 and id(root) not in self._derived:
                self._add(self._held.pop(id(root)))

    def finish(self) -> Tensor:
        """The norms, shape (n,)."""
        derived = [self._held.pop(key) for key in list(self._held) if key in self._derived]
        with BelowAutograd():
            formed = [held.form().to(held.root.dtype) for held in derived]
        pulled: Sequence[Tensor | None] = [None] * len(self._parameters)
        if derived:
            pulled = torch.autograd.grad(
                [held.root for held in derived],
                self._parameters,
                formed,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        with BelowAutograd():
            for p, single in zip(self._parameters, pulled, strict=True):
                if single is not None:
                    self._held.setdefault(id(p), _Held(p)).add(single)
            while self._held:
                self._add(self._held.popitem()[1])
            return self._norms

    def _add(self, held: _Held) -> None:
        self._norms = self._norms.hypot(held.norms().to(self._norms.dtype))
