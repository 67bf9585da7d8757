"""Operators of a linear layer: scores, gradients of single examples, the weighted gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import Checks
from ._operator import operator, scores
from .arithmetic import (
    WORKSPACE_BYTES,
    accumulation_dtype,
    parts,
    product,
    weighted,
    without_weight,
)

# The number of clean rows that are multiplied at a time: wide enough for a matrix product.
_COLUMNS = 4096


@operator(torch.ops.l2rw_ext.factored_correlation.default, fake=lambda z, *_: scores(z))
def factored_correlation(
    z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor, bias: bool
) -> Tensor:
    """Scores of a linear layer without forming its direction (Eq. 12).

    u_i = Σ_t Σ_j Σ_s (z_it · z'_js + bias) (g_it · g'_js)

    Args:
        z: (n, T, i) input of the layer.
        g: (n, T, o) gradient of the summed training losses.
        z_clean: (m, S, i) input of the clean batch.
        g_clean: (m, S, o) gradient of the mean clean loss: it carries the 1/m.
        bias: whether the layer has a bias.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> one = torch.ones(1, 1, 2)
        >>> ops.factored_correlation(one, one, one, one, True)
        tensor([6.])
    """
    _check_factored("", z, g, z_clean, g_clean)
    return _factored(z, g, z_clean, g_clean, bias)


@operator(torch.ops.l2rw_ext.factored_correlations.default, fake=lambda z, *_: scores(z[0]))
def factored_correlations(
    z: Sequence[Tensor],
    g: Sequence[Tensor],
    z_clean: Sequence[Tensor],
    g_clean: Sequence[Tensor],
    bias: Sequence[bool],
) -> Tensor:
    """Scores of several linear layers at once: the sum of their :func:`factored_correlation`.

    u_i = Σ_l Σ_t Σ_j Σ_s (z_lit · z'_ljs + bias_l) (g_lit · g'_ljs)

    On CUDA the work of all layers is divided among the processors together, in few launches. There
    must be at least one layer, and all share n, m, dtype and device.

    Args:
        z: for each layer, its (n, T, i) input.
        g: the (n, T, o) gradients of the summed training losses.
        z_clean: the (m, S, i) inputs of the clean batch.
        g_clean: the (m, S, o) gradients of the mean clean loss: they carry the 1/m.
        bias: whether each layer has a bias.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> wide, narrow = torch.ones(1, 1, 2), torch.ones(1, 3, 1)
        >>> z, g = [wide, narrow], [wide, narrow]
        >>> ops.factored_correlations(z, g, z, g, [True, False])
        tensor([15.])
    """
    check = Checks("z[0]", z[0])
    for name, found in (("g", g), ("z_clean", z_clean), ("g_clean", g_clean), ("bias", bias)):
        check.require(
            len(found) == len(z), f"{name} must hold {len(z)} (layers of z), got {len(found)}"
        )
    layers = list(zip(z, g, z_clean, g_clean, strict=True))
    for k, layer in enumerate(layers):
        _check_factored(f"[{k}]", *layer)
        check.same(f"z[{k}]", layer[0], (z[0].shape[0], "examples of z[0]"), None, None)
        examples = (z_clean[0].shape[0], "examples of z_clean[0]")
        check.same(f"z_clean[{k}]", layer[2], examples, None, None)
    u = _factored(*layers[0], bias[0])
    for layer, has_bias in zip(layers[1:], bias[1:], strict=True):
        u += _factored(*layer, has_bias)
    return u


def _check_factored(which: str, z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor) -> None:
    """``which`` follows the names of the arguments: which layer of several it is."""
    check = Checks(f"z{which}", z)
    examples, positions = (z.shape[0], "examples of z"), (z.shape[1], "positions of z")
    check.same(f"g{which}", g, examples, positions, None)
    check.same(f"z_clean{which}", z_clean, None, None, (z.shape[2], "width of z"))
    examples = (z_clean.shape[0], "examples of z_clean")
    positions = (z_clean.shape[1], "positions of z_clean")
    check.same(f"g_clean{which}", g_clean, examples, positions, (g.shape[2], "width of g"))


def _factored(z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor, bias: bool) -> Tensor:
    """Block by block of both products."""
    dtype = accumulation_dtype(z.dtype)
    n, positions = z.shape[:2]
    rows, clean_rows = n * positions, z_clean.shape[0] * z_clean.shape[1]
    z, g = z.reshape(rows, z.shape[2]), g.reshape(rows, g.shape[2])
    z_clean = z_clean.reshape(clean_rows, z.shape[1])
    g_clean = g_clean.reshape(clean_rows, g.shape[1])
    # Each pair of rows takes one number in each of the two products.
    pair = 2 * dtype.itemsize
    columns = max(_COLUMNS, WORKSPACE_BYTES // (pair * max(1, rows)))
    copied = 0 if z.dtype == dtype else dtype.itemsize * (z.shape[1] + g.shape[1])

    per_row = z.new_zeros(rows, dtype=dtype)
    for first in range(0, clean_rows, columns):
        z_columns = z_clean[first : first + columns].t()
        g_columns = g_clean[first : first + columns].t()
        for part in parts(rows, pair * z_columns.shape[1] + copied):
            inner = product(z[part], z_columns, dtype)
            if bias:
                inner += 1
            per_row[part].add_(inner.mul_(product(g[part], g_columns, dtype)).sum(1))
    return per_row.view(n, positions).sum(1)


@operator(torch.ops.l2rw_ext.dense_correlation.default, fake=lambda z, *_: scores(z))
def dense_correlation(
    z: Tensor, g: Tensor, direction: Tensor, direction_bias: Tensor | None = None
) -> Tensor:
    """Scores of a linear layer from its direction.

    u_i = Σ_t g_it · (V z_it + V_b)

    Args:
        z: (n, T, i) input of the layer.
        g: (n, T, o) gradient of the summed training losses.
        direction: (o, i) V.
        direction_bias: (o,) V_b.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> ops.dense_correlation(torch.ones(1, 1, 2), torch.ones(1, 1, 3), torch.ones(3, 2))
        tensor([6.])
    """
    _check_linear(z, g, direction, direction_bias)
    dtype = accumulation_dtype(z.dtype)
    n, positions = z.shape[:2]
    rows = n * positions
    z, g = z.reshape(rows, z.shape[2]), g.reshape(rows, g.shape[2])
    if g.shape[1] <= z.shape[1]:  # through the narrower of V z and Vᵀ g
        moved = product(z, direction.t(), dtype)
        if direction_bias is not None:
            moved += direction_bias
        per_row = moved.mul_(g).sum(1)
    else:
        per_row = product(g, direction, dtype).mul_(z).sum(1)
        if direction_bias is not None:
            per_row += (g * direction_bias.to(dtype)).sum(1)
    return per_row.view(n, positions).sum(1)


@operator(
    torch.ops.l2rw_ext.linear_example_gradients.default,
    fake=lambda z, g, *_: (
        z.new_empty((g.shape[0], g.shape[2], z.shape[2])),
        z.new_empty((g.shape[0], g.shape[2])),
        scores(z),
    ),
)
def linear_example_gradients(
    z: Tensor,
    g: Tensor,
    direction: Tensor | None = None,
    direction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of single examples of a linear layer, and their scores on the way.

    G_i = Σ_t g_it z_itᵀ, G_bi = Σ_t g_it, u_i = <V, G_i> + <V_b, G_bi>

    Args:
        z: (n, T, i) input of the layer.
        g: (n, T, o) gradient of the summed training losses.
        direction: (o, i) V; None: it adds nothing to the scores.
        direction_bias: (o,) V_b; None: it adds nothing to the scores.

    Returns:
        G (n, o, i) and G_b (n, o) in the dtype of z, and (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> G, G_b, u = ops.linear_example_gradients(torch.ones(1, 4, 2), torch.ones(1, 4, 1))
        >>> G, G_b, u
        (tensor([[[4., 4.]]]), tensor([[4.]]), tensor([0.]))
    """
    _check_linear(z, g, direction, direction_bias)
    dtype = accumulation_dtype(z.dtype)
    n, o, i = z.shape[0], g.shape[2], z.shape[2]
    bias_gradients = g.sum(1, dtype=dtype)
    u = z.new_zeros(n, dtype=dtype)
    if direction_bias is not None:
        u += bias_gradients @ direction_bias.to(dtype)
    v = None if direction is None else direction.to(dtype).reshape(o * i)
    if z.dtype == dtype:
        gradients = g.mT @ z
        if v is not None:
            u += gradients.reshape(n, o * i) @ v
        return gradients, bias_gradients, u
    # Scores are those of the gradients before they are rounded.
    gradients = z.new_empty(n, o, i)
    for part in parts(n, dtype.itemsize * (o * i + z.shape[1] * (o + i))):
        wide = product(g[part].mT, z[part], dtype)
        gradients[part] = wide
        if v is not None:
            u[part].add_(wide.reshape(wide.shape[0], o * i) @ v)
    return gradients, bias_gradients.to(z.dtype), u


