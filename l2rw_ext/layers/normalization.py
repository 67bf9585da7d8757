"""Scale and shift of the normalisation layers: y = γ x̂ + β.

An example's gradient of γ and β takes one pass over x and g and is no larger than the parameter. So
there is one form: the per-example gradients are formed at once and replace z and g.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext import ops
from l2rw_ext.errors import NotExactError

from .base import Mode, Roots, RowMap, Rule, Use, UseFunction
from .costs import Cost, Size, rates_of
from .registry import handles


@dataclass
class Layout:
    """Where γ lies in x, and how x̂ = (x - mean) rstd; without statistics x is x̂ itself."""

    channels: bool
    """γ runs over dimension 1; otherwise over the trailing ``features`` dimensions."""
    features: int
    mean: Tensor | None = None
    rstd: Tensor | None = None


class Scale(Rule):
    """y = γ x̂ + β."""

    name = "normalization"
    reduces = True

    def call(self, use: Use, x: Tensor) -> Tensor:
        """γ x̂ + β of a given x̂."""
        layout: Layout = use.options
        out = x
        if use.weight is not None:
            out = out * _broadcast(use.weight, x, layout)
        if use.bias is not None:
            out = out + _broadcast(use.bias, x, layout)
        return out.clone() if out is x else out

    def data_gradient(self, use: Use, x: Tensor, weight: Tensor | None, g: Tensor) -> Tensor:
        """γ g."""
        return g if weight is None else g * _broadcast(weight, g, use.options)

    def leading(self, use: Use, g: Tensor) -> int:
        """Dimension 0 for channels; else all dimensions before the normalised ones."""
        layout: Layout = use.options
        return 1 if layout.channels else g.dim() - layout.features

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """Per-example gradients of γ and β, (N, d) each.

        A z with one dimension more than g is what :func:`_stacked` made of them, by row.
        """
        layout: Layout = use.options
        mean, rstd = layout.mean, layout.rstd
        if z.dim() > g.dim():
            scale, shift = z.flatten(2).unbind()
            return _of_examples(scale, shift, rows)
        if layout.channels:
            x, gradient = _channels_last(z), _channels_last(g)
            if mean is not None and rstd is not None:
                mean, rstd = mean.unsqueeze(-2).expand(x.shape), rstd.unsqueeze(-2).expand(x.shape)
            scale, shift = ops.affine_example_gradients(x, gradient, mean, rstd)
            return _of_examples(scale, shift, rows)
        leading = self.leading(use, g)
        x, gradient = _by_example(z, rows, leading), _by_example(g, rows, leading)
        if mean is not None and rstd is not None:
            mean = _by_example(mean, rows, leading).expand(x.shape)
            rstd = _by_example(rstd, rows, leading).expand(x.shape)
        return ops.affine_example_gradients(x, gradient, mean, rstd)

    def costs(self, use: Use, size: Size) -> dict[str, Cost]:
        """One pass over x and g."""
        elements = math.prod(use.shape)
        item = 4.0
        speed = rates_of(*use.roots)
        width = sum(r.numel() for r in use.roots if r is not None)
        return {
            "per example": Cost(
                2.0 * elements,
                0.5 * size.n * width,
                size.n * width * item,
                2 * elements * item / speed.bytes,
            )
        }

    def direction(self, use: Use, z: Tensor, g: Tensor) -> Roots:
        """The sum over the clean examples."""
        return _pick(use, z.sum(0), g.sum(0))

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = <V, G_i> + <V_b, G_bi>."""
        weight, bias = direction
        u = z.new_zeros(z.shape[0])
        if weight is not None:
            u = u + z @ weight.reshape(-1)
        return u if bias is None else u + g @ bias.reshape(-1)

    def weighted_gradient(
        self, use: Use, z: Tensor, g: Tensor, weights: Tensor, active: Tensor | None
    ) -> Roots:
        """Σ w_i G_i, rows with w = 0 left out."""
        return (
            ops.weighted_sum(z, weights) if use.roots[0] is not None else None,
            ops.weighted_sum(g, weights) if use.roots[1] is not None else None,
        )


