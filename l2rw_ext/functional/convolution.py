"""The perturbed convolutions over one, two and three spatial dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from l2rw_ext import ops

from ._arguments import (
    check_dense,
    checked_direction,
    checked_eps,
    checked_example_dim,
    is_single,
    required,
)
from ._perturbation import add_term, along, apply, example_sum, fused, with_signature
from .directions import Direction, Factored

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _term(
    x: Tensor,
    V: Tensor,
    V_b: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    V_b = None if V_b is None else V_b.to(x.dtype)
    zeros = [0] * len(stride)
    return torch.convolution(x, V.to(x.dtype), V_b, stride, padding, dilation, False, zeros, groups)


def _gradients(
    g: Tensor,
    x: Tensor,
    V: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a convolution with respect to its input, weight and bias."""
    sizes, zeros = [V.shape[0]], [0] * len(stride)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        g, x, V, sizes, stride, padding, dilation, False, zeros, groups, needed
    )
    return gradients


class _Convolution(torch.autograd.Function):
    """y_i + ε_i (V * x_i + V_b)."""

    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(
        y: Tensor,  # [n, O, *p]
        x: Tensor,  # [n, C, *s]
        eps: Tensor,  # [n]
        V: Tensor,  # [O, C / groups, *k]
        V_b: Tensor | None,  # [O]
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> Tensor:
        return add_term(y, eps, _term(x, V, V_b, stride, padding, dilation, groups), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, x, eps, V, V_b, *ctx.geometry = inputs
        ctx.save_for_backward(x, eps, V, V_b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, eps, V, V_b = ctx.saved_tensors
        _, need_x, need_eps, need_V, need_b, *_ = ctx.needs_input_grad
        stride, padding, dilation, groups = ctx.geometry
        grad_x = grad_eps = grad_V = grad_b = None
        if need_eps:
            if fused():
                u = ops.conv_correlation(x, g, V, V_b, stride, padding, dilation, groups)
            else:
                u = example_sum(g, _term(x, V, V_b, stride, padding, dilation, groups), 0)
            grad_eps = u.to(eps.dtype)
        if need_x or need_V or need_b:
            needed = [need_x, need_V, need_b]
            scaled = g * along(eps, g, 0)
            grad_x, grad_V, grad_b = _gradients(
                scaled, x, V.to(x.dtype), stride, padding, dilation, groups, needed
            )
            grad_V = grad_V.to(V.dtype) if need_V else None
            grad_b = grad_b.to(V_b.dtype) if need_b else None
        return g, grad_x, grad_eps, grad_V, grad_b, None, None, None, None


def _numbers(layer: str, name: str, value: int | Sequence[int], dims: int) -> list[int]:
    """``value`` for each spatial dimension."""
    numbers = [value] if isinstance(value, int) else list(value)
    if len(numbers) == 1:
        numbers = numbers * dims
    if len(numbers) != dims:
        raise ValueError(f"{layer}: {name} must be one number or {dims}, got {value}")
    return numbers


def _padding_sides(
    layer: str,
    padding: str | int | Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """What is added before and after each spatial dimension."""
    dims = len(kernel)
    if not isinstance(padding, str):
        return [(number, number) for number in _numbers(layer, "padding", padding, dims)]
    if padding == "valid":
        return [(0, 0)] * dims
    if padding != "same":
        raise ValueError(f'{layer}: padding must be "same", "valid" or numbers, got "{padding}"')
    if any(step != 1 for step in stride):
        raise ValueError(f'{layer}: padding="same" needs a stride of 1, got {tuple(stride)}')
    totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    # As torch does, an odd total puts the larger half behind.
    return [(total // 2, total - total // 2) for total in totals]


def _pad(input: Tensor, sides: Sequence[tuple[int, int]], mode: str) -> Tensor:
    amounts = [amount for side in reversed(sides) for amount in side]
    if not any(amounts):
        return input
    return F.pad(input, amounts, mode="constant" if mode == "zeros" else mode)


def _factored_direction(
    layer: str,
    direction: Factored,
    weight: Tensor,
    has_bias: bool,
    y: Tensor,
    sides: Sequence[tuple[int, int]],
    mode: str,
    stride: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor | None]:
    """V and V_b from the factors: the weight gradient of the clean batch."""
    z_clean = required(layer, "z_clean", direction.z_clean)
    g_clean, dims = direction.g_clean, len(stride)
    channels = weight.shape[1] * groups
    if z_clean.dim() != dims + 2 or z_clean.shape[1] != channels:
        raise ValueError(
            f"{layer}: direction.z_clean must have {dims + 2} dimensions, (m, {channels}, ...), "
            f"got shape {tuple(z_clean.shape)}"
        )
    z_clean = _pad(z_clean.to(y.dtype), sides, mode)
    extents = [
        (size - step_in * (taps - 1) - 1) // step + 1
        for size, step_in, taps, step in zip(
            z_clean.shape[2:], dilation, weight.shape[2:], stride, strict=True
        )
    ]
    expected = (z_clean.shape[0], weight.shape[0], *extents)
    if tuple(g_clean.shape) != expected:
        raise ValueError(
            f"{layer}: direction.g_clean must have the shape of the output for z_clean, "
            f"{expected}, got {tuple(g_clean.shape)}"
        )
    zeros = [0] * dims
    _, V, _ = _gradients(
        g_clean,
        z_clean,
        weight.detach().to(y.dtype),
        stride,
        zeros,
        dilation,
        groups,
        [False, True, False],
    )
    V_b = g_clean.sum([0, *range(2, dims + 2)]) if has_bias and direction.bias else None
    return V, V_b


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
    if single:
        input = input.unsqueeze(0)
    checked_example_dim(layer, example_dim, input.dim(), 1)
    sides = _padding_sides(layer, padding, weight.shape[2:], strides, dilations)
    if padding_mode != "zeros" or any(before != after for before, after in sides):
        x, paddings = _pad(input, sides, padding_mode), [0] * dims
    else:
        x, paddings = input, [before for before, _ in sides]
    y = function(x, weight, bias, strides, paddings, dilations, groups)
    if eps is not None:
        is_single(layer, "eps", eps)
        eps = checked_eps(layer, "eps", eps, y, 0)
        direction = checked_direction(layer, "eps", direction, y)
        if isinstance(direction, Factored):
            V, V_b = _factored_direction(
                layer,
                direction,
                weight,
                bias is not None,
                y,
                sides,
                padding_mode,
                strides,
                dilations,
                groups,
            )
        else:
            V, V_b = required(layer, "V", direction.V), direction.V_b
            check_dense(layer, direction, weight, bias)
        x = x.to(y.dtype)
        y = apply(_Convolution, y, x, eps, V, V_b, strides, paddings, dilations, groups)
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
