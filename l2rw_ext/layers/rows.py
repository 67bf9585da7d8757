"""Taking the rows of active examples."""

from __future__ import annotations

from torch import Tensor

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import without_weight


def active_rows(
    z: Tensor, g: Tensor, weights: Tensor, active: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The z and w·g of ``active`` examples; rows of the others are never read (0·NaN is NaN).

    If the host does not know which examples are active, the result has all rows, and those of the
    others are zero. An index in z stays unchanged.
    """
    if active is None:
        scaled = (g * weights.view(-1, *[1] * (g.dim() - 1))).to(g.dtype)
        if z.is_floating_point():
            z = z.masked_fill(without_weight(weights, z.dim()), 0)
        return z, scaled.masked_fill(without_weight(weights, g.dim()), 0)
    scaled = ops.scale_rows(g, weights, active)
    if active.numel() < z.shape[0]:
        z = z.index_select(0, active)
    return z, scaled
