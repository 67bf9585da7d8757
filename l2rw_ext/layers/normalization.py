"""Scale and shift of the normalisation layers: y = γ x̂ + β.

An example's gradient of γ and β takes one pass over x and g and is no larger than the parameter. So
there is one form: the per-example gradients are formed at once and replace z and g.

A norm is a :class:`Scale` whose :meth:`~Scale.enter` computes x̂ with torch. Layer norm and group
norm run fused instead: their Functions know x̂ from the statistics that torch's kernels return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext import ops
from l2rw_ext.ops.arithmetic import accumulation_dtype

from .base import Call, Function, Layer, Roots, RowMap, Use
from .costs import Cost, Size, rates_of


@dataclass
class Layout:
    """Where γ lies in x, and how x̂ comes from it."""

    features: int | None
    """γ runs over so many trailing dimensions; None: over dimension 1, the channels."""
    normalize: Callable[[Tensor], Tensor]
    """x̂ of x, made of differentiable operations."""
    settings: tuple[Any, ...] = ()
    """What a fused Function takes besides x."""
    mean: Tensor | None = None
    """With ``rstd``, the statistics of a fused kernel: x̂ = (x - mean) rstd; else z is x̂."""
    rstd: Tensor | None = None

    def broadcast(self, parameter: Tensor, x: Tensor) -> Tensor:
        """γ or β in a shape that broadcasts to x."""
        if self.features is not None:
            return parameter
        return parameter.view(1, -1, *[1] * (x.dim() - 2))


class Scale(Layer):
    """y = γ x̂ + β. A norm overrides :attr:`functions` and :meth:`bind`, whose layout gives x̂."""

    name = "normalization"
    reduces = True

    def enter(self, x: Tensor, options: Layout) -> Tensor:
        """x̂."""
        return options.normalize(x)

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Layout
    ) -> Tensor:
        """γ x̂ + β of a given x̂."""
        out = x if weight is None else x * options.broadcast(weight, x)
        return out if bias is None else out + options.broadcast(bias, x)

    def term(self, x: Tensor, V: Tensor | None, V_b: Tensor | None, options: Layout) -> Tensor:
        """x̂ V + V_b, where a V that is None adds nothing."""
        if V is not None:
            return self.forward(x, V, V_b, options)
        assert V_b is not None
        return options.broadcast(V_b, x)

    def term_transpose(self, g: Tensor, x: Tensor, like: Roots, options: Layout) -> Roots:
        """Σ g x̂ and Σ g."""
        kept = [1] if options.features is None else range(g.dim() - options.features, g.dim())
        summed = [d for d in range(g.dim()) if d not in kept]
        dtype = accumulation_dtype(g.dtype)
        return (
            None if like[0] is None else (g * x).sum(summed, dtype=dtype),
            None if like[1] is None else g.sum(summed, dtype=dtype),
        )

    def data_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None, options: Layout) -> Tensor:
        """γ g, with respect to x̂."""
        return g if weight is None else g * options.broadcast(weight, g)

    def leading(self, use: Use, g: Tensor) -> int:
        """Dimension 0 for channels; else all dimensions before the normalised ones."""
        layout: Layout = use.options
        return 1 if layout.features is None else g.dim() - layout.features

    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """Per-example gradients of γ and β, (N, d) each.

        A z with one dimension more than g is what :func:`_stacked` made of them, by row.
        """
        layout: Layout = use.options
        mean, rstd = layout.mean, layout.rstd
        if z.dim() > g.dim():
            scale, shift = z.flatten(2).unbind()
            return _of_examples(scale, shift, rows)
        if layout.features is None:
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
        weight, bias = use.roots
        return None if weight is None else z.sum(0), None if bias is None else g.sum(0)

    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = <V, G_i> + <V_b, G_bi>."""
        V, V_b = direction
        u = z.new_zeros(z.shape[0])
        if V is not None:
            u = u + z @ V.reshape(-1)
        return u if V_b is None else u + g @ V_b.reshape(-1)

    def weighted_gradient(self, use: Use, z: Tensor, g: Tensor, weights: Tensor) -> Roots:
        """Σ w_i G_i, rows with w = 0 left out."""
        weight, bias = use.roots
        return (
            None if weight is None else ops.weighted_sum(z, weights),
            None if bias is None else ops.weighted_sum(g, weights),
        )


def _channels_last(x: Tensor) -> Tensor:
    """(R, C, *s) -> (R, S, C), a view for contiguous and for channels-last tensors."""
    rows, channels, *rest = x.shape
    last = x.movedim(1, -1)
    if x.dim() == 3 or not last.is_contiguous():
        # As a view: a reshape of channels that lie far apart would copy.
        return x.reshape(rows, channels, math.prod(rest)).transpose(1, 2)
    return last.reshape(rows, math.prod(rest), channels)


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
    features = math.prod(x.shape[leading:])
    return rows.arrange(x.reshape(*x.shape[:leading], features), leading)


