"""From scores to weights (Eq. 8-9), and sums over examples by weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2rw_ext.devices import without_autocast
from l2rw_ext.ops.arithmetic import accumulation_dtype, parts

from .checks import Checks


def without_weight(weights: Tensor, dims: int) -> Tensor:
    """Where w_i = 0, in a shape that broadcasts along ``dims`` dimensions."""
    return (weights == 0).view(-1, *[1] * (dims - 1))


@without_autocast()
def weighted_sum(gradients: Tensor, weights: Tensor) -> Tensor:
    """W = Σ_i w_i G_i over the examples with w_i ≠ 0."""
    check = Checks("weighted_sum", "gradients", gradients)
    check.require(
        gradients.dim() >= 1,
        f"gradients must have at least 1 dimension, got shape {tuple(gradients.shape)}",
    )
    check.dims("weights", weights, 1)
    check.floating()
    check.vector("weights", weights, gradients.shape[0], "examples of gradients")

    dtype = accumulation_dtype(gradients.dtype)
    n, shape = gradients.shape[0], gradients.shape[1:]
    if gradients.dim() == 1:
        gradients = gradients.unsqueeze(1)
    weights = weights.to(dtype)
    left_out = without_weight(weights, gradients.dim())
    total = gradients.new_empty(gradients.shape[1:], dtype=dtype)
    width = math.prod(gradients.shape[2:])
    # The gradients are the largest buffer of a step: a part of them is copied at a time.
    for part in parts(gradients.shape[1], n * width * dtype.itemsize):
        kept = gradients[:, part].to(dtype).masked_fill(left_out, 0)
        into = total[part]
        into.copy_((weights @ kept.reshape(n, into.numel())).view(into.shape))
    return total.view(shape)


@without_autocast()
def scale_rows(g: Tensor, weights: Tensor, active: Tensor) -> Tensor:
    """Rows w_a g_a, for a in ``active``."""
    check = Checks("scale_rows", "g", g)
    check.dims("g", g, 3)
    check.dims("weights", weights, 1)
    check.dims("active", active, 1)
    check.floating()
    check.vector("weights", weights, g.shape[0], "examples of g")
    check.device("active", active)
    check.require(
        active.dtype == torch.int64,
        f"active must be int64, got {str(active.dtype).removeprefix('torch.')}",
    )

    # The dimension that lies side by side in g does so in the result.
    by_channel = g.stride(1) == 1 and g.stride(2) != 1
    if by_channel:
        g = g.transpose(1, 2)
    factors = weights.to(accumulation_dtype(g.dtype)).index_select(0, active)
    rows = g.index_select(0, active) * factors.view(-1, 1, 1)
    rows = rows.to(g.dtype).contiguous()
    return rows.transpose(1, 2) if by_channel else rows


@without_autocast()
def normalize_weights(u: Tensor) -> Tensor:
    """Eq. 8: w̃ = max(u, 0), zero where not finite; Eq. 9: w = w̃ / Σ w̃, zero where that sum is."""
    check = Checks("normalize_weights", "u", u)
    check.dims("u", u, 1)
    check.floating()

    # In float64, as on the CPU: the sum of narrower scores cannot overflow.
    rectified = u.double()
    rectified = rectified.masked_fill(~(rectified.isfinite() & (rectified > 0)), 0)
    # That of float64 scores is scaled down first where it does.
    overflows = rectified.sum().isinf()
    rectified = torch.where(overflows, rectified / max(1, u.shape[0]), rectified)
    total = rectified.sum()
    return (rectified / total.masked_fill(total == 0, 1)).to(u.dtype)