def _empty_gradient(
    z: Tensor, g: Tensor, weights: Tensor, bias: bool, inputs_first: bool, wide: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(z.dtype) if wide else z.dtype
    matrix = (z.shape[-1], g.shape[-1]) if inputs_first else (g.shape[-1], z.shape[-1])
    return (
        z.new_empty((*z.shape[2:-1], *matrix), dtype=dtype),
        z.new_empty(g.shape[2:] if bias else (0,), dtype=dtype),
    )


@operator(torch.ops.l2rw_ext.linear_weighted_gradient.default, fake=_empty_gradient)
def linear_weighted_gradient(
    z: Tensor, g: Tensor, weights: Tensor, bias: bool, inputs_first: bool, wide: bool
) -> tuple[Tensor, Tensor]:
    """Weighted gradient of a linear layer, without storing the gradients of single examples.

    W = Σ_i Σ_t w_i g_it z_itᵀ and W_b = Σ_i Σ_t w_i g_it over the examples with w_i ≠ 0; the others
    are never read. w_i g_it may be rounded to the dtype of g, as in a backward of weighted losses.

    There may be heads, each a layer for itself.

    Args:
        z: (n, T, i) input of the layer, or (n, T, h, i).
        g: (n, T, o) gradient of the summed training losses, or (n, T, h, o).
        weights: (n,) weights.
        bias: whether W_b is formed.
        inputs_first: whether Wᵀ is returned, as for a layer that computes z @ W.
        wide: whether the results have the accumulation dtype; else they have that of z.

    Returns:
        W (o, i), or (h, o, i), or with the last two sizes exchanged; and W_b (o,), or (h, o), or
        (0,) if it is not formed.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> z, g = torch.ones(2, 1, 2), torch.tensor([[[2.0]], [[float("nan")]]])
        >>> ops.linear_weighted_gradient(z, g, torch.tensor([0.5, 0.0]), True, False, True)
        (tensor([[1., 1.]]), tensor([1.]))
    """
    check = Checks("z", z, dims=None)
    check.require(
        z.dim() in (3, 4),
        "z must have 3 or 4 dimensions (examples, positions, perhaps heads, width), got shape "
        f"{tuple(z.shape)}",
    )
    whats = ("examples of z", "positions of z", "heads of z")
    check.same("g", g, *zip(z.shape[:-1], whats, strict=False), None)
    check.same("weights", weights, (z.shape[0], "examples of z"), or_wide=True)

    dtype = accumulation_dtype(z.dtype) if wide else z.dtype
    z = z.masked_fill(without_weight(weights, z.dim()), 0)
    g = weighted(g, weights)
    W_b = g.sum((0, 1), dtype=dtype) if bias else g.new_empty(0, dtype=dtype)
    z, g = (x.flatten(0, 1).movedim(0, -2) for x in (z, g))  # one matrix, or one of each head
    return product(z.mT, g, dtype) if inputs_first else product(g.mT, z, dtype), W_b


def _check_linear(
    z: Tensor, g: Tensor, direction: Tensor | None, direction_bias: Tensor | None
) -> None:
    check = Checks("z", z)
    check.same("g", g, (z.shape[0], "examples of z"), (z.shape[1], "positions of z"), None)
    outputs = (g.shape[2], "width of g")
    check.same("direction", direction, outputs, (z.shape[2], "width of z"), or_wide=True)
    check.same("direction_bias", direction_bias, outputs, or_wide=True)