class _LayerNormUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, use: Use) -> Any:
        layout: Layout = use.options
        shape, eps = layout.settings
        out, layout.mean, layout.rstd = torch.native_layer_norm(x, shape, use.weight, use.bias, eps)
        ctx.use = use
        ctx.save_for_backward(x, use.weight, use.bias)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight, bias = ctx.saved_tensors
        use: Use = ctx.use
        assert use.sink is not None
        with use.sink.backward_of(use):
            use.sink.report(use, x, g)
            data = None
            if ctx.needs_input_grad[0]:
                layout: Layout = use.options
                data = torch.ops.aten.native_layer_norm_backward(
                    g,
                    x,
                    layout.settings[0],
                    layout.mean,
                    layout.rstd,
                    weight,
                    bias,
                    [True, False, False],
                )[0]
            return data, None, None


class LayerNorm(Scale):
    """Normalises the trailing dimensions."""

    functions: ClassVar[tuple[Function, ...]] = (F.layer_norm,)

    def bind(
        self,
        func: Function,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Call:
        """Every call."""
        shape = list(normalized_shape)
        layout = Layout(len(shape), lambda x: F.layer_norm(x, shape, None, None, eps), (shape, eps))
        return Call("layer_norm", input, weight, bias, layout)

    def run(self, use: Use, x: Tensor, token: Tensor) -> Tensor:
        """Fused."""
        out: Tensor = _LayerNormUse.apply(x.contiguous(), token, use)
        return out


class _GroupNormUse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, use: Use) -> Any:
        layout: Layout = use.options
        groups, eps = layout.settings
        n, channels, pixels = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        out, mean, rstd = torch.native_group_norm(
            x, use.weight, use.bias, n, channels, pixels, groups, eps
        )
        ctx.use = use
        ctx.save_for_backward(x, use.weight, mean, rstd)
        per_group = channels // groups
        layout.mean = mean.repeat_interleave(per_group, 1)
        layout.rstd = rstd.repeat_interleave(per_group, 1)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        use: Use = ctx.use
        assert use.sink is not None
        with use.sink.backward_of(use):
            if not ctx.needs_input_grad[0]:
                use.sink.report(use, x, g)
                return None, None, None
            groups, _ = use.options.settings
            data, scale, shift = ops.group_norm_backward(g, x, mean, rstd, weight, groups)
            use.sink.report(use, _stacked(scale, shift, g), g)
            return data, None, None


class GroupNorm(Scale):
    """Normalises groups of channels, example by example."""

    functions: ClassVar[tuple[Function, ...]] = (F.group_norm,)

    def bind(
        self,
        func: Function,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Call | None:
        """Groups that divide the channels; for others torch has an error."""
        if input.dim() < 2 or input.shape[1] % num_groups:
            return None
        layout = Layout(
            None, lambda x: F.group_norm(x, num_groups, None, None, eps), (num_groups, eps)
        )
        return Call("group_norm", input, weight, bias, layout)

    def run(self, use: Use, x: Tensor, token: Tensor) -> Tensor:
        """Fused."""
        # torch's kernel takes every memory for contiguous but on the CPU, as F.group_norm knows.
        memory_format = format_of(x) if x.device.type == "cpu" else torch.contiguous_format
        out: Tensor = _GroupNormUse.apply(x.contiguous(memory_format=memory_format), token, use)
        return out


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


class RMSNorm(Scale):
    """Divides by the root of the mean square of the trailing dimensions."""

    functions: ClassVar[tuple[Function, ...]] = (F.rms_norm,)

    def bind(
        self,
        func: Function,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Call:
        """Every call."""
        shape = list(normalized_shape)
        layout = Layout(len(shape), lambda x: F.rms_norm(x, shape, None, eps))
        return Call("rms_norm", input, weight, None, layout)


class BatchNorm(Scale):
    """Normalises by running statistics; those of the batch couple its examples."""

    functions: ClassVar[tuple[Function, ...]] = (F.batch_norm,)

    def bind(
        self,
        func: Function,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Call:
        """Both modes; with the statistics of the batch there is no layout."""
        if training or running_mean is None or running_var is None:
            return Call("BatchNorm in train mode", input, weight, bias, couples=True)
        layout = Layout(
            None,
            lambda x: F.batch_norm(x, running_mean, running_var, None, None, False, 0.0, eps),
        )
        return Call("batch_norm", input, weight, bias, layout)


class InstanceNorm(Scale):
    """Normalises every channel of every example, or by running statistics."""

    functions: ClassVar[tuple[Function, ...]] = (F.instance_norm,)

    def bind(
        self,
        func: Function,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Call:
        """Every call."""
        layout = Layout(
            None, lambda x: func(x, running_mean, running_var, None, None, *args, **kwargs)
        )
        return Call("instance_norm", input, weight, bias, layout)


SCALE = Scale()
LAYER_NORM = LayerNorm()
GROUP_NORM = GroupNorm()
RMS_NORM = RMSNorm()
BATCH_NORM = BatchNorm()
INSTANCE_NORM = InstanceNorm()
