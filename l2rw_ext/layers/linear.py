"""Linear layers: ``F.linear`` with a trainable matrix or vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype

from .base import Factors, Mode, Roots, RowMap, Rule, Use, UseFunction
from .costs import BLOCKED_POSITIONS, Cost, Size, rates_of
from .registry import handles
from .rows import active_rows, product


class Linear(Rule):
    """y = W z + b on rows z; forms: factored, dense, per example."""

    name = "linear"
    rows_add_up = True

    def call(self, use: Use, x: Tensor) -> Tensor:
        """W z + b."""
        assert use.weight is not None
        return F.linear(x, self._outputs_first(use.weight), use.bias)

    def data_gradient(self, use: Use, x: Tensor, weight: Tensor | None, g: Tensor) -> Tensor:
        """Wᵀ g."""
        assert weight is not None
        return torch.matmul(g, self._outputs_first(weight))

    def _outputs_first(self, weight: Tensor) -> Tensor:
        return weight

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

    def direction(self, use: Use, z: Tensor, g: Tensor) -> Roots:
        """V = Σ g' z'ᵀ, V_b = Σ g'."""
        dtype = accumulation_dtype(g.dtype)
        flat = g.reshape(-1, g.shape[-1])
        weight = None
        if use.roots[0] is not None:
            weight = self._outer(flat, z.reshape(-1, z.shape[-1]), dtype)
        return weight, (flat.sum(0, dtype=dtype) if use.roots[1] is not None else None)

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = Σ_t g·(V z + V_b)."""
        weight, bias = direction
        if weight is not None:
            return ops.dense_correlation(z, g, weight, bias)
        assert bias is not None
        return g.sum(1, dtype=bias.dtype) @ bias

    def factors(self, use: Use, z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor) -> Factors:
        """Eq. 12: u_i = Σ (z·z' + 1)(g·g')."""
        return z, g, z_clean, g_clean, use.roots[1] is not None

    def example_gradients(
        self, use: Use, z: Tensor, g: Tensor, direction: Roots | None
    ) -> tuple[Roots, Tensor]:
        """G_i = Σ_t g zᵀ."""
        weight, bias = direction if direction is not None else (None, None)
        gradients, bias_gradients, u = ops.linear_example_gradients(z, g, weight, bias)
        return (gradients, bias_gradients if use.roots[1] is not None else None), u

    def weighted_gradient(
        self, use: Use, z: Tensor, g: Tensor, weights: Tensor, active: Tensor | None
    ) -> Roots:
        """Σ w g zᵀ over the rows of active examples."""
        blocked = z.shape[1] >= BLOCKED_POSITIONS and z.device.type == "cpu"
        if blocked and use.roots[0] is not None:
            return self._by_example(use, z, g, weights)
        z, g = active_rows(z, g, weights, active)
        flat = g.reshape(-1, g.shape[-1])
        # Under autocast the parameter is wider than z and g, and so is its gradient.
        root = use.roots[0] if use.roots[0] is not None else use.roots[1]
        assert root is not None
        weight = None
        if use.roots[0] is not None:
            weight = self._outer(flat, z.reshape(-1, z.shape[-1]), root.dtype)
        return weight, (flat.sum(0, dtype=root.dtype) if use.roots[1] is not None else None)

    def _outer(self, g: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ g zᵀ over rows."""
        return product(g, z, dtype)

    def _by_example(self, use: Use, z: Tensor, g: Tensor, weights: Tensor) -> Roots:
        """A linear layer is a convolution of width T with a kernel of one."""
        weight, bias = ops.conv_weighted_gradient(
            z.transpose(1, 2), g.transpose(1, 2), weights, [1], [1], [0], [1], 1
        )
        return weight.squeeze(2), (bias if use.roots[1] is not None else None)


def _transposed(roots: Roots) -> Roots:
    weight, bias = roots
    return (None if weight is None else weight.mT), bias


class InputsFirst(Linear):
    """y = Wᵀ z + b with W (d_in, d_out), as in ``x @ W``: the same with each matrix transposed."""

    def _outputs_first(self, weight: Tensor) -> Tensor:
        return weight.t()

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = Σ_t g·(Vᵀ z + V_b)."""
        return super().correlation(use, z, g, _transposed(direction))

    def example_gradients(
        self, use: Use, z: Tensor, g: Tensor, direction: Roots | None
    ) -> tuple[Roots, Tensor]:
        """G_i = Σ_t z gᵀ."""
        turned = None if direction is None else _transposed(direction)
        examples, u = super().example_gradients(use, z, g, turned)
        return _transposed(examples), u

    def _outer(self, g: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ z gᵀ over rows."""
        return product(z, g, dtype)

    def _by_example(self, use: Use, z: Tensor, g: Tensor, weights: Tensor) -> Roots:
        """The transposed result, laid out as the parameter is."""
        weight, bias = _transposed(super()._by_example(use, z, g, weights))
        assert weight is not None
        return weight.contiguous(), bias


LINEAR = Linear()
INPUTS_FIRST = InputsFirst()


def use_linear(
    mode: Mode,
    operation: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rule: Linear = LINEAR,
) -> Tensor | None:
    """The product as a use; None if autograd should run it."""
    use = mode.use(rule, operation, weight, bias, None, x)
    if use is None:
        return None
    out: Tensor = UseFunction.apply(x, mode.token, use)
    return out


def _arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


@handles(F.linear)
def handle_linear(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``F.linear`` as a use if data meets trained operands."""
    x, weight, bias = _arguments(*args, **kwargs)
    if mode.is_use(x, weight, bias) and weight.dim() == 2:
        out = use_linear(mode, "linear", x, weight, bias)
        if out is not None:
            return out
    if mode.is_use(x, weight, bias) and weight.dim() == 1 and torch.is_grad_enabled():
        with mode:
            out = F.linear(x, weight.unsqueeze(0)).squeeze(-1)
            return out if bias is None else out + bias
    return mode.other(func, args, kwargs)
