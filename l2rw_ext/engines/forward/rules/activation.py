"""ReLU, the activation that stands between every two layers of most networks.

Torch's own rule would keep the tangent of every activation alive until the forward is over, because
autograd saves the activation together with its tangent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext.engines.forward.dual import dual, tangent_of, unpack
from l2rw_ext.engines.forward.mode import Tangents, carries
from l2rw_ext.layers.base import Function


@carries(F.relu, torch.relu, Tensor.relu)
def _relu(mode: Tangents, func: Function, input: Tensor, inplace: bool = False) -> Tensor:
    if inplace:
        return _relu_in_place(input)
    z, dz = unpack(input)
    y = torch.relu(z)
    with torch.no_grad():
        dy = torch.ops.aten.threshold_backward(dz, y, 0)
    return dual(y, dy)


@carries(torch.relu_, Tensor.relu_)
def _relu_(mode: Tangents, func: Function, input: Tensor) -> Tensor:
    return _relu_in_place(input)


def _relu_in_place(x: Tensor) -> Tensor:
    """Write to the primal of which x is a view, if x is all of it: a dual is a view of its primal.

    For a write to a view, autograd's backward copies the whole gradient three times.
    """
    base = x._base
    if base is None or base.grad_fn is None or not _same_place(x, base):
        return torch.relu_(x)
    tangent = tangent_of(x)
    torch.relu_(base)
    with torch.no_grad():
        torch.ops.aten.threshold_backward.grad_input(tangent, base, 0, grad_input=tangent)
    return dual(base, tangent)


def _same_place(x: Tensor, base: Tensor) -> bool:
    return (
        base.data_ptr() == x.data_ptr()
        and base.shape == x.shape
        and base.stride() == x.stride()
        and tangent_of(base) is None
    )