def _pick(use: Use, weight: Tensor, bias: Tensor) -> Roots:
    return (
        weight if use.roots[0] is not None else None,
        bias if use.roots[1] is not None else None,
    )


def _channels_last(x: Tensor) -> Tensor:
    """(R, C, *s) -> (R, S, C), a view for contiguous and for channels-last tensors."""
    last = x.movedim(1, -1)
    if x.dim() > 3 and last.is_contiguous():
        return last.flatten(1, -2)
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(2).transpose(1, 2)


def _stacked(scale: Tensor, shift: Tensor, g: Tensor) -> Tensor:
    """Gradients by row, (R, C) each, in place of the input in a report: (2, R, C, 1, ...)."""
    return torch.stack((scale, shift)).view(2, *g.shape[:2], *[1] * (g.dim() - 2))


def _of_examples(scale: Tensor, shift: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
    """Gradients by row, (R, C) each, summed over the rows of an example."""
    if rows.positions == 1:
        return scale, shift
    return rows.arrange(scale, 1).sum(1), rows.arrange(shift, 1).sum(1)


def _by_example(x: Tensor, rows: RowMap, leading: int) -> Tensor:
    """(rows..., features...) -> (N, T, d)."""
    return rows.arrange(x.flatten(leading), leading)


SCALE = Scale()


class _LayerNormUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, use: Use, shape: list[int], eps: float) -> Any:
        out, mean, rstd = torch.native_layer_norm(x, shape, use.weight, use.bias, eps)
        ctx.use, ctx.shape = use, shape
        layout: Layout = use.options
        layout.mean, layout.rstd = mean, rstd
        ctx.save_for_backward(x, use.weight, use.bias)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight, bias = ctx.saved_tensors
        use: Use = ctx.use
        assert use.sink is not None
        with use.sink.backward_of(use):
            use.sink.report(use, x, g)
            data = None
            if ctx.needs_input_grad[0]:
                layout: Layout = use.options
                data = torch.ops.aten.native_layer_norm_backward(
                    g, x, ctx.shape, layout.mean, layout.rstd, weight, bias, [True, False, False]
                )[0]
            return data, None, None, None, None


class _GroupNormUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, use: Use, groups: int, eps: float) -> Any:
        n, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        out, mean, rstd = torch.native_group_norm(
            x, use.weight, use.bias, n, channels, pixels, groups, eps
        )
        ctx.use, ctx.groups = use, groups
        ctx.save_for_backward(x, use.weight, mean, rstd)
        layout: Layout = use.options
        per_group = channels // groups
        layout.mean = mean.repeat_interleave(per_group, 1)
        layout.rstd = rstd.repeat_interleave(per_group, 1)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        use: Use = ctx.use
        assert use.sink is not None
        with use.sink.backward_of(use):
            if not ctx.needs_input_grad[0]:
                use.sink.report(use, x, g)
                return None, None, None, None, None
            data, scale, shift = ops.group_norm_backward(g, x, mean, rstd, weight, ctx.groups)
            use.sink.report(use, _stacked(scale, shift, g), g)
            return data, None, None, None, None


def format_of(x: Tensor) -> torch.memory_format:
    """Channels last where x is so and not contiguous as well."""
    for memory_format in (torch.channels_last, torch.channels_last_3d):
        dimensions = 4 if memory_format is torch.channels_last else 5
        if (
            x.dim() == dimensions
            and not x.is_contiguous()
            and x.is_contiguous(memory_format=memory_format)
        ):
            return memory_format
    return torch.contiguous_format


def _broadcast(parameter: Tensor, x: Tensor, layout: Layout) -> Tensor:
    if not layout.channels:
        return parameter
    return parameter.view(1, -1, *[1] * (x.dim() - 2))


