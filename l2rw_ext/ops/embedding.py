"""Operator of an embedding: its scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import Checks
from ._operator import operator, scores
from .arithmetic import accumulation_dtype


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
    check = Checks("g", g)
    examples, positions = (g.shape[0], "examples of g"), (g.shape[1], "positions of g")
    check.integers("index", index, (torch.int64, torch.int32), examples, positions)
    check.same("direction", direction, None, (g.shape[2], "width of g"), or_wide=True)
    rows = direction.index_select(0, index.reshape(-1)).view(g.shape)
    return (g.to(accumulation_dtype(g.dtype)) * rows).sum((1, 2))
