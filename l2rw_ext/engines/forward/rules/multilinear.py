"""Operations that are linear in input and weight, plus a bias: convolutions, linear, embeddings.

With y = W z + b the tangent is ẏ = W ż + V z + V_b: the same operation, called on the primals with
autograd's graph and on one tangent each without, so that no product with a zero tangent is formed
and nothing of the tangent is recorded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from l2rw_ext.engines.forward.dual import dual, unpack
from l2rw_ext.engines.forward.registry import Function, Mode, handles, operands


@handles(
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.linear,
)
def _product(mode: Mode, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = operands(args, kwargs, "input", "weight", "bias")
    z, dz = unpack(x)
    W, V = unpack(weight)
    b, V_b = unpack(bias)
    y = func(z, W, b, *args[3:], **kwargs)
    with torch.no_grad():
        dy = None
        if V is not None:
            dy = func(z, V, V_b, *args[3:], **kwargs)
            V_b = None
        if dz is not None:
            through = func(dz, W, V_b, *args[3:], **kwargs)
            dy = through if dy is None else dy.add_(through)
        elif V_b is not None:
            dy = func(torch.zeros_like(z), W, V_b, *args[3:], **kwargs)
    return dual(y, dy)
