"""ReLU, the activation that stands between every two layers of most networks.

Torch's own rule would keep the tangent of every activation alive until the forward is over, because
autograd saves the activation together with its tangent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Function, dual, handles, operands, unpack

if TYPE_CHECKING:
    from .mode import Tangents


@handles(F.relu, torch.relu, Tensor.relu)
def _relu(mode: Tangents, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, inplace = operands(args, kwargs, "input", "inplace")
    if inplace:
        return torch.relu_(x)
    z, dz = unpack(x)
    y = torch.relu(z)
    with torch.no_grad():
        dy = torch.ops.aten.threshold_backward(dz, y, 0)
    return dual(y, dy)
