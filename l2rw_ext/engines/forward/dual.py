"""Dual tensors: a primal with its autograd graph, and a tangent beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual


def unpack(x: Any) -> tuple[Any, Any]:
    """The primal with its autograd graph, and the tangent; each is None if it is absent."""
    if x is None or x.is_inference():
        return x, None
    primal, tangent = torch._VF._unpack_dual(x, level=0)
    return (x, None) if tangent is None else (primal, tangent)


def tangent_of(x: Tensor) -> Tensor | None:
    """The tangent of a dual tensor, None for any other."""
    if x.is_inference():
        return None  # torch cannot look for one while a dispatch mode is active
    tangent: Tensor | None = torch._VF._unpack_dual(x, level=0)[1]
    return tangent


def dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """The dual tensor, or the primal itself if there is no tangent."""
    if tangent is None:
        return primal
    joined: Tensor = make_dual(primal, tangent)
    return joined
