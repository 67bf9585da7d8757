"""Bags of embeddings, all of one length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Mode, Use
from .embedding import EMBEDDING
from .registry import handles


class _EmbeddingBagUse(torch.autograd.Function):
    """Sum or mean of W[index] over the last dimension of the index, without the padding index."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, token: Tensor, use: Use, how: str) -> Tensor:
        ctx.use, ctx.how = use, how
        assert use.weight is not None
        ctx.save_for_backward(index)
        return F.embedding_bag(index, use.weight, mode=how, padding_idx=use.options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None, None]:
        (index,) = ctx.saved_tensors
        use: Use = ctx.use
        assert use.sink is not None
        with use.sink.backward_of(use):
            if ctx.how == "mean":
                counted = torch.ones_like(index) if use.options is None else index != use.options
                g = g / counted.sum(1, keepdim=True).clamp(min=1)
            use.sink.report(use, index, g.unsqueeze(1).expand(*index.shape, g.shape[-1]))
        return None, None, None, None


def _arguments(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, str, Tensor | None, int | None, bool]:
    plain = max_norm is None and not scale_grad_by_freq and not sparse
    return input, weight, mode, per_sample_weights, padding_idx, plain


@handles(F.embedding_bag)
def _embedding_bag(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    index, weight, how, weights, padding, plain = _arguments(*args, **kwargs)
    if not plain or not mode.is_use(index, weight, None) or index.numel() == 0:
        return mode.other(func, args, kwargs)
    if index.dim() != 2:
        mode.unruled.setdefault(id(weight), "embedding_bag with offsets")
        return mode.other(func, args, kwargs)
    if padding is not None and padding < 0:
        padding += weight.shape[0]
    if how in ("sum", "mean") and weights is None:
        use = mode.use(EMBEDDING, "embedding_bag", weight, None, padding, index)
        if use is not None:
            return _EmbeddingBagUse.apply(index, mode.token, use, how)
    if (how == "max") == (weights is not None) or not torch.is_grad_enabled():
        return mode.other(func, args, kwargs)
    with mode:
        return _by_rows(index, weight, weights, padding)


def _by_rows(index: Tensor, weight: Tensor, weights: Tensor | None, padding: int | None) -> Tensor:
    """The sum of weighted rows, or without weights the largest of all."""
    rows = F.embedding(index, weight, padding)
    padded = torch.zeros_like(index) if padding is None else index == padding
    padded = padded.bool().unsqueeze(-1)
    if weights is not None:
        return (rows * weights.unsqueeze(-1)).masked_fill(padded, 0).sum(1)
    empty = padded.all(1)
    return rows.masked_fill(padded, -torch.inf).max(1).values.masked_fill(empty, 0)
