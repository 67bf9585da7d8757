"""The perturbed scale and shift of the normalization layers.

Torch's ``eps`` is a numerical constant here and stays as it is; ε is called ``perturbation``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l2rw_ext.layers.base import Call
from l2rw_ext.layers.normalization import SCALE, Layout

from ._arguments import checked_example_dim, is_single
from ._perturbation import perturb
from .directions import Direction


def _check_constant(layer: str, eps: Any) -> None:
    if isinstance(eps, Tensor):
        raise TypeError(
            f"{layer}: eps is the numerical constant, a number, got a tensor of shape "
            f"{tuple(eps.shape)}; ε goes into perturbation="
        )


def _perturb(
    layer: str,
    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    perturbation: Tensor,
    direction: Direction | None,
    example_dim: int,
    features: int | None = None,
) -> Tensor:
    """Adds ε_i (x̂_i V + V_b) to the plain layer, ``function`` of input, weight and bias.

    The parameters lie along the last ``features`` dimensions; None: along the channels.
    """
    parameter = weight if weight is not None else bias
    if parameter is None:
        raise ValueError(f"{layer}: with perturbation, the layer must have a weight or a bias")
    shape = tuple(parameter.shape)
    if features is not None and is_single(layer, "perturbation", perturbation):
        return _perturb(
            layer,
            function,
            input.unsqueeze(0),
            weight,
            bias,
            perturbation.reshape(1),
            direction,
            0,
            features,
        ).squeeze(0)
    is_single(layer, "perturbation", perturbation)
    allowed = 1 if features is None else input.dim() - features
    dim = checked_example_dim(layer, example_dim, input.dim(), allowed)
    # With a bias and no weight, torch's layer_norm has wrong second derivatives and its group_norm
    # has no backward.
    y = function(input, torch.ones_like(parameter) if weight is None else weight, bias)

    def clean_shape(z_clean: Tensor) -> tuple[int, ...]:
        first = 1 if features is None else z_clean.dim() - features
        if first < 1 or tuple(z_clean.shape[first : first + len(shape)]) != shape:
            where = "has, from dimension 1 on," if features is None else "ends in"
            raise ValueError(
                f"{layer}: direction.z_clean must be a batch whose shape {where} {shape}, "
                f"got {tuple(z_clean.shape)}"
            )
        return tuple(z_clean.shape)

    layout = Layout(features, lambda x: function(x, None, None))
    call = Call(layer, input, weight, bias, layout)
    return perturb(
        SCALE,
        call,
        y,
        perturbation,
        direction,
        dim,
        clean_shape,
        "perturbation",
        bias_alone=True,
    )


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
    return _perturb(
        "layer_norm",
        lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps),
        input,
        weight,
        bias,
        perturbation,
        direction,
        example_dim,
        len(normalized_shape),
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
    return _perturb(
        "rms_norm",
        lambda x, w, _: F.rms_norm(x, shape, w, eps),
        input,
        weight,
        None,
        perturbation,
        direction,
        example_dim,
        len(shape),
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
    return _perturb(
        "group_norm",
        lambda x, w, b: F.group_norm(x, num_groups, w, b, eps),
        input,
        weight,
        bias,
        perturbation,
        direction,
        example_dim,
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
    return _perturb(
        "batch_norm",
        lambda x, w, b: F.batch_norm(x, running_mean, running_var, w, b, False, momentum, eps),
        input,
        weight,
        bias,
        perturbation,
        direction,
        example_dim,
    )
