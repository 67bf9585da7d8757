"""The perturbed embedding."""

from __future__ import annotations

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


def _is_padding(index: Tensor, padding_idx: int) -> Tensor:
    return (index == padding_idx).unsqueeze(-1)


def _term(index: Tensor, V: Tensor, padding_idx: int, dtype: torch.dtype) -> Tensor:
    # The row padding_idx has no gradient in torch, hence no part in <V, ∇f_i>.
    term = F.embedding(index, V).to(dtype)
    return term if padding_idx < 0 else term.masked_fill(_is_padding(index, padding_idx), 0)


class _Embedding(torch.autograd.Function):
    """y_i + ε_i V[index_i], except at indices ``padding_idx``, which is -1 if there is none."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        y: Tensor,  # [..., d]
        index: Tensor,  # [...]
        eps: Tensor,  # [n]
        V: Tensor,  # [v, d]
        padding_idx: int,
        example_dim: int,
    ) -> Tensor:
        return add_term(y, eps, _term(index, V, padding_idx, y.dtype), example_dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, index, eps, V, ctx.padding_idx, ctx.example_dim = inputs
        ctx.save_for_backward(index, eps, V)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        index, eps, V = ctx.saved_tensors
        _, _, need_eps, need_V, _, _ = ctx.needs_input_grad
        dim, padding_idx = ctx.example_dim, ctx.padding_idx
        grad_eps = grad_V = None
        if need_eps:
            if fused():
                active = g if padding_idx < 0 else g.masked_fill(_is_padding(index, padding_idx), 0)
                positions = rows(index, dim, []).squeeze(-1)
                u = ops.embedding_correlation(positions, rows(active, dim, [g.dim() - 1]), V)
            else:
                u = example_sum(g, _term(index, V, padding_idx, g.dtype), dim)
            grad_eps = u.to(eps.dtype)
        if need_V:
            scaled = (g * along(eps, g, dim)).to(V.dtype)
            grad_V = torch.ops.aten.embedding_dense_backward(
                scaled, index, V.shape[0], padding_idx, False
            )
        return g, None, grad_eps, grad_V, None, None


def _factored_direction(direction: Factored, weight: Tensor, padding_idx: int) -> Tensor:
    """V from the factors: the weight gradient of the clean batch."""
    index, g_clean = required("embedding", "z_clean", direction.z_clean), direction.g_clean
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"embedding: direction.z_clean must hold indices, int32 or int64, got {index.dtype}"
        )
    expected = (*index.shape, weight.shape[1])
    if tuple(g_clean.shape) != expected:
        raise ValueError(
            f"embedding: direction.g_clean must have shape {expected}, that of z_clean and the "
            f"width of weight, got {tuple(g_clean.shape)}"
        )
    V: Tensor = torch.ops.aten.embedding_dense_backward(
        g_clean, index, weight.shape[0], padding_idx, False
    )
    return V


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    eps: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.embedding` with the table W + ε_i V.

    Args:
        input: indices, int64 or int32, (n, ...).
        weight: (v, d).
        padding_idx: the row without a gradient: it is not perturbed.
        max_norm: as in torch: rows of ``weight`` are scaled in place, before V is added.
        norm_type: as in torch.
        scale_grad_by_freq: must be ``False`` with ``eps``: it divides by counts over the whole
            batch, so that the gradient of an example depends on the others.
        sparse: as in torch, for the gradient of ``weight``; that of V is dense.
        eps: (n,), any floating dtype; ``None`` is the plain layer.
        direction: ``Dense(V)``, or ``Factored(z_clean, g_clean)`` with the clean batch's indices
            (m, ...) and the gradient (m, ..., d) of its output.
        example_dim: the dimension of ``input`` that counts the examples.

    Returns:
        The output, (n, ..., d). At ε = 0, backward adds Σ_t g_it · V[index_it] to
        ``eps.grad[i]``.

    Raises:
        TypeError: ``eps`` or ``direction`` has a wrong type or dtype.
        ValueError: another argument does not fit the layer.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> table, v = torch.zeros(3, 2), PF.Dense(torch.tensor([[1.0, 1], [2, 2], [3, 3]]))
        >>> eps = torch.zeros(2, requires_grad=True)
        >>> index = torch.tensor([[0, 1], [2, 2]])
        >>> PF.embedding(index, table, eps=eps, direction=v).sum().backward()
        >>> eps.grad
        tensor([ 6., 12.])
    """
    if eps is None:
        return F.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    if scale_grad_by_freq:
        raise ValueError(
            "embedding: scale_grad_by_freq must be False with eps: it divides gradients by counts "
            "over the whole batch, got True"
        )
    if is_single("embedding", "eps", eps):
        return embedding(
            input.unsqueeze(0),
            weight,
            padding_idx,
            max_norm,
            norm_type,
            sparse=sparse,
            eps=eps.reshape(1),
            direction=direction,
        ).squeeze(0)
    dim = checked_example_dim("embedding", example_dim, input.dim(), input.dim())
    y = F.embedding(input, weight, padding_idx, max_norm, norm_type, False, sparse)
    padding = -1 if padding_idx is None else padding_idx % weight.shape[0]
    eps = checked_eps("embedding", "eps", eps, y, dim)
    direction = checked_direction("embedding", "eps", direction, y)
    if isinstance(direction, Factored):
        V = _factored_direction(direction, weight, padding)
    else:
        V = required("embedding", "V", direction.V)
        check_dense("embedding", direction, weight, None)
    return apply(_Embedding, y, input, eps, V, padding, dim)
