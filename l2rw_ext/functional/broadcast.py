"""The perturbed broadcast uses of a parameter: x + p, x * p and p.expand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._affine import add_affine
from ._arguments import checked_direction, checked_eps, checked_example_dim, is_single, required
from .directions import Direction, Factored, accumulation_dtype


def _check_parameter(layer: str, p: Tensor, y: Tensor, example_dim: int) -> None:
    """Raises unless ``p`` is the same for all examples of ``y``."""
    position = example_dim - (y.dim() - p.dim())
    if position >= 0 and p.shape[position] != 1:
        raise ValueError(
            f"{layer}: p must be shared by all examples, with no dimension or size 1 at dimension "
            f"{example_dim} of the output {tuple(y.shape)}, got shape {tuple(p.shape)}"
        )


def _check_like_p(layer: str, V: Tensor, p: Tensor) -> Tensor:
    if V.shape != p.shape:
        raise ValueError(
            f"{layer}: direction.V must have the shape of p, {tuple(p.shape)}, got {tuple(V.shape)}"
        )
    return V


def _reduced(layer: str, product: Tensor, p: Tensor) -> Tensor:
    """Sums the clean batch's gradients to the shape of ``p``."""
    try:
        return product.to(accumulation_dtype(product.dtype)).sum_to_size(p.shape)
    except RuntimeError as error:
        raise ValueError(
            f"{layer}: direction.g_clean must have a shape to which p, {tuple(p.shape)}, "
            f"broadcasts, got {tuple(product.shape)}"
        ) from error


def _gradient_direction(layer: str, direction: Direction, p: Tensor) -> Tensor:
    """The direction of a parameter that is added: V, or Σ g' in the shape of ``p``."""
    if isinstance(direction, Factored):
        return _reduced(layer, direction.g_clean, p)
    if direction.V_b is not None:
        raise ValueError(f"{layer}: direction.V_b must be None: p has no bias")
    return _check_like_p(layer, required(layer, "V", direction.V), p)


def _check_input(layer: str, x: Tensor, p: Tensor) -> None:
    if x.dim() < p.dim():
        raise ValueError(
            f"{layer}: input must have at least the {p.dim()} dimensions of p, so that one of them "
            f"counts the examples, got shape {tuple(x.shape)}"
        )


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
    dim = checked_example_dim("add", example_dim, y.dim(), y.dim())
    _check_parameter("add", p, y, dim)
    eps = checked_eps("add", "eps", eps, y, dim)
    V = _gradient_direction("add", checked_direction("add", "eps", direction, y), p)
    if alpha != 1:
        # Once for the layer p ↦ alpha p; once more where V itself comes from its gradients.
        V = (alpha * alpha if isinstance(direction, Factored) else alpha) * V
    return add_affine(y, None, eps, None, V, dim)


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
    y = torch.mul(input, p)
    dim = checked_example_dim("mul", example_dim, y.dim(), y.dim())
    _check_parameter("mul", p, y, dim)
    eps = checked_eps("mul", "eps", eps, y, dim)
    direction = checked_direction("mul", "eps", direction, y)
    if isinstance(direction, Factored):
        z_clean = required("mul", "z_clean", direction.z_clean)
        try:
            product = direction.g_clean * z_clean
        except RuntimeError as error:
            raise ValueError(
                "mul: direction.z_clean must broadcast to g_clean, got shapes "
                f"{tuple(z_clean.shape)} and {tuple(direction.g_clean.shape)}"
            ) from error
        V = _reduced("mul", product, p)
    else:
        V = _gradient_direction("mul", direction, p)
    return add_affine(y, input.expand(y.shape), eps, V, None, dim)


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
        y, eps, example_dim, single = y.unsqueeze(0), eps.reshape(1), 0, True
    else:
        single = False
    dim = checked_example_dim("expand", example_dim, y.dim(), y.dim())
    _check_parameter("expand", p, y, dim)
    eps = checked_eps("expand", "eps", eps, y, dim)
    V = _gradient_direction("expand", checked_direction("expand", "eps", direction, y), p)
    y = add_affine(y, None, eps, None, V, dim)
    return y.squeeze(0) if single else y
