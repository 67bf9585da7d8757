"""Scores of an embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from l2rw_ext.devices import without_autocast
from l2rw_ext.ops.arithmetic import accumulation_dtype

from .checks import Checks


@without_autocast()
def embedding_correlation(index: Tensor, g: Tensor, direction: Tensor) -> Tensor:
    """u_i = Σ_t g_it · V[index_it]."""
    check = Checks("embedding_correlation", "g", g)
    check.dims("index", index, 2)
    check.dims("g", g, 3)
    check.dims("direction", direction, 2)
    check.floating()
    check.same_or_wide("direction", direction)
    check.device("index", index)
    check.size("index", index, 0, g.shape[0], "examples of g")
    check.size("index", index, 1, g.shape[1], "positions of g")
    check.size("direction", direction, 1, g.shape[2], "width of g")
    check.require(
        index.dtype in (torch.int64, torch.int32),
        f"index must be int64 or int32, got {str(index.dtype).removeprefix('torch.')}",
    )

    dtype = accumulation_dtype(g.dtype)
    rows = direction.index_select(0, index.reshape(-1)).view(g.shape)
    return (g.to(dtype) * rows).sum((1, 2))
