"""The perturbed broadcast uses of a parameter: x + p, x * p and p.expand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l2rw_ext.layers.base import Roots
from l2rw_ext.layers.broadcast import BROADCAST
from l2rw_ext.ops.arithmetic import accumulation_dtype

from ._arguments import checked_direction, checked_eps, checked_example_dim, is_single, required
from ._perturbation import Gradients, Term, add_term
from .directions import Direction, Factored


def _check_input(layer: str, x: Tensor, p: Tensor) -> None:
    if x.dim() < p.dim():
        raise ValueError(
            f"{layer}: input must have at least the {p.dim()} dimensions of p, so that one of them "
            f"counts the examples, got shape {tuple(x.shape)}"
        )


class _Product(Term):
    """The term x_i V of a product, elementwise."""

    def value(self, x: Tensor, direction: Roots, dtype: torch.dtype) -> Tensor:
        """See :class:`Term`."""
        return x * super().value(x, direction, dtype)

    def gradients(
        self, g: Tensor, x: Tensor, direction: Roots, needed: tuple[bool, ...]
    ) -> Gradients:
        """See :class:`Term`."""
        need_x, *others = needed
        _, V, _ = super().gradients(g * x, x, direction, (False, *others))
        return g * super().value(x, direction, g.dtype) if need_x else None, V, None

    def scores(self, x: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """See :class:`Term`."""
        return super().scores(x, g.to(accumulation_dtype(g.dtype)) * x, direction)


def _perturb(
    layer: str,
    p: Tensor,
    x: Tensor | None,
    y: Tensor,
    eps: Tensor,
    direction: Direction | None,
    example_dim: int,
    alpha: float = 1,
) -> Tensor:
    """The plain result with ε_i alpha V, or ε_i x_i V, added to the part of example i."""
    dim = checked_example_dim(layer, example_dim, y.dim(), y.dim())
    position = dim - (y.dim() - p.dim())
    if position >= 0 and p.shape[position] != 1:
        raise ValueError(
            f"{layer}: p must be shared by all examples, with no dimension or size 1 at dimension "
            f"{dim} of the output {tuple(y.shape)}, got shape {tuple(p.shape)}"
        )
    eps = checked_eps(layer, "eps", eps, y, dim)
    direction = checked_direction(layer, "eps", direction, y)
    if isinstance(direction, Factored):
        V = _clean_gradient(layer, p, direction, multiplies=x is not None)
        # Once for the layer p -> alpha p; once more below, as V itself comes from its gradients.
        V = V if alpha == 1 else alpha * V
    elif direction.V_b is not None:
        raise ValueError(f"{layer}: direction.V_b must be None: p has no bias")
    else:
        V = required(layer, "V", direction.V)
        if V.shape != p.shape:
            raise ValueError(
                f"{layer}: direction.V must have the shape of p, {tuple(p.shape)}, "
                f"got {tuple(V.shape)}"
            )
    V = V if alpha == 1 else alpha * V
    if x is None:  # a sum and an expansion read nothing
        return add_term(y, p.detach(), eps, V, None, Term(BROADCAST, y.shape, dim))
    x = x.expand(y.shape).to(y.dtype)
    return add_term(y, x, eps, V, None, _Product(BROADCAST, y.shape, dim))


def _clean_gradient(layer: str, p: Tensor, direction: Factored, *, multiplies: bool) -> Tensor:
    """V = Σ g', or Σ g' z' where p multiplies, in the shape of p."""
    g_clean = direction.g_clean
    if multiplies:
        z_clean = required(layer, "z_clean", direction.z_clean)
        try:
            g_clean = g_clean * z_clean
        except RuntimeError as error:
            raise ValueError(
                f"{layer}: direction.z_clean must broadcast to g_clean, got shapes "
                f"{tuple(z_clean.shape)} and {tuple(g_clean.shape)}"
            ) from error
    try:
        V, _ = BROADCAST.term_transpose(g_clean, g_clean, (p, None), g_clean.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{layer}: direction.g_clean must have a shape to which p, {tuple(p.shape)}, "
            f"broadcasts, got {tuple(g_clean.shape)}"
        ) from error
    assert V is not None
    return V


