"""Taking the rows of active examples, and products over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


def active_rows(z: Tensor, g: Tensor, weights: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The z and w·g of ``active`` examples; rows of the others are never read (0·NaN is NaN)."""
    scaled = ops.scale_rows(g, weights, active)
    if active.numel() < z.shape[0]:
        z = z.index_select(0, active)
    return z, scaled


def product(g: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over rows of g zᵀ in ``dtype``: (rows, d_out) and (rows, d_in) to (d_out, d_in)."""
    if g.dtype == dtype:
        return g.t() @ z
    if g.device.type == "cuda" and dtype == torch.float32:
        return torch.mm(g.t(), z, out_dtype=dtype)
    return g.t().to(dtype) @ z.to(dtype)
