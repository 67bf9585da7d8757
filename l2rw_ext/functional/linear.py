"""The perturbed fully connected layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l2rw_ext import ops

from ._arguments import (
    check_dense,
    checked_direction,
    checked_eps,
    checked_example_dim,
    is_single,
    required,
)
from ._perturbation import add_term, along, apply, example_sum, fused, rows, with_signature
from .directions import Direction, Factored


def _flat(value: Tensor) -> Tensor:
    """All positions of all examples as rows; batched backward has no rule for ``flatten``."""
    return value.reshape(math.prod(value.shape[:-1]), value.shape[-1])


def _dense_term(x: Tensor, V: Tensor, V_b: Tensor | None) -> Tensor:
    return F.linear(x, V.to(x.dtype), None if V_b is None else V_b.to(x.dtype))


class _DenseLinear(torch.autograd.Function):
    """y_i + ε_i (V x_i + V_b)."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        y: Tensor,  # [..., d_out]
        x: Tensor,  # [..., d_in]
        eps: Tensor,  # [n]
        V: Tensor,  # [d_out, d_in]
        V_b: Tensor | None,  # [d_out]
        example_dim: int,
    ) -> Tensor:
        return add_term(y, eps, _dense_term(x, V, V_b), example_dim)

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
                last = [x.dim() - 1]
                u = ops.dense_correlation(rows(x, dim, last), rows(g, dim, last), V, V_b)
            else:
                u = example_sum(g, _dense_term(x, V, V_b), dim)
            grad_eps = u.to(eps.dtype)
        if need_x or need_V or need_b:
            scaled = g * along(eps, g, dim)
            if need_x:
                grad_x = scaled @ V.to(x.dtype)
            if need_V:
                grad_V = (_flat(scaled).mT @ _flat(x)).to(V.dtype)
            if need_b:
                grad_b = _flat(scaled).sum(0).to(V_b.dtype)
        return g, grad_x, grad_eps, grad_V, grad_b, None


def _factored_gram(x: Tensor, z_clean: Tensor, bias: bool) -> Tensor:
    gram = x @ z_clean.mT
    return gram + 1 if bias else gram


