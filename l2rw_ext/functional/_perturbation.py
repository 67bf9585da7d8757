"""What the Functions of all layers share: they add ε_i times a term that is linear in V and V_b.

A perturbed layer is torch's layer plus ε_i (V z_i + V_b). Torch computes the first part and the
gradients of the parameters. A Function adds the second part, keeps nothing but its inputs, and
forms the gradient of ε in backward, in one pass over z and g.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .directions import accumulation_dtype


def _forward_mode() -> bool:
    return forward_ad._current_level >= 0


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """Runs a Function; in forward mode only its forward, which consists of torch operations.

    ``torch.compile`` takes no Function with a ``jvp``, and none is needed: torch differentiates the
    operations of the forward.
    """
    run = function.forward if _forward_mode() else function.apply
    result: Tensor = run(*arguments)
    return result


def with_signature(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps the signature of a Function's forward, which ``apply`` would inspect at every call."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def fused() -> bool:
    """Says whether an operator without a second derivative or a tangent may serve."""
    return not torch.is_grad_enabled() and not _forward_mode()


def along(eps: Tensor, like: Tensor, example_dim: int) -> Tensor:
    """Returns ``eps`` (n,) shaped to broadcast along ``example_dim`` of ``like``, in its dtype."""
    shape = [1] * like.dim()
    shape[example_dim] = eps.shape[0]
    return eps.view(shape).to(like.dtype)


def add_term(y: Tensor, eps: Tensor, term: Tensor, example_dim: int) -> Tensor:
    """Returns y_i + ε_i term_i."""
    return torch.addcmul(y, along(eps, y, example_dim), term)


def example_sum(g: Tensor, term: Tensor, example_dim: int) -> Tensor:
    """Returns Σ g_i · term_i for each example, (n,), in the accumulation dtype of g."""
    product = g * term
    dims = [d for d in range(product.dim()) if d != example_dim]
    dtype = accumulation_dtype(product.dtype)
    return product.sum(dims, dtype=dtype) if dims else product.to(dtype)


def rows(value: Tensor, example_dim: int, kept: Sequence[int]) -> Tensor:
    """Returns ``value`` as (n, T, d): d runs over the dimensions ``kept``, T over all others.

    A view where the strides allow it.
    """
    others = [d for d in range(value.dim()) if d != example_dim and d not in kept]
    size = value.shape
    positions = math.prod([size[d] for d in others])
    channels = math.prod([size[d] for d in kept])
    return value.permute(example_dim, *others, *kept).reshape(
        size[example_dim], positions, channels
    )
