"""The perturbed fully connected layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from l2rw_ext import ops
from l2rw_ext.layers.base import Call, Roots, Use
from l2rw_ext.layers.linear import LINEAR, flat

from ._arguments import checked_direction, checked_eps, checked_example_dim, is_single
from ._perturbation import Gradients, Term, add_term, checked_factors, perturb
from .directions import Direction, Factored


@dataclass(frozen=True)
class _FactoredTerm(Term):
    """Σ_s (x_i · z'_s + bias) g'_s, which is Eq. 12 with V never formed.

    z' (S, d_in) and g' (S, d_out), all positions of the clean batch, stand in for V and V_b;
    ``options`` says whether there is a bias.
    """

    def value(self, x: Tensor, direction: Roots, dtype: torch.dtype) -> Tensor:
        """See :class:`Term`."""
        z_clean, g_clean = _given(direction)
        return self._gram(x, z_clean) @ g_clean

    def _gram(self, x: Tensor, z_clean: Tensor) -> Tensor:
        gram = x @ z_clean.mT
        return gram + 1 if self.options else gram

    def gradients(
        self, g: Tensor, x: Tensor, direction: Roots, needed: tuple[bool, ...]
    ) -> Gradients:
        """See :class:`Term`."""
        z_clean, g_clean = _given(direction)
        need_x, need_z, need_g = needed
        gram = g @ g_clean.mT
        return (
            gram @ z_clean if need_x else None,
            flat(gram).mT @ flat(x) if need_z else None,
            flat(self._gram(x, z_clean)).mT @ flat(g) if need_g else None,
        )

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """See :class:`Term`."""
        z_clean, g_clean = (factor.unsqueeze(0) for factor in _given(direction))
        return ops.factored_correlation(z, g, z_clean, g_clean, self.options)


def _given(direction: Roots) -> tuple[Tensor, Tensor]:
    z_clean, g_clean = direction
    assert z_clean is not None
    assert g_clean is not None
    return z_clean, g_clean


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.linear` with the weights W + ε_i V and b + ε_i V_b.

    Args:
        input: (n, ..., d_in), or with the examples in any dimension but the last; (d_in,) is one
            example.
        weight: (d_out, d_in).
        bias: (d_out,).
        eps: (n,), any floating dtype; ``None`` is the plain layer.
        direction: ``Dense(V, V_b)``, or ``Factored(z_clean, g_clean)`` with shapes (m, ..., d_in)
            and (m, ..., d_out). Factored never forms V where that takes more operations:
            n T m T' (d_in + d_out) against (n T + m T') d_in d_out multiply-adds.
        example_dim: the dimension of ``input`` that counts the examples.

    Returns:
        The output, (n, ..., d_out). At ε = 0, backward adds Σ_t g_it · (V z_it + V_b) to
        ``eps.grad[i]``: Eq. 12.

    Raises:
        TypeError: ``eps`` or ``direction`` has a wrong type or dtype.
        ValueError: ``eps``, ``direction`` or ``example_dim`` does not fit the layer.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
        >>> v = PF.Dense(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]))
        >>> eps = torch.zeros(3, requires_grad=True)
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
        >>> y = PF.linear(x, weight, bias, eps=eps, direction=v)
        >>> y.sum().backward()
        >>> eps.grad
        tensor([1., 2., 3.])
    """
    if eps is None:
        return F.linear(input, weight, bias)
    if is_single("linear", "eps", eps) or input.dim() == 1:
        one = input.unsqueeze(0)
        eps = eps.reshape(1) if eps.dim() == 0 else eps
        return linear(one, weight, bias, eps=eps, direction=direction).squeeze(0)
    if weight.dim() != 2:
        raise ValueError(
            f"linear: with eps, weight must have shape (d_out, d_in), got {tuple(weight.shape)}"
        )
    d_out, d_in = weight.shape
    dim = checked_example_dim("linear", example_dim, input.dim(), input.dim() - 1)
    y = F.linear(input, weight, bias)

    def clean_shape(z_clean: Tensor) -> tuple[int, ...]:
        if z_clean.dim() < 2 or z_clean.shape[-1] != d_in:
            raise ValueError(
                f"linear: direction.z_clean must have shape (m, ..., d_in) with d_in = {d_in}, "
                f"got {tuple(z_clean.shape)}"
            )
        return (*z_clean.shape[:-1], d_out)

    if isinstance(direction, Factored):
        eps = checked_eps("linear", "eps", eps, y, dim)
        checked_direction("linear", "eps", direction, y)
        z_clean, g_clean = checked_factors("linear", direction, clean_shape)
        rows, clean_rows = math.prod(input.shape[:-1]), math.prod(z_clean.shape[:-1])
        if rows * clean_rows * (d_in + d_out) < (rows + clean_rows) * d_in * d_out:
            term = _FactoredTerm(LINEAR, bias is not None and direction.bias, dim)
            x, z_clean = input.to(y.dtype), flat(z_clean.to(y.dtype))
            return add_term(y, x, eps, z_clean, flat(g_clean), term)
    call = Call("linear", input, weight, bias)
    return perturb(LINEAR, call, y, eps, direction, dim, clean_shape)
