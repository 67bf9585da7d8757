"""Functions that run unfused, so that what they are made of has a forward derivative.

Either the fused kernel has none, or the function is a Python body around one that has a rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from l2rw_ext.engines.forward.mode import Tangents, carries
from l2rw_ext.layers import corrections
from l2rw_ext.layers.base import Function
from l2rw_ext.layers.torch_functions import inside
from l2rw_ext.task.unfused import without_onednn

_BY_PARTS = {
    func: inside(func)
    for func in (F.batch_norm, F.embedding, F.embedding_bag, F.multi_head_attention_forward)
}


@carries(*_BY_PARTS)
def _by_parts(mode: Tangents, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    """Run the Python body under the mode, which then sees ``torch.batch_norm`` and its like."""
    with mode:
        return _BY_PARTS[func](*args, **kwargs)


@carries(torch._weight_norm)
def _weight_norm(mode: Tangents, func: Function, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Its fused kernel has no forward derivative."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_CORRECTED: dict[Function, Function] = {
    F.prelu: corrections.prelu,
    Tensor.prelu: corrections.prelu,
    torch.fmax: corrections.fmax,
    Tensor.fmax: corrections.fmax,
    torch.fmin: corrections.fmin,
    Tensor.fmin: corrections.fmin,
}


@carries(*_CORRECTED)
def _corrected(mode: Tangents, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    """Functions whose forward derivative is wrong in torch run as corrections."""
    return _CORRECTED[func](*args, **kwargs)


@carries(F.scaled_dot_product_attention)
def _attention(mode: Tangents, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    mode.attention = True
    with sdpa_kernel(SDPBackend.MATH):
        return func(*args, **kwargs)


@carries(torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu)
def _recurrence(mode: Tangents, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    """Torch's fused layer has no forward derivative; its unfused composition has one."""
    with without_onednn():
        return func(*args, **kwargs)
