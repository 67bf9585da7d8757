"""Linear layers: ``F.linear``, and products with a trained matrix on the right."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype, product

from .base import Call, Factors, Function, Layer, Roots, RowMap, Single, Use
from .costs import Cost, Size, rates_of


def flat(x: Tensor) -> Tensor:
    """All rows as one dimension: (..., d) -> (rows, d)."""
    rows = -1 if x.numel() else math.prod(x.shape[:-1])
    return x.reshape(rows, x.shape[-1])


class Linear(Layer):
    """y = W z + b on rows z; forms: factored, dense, per example."""

    name = "linear"
    functions: ClassVar[tuple[Function, ...]] = (F.linear,)
    linear_in_x = True
    rows_add_up = True
    inputs_first: ClassVar[bool] = False
    """Whether the weight is (d_in, d_out)."""

    def bind(
        self, func: Function, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Call | None:
        """A weight of one dimension has a rewrite."""
        return Call("linear", input, weight, bias) if weight.dim() == 2 else None

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Any
    ) -> Tensor:
        """W x + b."""
        assert weight is not None
        return F.linear(x, self._outputs_first(weight), bias)

    def term_transpose(self, g: Tensor, x: Tensor, like: Roots, options: Any) -> Roots:
        """Σ g xᵀ and Σ g over all rows."""
        g, z, dtype = flat(g), flat(x), accumulation_dtype(g.dtype)
        left, right = (z, g) if self.inputs_first else (g, z)
        return (
            None if like[0] is None else product(left.t(), right, dtype),
            None if like[1] is None else g.sum(0, dtype=dtype),
        )

    def data_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None, options: Any) -> Tensor:
        """Wᵀ g."""
        assert weight is not None
        return torch.matmul(g, self._outputs_first(weight))

    def _outputs_first(self, weight: Tensor) -> Tensor:
        return weight.mT if self.inputs_first else weight

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """(N, T, d_in) and (N, T, d_out)."""
        leading = g.dim() - 1
        return rows.arrange(z, leading), rows.arrange(g, leading)

    def leading(self, use: Use, g: Tensor) -> int:
        """All dimensions but the last."""
        return g.dim() - 1

    def costs(self, use: Use, size: Size) -> dict[str, Cost]:
        """Costs; factored pays if n T m T' (d_in + d_out) < (n T + m T') d_in d_out."""
        if use.roots[0] is None:
            return {"dense": Cost(0, 0, 0, 0)}
        assert use.weight is not None
        speed = rates_of(use.weight)
        d_out, d_in = use.weight.shape
        item = use.weight.element_size()
        n_rows, m_rows = size.n * size.positions, size.m * size.clean_positions
        product = d_in * d_out
        kept = n_rows * (d_in + d_out) * item
        weighted = 0.5 * n_rows * product
        gram = n_rows * m_rows * (d_in + d_out)
        width = -(-m_rows // speed.gram_width) * speed.gram_width
        padded_gram = n_rows * width * (d_in + d_out)
        dense = (n_rows + m_rows) * product
        dense_seconds = m_rows * product / speed.matmul + n_rows * product / speed.dense
        return {
            "factored": Cost(
                gram, weighted, kept, padded_gram / speed.gram + weighted / speed.matmul
            ),
            "dense": Cost(dense, weighted, kept, dense_seconds + weighted / speed.matmul),
            "per example": Cost(
                dense + size.n * product,
                0.5 * size.n * product,
                size.n * product * item,
                dense / speed.examples + 2.5 * size.n * product * item / speed.bytes,
            ),
        }

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = Σ_t g·(V z + V_b)."""
        weight, bias = direction
        if weight is not None:
            return ops.dense_correlation(z, g, self._outputs_first(weight), bias)
        assert bias is not None
        return g.sum(1, dtype=bias.dtype) @ bias

    def factors(self, use: Use, z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor) -> Factors:
        """Eq. 12: u_i = Σ (z·z' + 1)(g·g')."""
        return z, g, z_clean, g_clean, use.roots[1] is not None

    def example_gradients(
        self, use: Use, z: Tensor, g: Tensor, direction: Roots | None
    ) -> tuple[Roots, Tensor]:
        """G_i = Σ_t g zᵀ."""
        V, V_b = direction if direction is not None else (None, None)
        V = None if V is None else self._outputs_first(V)
        G, G_b, u = ops.linear_example_gradients(z, g, V, V_b)
        return (self._outputs_first(G), G_b if use.roots[1] is not None else None), u

    def single_gradients(
        self, use: Use, z: Tensor, g: Tensor
    ) -> tuple[Single | None, Single | None]:
        """Σ_t g zᵀ as products, and Σ_t g."""
        products = (z, g) if self.inputs_first else (g, z)
        return products, g.sum(1, dtype=accumulation_dtype(g.dtype))

    def weighted_gradient(self, use: Use, z: Tensor, g: Tensor, weights: Tensor) -> Roots:
        """Σ w g zᵀ, in the memory layout of the weight, and Σ w g over all rows."""
        weight, bias = use.roots
        if weight is None:
            return None, ops.weighted_sum(g, weights).sum(0)
        # Under autocast the parameter is wider than z and g, and so is its gradient.
        wide = weight.dtype != g.dtype
        W, W_b = ops.linear_weighted_gradient(
            z, g, weights, bias is not None, self.inputs_first, wide
        )
        return W, None if bias is None else W_b


class InputsFirst(Linear):
    """y = Wᵀ z + b with W (d_in, d_out), as in ``x @ W``: the same with each matrix transposed."""

    functions: ClassVar[tuple[Function, ...]] = (
        torch.matmul,
        torch.mm,
        torch.mv,
        Tensor.matmul,
        Tensor.mm,
        Tensor.mv,
        Tensor.__matmul__,
        torch.addmm,
        Tensor.addmm,
    )
    inputs_first = True

    def bind(self, func: Function, *args: Any, **kwargs: Any) -> Call | None:
        """``x @ W`` or ``addmm(b, x, W)``; other products have rewrites."""
        if kwargs or len(args) < 2 or not all(isinstance(a, Tensor) for a in args):
            return None
        *start, x, weight = args
        if x.dim() == 0 or weight.dim() != 2 or any(b.shape != weight.shape[1:] for b in start):
            return None
        return Call(func.__name__.strip("_"), x, weight, start[0] if start else None)


LINEAR = Linear()
INPUTS_FIRST = InputsFirst()
