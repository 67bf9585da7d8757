"""Gradients that a forward asks for, by parameters that uses hide from autograd.

Torch would say that the parameter is not used or, if that is allowed, give no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2rw_ext.errors import NotExactError
from l2rw_ext.layers.base import Function
from l2rw_ext.layers.torch_functions import getters
from l2rw_ext.tracing.interception import Interception, rewrites


@rewrites(torch.autograd.grad)
def _grad(
    mode: Interception, func: Function, outputs: Any, inputs: Any, *args: Any, **kwargs: Any
) -> Any:
    for x in inputs:
        _check(mode, x)
    return NotImplemented


@rewrites(*getters("grad"))
def _read(mode: Interception, func: Function, x: Tensor) -> Any:
    _check(mode, x)
    return NotImplemented


def _check(mode: Interception, x: Any) -> None:
    if mode.is_root(x):
        raise NotExactError(f"the forward asks for the gradient of {mode.name_of(x)}")
