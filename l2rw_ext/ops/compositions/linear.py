"""Scores and gradients of single examples of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from l2rw_ext.devices import without_autocast
from l2rw_ext.ops.arithmetic import WORKSPACE_BYTES, accumulation_dtype, parts, product

from .checks import Checks

# The number of clean rows that are multiplied at a time: wide enough for a matrix product.
_COLUMNS = 4096


def _check_factored(
    check: Checks, which: str, z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor
) -> None:
    """``which`` follows the names of the arguments: which layer of several it is."""
    names = [name + which for name in ("z", "g", "z_clean", "g_clean")]
    check.floating()
    for name, tensor in zip(names, (z, g, z_clean, g_clean), strict=True):
        check.dims(name, tensor, 3)
        check.same(name, tensor)
    check.size(names[1], g, 0, z.shape[0], "examples of z")
    check.size(names[1], g, 1, z.shape[1], "positions of z")
    check.size(names[3], g_clean, 0, z_clean.shape[0], "examples of z_clean")
    check.size(names[3], g_clean, 1, z_clean.shape[1], "positions of z_clean")
    check.size(names[2], z_clean, 2, z.shape[2], "width of z")
    check.size(names[3], g_clean, 2, g.shape[2], "width of g")


def _factored(z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor, bias: bool) -> Tensor:
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


@without_autocast()
def factored_correlation(
    z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor, bias: bool
) -> Tensor:
    """u_i = Σ_t Σ_j Σ_s (z_it · z'_js + bias) (g_it · g'_js), block by block of both products."""
    _check_factored(Checks("factored_correlation", "z", z), "", z, g, z_clean, g_clean)
    return _factored(z, g, z_clean, g_clean, bias)


@without_autocast()
def factored_correlations(
    z: Sequence[Tensor],
    g: Sequence[Tensor],
    z_clean: Sequence[Tensor],
    g_clean: Sequence[Tensor],
    bias: Sequence[bool],
) -> Tensor:
    """The sum of the layers' :func:`factored_correlation`, layer by layer."""
    operation = "factored_correlations"
    if not z:
        raise RuntimeError(f"l2rw_ext::{operation}: z must hold at least one layer, got none")
    check = Checks(operation, "z[0]", z[0])
    for name, count in (
        ("g", len(g)),
        ("z_clean", len(z_clean)),
        ("g_clean", len(g_clean)),
        ("bias", len(bias)),
    ):
        check.require(count == len(z), f"{name} must hold {len(z)} (layers of z), got {count}")
    layers = list(zip(z, g, z_clean, g_clean, strict=True))
    for k, layer in enumerate(layers):
        _check_factored(Checks(operation, f"z[{k}]", layer[0]), f"[{k}]", *layer)
        check.same(f"z[{k}]", layer[0])
        check.size(f"z[{k}]", layer[0], 0, z[0].shape[0], "examples of z[0]")
        examples = z_clean[0].shape[0]
        check.size(f"z_clean[{k}]", layer[2], 0, examples, "examples of z_clean[0]")
    u = _factored(*layers[0], bias[0])
    for layer, has_bias in zip(layers[1:], bias[1:], strict=True):
        u += _factored(*layer, has_bias)
    return u


@without_autocast()
def dense_correlation(
    z: Tensor, g: Tensor, direction: Tensor, direction_bias: Tensor | None = None
) -> Tensor:
    """u_i = Σ_t g_it · (V z_it + V_b), through the narrower of V z and Vᵀ g."""
    check = Checks("dense_correlation", "z", z)
    check.dims("z", z, 3)
    check.dims("g", g, 3)
    check.dims("direction", direction, 2)
    check.floating()
    check.same("g", g)
    check.same_or_wide("direction", direction)
    check.size("g", g, 0, z.shape[0], "examples of z")
    check.size("g", g, 1, z.shape[1], "positions of z")
    check.size("direction", direction, 0, g.shape[2], "width of g")
    check.size("direction", direction, 1, z.shape[2], "width of z")
    check.vector("direction_bias", direction_bias, g.shape[2], "width of g")

    dtype = accumulation_dtype(z.dtype)
    n, positions = z.shape[:2]
    rows = n * positions
    z, g = z.reshape(rows, z.shape[2]), g.reshape(rows, g.shape[2])
    if g.shape[1] <= z.shape[1]:
        moved = product(z, direction.t(), dtype)
        if direction_bias is not None:
            moved += direction_bias
        per_row = moved.mul_(g).sum(1)
    else:
        per_row = product(g, direction, dtype).mul_(z).sum(1)
        if direction_bias is not None:
            per_row += (g * direction_bias.to(dtype)).sum(1)
    return per_row.view(n, positions).sum(1)


@without_autocast()
def linear_example_gradients(
    z: Tensor,
    g: Tensor,
    direction: Tensor | None = None,
    direction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """G_i = Σ_t g_it z_itᵀ, G_bi = Σ_t g_it, u_i = <V, G_i> + <V_b, G_bi>."""
    check = Checks("linear_example_gradients", "z", z)
    check.dims("z", z, 3)
    check.dims("g", g, 3)
    check.floating()
    check.same("g", g)
    check.size("g", g, 0, z.shape[0], "examples of z")
    check.size("g", g, 1, z.shape[1], "positions of z")
    if direction is not None:
        check.same_or_wide("direction", direction)
        check.dims("direction", direction, 2)
        check.size("direction", direction, 0, g.shape[2], "width of g")
        check.size("direction", direction, 1, z.shape[2], "width of z")
    check.vector("direction_bias", direction_bias, g.shape[2], "width of g")

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
