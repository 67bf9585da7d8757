"""Activations with trainable parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import corrections
from .base import Mode
from .broadcast import root_meets_data
from .registry import handles


def _arguments(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return input, weight


@handles(F.prelu, Tensor.prelu)
def _prelu(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """PReLU: x where it is positive, and elsewhere x times the slope of its channel."""
    x, slope = _arguments(*args, **kwargs)
    if not root_meets_data(mode, [x, slope]) or x.dim() == 0 or not torch.is_grad_enabled():
        return mode.other(func, args, kwargs)
    with mode:
        return corrections.prelu(x, slope)
