"""The perturbed convolutions over one, two and three spatial dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from l2rw_ext.layers.base import Call
from l2rw_ext.layers.convolution import CONVOLUTION, Geometry, beforehand, numbers, sides_of

from ._arguments import checked_example_dim, is_single
from ._perturbation import perturb
from .directions import Direction

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _numbers(layer: str, name: str, value: int | Sequence[int], dims: int) -> list[int]:
    """``value`` for each spatial dimension."""
    found = numbers(value, dims)
    if len(found) != dims:
        raise ValueError(f"{layer}: {name} must be one number or {dims}, got {value}")
    return found


def _padding_sides(
    layer: str,
    padding: str | int | Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: list[int],
) -> list[tuple[int, int]]:
    """What is added before and after each spatial dimension."""
    if not isinstance(padding, str):
        return [(number, number) for number in _numbers(layer, "padding", padding, len(kernel))]
    if padding not in ("valid", "same"):
        raise ValueError(f'{layer}: padding must be "same", "valid" or numbers, got "{padding}"')
    if padding == "same" and any(step != 1 for step in stride):
        raise ValueError(f'{layer}: padding="same" needs a stride of 1, got {tuple(stride)}')
    return sides_of(padding, kernel, dilation)


def _convolution(
    function: Callable[..., Tensor],
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    padding_mode: str,
    eps: Tensor | None,
    direction: Direction | None,
    example_dim: int,
) -> Tensor:
    layer = f"conv{dims}d"
    if padding_mode not in PADDING_MODES:
        raise ValueError(
            f"{layer}: padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}"
        )
    if padding_mode == "zeros" and eps is None:
        return function(input, weight, bias, stride, padding, dilation, groups)
    strides = _numbers(layer, "stride", stride, dims)
    dilations = _numbers(layer, "dilation", dilation, dims)
    if weight.dim() != dims + 2:
        raise ValueError(
            f"{layer}: weight must have {dims + 2} dimensions, got shape {tuple(weight.shape)}"
        )
    single = input.dim() == dims + 1
    if not single and input.dim() != dims + 2:
        raise ValueError(
            f"{layer}: input must have {dims + 2} dimensions, or {dims + 1} for a single example, "
            f"got shape {tuple(input.shape)}"
        )
    input = input.unsqueeze(0) if single else input
    checked_example_dim(layer, example_dim, input.dim(), 1)
    sides = _padding_sides(layer, padding, weight.shape[2:], strides, dilations)
    paddings, amounts = beforehand(sides, always=padding_mode != "zeros")
    mode = "constant" if padding_mode == "zeros" else padding_mode
    geometry = Geometry(strides, paddings, dilations, groups, sides=amounts, mode=mode)
    y = CONVOLUTION.forward(CONVOLUTION.enter(input, geometry), weight, bias, geometry)
    if eps is None:
        return y.squeeze(0) if single else y
    is_single(layer, "eps", eps)
    channels = weight.shape[1] * groups

    def clean_shape(z_clean: Tensor) -> tuple[int, ...]:
        if z_clean.dim() != dims + 2 or z_clean.shape[1] != channels:
            raise ValueError(
                f"{layer}: direction.z_clean must have {dims + 2} dimensions, (m, {channels}, "
                f"...), got shape {tuple(z_clean.shape)}"
            )
        extents = [
            (size + before + after - apart * (taps - 1) - 1) // step + 1
            for size, (before, after), apart, taps, step in zip(
                z_clean.shape[2:], sides, dilations, weight.shape[2:], strides, strict=True
            )
        ]
        return (z_clean.shape[0], weight.shape[0], *extents)

    call = Call(layer, input, weight, bias, geometry)
    y = perturb(CONVOLUTION, call, y, eps, direction, 0, clean_shape)
    return y.squeeze(0) if single else y


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    eps: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.conv1d` with the weights W + ε_i V and b + ε_i V_b.

    Args:
        input: (n, C, L); (C, L) is one example.
        weight: (O, C / groups, K).
        bias: (O,).
        stride: as in torch.
        padding: numbers, ``"same"`` or ``"valid"``.
        dilation: as in torch.
        groups: as in torch.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``, as in
            :class:`torch.nn.Conv1d`.
        eps: (n,), any floating dtype; ``None`` is the plain layer.
        direction: ``Dense(V, V_b)``, or ``Factored(z_clean, g_clean)`` with the clean batch's
            input (m, C, L') before padding and the gradient (m, O, P') of its output.
        example_dim: 0, where a convolution has its examples.

    Returns:
        The output, (n, O, P). At ε = 0, backward adds Σ_p g_ip · (V * z_i + V_b)_p to
        ``eps.grad[i]``: Eq. 12, with convolutions in place of matrix products.

    Raises:
        TypeError: ``eps`` or ``direction`` has a wrong type or dtype.
        ValueError: another argument does not fit the layer.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> x, weight = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 2)
        >>> eps = torch.zeros(1, requires_grad=True)
        >>> v = PF.Dense(torch.tensor([[[1.0, 0.0]]]))
        >>> PF.conv1d(x, weight, eps=eps, direction=v).sum().backward()
        >>> eps.grad
        tensor([3.])
    """
    return _convolution(
        F.conv1d,
        1,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        eps,
        direction,
        example_dim,
    )


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    eps: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.conv2d` with the weights W + ε_i V and b + ε_i V_b.

    Args:
        input: (n, C, H, W); (C, H, W) is one example.
        weight: (O, C / groups, K_h, K_w).
        bias: (O,).
        stride: as in torch.
        padding: numbers, ``"same"`` or ``"valid"``.
        dilation: as in torch.
        groups: as in torch.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``, as in
            :class:`torch.nn.Conv2d`.
        eps: (n,), any floating dtype; ``None`` is the plain layer.
        direction: ``Dense(V, V_b)``, or ``Factored(z_clean, g_clean)`` with the clean batch's
            input (m, C, H', W') before padding and the gradient (m, O, P', Q') of its output.
        example_dim: 0, where a convolution has its examples.

    Returns:
        The output, (n, O, P, Q). At ε = 0, backward adds Σ_p g_ip · (V * z_i + V_b)_p to
        ``eps.grad[i]``: Eq. 12, with convolutions in place of matrix products.

    Raises:
        TypeError: ``eps`` or ``direction`` has a wrong type or dtype.
        ValueError: another argument does not fit the layer.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> x, weight = torch.ones(2, 1, 3, 3), torch.ones(1, 1, 3, 3)
        >>> eps = torch.zeros(2, requires_grad=True)
        >>> v = PF.Dense(torch.ones(1, 1, 3, 3))
        >>> y = PF.conv2d(x, weight, padding="same", padding_mode="circular", eps=eps, direction=v)
        >>> y.sum().backward()
        >>> eps.grad
        tensor([81., 81.])
    """
    return _convolution(
        F.conv2d,
        2,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        eps,
        direction,
        example_dim,
    )


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    eps: Tensor | None = None,
    direction: Direction | None = None,
    example_dim: int = 0,
) -> Tensor:
    """:func:`torch.nn.functional.conv3d` with the weights W + ε_i V and b + ε_i V_b.

    Args:
        input: (n, C, D, H, W); (C, D, H, W) is one example.
        weight: (O, C / groups, K_d, K_h, K_w).
        bias: (O,).
        stride: as in torch.
        padding: numbers, ``"same"`` or ``"valid"``.
        dilation: as in torch.
        groups: as in torch.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``, as in
            :class:`torch.nn.Conv3d`.
        eps: (n,), any floating dtype; ``None`` is the plain layer.
        direction: ``Dense(V, V_b)``, or ``Factored(z_clean, g_clean)`` with the clean batch's
            input (m, C, D', H', W') before padding and the gradient of its output.
        example_dim: 0, where a convolution has its examples.

    Returns:
        The output, (n, O, P, Q, R). At ε = 0, backward adds Σ_p g_ip · (V * z_i + V_b)_p to
        ``eps.grad[i]``: Eq. 12, with convolutions in place of matrix products.

    Raises:
        TypeError: ``eps`` or ``direction`` has a wrong type or dtype.
        ValueError: another argument does not fit the layer.

    Example:
        >>> import torch
        >>> from l2rw_ext import functional as PF
        >>> x, weight = torch.ones(1, 1, 2, 2, 2), torch.ones(1, 1, 1, 1, 1)
        >>> eps = torch.zeros(1, requires_grad=True)
        >>> v = PF.Dense(torch.full((1, 1, 1, 1, 1), 0.5))
        >>> PF.conv3d(x, weight, eps=eps, direction=v).sum().backward()
        >>> eps.grad
        tensor([4.])
    """
    return _convolution(
        F.conv3d,
        3,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        eps,
        direction,
        example_dim,
    )
