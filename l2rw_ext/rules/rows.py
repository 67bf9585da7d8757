"""Taking the rows of active examples."""

from __future__ import annotations

from torch import Tensor

from .. import ops


def active_rows(z: Tensor, g: Tensor, weights: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The z and w·g of ``active`` examples; rows of the others are never read (0·NaN is NaN)."""
    scaled = ops.scale_rows(g, weights, active)
    if active.numel() < z.shape[0]:
        z = z.index_select(0, active)
    return z, scaled
