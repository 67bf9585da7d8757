"""Operators of an embedding: scores, and the weighted gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import Checks
from ._operator import operator, scores
from .arithmetic import accumulation_dtype, weighted


@operator(torch.ops.l2rw_ext.embedding_correlation.default, fake=lambda index, g, *_: scores(g))
def embedding_correlation(index: Tensor, g: Tensor, direction: Tensor) -> Tensor:
    """Scores of an embedding.

    u_i = Σ_t g_it · V[index_it]

    Args:
        index: (n, T) rows, int64 or int32.
        g: (n, T, d) gradient of the summed training losses.
        direction: (v, d) V.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> V = torch.tensor([[1.0], [10.0]])
        >>> ops.embedding_correlation(torch.tensor([[0, 1]]), torch.ones(1, 2, 1), V)
        tensor([11.])
    """
    check = _check(index, g)
    check.same("direction", direction, None, (g.shape[2], "width of g"), or_wide=True)
    rows = direction.index_select(0, index.reshape(-1)).view(g.shape)
    return (g.to(accumulation_dtype(g.dtype)) * rows).sum((1, 2))


@operator(
    torch.ops.l2rw_ext.embedding_weighted_gradient.default,
    fake=lambda index, g, weights, rows: g.new_empty(
        (rows, g.shape[2]), dtype=accumulation_dtype(g.dtype)
    ),
)
def embedding_weighted_gradient(index: Tensor, g: Tensor, weights: Tensor, rows: int) -> Tensor:
    """Weighted gradient of an embedding.

    W_k = Σ w_i g_it over the positions with index_it = k, of the examples with w_i ≠ 0; the
    gradients of the others are never read.

    Args:
        index: (n, T) rows, int64 or int32.
        g: (n, T, d) gradient of the summed training losses.
        weights: (n,) weights.
        rows: the number of rows of the embedding.

    Returns:
        (rows, d) W in the accumulation dtype.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> index, w = torch.tensor([[0, 1], [1, 1]]), torch.tensor([0.5, 2.0])
        >>> ops.embedding_weighted_gradient(index, torch.ones(2, 2, 1), w, 3)
        tensor([[0.5000],
                [4.5000],
                [0.0000]])
    """
    check = _check(index, g)
    check.same("weights", weights, (g.shape[0], "examples of g"), or_wide=True)
    check.require(rows >= 0, f"rows must be at least 0, got {rows}")
    dtype = accumulation_dtype(g.dtype)
    zeros = g.new_zeros((rows, g.shape[2]), dtype=dtype)
    return zeros.index_add(0, index.reshape(-1), weighted(g.to(dtype), weights).flatten(0, 1))


def _check(index: Tensor, g: Tensor) -> Checks:
    check = Checks("g", g)
    examples, positions = (g.shape[0], "examples of g"), (g.shape[1], "positions of g")
    check.integers("index", index, (torch.int64, torch.int32), examples, positions)
    return check
