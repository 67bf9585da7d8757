"""Torch functions whose own derivatives disagree, written out so that all of them agree.

They were found by comparing, function by function, the gradient along a direction with second
derivatives and with forward mode, also at kinks and ties (torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """Torch's gradient treats x = 0 as negative; its other derivatives treat it as positive."""
    if weight.numel() > 1:
        weight = weight.reshape(-1, *[1] * (input.dim() - 2))
    return torch.where(input > 0, input, weight * input)


def fmax(input: Tensor, other: Tensor) -> Tensor:
    """The gradient of a tie goes to the first operand, but torch's tangent is the second's."""
    return torch.where((input >= other) | other.isnan(), input, other)


def fmin(input: Tensor, other: Tensor) -> Tensor:
    """See :func:`fmax`."""
    return torch.where((input <= other) | other.isnan(), input, other)


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Torch loses the second derivative of a layer norm with a bias and no weight."""
    if weight is None and bias is not None:
        return F.layer_norm(input, normalized_shape, None, None, eps) + bias
    return F.layer_norm(input, normalized_shape, weight, bias, eps)
