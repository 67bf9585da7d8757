"""Embeddings looked up by an index that depends on the example, and bags of them."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype

from .base import Call, Function, Layer, Roots, RowMap, Single, Use
from .costs import Cost, Size, rates_of


class Embedding(Layer):
    """y = W[index]; the padding row, which ``options`` names, has no gradient."""

    name = "embedding"
    functions: ClassVar[tuple[Function, ...]] = (F.embedding,)
    rows_add_up = True

    def bind(
        self,
        func: Function,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Call | None:
        """Plain look-ups: no row is changed, no gradient scaled or sparse."""
        if max_norm is not None or scale_grad_by_freq or sparse:
            return None
        return Call("embedding", input, weight, None, row_of(padding_idx, weight))

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Any
    ) -> Tensor:
        """W[x]."""
        assert weight is not None
        return F.embedding(x, weight, options)

    def term(self, x: Tensor, V: Tensor | None, V_b: Tensor | None, options: Any) -> Tensor:
        """V[x], zero at the padding index, whose row has no part in <V, ∇f_i>."""
        return _unpadded(self.forward(x, V, None, None), x, options)

    def term_transpose(self, g: Tensor, x: Tensor, like: Roots, options: Any) -> Roots:
        """Σ of g where the index is k, for every row k."""
        assert like[0] is not None
        dtype = accumulation_dtype(g.dtype)
        rows = _unpadded(g, x, options).reshape(x.numel(), g.shape[-1]).to(dtype)
        zeros = torch.zeros(like[0].shape, dtype=dtype, device=g.device)
        return zeros.index_add(0, x.reshape(x.numel()), rows), None

    def data_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None, options: Any) -> Tensor:
        """An index has no gradient."""
        raise AssertionError("an index requires no grad")

    def leading(self, use: Use, g: Tensor) -> int:
        """All dimensions of the index."""
        return g.dim() - 1

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """Index (N, T), gradient (N, T, d), zero at the padding index."""
        g = _unpadded(g, z, use.options)
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
        """V[k] = Σ of g' where the index is k; the gradients at the padding index are zero."""
        return self.weighted_gradient(use, z, g, g.new_ones(g.shape[0]))

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = Σ_t g·V[index]."""
        V, _ = direction
        assert V is not None
        return ops.embedding_correlation(z, g, V)

    def single_gradients(
        self, use: Use, z: Tensor, g: Tensor
    ) -> tuple[Single | None, Single | None]:
        """Σ of g at each index, as products."""
        return (z.long(), g), None

    def weighted_gradient(self, use: Use, z: Tensor, g: Tensor, weights: Tensor) -> Roots:
        """Σ w g at each index."""
        assert use.weight is not None
        return ops.embedding_weighted_gradient(z, g, weights, use.weight.shape[0]), None


def row_of(padding_idx: int | None, weight: Tensor) -> int | None:
    """The padding index, counted from the front."""
    if padding_idx is None or padding_idx >= 0:
        return padding_idx
    return padding_idx + weight.shape[0]


def _unpadded(g: Tensor, index: Tensor, padding: int | None) -> Tensor:
    """The rows of g, zero where the index is that of the padding."""
    return g if padding is None else g.masked_fill((index == padding).unsqueeze(-1), 0)


class Bag(NamedTuple):
    """How the rows of a bag are put together."""

    how: str
    padding: int | None


class EmbeddingBag(Embedding):
    """Sum or mean of W[index] over the last dimension of the index, without the padding index."""

    functions: ClassVar[tuple[Function, ...]] = (F.embedding_bag,)

    def bind(  # type: ignore[override]  # torch's own order
        self,
        func: Function,
        input: Tensor,
        weight: Tensor,
        offsets: Tensor | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        per_sample_weights: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> Call | None:
        """Bags of one length, without weights of their own."""
        changed = max_norm is not None or scale_grad_by_freq or sparse
        if changed or input.dim() != 2 or input.numel() == 0:
            return None
        if per_sample_weights is not None or mode not in ("sum", "mean"):
            return None
        return Call("embedding_bag", input, weight, None, Bag(mode, row_of(padding_idx, weight)))

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Any
    ) -> Tensor:
        """Σ W[x], or its mean; torch leaves the padding out."""
        assert weight is not None
        return F.embedding_bag(x, weight, mode=options.how, padding_idx=options.padding)

    def term(self, x: Tensor, V: Tensor | None, V_b: Tensor | None, options: Any) -> Tensor:
        """Σ V[x], or its mean."""
        return self.forward(x, V, None, options)

    def term_transpose(self, g: Tensor, x: Tensor, like: Roots, options: Any) -> Roots:
        """As for an embedding of all indices."""
        return super().term_transpose(_of_indices(g, x, options), x, like, options.padding)

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """As for an embedding of all indices."""
        g = _unpadded(_of_indices(g, z, use.options), z, use.options.padding)
        return rows.arrange(z, 1).flatten(1), rows.arrange(g, 1).flatten(1, 2)

    def costs(self, use: Use, size: Size) -> dict[str, Cost]:
        """Those of an embedding of all indices in the bags."""
        length = use.shape[1]
        return super().costs(
            use, Size(size.n, size.m, size.positions * length, size.clean_positions * length)
        )


def _of_indices(g: Tensor, index: Tensor, bag: Bag) -> Tensor:
    """The gradient of each bag at every index in it, (N, L, d)."""
    if bag.how == "mean":
        counted = torch.ones_like(index) if bag.padding is None else index != bag.padding
        g = g / counted.sum(1, keepdim=True).clamp(min=1)
    return g.unsqueeze(1).expand(*index.shape, g.shape[-1])


EMBEDDING = Embedding()
EMBEDDING_BAG = EmbeddingBag()