def _layer_norm_arguments(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, list[int], Tensor | None, Tensor | None, float]:
    return input, list(normalized_shape), weight, bias, eps


@handles(F.layer_norm)
def _layer_norm(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    x, shape, weight, bias, eps = _layer_norm_arguments(*args, **kwargs)
    if not mode.is_use(x, weight, bias):
        return mode.other(func, args, kwargs)
    use = mode.use(SCALE, "layer_norm", weight, bias, Layout(False, len(shape)), x)
    if use is None:
        return mode.other(func, args, kwargs)
    return _LayerNormUse.apply(x.contiguous(), mode.token, use, shape, eps)


def _group_norm_arguments(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, int, Tensor | None, Tensor | None, float]:
    return input, num_groups, weight, bias, eps


@handles(F.group_norm)
def _group_norm(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    x, groups, weight, bias, eps = _group_norm_arguments(*args, **kwargs)
    if not mode.is_use(x, weight, bias) or x.dim() < 2 or x.shape[1] % groups:
        return mode.other(func, args, kwargs)
    use = mode.use(SCALE, "group_norm", weight, bias, Layout(True, x.dim() - 1), x)
    if use is None:
        return mode.other(func, args, kwargs)
    # torch's kernel takes every memory for contiguous but on the CPU, as F.group_norm knows.
    memory_format = format_of(x) if x.device.type == "cpu" else torch.contiguous_format
    return _GroupNormUse.apply(
        x.contiguous(memory_format=memory_format), mode.token, use, groups, eps
    )


def _rms_norm_arguments(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, list[int], Tensor | None, float | None]:
    return input, list(normalized_shape), weight, eps


@handles(F.rms_norm)
def _rms_norm(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    x, shape, weight, eps = _rms_norm_arguments(*args, **kwargs)
    if not mode.is_use(x, weight, None):
        return mode.other(func, args, kwargs)
    normalized = F.rms_norm(x, shape, None, eps)
    layout = Layout(False, len(shape))
    out = _scaled(mode, "rms_norm", normalized, weight, None, layout)
    return mode.other(func, args, kwargs) if out is None else out


def _batch_norm_arguments(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, float]:
    return input, running_mean, running_var, weight, bias, training, eps


@handles(F.batch_norm)
def _batch_norm(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    x, running_mean, running_var, weight, bias, training, eps = _batch_norm_arguments(
        *args, **kwargs
    )
    if training and mode.is_data(x) and torch.is_grad_enabled():
        raise NotExactError(
            "a BatchNorm in train mode couples the examples of a batch"
            + ("" if weight is None else f" (parameter {mode.name_of(weight)!r})")
        )
    if not mode.is_use(x, weight, bias) or running_mean is None or running_var is None:
        return mode.other(func, args, kwargs)
    normalized = F.batch_norm(x, running_mean, running_var, None, None, False, 0.0, eps)
    out = _scaled(mode, "batch_norm", normalized, weight, bias, Layout(True, x.dim() - 1))
    return mode.other(func, args, kwargs) if out is None else out


@handles(F.instance_norm)
def _instance_norm(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    if not mode.is_use(x, weight, bias):
        return mode.other(func, args, kwargs)
    bare = {k: v for k, v in kwargs.items() if k not in ("weight", "bias")}
    normalized = func(*args[:3], *([None] * len(args[3:5])), *args[5:], **bare)
    out = _scaled(mode, "instance_norm", normalized, weight, bias, Layout(True, x.dim() - 1))
    return mode.other(func, args, kwargs) if out is None else out


def _scaled(
    mode: Mode,
    operation: str,
    normalized: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layout: Layout,
) -> Any:
    use = mode.use(SCALE, operation, weight, bias, layout, normalized)
    return None if use is None else UseFunction.apply(normalized, mode.token, use)
