"""The Function of all perturbed layers: it adds ε_i times a term that is linear in V and V_b.

Torch computes the plain layer and the gradients of its parameters. The Function adds the term,
keeps nothing but its inputs, and forms the gradient of ε in backward, in one pass over z and g. The
term and its transposes come from the layer's one description, :class:`l2rw_ext.layers.base.Layer`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from l2rw_ext.layers.base import Call, Layer, Roots, RowMap, Use
from l2rw_ext.ops.arithmetic import accumulation_dtype

from ._arguments import check_dense, checked_direction, checked_eps, required
from .directions import Direction, Factored

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""With respect to x, V and V_b; None where it is not needed."""


@dataclass(frozen=True)
class Term:
    """What ε multiplies: ``layer.term(x, V, V_b)``."""

    layer: Layer
    options: Any
    example_dim: int

    def value(self, x: Tensor, direction: Roots, dtype: torch.dtype) -> Tensor:
        """The term, made of differentiable operations."""
        V, V_b = direction
        return self.layer.term(x, _to(V, dtype), _to(V_b, dtype), self.options)

    def gradients(
        self, g: Tensor, x: Tensor, direction: Roots, needed: tuple[bool, ...]
    ) -> Gradients:
        """Those of <g, term>, made of differentiable operations."""
        V, V_b = direction
        need_x, need_V, need_b = needed
        data = None
        if need_x:
            data = self.layer.data_gradient(g, x, _to(V, g.dtype), self.options)
        weight = bias = None
        if need_V or need_b:
            like = V if need_V else None, V_b if need_b else None
            weight, bias = self.layer.term_transpose(g, x, like, self.options)
        return (
            data,
            None if weight is None or V is None else weight.to(V.dtype),
            None if bias is None or V_b is None else bias.to(V_b.dtype),
        )

    def scores(self, x: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """<g_i, term_i> for each example, (n,), by an operator without derivatives."""
        use = Use(self.layer, Call("", g, *direction, self.options), (None, None))
        dim, leading = self.example_dim, self.layer.leading(use, g)
        outer, inner = math.prod(g.shape[:dim]), math.prod(g.shape[dim + 1 : leading])
        z, g = self.layer.prepare(use, x, g, RowMap(outer, g.shape[dim], inner))
        return self.correlation(use, z, g, direction)

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """The scores from input and gradient with the examples first."""
        dtype = accumulation_dtype(g.dtype)
        V, V_b = direction
        return self.layer.correlation(use, z, g, (_to(V, dtype), _to(V_b, dtype)))


def _to(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _with_signature(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps the signature of a Function's forward, which ``apply`` would inspect at every call."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


def _forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _along(eps: Tensor, like: Tensor, example_dim: int) -> Tensor:
    """ε (n,) shaped to broadcast along ``example_dim`` of ``like``, in its dtype."""
    shape = [1] * like.dim()
    shape[example_dim] = eps.shape[0]
    return eps.view(shape).to(like.dtype)


class _Perturbed(torch.autograd.Function):
    """y_i + ε_i term(x_i, V, V_b)."""

    generate_vmap_rule = True

    @staticmethod
    @_with_signature
    def forward(
        y: Tensor,
        x: Tensor,
        eps: Tensor,  # [n]
        V: Tensor | None,
        V_b: Tensor | None,
        term: Term,
    ) -> Tensor:
        return torch.addcmul(y, _along(eps, y, term.example_dim), term.value(x, (V, V_b), y.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, x, eps, V, V_b, ctx.term = inputs
        ctx.save_for_backward(x, eps, V, V_b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, eps, V, V_b = ctx.saved_tensors
        _, need_x, need_eps, need_V, need_b, _ = ctx.needs_input_grad
        term: Term = ctx.term
        dim = term.example_dim
        u = None
        if need_eps:
            # An operator serves where nobody differentiates the scores again: it has no derivative.
            if g.numel() and not torch.is_grad_enabled() and not _forward_mode():
                u = term.scores(x, g, (V, V_b))
            else:
                product = g * term.value(x, (V, V_b), g.dtype)
                others = [d for d in range(g.dim()) if d != dim]
                dtype = accumulation_dtype(g.dtype)
                u = product.sum(others, dtype=dtype) if others else product.to(dtype)
            u = u.to(eps.dtype)
        gradients: Gradients = None, None, None
        if need_x or need_V or need_b:
            scaled = g * _along(eps, g, dim)
            gradients = term.gradients(scaled, x, (V, V_b), (need_x, need_V, need_b))
        return g, gradients[0], u, *gradients[1:], None


def add_term(
    y: Tensor, x: Tensor, eps: Tensor, V: Tensor | None, V_b: Tensor | None, term: Term
) -> Tensor:
    """y_i + ε_i term(x_i, V, V_b).

    In forward mode only the Function's forward runs, which consists of torch operations:
    ``torch.compile`` takes no Function with a ``jvp``, and none is needed.
    """
    run = _Perturbed.forward if _forward_mode() else _Perturbed.apply
    out: Tensor = run(y, x, eps, V, V_b, term)
    return out


def checked_factors(
    name: str, direction: Factored, clean_shape: Callable[[Tensor], tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Z' and g'. ``clean_shape`` checks z' and returns the shape of the output for it."""
    z_clean, g_clean = required(name, "z_clean", direction.z_clean), direction.g_clean
    expected = clean_shape(z_clean)
    if tuple(g_clean.shape) != expected:
        raise ValueError(
            f"{name}: direction.g_clean must have the shape of the output for z_clean, {expected}, "
            f"got {tuple(g_clean.shape)}"
        )
    return z_clean, g_clean


def perturb(
    layer: Layer,
    call: Call,
    y: Tensor,
    eps: Tensor,
    direction: Direction | None,
    example_dim: int,
    clean_shape: Callable[[Tensor], tuple[int, ...]],
    eps_name: str = "eps",
    *,
    bias_alone: bool = False,
) -> Tensor:
    """The plain layer's output ``y`` with ε_i times the term of the layer added to it.

    ``bias_alone`` allows a direction without V.
    """
    name = call.operation
    eps = checked_eps(name, eps_name, eps, y, example_dim)
    direction = checked_direction(name, eps_name, direction, y)
    if isinstance(direction, Factored):
        z_clean, g_clean = checked_factors(name, direction, clean_shape)
        if z_clean.is_floating_point():
            z_clean = layer.enter(z_clean.to(y.dtype), call.options)
        like = call.weight, call.bias if direction.bias else None
        V, V_b = layer.term_transpose(g_clean, z_clean, like, call.options)
    else:
        if not bias_alone:
            required(name, "V", direction.V)
        check_dense(name, direction, call.weight, call.bias)
        V, V_b = direction.V, direction.V_b
    if V is None and V_b is None:
        return y
    # Without V the term has the shape of y and depends on no input.
    x = y.detach() if V is None else layer.enter(call.x, call.options)
    x = x.to(y.dtype) if x.is_floating_point() else x
    return add_term(y, x, eps, V, V_b, Term(layer, call.options, example_dim))
