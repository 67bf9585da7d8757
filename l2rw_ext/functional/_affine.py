"""The Function of the layers that scale and shift: normalization and broadcast parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l2rw_ext import ops

from ._perturbation import add_term, along, apply, example_sum, fused, rows, with_signature


def _term(x: Tensor | None, V: Tensor | None, V_b: Tensor | None, dtype: torch.dtype) -> Tensor:
    V_b = None if V_b is None else V_b.to(dtype)
    if x is None or V is None:
        assert V_b is not None
        return V_b
    V = V.to(dtype)
    return x * V if V_b is None else torch.addcmul(V_b, x, V)


def _correlation(
    x: Tensor | None, g: Tensor, V: Tensor | None, V_b: Tensor | None, example_dim: int
) -> Tensor:
    some = V if V is not None else V_b
    assert some is not None
    offset = g.dim() - some.dim()
    kept = [d for d in range(g.dim()) if d >= offset and some.shape[d - offset] != 1]
    gradient = rows(g, example_dim, kept)
    # Without V there is no x, and the first result is not used.
    inputs = gradient if x is None else rows(x, example_dim, kept)
    G, G_b = ops.affine_example_gradients(inputs, gradient, None, None)
    u = G.new_zeros(G.shape[0])
    if V is not None:
        u = u + G @ V.reshape(V.numel()).to(G.dtype)
    if V_b is not None:
        u = u + G_b @ V_b.reshape(V_b.numel()).to(G.dtype)
    return u


class _Affine(torch.autograd.Function):
    """y_i + ε_i (x_i V + V_b), where V and V_b broadcast to y, the same for all examples.

    x is ``None`` exactly where V is.
    """

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        y: Tensor,  # [*s]
        x: Tensor | None,  # [*s]
        eps: Tensor,  # [n]
        V: Tensor | None,  # broadcasts to [*s]
        V_b: Tensor | None,  # as V
        example_dim: int,
    ) -> Tensor:
        return add_term(y, eps, _term(x, V, V_b, y.dtype), example_dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, x, eps, V, V_b, ctx.example_dim = inputs
        ctx.save_for_backward(x, eps, V, V_b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, eps, V, V_b = ctx.saved_tensors
        _, need_x, need_eps, need_V, need_b, _ = ctx.needs_input_grad
        dim = ctx.example_dim
        grad_x = grad_eps = grad_V = grad_b = None
        if need_eps:
            if fused():
                u = _correlation(x, g, V, V_b, dim)
            else:
                u = example_sum(g, _term(x, V, V_b, g.dtype), dim)
            grad_eps = u.to(eps.dtype)
        if need_x or need_V or need_b:
            scaled = g * along(eps, g, dim)
            if need_x:
                grad_x = scaled * V.to(g.dtype)
            if need_V:
                grad_V = (scaled * x).sum_to_size(V.shape).to(V.dtype)
            if need_b:
                grad_b = scaled.sum_to_size(V_b.shape).to(V_b.dtype)
        return g, grad_x, grad_eps, grad_V, grad_b, None


def add_affine(
    y: Tensor,
    x: Tensor | None,
    eps: Tensor,
    V: Tensor | None,
    V_b: Tensor | None,
    example_dim: int,
) -> Tensor:
    """Returns y_i + ε_i (x_i V + V_b), where x is ``None`` exactly where V is."""
    if V is None and V_b is None:
        return y
    x = None if x is None else x.to(y.dtype)
    return apply(_Affine, y, x, eps, V, V_b, example_dim)
