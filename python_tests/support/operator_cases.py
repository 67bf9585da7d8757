"""Arguments of every operator, drawn at random, and what it computes in plain float64 torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from l2rw_ext import ops
from support.tolerances import SCORES, TOLERANCES

Arguments = tuple[Any, ...]
Results = tuple[Tensor, ...]

# One result, in the dtype of the input.
STORED = ("batch_norm_tangent", "scale_rows", "normalize_weights")
# Results in the accumulation dtype although the operator's first result has that of the input.
WIDE_RESULTS = {
    "linear_example_gradients": (2,),
    "conv_example_gradients": (2,),
    "group_norm_backward": (1, 2),
}

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
        accumulation = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.tensor(*shape, dtype=self.draw(st.sampled_from((self.dtype, accumulation))))

    def maybe(self, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if self.draw(st.booleans()) else None


@dataclass(frozen=True)
class Operator:
    """How to draw an operator's arguments, and its result in plain torch.

    ``plain`` takes float64 arguments. Called with absolute values and ``sign=-1`` it returns the
    sum over the absolute values of all terms: every difference becomes a sum.
    """

    arguments: Callable[[Draw], Arguments]
    plain: Callable[..., Results]


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


def factored(
    z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor, bias: bool, sign: int = 1
) -> Results:
    inner = torch.einsum("nti,msi->ntms", z, z_clean) + float(bias)
    return ((inner * torch.einsum("nto,mso->ntms", g, g_clean)).sum((1, 2, 3)),)


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


def factored_layers(*arguments: Any, sign: int = 1) -> Results:
    return (sum(factored(*layer)[0] for layer in zip(*arguments, strict=True)),)


def dense_arguments(d: Draw) -> Arguments:
    n, t, i, o = linear_arguments(d)
    return d.tensor(n, t, i), d.tensor(n, t, o), d.wide(o, i), d.maybe(lambda: d.wide(o))


def dense(z: Tensor, g: Tensor, V: Tensor, V_b: Tensor | None = None, sign: int = 1) -> Results:
    product = z @ V.T
    if V_b is not None:
        product = product + V_b
    return ((g * product).sum((1, 2)),)


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
    inputs = d.size(1, 2, 3, 17 if rank < 3 else 4)
    outputs = d.size(1, 2, 3, 17 if rank < 3 else 4)
    kernel = [d.size(1, 2, 3) for _ in range(rank)]
    stride = [d.size(1, 2, 3) for _ in range(rank)]
    padding = [d.size(0, 1, 2) for _ in range(rank)]
    dilation = [d.size(1, 2) for _ in range(rank)]
    pixels = [d.size(1, 2, 5, 9 if rank > 1 else 40) for _ in range(rank)]
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


def convolve(z: Tensor, V: Tensor, V_b: Tensor | None, *geometry: Any) -> Tensor:
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[z.dim()]
    return function(z, V, V_b, *geometry)


def conv_correlation(
    z: Tensor, g: Tensor, V: Tensor, V_b: Tensor | None, *geometry: Any, sign: int = 1
) -> Results:
    return ((g * convolve(z, V, V_b, *geometry)).flatten(1).sum(1),)


def conv_gradients(z: Tensor, g: Tensor, kernel_size: list[int], *geometry: Any) -> Results:
    groups = geometry[-1]
    weight = torch.zeros(
        g.shape[1], z.shape[1] // groups, *kernel_size, dtype=z.dtype, requires_grad=True
    )
    gradients = [
        torch.autograd.grad(convolve(z[i : i + 1], weight, None, *geometry), weight, g[i : i + 1])[
            0
        ]
        for i in range(z.shape[0])
    ]
    G = torch.stack(gradients) if gradients else weight.new_zeros((0, *weight.shape))
    return G.detach(), g.flatten(2).sum(2)


def conv_example_arguments(d: Draw) -> Arguments:
    c = draw_geometry(d)
    V = d.maybe(lambda: d.wide(*c.weight_shape))
    V_b = d.maybe(lambda: d.wide(c.weight_shape[0]))
    kernel = list(c.weight_shape[2:])
    return c.z, c.g, kernel, c.stride, c.padding, c.dilation, c.groups, V, V_b


def with_scores(G: Tensor, G_b: Tensor, V: Tensor | None, V_b: Tensor | None) -> Results:
    u = G.new_zeros(G.shape[0])
    if V is not None:
        u = u + (G * V).flatten(1).sum(1)
    if V_b is not None:
        u = u + (G_b * V_b).sum(1)
    return G, G_b, u


def conv_example(*arguments: Any, sign: int = 1) -> Results:
    return with_scores(*conv_gradients(*arguments[:7]), *arguments[7:])


def conv_weighted_arguments(d: Draw) -> Arguments:
    c = draw_geometry(d)
    w = d.maybe(lambda: weights_of(d, c.z.shape[0]))
    kernel = list(c.weight_shape[2:])
    return c.z, c.g, w, kernel, c.stride, c.padding, c.dilation, c.groups


def conv_weighted(z: Tensor, g: Tensor, w: Tensor | None, *geometry: Any, sign: int = 1) -> Results:
    G, G_b = conv_gradients(z, g, *geometry)
    if w is None:
        w = torch.ones(z.shape[0], dtype=z.dtype)
    return torch.einsum("n,n...->...", w, G), torch.einsum("n,no->o", w, G_b)


def linear_example_arguments(d: Draw) -> Arguments:
    n, t, i, o = linear_arguments(d)
    V, V_b = d.maybe(lambda: d.wide(o, i)), d.maybe(lambda: d.wide(o))
    return d.tensor(n, t, i), d.tensor(n, t, o), V, V_b


def linear_example(
    z: Tensor,
    g: Tensor,
    V: Tensor | None = None,
    V_b: Tensor | None = None,
    sign: int = 1,
) -> Results:
    return with_scores(torch.einsum("nto,nti->noi", g, z), g.sum(1), V, V_b)


def statistic(d: Draw, n: int, t: int, c: int) -> Tensor | None:
    shape = d.draw(st.sampled_from(((n, t, 1), (n, 1, c), (1, 1, c), (n, t, c), (1, 1, 1))))
    return d.maybe(lambda: d.wide(*shape))


def affine_arguments(d: Draw) -> Arguments:
    n, t, c = d.size(0, 1, 2, 5), d.size(0, 1, 2, 7, 40), d.size()
    # Both fast layouts need that x and g agree.
    if d.draw(st.booleans()):
        d = Draw(d.draw, d.dtype, d.generator, (d.draw(st.sampled_from(LAYOUTS[:2])),))
    return d.tensor(n, t, c), d.tensor(n, t, c), statistic(d, n, t, c), statistic(d, n, t, c)


def affine_correlation_arguments(d: Draw) -> Arguments:
    arguments = affine_arguments(d)
    c = arguments[0].shape[2]
    return *arguments, d.maybe(lambda: d.wide(c)), d.maybe(lambda: d.wide(c))


def affine_example(
    x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor | None, sign: int = 1
) -> Results:
    normalized = x if mean is None else x - sign * mean
    if rstd is not None:
        normalized = normalized * rstd
    return (g * normalized).sum(1), g.sum(1)


def affine_correlation(
    x: Tensor,
    g: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    V: Tensor | None,
    V_b: Tensor | None,
    sign: int = 1,
) -> Results:
    return with_scores(*affine_example(x, g, mean, rstd, sign), V, V_b)[2:]


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


def group_norm(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    groups: int,
    sign: int = 1,
) -> Results:
    n, c = x.shape[:2]
    positions = math.prod(x.shape[2:])
    count = max(1, c // groups * positions)
    shape = (n, groups, c // groups, positions)
    mean, rstd = mean[:, :, None, None], rstd[:, :, None, None]
    normalized = (x.reshape(shape) - sign * mean) * rstd
    g = g.reshape(shape)
    scaled = g if weight is None else g * weight.view(1, groups, c // groups, 1)
    slope = (scaled * normalized).sum((2, 3), keepdim=True) / count
    offset = scaled.sum((2, 3), keepdim=True) / count
    data = rstd * (scaled - sign * (normalized * slope + offset))
    return data.reshape(x.shape), (g * normalized).sum(3).view(n, c), g.sum(3).view(n, c)


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


def batch_norm_tangent(
    x: Tensor,
    x_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    V: Tensor | None,
    V_b: Tensor | None,
    sign: int = 1,
) -> Results:
    others = (0, *range(2, x.dim()))
    shape = (1, -1, *[1] * (x.dim() - 2))

    def mean_of(values: Tensor) -> Tensor:
        return values.sum(others, keepdim=True) / max(1, values.numel() // max(1, x.shape[1]))

    normalized = (x - sign * mean.view(shape)) * rstd.view(shape)
    result = torch.zeros_like(x)
    if x_tangent is not None:
        scale = rstd if weight is None else rstd * weight
        along = normalized * mean_of(normalized * x_tangent)
        result = scale.view(shape) * (x_tangent - sign * (mean_of(x_tangent) + along))
    if V is not None:
        result = result + normalized * V.view(shape)
    if V_b is not None:
        result = result + V_b.view(shape)
    return (result,)


def embedding_arguments(d: Draw) -> Arguments:
    n, t, c, v = d.size(0, 1, 2, 5), d.size(0, 1, 2, 7), d.size(), d.size(1, 2, 9)
    index = torch.randint(v, (n, t), generator=d.generator)
    index = index.to(d.draw(st.sampled_from((torch.int64, torch.int32))))
    index = lay_out(index.double(), d.draw(st.sampled_from(LAYOUTS[:3]))).to(index.dtype)
    return index, d.tensor(n, t, c), d.wide(v, c)


def embedding(index: Tensor, g: Tensor, V: Tensor, sign: int = 1) -> Results:
    return ((g * V[index.long()]).sum((1, 2)),)


def weights_of(d: Draw, n: int) -> Tensor:
    kept = torch.rand(n, generator=d.generator) > 0.4
    return d.wide(n) * kept


def weighted_sum_arguments(d: Draw) -> Arguments:
    n = d.size(0, 1, 2, 3, 4, 5, 9)
    shape = [d.size(0, 1, 3, 4, 17) for _ in range(d.size(0, 1, 2, 3))]
    return d.tensor(n, *shape), weights_of(d, n)


def weighted_sum(gradients: Tensor, w: Tensor, sign: int = 1) -> Results:
    return (torch.einsum("n,n...->...", w, gradients),)


def scale_rows_arguments(d: Draw) -> Arguments:
    n = d.size(0, 1, 2, 5)
    w = weights_of(d, n)
    return d.tensor(n, d.size(0, 1, 7), d.size()), w, w.nonzero().flatten()


def scale_rows(g: Tensor, w: Tensor, active: Tensor, sign: int = 1) -> Results:
    return (w[active, None, None] * g[active],)


def normalize_arguments(d: Draw) -> Arguments:
    return (d.tensor(d.size(0, 1, 2, 5, 300)),)


def normalize(u: Tensor, sign: int = 1) -> Results:
    rectified = u.clamp(min=0)
    total = rectified.sum()
    return (rectified / (total + float(total == 0)),)


OPERATORS: dict[str, Operator] = {
    "factored_correlation": Operator(factored_arguments, factored),
    "factored_correlations": Operator(factored_layers_arguments, factored_layers),
    "dense_correlation": Operator(dense_arguments, dense),
    "conv_correlation": Operator(conv_correlation_arguments, conv_correlation),
    "affine_correlation": Operator(affine_correlation_arguments, affine_correlation),
    "embedding_correlation": Operator(embedding_arguments, embedding),
    "linear_example_gradients": Operator(linear_example_arguments, linear_example),
    "conv_example_gradients": Operator(conv_example_arguments, conv_example),
    "conv_weighted_gradient": Operator(conv_weighted_arguments, conv_weighted),
    "affine_example_gradients": Operator(affine_arguments, affine_example),
    "group_norm_backward": Operator(group_norm_arguments, group_norm),
    "batch_norm_tangent": Operator(batch_norm_tangent_arguments, batch_norm_tangent),
    "weighted_sum": Operator(weighted_sum_arguments, weighted_sum),
    "scale_rows": Operator(scale_rows_arguments, scale_rows),
    "normalize_weights": Operator(normalize_arguments, normalize),
}


def sample(name: str, dtype: torch.dtype = torch.float32, optional: bool = True) -> Arguments:
    """Small valid arguments of an operator, the same at every call."""

    def tensor(*shape: int) -> Tensor:
        count = math.prod(shape)
        return (torch.linspace(-1, 1, count + 2)[1:-1] + 0.1).view(shape).to(dtype)

    z, g, V, V_b = tensor(2, 3, 4), tensor(2, 3, 5), tensor(5, 4), tensor(5)
    image, gradient, kernel = tensor(2, 4, 5, 6), tensor(2, 6, 3, 2), tensor(6, 2, 3, 2)
    geometry = ([2, 3], [1, 0], [1, 1], 2)
    w = tensor(2).abs()
    mean, rstd = tensor(2, 3, 1), tensor(1, 1, 4).abs()
    some = (lambda value: value) if optional else (lambda value: None)
    return {
        "factored_correlation": (z, g, tensor(3, 2, 4), tensor(3, 2, 5), optional),
        "factored_correlations": (
            [z, tensor(2, 1, 3)],
            [g, tensor(2, 1, 2)],
            [tensor(3, 2, 4), tensor(3, 1, 3)],
            [tensor(3, 2, 5), tensor(3, 1, 2)],
            [True, optional],
        ),
        "dense_correlation": (z, g, V, some(V_b)),
        "conv_correlation": (image, gradient, kernel, some(tensor(6)), *geometry),
        "affine_correlation": (
            z,
            tensor(2, 3, 4),
            some(mean),
            some(rstd),
            some(tensor(4)),
            some(tensor(4)),
        ),
        "embedding_correlation": (torch.tensor([[0, 1, 1], [2, 0, 1]]), z, tensor(3, 4)),
        "linear_example_gradients": (z, g, some(V), some(V_b)),
        "conv_example_gradients": (
            image,
            gradient,
            [3, 2],
            *geometry,
            some(kernel),
            some(tensor(6)),
        ),
        "conv_weighted_gradient": (image, gradient, some(w), [3, 2], *geometry),
        "affine_example_gradients": (z, tensor(2, 3, 4), some(mean), some(rstd)),
        "group_norm_backward": (
            tensor(2, 4, 5, 6).flip(3),
            image,
            tensor(2, 2),
            tensor(2, 2).abs(),
            some(tensor(4)),
            2,
        ),
        "batch_norm_tangent": (
            image,
            some(tensor(2, 4, 5, 6).flip(3)),
            tensor(4),
            tensor(4).abs(),
            some(tensor(4).flip(0)),
            some(tensor(4)),
            some(tensor(4)),
        ),
        "weighted_sum": (z, w),
        "scale_rows": (z.transpose(1, 2) if optional else z, w, torch.tensor([1])),
        "normalize_weights": (tensor(5),),
    }[name]


def call(name: str, arguments: Arguments) -> Results:
    """The operator's results as a tuple."""
    results = getattr(ops, name)(*arguments)
    return results if isinstance(results, tuple) else (results,)


