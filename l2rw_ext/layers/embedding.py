"""Embeddings looked up by an index that depends on the example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype

from .base import Mode, Roots, RowMap, Rule, Use
from .costs import Cost, Size, rates_of
from .registry import handles
from .rows import active_rows


class _EmbeddingUse(torch.autograd.Function):
    """y = W[index]."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, token: Tensor, use: Use) -> Tensor:
        ctx.use = use
        assert use.weight is not None
        ctx.save_for_backward(index)
        return F.embedding(index, use.weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, None]:
        (index,) = ctx.saved_tensors
        use: Use = ctx.use
        assert use.sink is not None
        with use.sink.backward_of(use):
            use.sink.report(use, index, g)
        return None, None, None


class Embedding(Rule):
    """y = W[index]; the padding row has no gradient."""

    name = "embedding"
    rows_add_up = True

    def leading(self, use: Use, g: Tensor) -> int:
        """All dimensions of the index."""
        return g.dim() - 1

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """Index (N, T), gradient (N, T, d), zero at the padding index."""
        padding: int | None = use.options
        if padding is not None:
            g = g.masked_fill((z == padding).unsqueeze(-1), 0)
        leading = self.leading(use, g)
        return rows.arrange(z, leading), rows.arrange(g, leading)

    def costs(self, use: Use, size: Size) -> dict[str, Cost]:
        """The costs of the dense form, which only moves and adds rows."""
        assert use.weight is not None
        speed = rates_of(use.weight)
        width = use.weight.shape[1]
        item = use.weight.element_size()
        rows = size.n * size.positions * width
        clean = size.m * size.clean_positions * width
        kept = size.n * size.positions * (8 + width * item)
        moved = (3 * rows + clean + use.weight.numel()) * item
        return {"dense": Cost(rows + clean, 0.5 * rows, kept, moved / speed.bytes)}

    def direction(self, use: Use, z: Tensor, g: Tensor) -> Roots:
        """V[k] = Σ of g' where the index is k."""
        return _scatter(use, z, g, accumulation_dtype(g.dtype)), None

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = Σ_t g·V[index]."""
        weight, _ = direction
        assert weight is not None
        return ops.embedding_correlation(z, g, weight)

    def weighted_gradient(
        self, use: Use, z: Tensor, g: Tensor, weights: Tensor, active: Tensor | None
    ) -> Roots:
        """Σ w g at each index."""
        z, g = active_rows(z, g, weights, active)
        return _scatter(use, z, g, g.dtype), None


def _scatter(use: Use, index: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    assert use.weight is not None
    out = torch.zeros(use.weight.shape, dtype=dtype, device=g.device)
    return out.index_add_(0, index.reshape(-1), g.reshape(-1, g.shape[-1]).to(dtype))


EMBEDDING = Embedding()


def _arguments(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, Tensor, int | None, bool]:
    plain = max_norm is None and not scale_grad_by_freq and not sparse
    return input, weight, padding_idx, plain


@handles(F.embedding)
def _embedding(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    index, weight, padding, plain = _arguments(*args, **kwargs)
    if not plain or not mode.is_use(index, weight, None):
        return mode.other(func, args, kwargs)
    if padding is not None and padding < 0:
        padding += weight.shape[0]
    use = mode.use(EMBEDDING, "embedding", weight, None, padding, index)
    if use is None:
        return mode.other(func, args, kwargs)
    return _EmbeddingUse.apply(index, mode.token, use)
