"""The perturbed embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from l2rw_ext.layers.base import Call
from l2rw_ext.layers.embedding import EMBEDDING, row_of

from ._arguments import checked_example_dim, is_single
from ._perturbation import perturb
from .directions import Direction


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

    def clean_shape(z_clean: Tensor) -> tuple[int, ...]:
        if z_clean.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                "embedding: direction.z_clean must hold indices, int32 or int64, got "
                f"{z_clean.dtype}"
            )
        return (*z_clean.shape, weight.shape[1])

    call = Call("embedding", input, weight, None, row_of(padding_idx, weight))
    return perturb(EMBEDDING, call, y, eps, direction, dim, clean_shape)