def add(
    input: Tensor,
    p: Tensor,
    *,
    alpha: float = 1,
    eps: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.add` of a parameter: x_i + alpha (p + ε_i V).

    Args:
        input: (n, ...), or with the examples in another dimension.
        p: broadcasts to the result, with no dimension or size 1 along the examples.
        alpha: as in torch.
        eps: (n,), any floating dtype; ``None`` is the plain sum.
        direction: ``Dense(V)`` with V like ``p``, or ``Factored(None, g_clean)`` with the gradient
            of the sum for the clean batch.
        example_dim: the dimension of ``input`` that counts the examples.

    Returns:
        The sum. At ε = 0, backward adds alpha Σ g_i · V to ``eps.grad[i]``.

    Raises:
        TypeError: ``eps`` or ``direction`` has a wrong type or dtype.
        ValueError: ``p``, ``eps``, ``direction`` or ``example_dim`` does not fit the input.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> x, p = torch.zeros(2, 3), torch.zeros(3)
        >>> eps = torch.zeros(2, requires_grad=True)
        >>> v = PF.Dense(torch.tensor([1.0, 2.0, 3.0]))
        >>> PF.add(x, p, eps=eps, direction=v).sum().backward()
        >>> eps.grad
        tensor([6., 6.])
    """
    if eps is None:
        return torch.add(input, p, alpha=alpha)
    _check_input("add", input, p)
    if is_single("add", "eps", eps):
        one = input.unsqueeze(0)
        eps = eps.reshape(1)
        return add(one, p, alpha=alpha, eps=eps, direction=direction).squeeze(0)
    y = torch.add(input, p, alpha=alpha)
    return _perturb("add", p, None, y, eps, direction, example_dim, alpha)


def mul(
    input: Tensor,
    p: Tensor,
    *,
    eps: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.mul` by a parameter: x_i (p + ε_i V), elementwise.

    Args:
        input: (n, ...), or with the examples in another dimension.
        p: broadcasts to the result, with no dimension or size 1 along the examples.
        eps: (n,), any floating dtype; ``None`` is the plain product.
        direction: ``Dense(V)`` with V like ``p``, or ``Factored(z_clean, g_clean)`` with the clean
            batch's input and the gradient of its product.
        example_dim: the dimension of ``input`` that counts the examples.

    Returns:
        The product. At ε = 0, backward adds Σ g_i · (x_i V) to ``eps.grad[i]``.

    Raises:
        TypeError: ``eps`` or ``direction`` has a wrong type or dtype.
        ValueError: ``p``, ``eps``, ``direction`` or ``example_dim`` does not fit the input.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> x, p = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.ones(2)
        >>> eps = torch.zeros(2, requires_grad=True)
        >>> v = PF.Dense(torch.tensor([1.0, 2.0]))
        >>> PF.mul(x, p, eps=eps, direction=v).sum().backward()
        >>> eps.grad
        tensor([1., 5.])
    """
    if eps is None:
        return torch.mul(input, p)
    _check_input("mul", input, p)
    if is_single("mul", "eps", eps):
        one = input.unsqueeze(0)
        return mul(one, p, eps=eps.reshape(1), direction=direction).squeeze(0)
    return _perturb("mul", p, input, torch.mul(input, p), eps, direction, example_dim)


def expand(
    p: Tensor,
    *sizes: int | Sequence[int],
    eps: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:meth:`torch.Tensor.expand` of a parameter: the result's part for example i is p + ε_i V.

    Args:
        p: broadcasts to ``sizes``, with no dimension or size 1 along the examples.
        *sizes: numbers or one sequence, as in torch; -1 keeps a size.
        eps: (n,), any floating dtype; ``None`` is the plain view.
        direction: ``Dense(V)`` with V like ``p``, or ``Factored(None, g_clean)`` with the gradient
            of the clean batch's result.
        example_dim: the dimension of the result that counts the examples.

    Returns:
        A tensor of shape ``sizes``: with ``eps`` its examples differ, so it is no view of ``p``.
        At ε = 0, backward adds Σ g_i · V to ``eps.grad[i]``.

    Raises:
        TypeError: ``eps`` or ``direction`` has a wrong type or dtype.
        ValueError: ``p``, ``eps``, ``direction`` or ``example_dim`` does not fit the sizes.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> token = torch.zeros(1, 1, 2)
        >>> eps = torch.zeros(3, requires_grad=True)
        >>> v = PF.Dense(torch.tensor([[[1.0, 2.0]]]))
        >>> PF.expand(token, 3, -1, -1, eps=eps, direction=v).sum().backward()
        >>> eps.grad
        tensor([3., 3., 3.])
    """
    shape = sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    y = p.expand(shape)  # type: ignore[arg-type]
    if eps is None:
        return y
    if is_single("expand", "eps", eps):
        return _perturb("expand", p, None, y.unsqueeze(0), eps.reshape(1), direction, 0).squeeze(0)
    return _perturb("expand", p, None, y, eps, direction, example_dim)
