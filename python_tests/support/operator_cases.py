"""Arguments of every operator, drawn at random, and its results held to the float64 formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.arithmetic import accumulation_dtype
from l2rw_ext.ops.formulas import FORMULAS, Arguments, Results, as_results, sample
from support.tolerances import tolerance

LAYOUTS = ("contiguous", "transposed", "reversed", "sliced", "expanded", "offset")
SIZES = (0, 1, 2, 3, 5, 16, 17, 33)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The values (the first of a dimension repeated, for "expanded") with other strides."""
    if values.dim() == 0 or layout == "contiguous":
        return values.contiguous()
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "reversed":
        order = tuple(range(values.dim()))[::-1]
        return values.permute(order).contiguous().permute(order)
    if layout == "sliced":
        wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), math.nan)
        part = wide[..., 1::2]
        return part.copy_(values)
    if layout == "expanded":
        dim = values.dim() // 2
        return values.narrow(dim, 0, min(1, values.shape[dim])).expand(values.shape)
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    padded = values.new_full((values.numel() + 1,), math.nan)[1:]
    return padded.view(values.shape).copy_(values)


@dataclass
class Draw:
    """Draws tensors of one dtype."""

    draw: Callable[[Any], Any]
    dtype: torch.dtype
    generator: torch.Generator
    layouts: tuple[str, ...] = LAYOUTS

    def size(self, *sizes: int) -> int:
        return int(self.draw(st.sampled_from(sizes or SIZES)))

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return lay_out(values.to(dtype or self.dtype), self.draw(st.sampled_from(self.layouts)))

    def wide(self, *shape: int) -> Tensor:
        """A tensor that may also have the accumulation dtype."""
        dtypes = (self.dtype, accumulation_dtype(self.dtype))
        return self.tensor(*shape, dtype=self.draw(st.sampled_from(dtypes)))

    def maybe(self, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if self.draw(st.booleans()) else None


def linear_arguments(d: Draw) -> tuple[int, int, int, int]:
    return d.size(0, 1, 2, 5), d.size(0, 1, 2, 7, 40), d.size(), d.size()


def factored_arguments(d: Draw) -> Arguments:
    n, t, i, o = linear_arguments(d)
    m, s = d.size(0, 1, 2, 5), d.size(0, 1, 2, 7)
    return (
        d.tensor(n, t, i),
        d.tensor(n, t, o),
        d.tensor(m, s, i),
        d.tensor(m, s, o),
        d.draw(st.booleans()),
    )


def factored_layers_arguments(d: Draw) -> Arguments:
    n, m = d.size(0, 1, 2, 5), d.size(0, 1, 2, 5)
    z, g, z_clean, g_clean, bias = [], [], [], [], []
    for _ in range(d.size(1, 2, 3, 25)):
        t, s, i, o = d.size(0, 1, 2, 7, 40), d.size(0, 1, 2, 7), d.size(), d.size()
        z.append(d.tensor(n, t, i))
        g.append(d.tensor(n, t, o))
        z_clean.append(d.tensor(m, s, i))
        g_clean.append(d.tensor(m, s, o))
        bias.append(d.draw(st.booleans()))
    return z, g, z_clean, g_clean, bias


def dense_arguments(d: Draw) -> Arguments:
    n, t, i, o = linear_arguments(d)
    return d.tensor(n, t, i), d.tensor(n, t, o), d.wide(o, i), d.maybe(lambda: d.wide(o))


@dataclass(frozen=True)
class Geometry:
    """A convolution."""

    z: Tensor
    g: Tensor
    weight_shape: tuple[int, ...]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def draw_geometry(d: Draw) -> Geometry:
    rank = d.size(1, 2, 3)
    groups = d.size(1, 1, 2, 3)
    inputs = d.size(0, 1, 2, 3, 17 if rank < 3 else 4)
    outputs = d.size(0, 1, 2, 3, 17 if rank < 3 else 4)
    kernel = [d.size(1, 2, 3) for _ in range(rank)]
    stride = [d.size(1, 2, 3) for _ in range(rank)]
    padding = [d.size(0, 1, 2) for _ in range(rank)]
    dilation = [d.size(1, 2) for _ in range(rank)]
    pixels = [d.size(0, 1, 2, 5, 9 if rank > 1 else 40) for _ in range(rank)]
    spatial = []
    for p, k, s, pad, step in zip(pixels, kernel, stride, padding, dilation, strict=True):
        needed = (p - 1) * s + step * (k - 1) + 1 - 2 * pad
        spatial.append(max(1, needed + d.size(0, s - 1)))
    n = d.size(0, 1, 2, 5)
    z = d.tensor(n, groups * inputs, *spatial)
    pixels = [
        (size + 2 * pad - step * (k - 1) - 1) // s + 1
        for size, k, s, pad, step in zip(spatial, kernel, stride, padding, dilation, strict=True)
    ]
    g = d.tensor(n, groups * outputs, *pixels)
    return Geometry(z, g, (groups * outputs, inputs, *kernel), stride, padding, dilation, groups)


def conv_correlation_arguments(d: Draw) -> Arguments:
    c = draw_geometry(d)
    V_b = d.maybe(lambda: d.wide(c.weight_shape[0]))
    return c.z, c.g, d.wide(*c.weight_shape), V_b, c.stride, c.padding, c.dilation, c.groups


def conv_example_arguments(d: Draw) -> Arguments:
    c = draw_geometry(d)
    V = d.maybe(lambda: d.wide(*c.weight_shape))
    V_b = d.maybe(lambda: d.wide(c.weight_shape[0]))
    kernel = list(c.weight_shape[2:])
    return c.z, c.g, kernel, c.stride, c.padding, c.dilation, c.groups, V, V_b


def conv_weighted_arguments(d: Draw) -> Arguments:
    c = draw_geometry(d)
    w = d.maybe(lambda: weights_of(d, c.z.shape[0]))
    kernel = list(c.weight_shape[2:])
    return c.z, c.g, w, kernel, c.stride, c.padding, c.dilation, c.groups


def linear_example_arguments(d: Draw) -> Arguments:
    n, t, i, o = linear_arguments(d)
    V, V_b = d.maybe(lambda: d.wide(o, i)), d.maybe(lambda: d.wide(o))
    return d.tensor(n, t, i), d.tensor(n, t, o), V, V_b


def statistic(d: Draw, n: int, t: int, c: int) -> Tensor | None:
    shape = d.draw(st.sampled_from(((n, t, 1), (n, 1, c), (1, 1, c), (n, t, c), (1, 1, 1))))
    return d.maybe(lambda: d.wide(*shape))


def affine_arguments(d: Draw) -> Arguments:
    n, t, c = d.size(0, 1, 2, 5), d.size(0, 1, 2, 7, 40), d.size()
    # Both fast layouts need that x and g agree.
    if d.draw(st.booleans()):
        d = Draw(d.draw, d.dtype, d.generator, (d.draw(st.sampled_from(LAYOUTS[:2])),))
    return d.tensor(n, t, c), d.tensor(n, t, c), statistic(d, n, t, c), statistic(d, n, t, c)


def group_norm_arguments(d: Draw) -> Arguments:
    n, groups = d.size(0, 1, 2, 5), d.size(1, 1, 2, 3)
    channels = groups * d.size(0, 1, 2, 3, 17)
    shape = (n, channels, *[d.size(0, 1, 2, 5, 9) for _ in range(d.size(0, 1, 2, 3))])
    # Both fast layouts need that x and g agree.
    fast = d
    if d.draw(st.booleans()):
        layout = d.draw(st.sampled_from(("contiguous", "channels_last")))
        fast = Draw(d.draw, d.dtype, d.generator, (layout,))
    g, x = fast.tensor(*shape), fast.tensor(*shape)
    weight = d.maybe(lambda: d.wide(channels))
    return g, x, d.wide(n, groups), d.wide(n, groups), weight, groups


def batch_norm_tangent_arguments(d: Draw) -> Arguments:
    n, channels = d.size(0, 1, 2, 5, 40), d.size()
    shape = (n, channels, *[d.size(0, 1, 2, 5, 9, 40) for _ in range(d.size(0, 1, 2, 3))])
    # Both fast layouts need that x and its tangent agree.
    fast = d
    if d.draw(st.booleans()):
        layout = d.draw(st.sampled_from(("contiguous", "channels_last")))
        fast = Draw(d.draw, d.dtype, d.generator, (layout,))
    x, x_tangent = fast.tensor(*shape), d.maybe(lambda: fast.tensor(*shape))
    optional = [d.maybe(lambda: d.wide(channels)) for _ in range(3)]
    return x, x_tangent, d.wide(channels), d.wide(channels), *optional


def embedding_arguments(d: Draw) -> Arguments:
    n, t, c, v = d.size(0, 1, 2, 5), d.size(0, 1, 2, 7), d.size(), d.size(1, 2, 9)
    index = torch.randint(v, (n, t), generator=d.generator)
    index = index.to(d.draw(st.sampled_from((torch.int64, torch.int32))))
    index = lay_out(index.double(), d.draw(st.sampled_from(LAYOUTS[:3]))).to(index.dtype)
    return index, d.tensor(n, t, c), d.wide(v, c)


def weights_of(d: Draw, n: int) -> Tensor:
    kept = torch.rand(n, generator=d.generator) > 0.4
    return d.wide(n) * kept


def weighted_sum_arguments(d: Draw) -> Arguments:
    n = d.size(0, 1, 2, 3, 4, 5, 9)
    shape = [d.size(0, 1, 3, 4, 17) for _ in range(d.size(0, 1, 2, 3))]
    return d.tensor(n, *shape), weights_of(d, n)


def linear_weighted_arguments(d: Draw) -> Arguments:
    n, t, i, o = linear_arguments(d)
    heads = d.draw(st.sampled_from(((), (), (1,), (3,))))
    flags = (d.draw(st.booleans()) for _ in range(3))
    return d.tensor(n, t, *heads, i), d.tensor(n, t, *heads, o), weights_of(d, n), *flags


def embedding_weighted_arguments(d: Draw) -> Arguments:
    index, g, table = embedding_arguments(d)
    return index, g, weights_of(d, g.shape[0]), table.shape[0]


def normalize_arguments(d: Draw) -> Arguments:
    return (d.tensor(d.size(0, 1, 2, 5, 300)),)


ARGUMENTS: dict[str, Callable[[Draw], Arguments]] = {
    "factored_correlation": factored_arguments,
    "factored_correlations": factored_layers_arguments,
    "dense_correlation": dense_arguments,
    "conv_correlation": conv_correlation_arguments,
    "embedding_correlation": embedding_arguments,
    "embedding_weighted_gradient": embedding_weighted_arguments,
    "linear_example_gradients": linear_example_arguments,
    "linear_weighted_gradient": linear_weighted_arguments,
    "conv_example_gradients": conv_example_arguments,
    "conv_weighted_gradient": conv_weighted_arguments,
    "affine_example_gradients": affine_arguments,
    "group_norm_backward": group_norm_arguments,
    "batch_norm_tangent": batch_norm_tangent_arguments,
    "weighted_sum": weighted_sum_arguments,
    "normalize_weights": normalize_arguments,
}


EDGES: dict[str, Arguments] = {
    # Wide channels and few pixels have a kernel for themselves, which once divided by n.
    "conv_correlation": (
        *(torch.ones(0, 32, 3, 3), torch.ones(0, 32, 3, 3), torch.ones(32, 32, 3, 3), None),
        *([1, 1], [1, 1], [1, 1], 1),
    ),
}
"""Arguments on which an operator was wrong although drawn ones were right."""


def call(name: str, arguments: Arguments) -> Results:
    """The operator's results as a tuple."""
    return as_results(OPERATORS[name](*arguments))


def compose(name: str, arguments: Arguments) -> Results:
    """The composition's results as a tuple."""
    return as_results(OPERATORS[name].composition(*arguments))


def map_tensors(function: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """The arguments with the function applied to all tensors, also to those in lists."""
    return pytree.tree_map(lambda a: function(a) if isinstance(a, Tensor) else a, arguments)


def channels_last(arguments: Arguments) -> Arguments:
    """The arguments with the channels of images side by side in memory."""
    laid_out: Arguments = map_tensors(
        lambda a: lay_out(a, "channels_last") if a.dim() == 4 else a, arguments
    )
    return laid_out


def flat(arguments: Arguments) -> tuple[list[Any], Callable[[Sequence[Any]], Arguments]]:
    """The arguments with those in lists side by side, and what puts others in their places."""
    leaves, structure = pytree.tree_flatten(arguments)
    return leaves, lambda others: pytree.tree_unflatten(others, structure)


def assert_operator_exact(
    name: str,
    dtype: torch.dtype,
    arguments: Arguments,
    results: Results,
    allowed: float = 0.0,
) -> None:
    """Shapes, dtypes, and numbers within a tolerance (at least the table's) of plain float64."""
    formula = FORMULAS[name]
    wide = dict(zip(named_arguments(name), arguments, strict=False)).get("wide", True)
    expected, bounds = formula.exact(arguments), formula.magnitudes(arguments)
    assert len(results) == len(expected)
    for k, (result, exact, bound) in enumerate(zip(results, expected, bounds, strict=True)):
        stored = k in formula.stored or not wide
        assert result.dtype == (dtype if stored else accumulation_dtype(dtype))
        assert result.shape == exact.shape
        relative = max(allowed, tolerance(result.dtype, dtype if formula.rounds else None))
        # The smallest numbers of a dtype are off by half a unit of a subnormal one.
        info = torch.finfo(result.dtype)
        floor = info.tiny * info.eps / 2
        assert ((result.double() - exact).abs() <= relative * bound.abs() + floor).all()


def named_arguments(name: str) -> list[str]:
    return [argument.name for argument in OPERATORS[name].compiled._schema.arguments]


def wrong(name: str, int16: str) -> Iterator[tuple[str, Arguments, tuple[str, ...]]]:
    """Arguments of which one does not fit, and what the message must say (``int16``: its name)."""
    arguments = sample(name)
    leaves, rebuilt = flat(arguments)
    labels = [
        f"{label}[{k}]" if isinstance(argument, list) else label
        for label, argument in zip(named_arguments(name), arguments, strict=True)
        for k in range(len(pytree.tree_leaves(argument)))
    ]
    for k, (label, argument) in enumerate(zip(labels, leaves, strict=True)):
        if not isinstance(argument, Tensor):
            continue

        def replaced(other: Tensor, k: int = k) -> Arguments:
            return rebuilt([*leaves[:k], other, *leaves[k + 1 :]])

        yield f"{label} dtype", replaced(argument.to(torch.int16)), (label, int16)
        if argument.is_floating_point() and len(leaves) > 1:
            yield f"{label} float64", replaced(argument.double()), ("float64", "float32")
        deeper = argument[None, None, None]
        if (name, label) != ("weighted_sum", "gradients"):
            yield f"{label} rank", replaced(deeper), ("dimension", "got shape")
        # A single argument, a list of rows and a table may have any length.
        free = len(leaves) == 1 or (name, label) == ("embedding_correlation", "direction")
        if argument.dim() and not free:
            longer = torch.cat([argument, argument[:1], argument[:1]])
            yield f"{label} examples", replaced(longer), ("must", "got shape")
