"""Batch norm with the statistics of the batch, which the direction moves as well.

The Jacobian of the normalisation is symmetric, so that the tangent is the backward applied to the
tangent of the input; one operator forms it together with x̂ V + V_b. Statistics and primal are
torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext import ops
from l2rw_ext.engines.forward.dual import dual, unpack
from l2rw_ext.engines.forward.mode import Tangents, carries
from l2rw_ext.layers.base import Function
from l2rw_ext.layers.normalization import format_of

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@carries(torch.batch_norm)
def _batch_norm(
    mode: Tangents,
    func: Function,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    statistics = running_mean, running_var
    if not training or input.dtype not in _DTYPES or input.numel() == 0:
        return func(input, weight, bias, *statistics, training, momentum, eps, cudnn_enabled)
    x, dx = unpack(input)
    gamma, V = unpack(weight)
    beta, V_b = unpack(bias)
    y, mean, rstd = torch.native_batch_norm(x, gamma, beta, *statistics, True, momentum, eps)
    with torch.no_grad():
        dy = ops.batch_norm_tangent(x, dx, mean, rstd, gamma, V, V_b)
    return dual(y, dy)


@carries(F.group_norm)
def _group_norm(
    mode: Tangents, func: Function, /, input: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Contiguous inside: torch's forward derivative fails for channels last."""
    out: Tensor = func(input.contiguous(), *args, **kwargs)
    return out if input.is_contiguous() else out.contiguous(memory_format=format_of(input))