class _FactoredLinear(torch.autograd.Function):
    """y_i + ε_i Σ_s (x_i · z'_s + bias) g'_s, which is Eq. 12 with V never formed."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        y: Tensor,  # [..., d_out]
        x: Tensor,  # [..., d_in]
        eps: Tensor,  # [n]
        z_clean: Tensor,  # [S, d_in], all positions of the clean batch
        g_clean: Tensor,  # [S, d_out]
        bias: bool,
        example_dim: int,
    ) -> Tensor:
        return add_term(y, eps, _factored_gram(x, z_clean, bias) @ g_clean, example_dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, x, eps, z_clean, g_clean, ctx.bias, ctx.example_dim = inputs
        ctx.save_for_backward(x, eps, z_clean, g_clean)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, eps, z_clean, g_clean = ctx.saved_tensors
        _, need_x, need_eps, need_z, need_g, _, _ = ctx.needs_input_grad
        dim = ctx.example_dim
        grad_x = grad_eps = grad_z = grad_g = None
        if need_eps:
            if fused():
                last = [x.dim() - 1]
                u = ops.factored_correlation(
                    rows(x, dim, last),
                    rows(g, dim, last),
                    z_clean.unsqueeze(0),
                    g_clean.unsqueeze(0),
                    ctx.bias,
                )
            else:
                u = example_sum(g, _factored_gram(x, z_clean, ctx.bias) @ g_clean, dim)
            grad_eps = u.to(eps.dtype)
        if need_x or need_z or need_g:
            scaled = g * along(eps, g, dim)
            if need_x or need_z:
                gram = scaled @ g_clean.mT
                if need_x:
                    grad_x = gram @ z_clean
                if need_z:
                    grad_z = _flat(gram).mT @ _flat(x)
            if need_g:
                gram = _factored_gram(x, z_clean, ctx.bias)
                grad_g = _flat(gram).mT @ _flat(scaled)
        return g, grad_x, grad_eps, grad_z, grad_g, None, None


def _add_factored(
    y: Tensor,
    x: Tensor,
    eps: Tensor,
    direction: Factored,
    weight: Tensor,
    has_bias: bool,
    example_dim: int,
) -> Tensor:
    z_clean = required("linear", "z_clean", direction.z_clean)
    g_clean = direction.g_clean
    for name, factor, size_name, size in (
        ("z_clean", z_clean, "d_in", weight.shape[1]),
        ("g_clean", g_clean, "d_out", weight.shape[0]),
    ):
        if factor.dim() < 2 or factor.shape[-1] != size:
            raise ValueError(
                f"linear: direction.{name} must have shape (m, ..., {size_name}) with "
                f"{size_name} = {size}, got {tuple(factor.shape)}"
            )
    if z_clean.shape[:-1] != g_clean.shape[:-1]:
        raise ValueError(
            "linear: direction.z_clean and direction.g_clean must agree in all dimensions but the "
            f"last, got {tuple(z_clean.shape)} and {tuple(g_clean.shape)}"
        )
    z_clean, g_clean = _flat(z_clean.to(y.dtype)), _flat(g_clean)
    bias = has_bias and direction.bias
    positions, clean_positions = math.prod(x.shape[:-1]), z_clean.shape[0]
    d_out, d_in = weight.shape
    dense = (positions + clean_positions) * d_in * d_out
    if positions * clean_positions * (d_in + d_out) < dense:
        return apply(_FactoredLinear, y, x, eps, z_clean, g_clean, bias, example_dim)
    V, V_b = g_clean.mT @ z_clean, g_clean.sum(0) if bias else None
    return apply(_DenseLinear, y, x, eps, V, V_b, example_dim)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.linear` with the weights W + ε_i V and b + ε_i V_b.

    Args:
        input: (n, ..., d_in), or with the examples in any dimension but the last; (d_in,) is one
            example.
        weight: (d_out, d_in).
        bias: (d_out,).
        eps: (n,), any floating dtype; ``None`` is the plain layer.
        direction: ``Dense(V, V_b)``, or ``Factored(z_clean, g_clean)`` with shapes (m, ..., d_in)
            and (m, ..., d_out). Factored never forms V where that takes more operations:
            n T m T' (d_in + d_out) against (n T + m T') d_in d_out multiply-adds.
        example_dim: the dimension of ``input`` that counts the examples.

    Returns:
        The output, (n, ..., d_out). At ε = 0, backward adds Σ_t g_it · (V z_it + V_b) to
        ``eps.grad[i]``: Eq. 12.

    Raises:
        TypeError: ``eps`` or ``direction`` has a wrong type or dtype.
        ValueError: ``eps``, ``direction`` or ``example_dim`` does not fit the layer.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
        >>> v = PF.Dense(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]))
        >>> eps = torch.zeros(3, requires_grad=True)
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
        >>> y = PF.linear(x, weight, bias, eps=eps, direction=v)
        >>> y.sum().backward()
        >>> eps.grad
        tensor([1., 2., 3.])
    """
    if eps is None:
        return F.linear(input, weight, bias)
    if is_single("linear", "eps", eps) or input.dim() == 1:
        one = input.unsqueeze(0)
        eps = eps.reshape(1) if eps.dim() == 0 else eps
        return linear(one, weight, bias, eps=eps, direction=direction).squeeze(0)
    if weight.dim() != 2:
        raise ValueError(
            f"linear: with eps, weight must have shape (d_out, d_in), got {tuple(weight.shape)}"
        )
    dim = checked_example_dim("linear", example_dim, input.dim(), input.dim() - 1)
    y = F.linear(input, weight, bias)
    eps = checked_eps("linear", "eps", eps, y, dim)
    direction = checked_direction("linear", "eps", direction, y)
    x = input.to(y.dtype)
    if isinstance(direction, Factored):
        return _add_factored(y, x, eps, direction, weight, bias is not None, dim)
    V = required("linear", "V", direction.V)
    check_dense("linear", direction, weight, bias)
    return apply(_DenseLinear, y, x, eps, V, direction.V_b, dim)