def map_tensors(function: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """The arguments with the function applied to all tensors, also to those in lists."""
    return pytree.tree_map(lambda a: function(a) if isinstance(a, Tensor) else a, arguments)


def convert(arguments: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with the function applied to the floating tensors."""
    converted: Arguments = map_tensors(
        lambda a: function(a) if a.is_floating_point() else a, arguments
    )
    return converted


def flat(arguments: Arguments) -> tuple[list[Any], Callable[[Sequence[Any]], Arguments]]:
    """The arguments with those in lists side by side, and what puts others in their places."""
    leaves, structure = pytree.tree_flatten(arguments)
    return leaves, lambda others: pytree.tree_unflatten(others, structure)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_operator_exact(
    name: str,
    dtype: torch.dtype,
    arguments: Arguments,
    results: Results,
    allowed: float = 0.0,
) -> None:
    """Shapes, dtypes, and numbers within a tolerance (at least the table's) of plain float64."""
    plain = OPERATORS[name].plain
    expected = plain(*convert(arguments, Tensor.double))
    bounds = expected
    if name != "normalize_weights":  # not a sum over its arguments
        bounds = plain(*convert(arguments, lambda a: a.double().abs()), sign=-1)
    assert len(results) == len(expected)
    for k, (result, exact, bound) in enumerate(zip(results, expected, bounds, strict=True)):
        wide = k in WIDE_RESULTS.get(name, ())
        tolerance = max(allowed, (SCORES if wide else TOLERANCES[name])[dtype])
        stored = name in (*STORED, *WIDE_RESULTS) and not wide
        assert result.dtype == (dtype if stored else accumulation(dtype))
        assert result.shape == exact.shape
        # The smallest numbers of a dtype have fewer digits.
        floor = torch.finfo(result.dtype).tiny
        assert ((result.double() - exact).abs() <= tolerance * bound.abs() + floor).all()


def named_arguments(name: str) -> list[str]:
    schema = getattr(torch.ops.l2rw_ext, name).default._schema
    return [argument.name for argument in schema.arguments]


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
        if argument.dim() and (name, label) not in (
            ("scale_rows", "active"),
            ("normalize_weights", "u"),
            ("embedding_correlation", "direction"),
        ):
            longer = torch.cat([argument, argument[:1], argument[:1]])
            yield f"{label} examples", replaced(longer), ("must", "got shape")
