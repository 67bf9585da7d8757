"""The perturbed scale and shift of the normalization layers.

Torch's ``eps`` is a numerical constant here and stays as it is; ε is called ``perturbation``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._affine import add_affine
from ._arguments import (
    check_dense,
    checked_direction,
    checked_eps,
    checked_example_dim,
    is_single,
    required,
)
from .directions import Direction, Factored, accumulation_dtype


def _check_constant(layer: str, eps: Any) -> None:
    if isinstance(eps, Tensor):
        raise TypeError(
            f"{layer}: eps is the numerical constant, a number, got a tensor of shape "
            f"{tuple(eps.shape)}; ε goes into perturbation="
        )


def _factored_direction(
    layer: str,
    direction: Factored,
    normalize: Callable[[Tensor], Tensor],
    parameter_shape: tuple[int, ...],
    first: int,
    has_weight: bool,
    has_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """V and V_b from the factors; the parameters lie along the dimensions from ``first`` on.

    A negative ``first`` counts from the back, as the normalized dimensions of a layer norm do.
    """
    z_clean, g_clean = required(layer, "z_clean", direction.z_clean), direction.g_clean
    width = len(parameter_shape)
    begin = first % z_clean.dim() if -z_clean.dim() < first < z_clean.dim() else 0
    if begin == 0 or tuple(z_clean.shape[begin : begin + width]) != parameter_shape:
        shape = "ends in" if first < 0 else "has, from dimension 1 on,"
        raise ValueError(
            f"{layer}: direction.z_clean must be a batch whose shape {shape} {parameter_shape}, "
            f"got {tuple(z_clean.shape)}"
        )
    if z_clean.shape != g_clean.shape:
        raise ValueError(
            f"{layer}: direction.g_clean must have the shape of z_clean, "
            f"{tuple(z_clean.shape)}, got {tuple(g_clean.shape)}"
        )
    summed = [d for d in range(z_clean.dim()) if not begin <= d < begin + width]
    dtype = accumulation_dtype(g_clean.dtype)
    V = V_b = None
    if has_weight:
        V = (g_clean * normalize(z_clean)).sum(summed, dtype=dtype)
    if has_bias and direction.bias:
        V_b = g_clean.sum(summed, dtype=dtype)
    return V, V_b


def _perturb(
    layer: str,
    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    perturbation: Tensor,
    direction: Direction | None,
    example_dim: int,
    first: int,
) -> Tensor:
    """Adds ε_i (x̂_i V + V_b) to the plain layer, ``function`` of input, weight and bias."""
    parameter = weight if weight is not None else bias
    if parameter is None:
        raise ValueError(f"{layer}: with perturbation, the layer must have a weight or a bias")
    # With a bias and no weight, torch's layer_norm has wrong second derivatives and its group_norm
    # has no backward.
    y = function(input, torch.ones_like(parameter) if weight is None else weight, bias)
    eps = checked_eps(layer, "perturbation", perturbation, y, example_dim)
    direction = checked_direction(layer, "perturbation", direction, y)
    if isinstance(direction, Factored):
        V, V_b = _factored_direction(
            layer,
            direction,
            lambda z_clean: function(z_clean, None, None),
            tuple(parameter.shape),
            first,
            weight is not None,
            bias is not None,
        )
    else:
        check_dense(layer, direction, weight, bias)
        V, V_b = direction.V, direction.V_b
    if first > 0:
        shape = [*parameter.shape, *[1] * (y.dim() - first - 1)]
        V = None if V is None else V.reshape(shape)
        V_b = None if V_b is None else V_b.reshape(shape)
    x = None if V is None else function(input, None, None)
    return add_affine(y, x, eps, V, V_b, example_dim)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    perturbation: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.layer_norm` with the scale W + ε_i V and the shift b + ε_i V_b.

    Args:
        input: (n, ..., *normalized_shape), or with the examples in any of the leading dimensions.
        normalized_shape: as in torch.
        weight: normalized_shape.
        bias: normalized_shape.
        eps: torch's numerical constant.
        perturbation: ε, (n,), any floating dtype; ``None`` is the plain layer.
        direction: ``Dense(V, V_b)``, or ``Factored(z_clean, g_clean)`` with the clean batch's
            input before normalization and the gradient of its output, of the same shape.
        example_dim: the dimension of ``input`` that counts the examples.

    Returns:
        The output, of the shape of ``input``. At ε = 0, backward adds Σ_t g_it · (x̂_it V + V_b)
        to ``perturbation.grad[i]``, where x̂ is the normalized input.

    Raises:
        TypeError: ``eps``, ``perturbation`` or ``direction`` has a wrong type or dtype.
        ValueError: ``perturbation``, ``direction`` or ``example_dim`` does not fit the layer.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> x, weight, bias = torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2)
        >>> v = PF.Dense(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0]))
        >>> e = torch.zeros(1, requires_grad=True)
        >>> y = PF.layer_norm(x, (2,), weight, bias, 0.0, perturbation=e, direction=v)
        >>> y.sum().backward()
        >>> e.grad
        tensor([3.])
    """
    _check_constant("layer_norm", eps)
    if perturbation is None:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    if is_single("layer_norm", "perturbation", perturbation):
        return layer_norm(
            input.unsqueeze(0),
            normalized_shape,
            weight,
            bias,
            eps,
            perturbation=perturbation.reshape(1),
            direction=direction,
        ).squeeze(0)
    width = len(normalized_shape)
    dim = checked_example_dim("layer_norm", example_dim, input.dim(), input.dim() - width)
    return _perturb(
        "layer_norm",
        lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps),
        input,
        weight,
        bias,
        perturbation,
        direction,
        dim,
        -width,
    )


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    perturbation: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.rms_norm` with the scale W + ε_i V.

    Args:
        input: (n, ..., *normalized_shape), or with the examples in any of the leading dimensions.
        normalized_shape: as in torch.
        weight: normalized_shape.
        eps: torch's numerical constant.
        perturbation: ε, (n,), any floating dtype; ``None`` is the plain layer.
        direction: ``Dense(V)``, or ``Factored(z_clean, g_clean)`` with the clean batch's input
            before normalization and the gradient of its output, of the same shape.
        example_dim: the dimension of ``input`` that counts the examples.

    Returns:
        The output, of the shape of ``input``. At ε = 0, backward adds Σ_t g_it · (x̂_it V) to
        ``perturbation.grad[i]``, where x̂ is the normalized input.

    Raises:
        TypeError: ``eps``, ``perturbation`` or ``direction`` has a wrong type or dtype.
        ValueError: ``perturbation``, ``direction`` or ``example_dim`` does not fit the layer.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> x, weight = torch.tensor([[1.0, -1.0], [0.0, 0.0]]), torch.ones(2)
        >>> e = torch.zeros(2, requires_grad=True)
        >>> v = PF.Dense(torch.tensor([2.0, 1.0]))
        >>> PF.rms_norm(x, (2,), weight, perturbation=e, direction=v).sum().backward()
        >>> e.grad
        tensor([1., 0.])
    """
    _check_constant("rms_norm", eps)
    shape = list(normalized_shape)
    if perturbation is None:
        return F.rms_norm(input, shape, weight, eps)
    if is_single("rms_norm", "perturbation", perturbation):
        return rms_norm(
            input.unsqueeze(0),
            shape,
            weight,
            eps,
            perturbation=perturbation.reshape(1),
            direction=direction,
        ).squeeze(0)
    dim = checked_example_dim("rms_norm", example_dim, input.dim(), input.dim() - len(shape))
    return _perturb(
        "rms_norm",
        lambda x, w, _: F.rms_norm(x, shape, w, eps),
        input,
        weight,
        None,
        perturbation,
        direction,
        dim,
        -len(shape),
    )


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    perturbation: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.group_norm` with the scale W + ε_i V and the shift b + ε_i V_b.

    Args:
        input: (n, C, ...).
        num_groups: as in torch.
        weight: (C,).
        bias: (C,).
        eps: torch's numerical constant.
        perturbation: ε, (n,), any floating dtype; ``None`` is the plain layer.
        direction: ``Dense(V, V_b)``, or ``Factored(z_clean, g_clean)`` with the clean batch's
            input before normalization and the gradient of its output, of the same shape.
        example_dim: 0, where this layer has its examples.

    Returns:
        The output, of the shape of ``input``. At ε = 0, backward adds Σ_p g_ip · (x̂_ip V + V_b)
        to ``perturbation.grad[i]``, where x̂ is the normalized input.

    Raises:
        TypeError: ``eps``, ``perturbation`` or ``direction`` has a wrong type or dtype.
        ValueError: ``perturbation``, ``direction`` or ``example_dim`` does not fit the layer.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> x, weight, bias = torch.tensor([[[1.0, 3.0]]]), torch.ones(1), torch.zeros(1)
        >>> e = torch.zeros(1, requires_grad=True)
        >>> v = PF.Dense(torch.tensor([5.0]), torch.tensor([1.0]))
        >>> PF.group_norm(x, 1, weight, bias, perturbation=e, direction=v).sum().backward()
        >>> e.grad
        tensor([2.])
    """
    _check_constant("group_norm", eps)
    if perturbation is None:
        return F.group_norm(input, num_groups, weight, bias, eps)
    is_single("group_norm", "perturbation", perturbation)
    return _perturb(
        "group_norm",
        lambda x, w, b: F.group_norm(x, num_groups, w, b, eps),
        input,
        weight,
        bias,
        perturbation,
        direction,
        checked_example_dim("group_norm", example_dim, input.dim(), 1),
        1,
    )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    perturbation: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.batch_norm` in eval mode with scale W + ε_i V, shift b + ε_i V_b.

    Args:
        input: (n, C, ...).
        running_mean: (C,).
        running_var: (C,).
        weight: (C,).
        bias: (C,).
        training: must be ``False`` with ``perturbation``: batch statistics couple the examples,
            and no sum over an example's own rows is <∇f_i, v>.
        momentum: as in torch.
        eps: torch's numerical constant.
        perturbation: ε, (n,), any floating dtype; ``None`` is the plain layer.
        direction: ``Dense(V, V_b)``, or ``Factored(z_clean, g_clean)`` with the clean batch's
            input before normalization and the gradient of its output, of the same shape.
        example_dim: 0, where this layer has its examples.

    Returns:
        The output, of the shape of ``input``. At ε = 0, backward adds Σ_p g_ip · (x̂_ip V + V_b)
        to ``perturbation.grad[i]``, where x̂ is the normalized input.

    Raises:
        TypeError: ``eps``, ``perturbation`` or ``direction`` has a wrong type or dtype.
        ValueError: ``training`` is true, or ``perturbation``, ``direction`` or ``example_dim``
            does not fit the layer.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> x, mean, var = torch.tensor([[1.0, 2.0]]), torch.zeros(2), torch.ones(2)
        >>> e = torch.zeros(1, requires_grad=True)
        >>> v = PF.Dense(torch.tensor([3.0, 4.0]))
        >>> y = PF.batch_norm(x, mean, var, torch.ones(2), eps=0.0, perturbation=e, direction=v)
        >>> y.sum().backward()
        >>> e.grad
        tensor([11.])
    """
    _check_constant("batch_norm", eps)
    if perturbation is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if training:
        raise ValueError(
            "batch_norm: training must be False with perturbation, got True: batch statistics "
            "couple the examples, so that scores by layer would be wrong"
        )
    is_single("batch_norm", "perturbation", perturbation)
    return _perturb(
        "batch_norm",
        lambda x, w, b: F.batch_norm(x, running_mean, running_var, w, b, False, momentum, eps),
        input,
        weight,
        bias,
        perturbation,
        direction,
        checked_example_dim("batch_norm", example_dim, input.dim(), 1),
        1,
    )
