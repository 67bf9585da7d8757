"""Linear layers side by side: one matrix for each head, or for each expert."""

from __future__ import annotations

from torch import Tensor

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype, product

from .base import Layer, Roots, RowMap, Single, Use
from .costs import Cost, Size, rates_of


def _heads_first(x: Tensor) -> Tensor:
    """(rows..., h, d) -> (h, rows, d)."""
    return x.reshape(-1, *x.shape[-2:]).transpose(0, 1)


class BatchedLinear(Layer):
    """y_h = W_h z_h on rows z of shape (h, d), W (h, k, d); form: dense."""

    name = "batched linear"
    linear_in_x = True
    rows_add_up = True

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: object
    ) -> Tensor:
        """W_h x_h, head by head."""
        assert weight is not None
        out = _heads_first(x) @ weight.mT
        return out.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[1])

    def term_transpose(self, g: Tensor, x: Tensor, like: Roots, options: object) -> Roots:
        """Σ g_h x_hᵀ."""
        dtype = accumulation_dtype(g.dtype)
        return _heads_first(g.to(dtype)).mT @ _heads_first(x.to(dtype)), None

    def data_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None, options: object) -> Tensor:
        """W_hᵀ g_h."""
        assert weight is not None
        return (_heads_first(g) @ weight).transpose(0, 1).reshape(x.shape)

    def leading(self, use: Use, g: Tensor) -> int:
        """All dimensions but head and feature."""
        return g.dim() - 2

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """(N, T, h, d) and (N, T, h, k)."""
        leading = self.leading(use, g)
        return rows.arrange(z, leading), rows.arrange(g, leading)

    def costs(self, use: Use, size: Size) -> dict[str, Cost]:
        """The cost of a dense linear layer for each head."""
        assert use.weight is not None
        speed = rates_of(use.weight)
        heads, d_out, d_in = use.weight.shape
        item = use.weight.element_size()
        n_rows, m_rows = size.n * size.positions, size.m * size.clean_positions
        score = (n_rows + m_rows) * use.weight.numel()
        weighted = 0.5 * n_rows * use.weight.numel()
        kept = n_rows * heads * (d_in + d_out) * item
        return {"dense": Cost(score, weighted, kept, (score + weighted) / speed.matmul)}

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = Σ_t Σ_h g_h·V_h z_h."""
        V, _ = direction
        assert V is not None
        return self.forward(z.to(V.dtype), V, None, None).mul_(g).sum((1, 2, 3))

    def single_gradients(
        self, use: Use, z: Tensor, g: Tensor
    ) -> tuple[Single | None, Single | None]:
        """Σ_t g_h z_hᵀ of every head."""
        left, right = (x.transpose(1, 2).flatten(0, 1) for x in (g, z))
        G = product(left.mT, right, accumulation_dtype(g.dtype))
        return G.unflatten(0, g.shape[:1] + g.shape[2:3]), None

    def weighted_gradient(self, use: Use, z: Tensor, g: Tensor, weights: Tensor) -> Roots:
        """Σ w g_h z_hᵀ."""
        weight, _ = use.roots
        assert weight is not None
        wide = weight.dtype != g.dtype
        return ops.linear_weighted_gradient(z, g, weights, False, False, wide)[0], None


BATCHED_LINEAR = BatchedLinear()
