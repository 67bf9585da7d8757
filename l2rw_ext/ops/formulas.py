"""What every operator computes, in plain float64 torch, and small arguments of it.

The self-check of :mod:`l2rw_ext.doctor`, the tests and ``benchmarks kernels`` hold operators to
these formulas, which share nothing with the operators. Only who asks loads this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import grad
from torch.utils import _pytree as pytree

Arguments = tuple[Any, ...]
Results = tuple[Tensor, ...]
Maybe = Tensor | None

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Draw:
    """Draws the tensors of one call, the same for a device and a dtype.

    Attributes:
        optional: whether arguments that may be None, or False, are not.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", optional: bool = True
    ) -> None:
        self.optional = optional
        self._dtype = dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Normally distributed numbers."""
        values = torch.randn(shape, generator=self._generator, device=self._generator.device)
        return values.to(self._dtype)

    def maybe(self, value: Tensor) -> Maybe:
        """The value, or None for an argument that is optional."""
        return value if self.optional else None

    def weights(self, count: int = 4) -> Tensor:
        """Weights of examples, of which every fourth is zero."""
        some = torch.tensor([0.5, 0, 0.25, 0.25], dtype=self._dtype)
        return some.repeat(-(-count // 4))[:count].to(self._generator.device)

    def rows(self, count: int, *shape: int) -> Tensor:
        """Numbers of the rows of a table, int64."""
        device = self._generator.device
        return torch.randint(count, shape, generator=self._generator, device=device)


@dataclass(frozen=True)
class Formula:
    """One operator in plain torch.

    Attributes:
        function: returns the result, or the tuple of results, of float64 arguments.
        small: draws arguments for a check that takes no time.
        large: draws arguments of several tiles, in parts that are not whole; those of scores fill
            every processor of a GPU.
        stored: which results have the dtype of the arguments; the others are in the accumulation
            dtype.
        signed: whether the function takes ``sign``, by which it multiplies whatever it subtracts:
            with absolute values and -1 it returns the sum over the absolute values of all terms.
        sums: whether the results are sums over the arguments.
        rounds: whether a product of an argument and a weight may be rounded to the dtype of the
            argument.
    """

    function: Callable[..., Any]
    small: Callable[[Draw], Arguments]
    large: Callable[[Draw], Arguments]
    stored: tuple[int, ...]
    signed: bool
    sums: bool
    rounds: bool

    def exact(self, arguments: Arguments) -> Results:
        """The results in float64."""
        return as_results(self.function(*convert(arguments, Tensor.double)))

    def magnitudes(self, arguments: Arguments) -> Results:
        """Σ |terms| of every result, against which an error of rounding is measured.

        Cancellation then neither hides an error nor makes one up.
        """
        if not self.sums:
            return self.exact(arguments)
        absolute = convert(arguments, lambda a: a.double().abs())
        options = {"sign": -1} if self.signed else {}
        return as_results(self.function(*absolute, **options))


FORMULAS: dict[str, Formula] = {}
"""The formulas of all operators, by name."""


def as_results(value: Any) -> Results:
    """An operator's result, or results, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def convert(arguments: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with the function applied to all floating tensors, also to those in lists."""
    converted: Arguments = pytree.tree_map(
        lambda a: function(a) if isinstance(a, Tensor) and a.is_floating_point() else a, arguments
    )
    return converted


def sample(name: str, dtype: torch.dtype = torch.float32, optional: bool = True) -> Arguments:
    """Small valid arguments of an operator, the same at every call."""
    return FORMULAS[name].small(Draw(dtype, optional=optional))


def _formula(
    small: Callable[[Draw], Arguments],
    large: Callable[[Draw], Arguments],
    *,
    stored: tuple[int, ...] = (),
    signed: bool = False,
    sums: bool = True,
    rounds: bool = False,
) -> Callable[[_Function], _Function]:
    """Enter a function into the table, under its name."""

    def enter(function: _Function) -> _Function:
        FORMULAS[function.__name__] = Formula(function, small, large, stored, signed, sums, rounds)
        return function

    return enter


@_formula(
    lambda d: (d(4, 5, 9), d(4, 5, 6), d(3, 2, 9), d(3, 2, 6), d.optional),
    lambda d: (d(2100, 1, 1100), d(2100, 1, 650), d(2500, 1, 1100), d(2500, 1, 650), True),
)
def factored_correlation(
    z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor, bias: bool
) -> Tensor:
    inner = torch.einsum("nti,msi->ntms", z, z_clean) + float(bias)
    return (inner * torch.einsum("nto,mso->ntms", g, g_clean)).sum((1, 2, 3))


@_formula(
    lambda d: (
        [d(4, 5, 9), d(4, 1, 6)],
        [d(4, 5, 6), d(4, 1, 9)],
        [d(3, 2, 9), d(3, 1, 6)],
        [d(3, 2, 6), d(3, 1, 9)],
        [True, d.optional],
    ),
    lambda d: (
        [d(150, 9, 200), d(150, 1, 700), d(150, 1, 10)],
        [d(150, 9, 150), d(150, 1, 300), d(150, 1, 1000)],
        [d(70, 5, 200), d(70, 1, 700), d(70, 1, 10)],
        [d(70, 5, 150), d(70, 1, 300), d(70, 1, 1000)],
        [True, False, True],
    ),
)
def factored_correlations(*arguments: Any) -> Tensor:
    scores = [factored_correlation(*layer) for layer in zip(*arguments, strict=True)]
    return torch.stack(scores).sum(0)


@_formula(
    lambda d: (d(4, 5, 9), d(4, 5, 6), d(6, 9), d.maybe(d(6))),
    lambda d: (d(2100, 1, 1100), d(2100, 1, 2600), d(2600, 1100), d(2600)),
)
def dense_correlation(z: Tensor, g: Tensor, V: Tensor, V_b: Maybe) -> Tensor:
    product = z @ V.T
    return (g * (product if V_b is None else product + V_b)).sum((1, 2))


@_formula(
    lambda d: (d(4, 5, 9), d(4, 5, 6), d.maybe(d(6, 9)), d.maybe(d(6))),
    lambda d: (d(7, 150, 210), d(7, 150, 130), d(130, 210), d(130)),
    stored=(0, 1),
)
def linear_example_gradients(z: Tensor, g: Tensor, V: Maybe, V_b: Maybe) -> Results:
    return _with_scores(torch.einsum("nto,nti->noi", g, z), g.sum(1), V, V_b)


def _with_scores(G: Tensor, G_b: Tensor, V: Maybe, V_b: Maybe) -> Results:
    u = G.new_zeros(G.shape[0])
    if V is not None:
        u = u + (G * V).flatten(1).sum(1)
    if V_b is not None:
        u = u + (G_b * V_b).sum(1)
    return G, G_b, u


def _conv_gradients(
    z: Tensor, g: Tensor, kernel: list[int], *geometry: Any
) -> tuple[Tensor, Tensor]:
    shape = (g.shape[1], z.shape[1] // geometry[-1], *kernel)
    G = z.new_zeros(z.shape[0], *shape)
    if z.numel() > 0 and g.numel() > 0:  # torch's convolution takes no empty images
        functions = (grad.conv1d_weight, grad.conv2d_weight, grad.conv3d_weight)
        of_weight: Callable[..., Tensor] = functions[z.dim() - 3]
        for i in range(z.shape[0]):
            G[i] = of_weight(z[i : i + 1], shape, g[i : i + 1], *geometry)
    return G, g.flatten(2).sum(2)


@_formula(
    lambda d: (
        *((d(4, 5, 9), d(4, 5, 6)) if d.optional else (d(4, 5, 2, 9), d(4, 5, 2, 6))),
        *(d.weights(), d.optional, not d.optional, True),
    ),
    lambda d: (d(90, 40, 150), d(90, 40, 130), d.weights(90), True, False, True),
    rounds=True,
)
def linear_weighted_gradient(
    z: Tensor, g: Tensor, w: Tensor, bias: bool, inputs_first: bool, wide: bool
) -> Results:
    W = torch.einsum("n,nt...o,nt...i->...oi", w, g, z)
    W_b = torch.einsum("n,nt...->...", w, g) if bias else g.new_empty(0)
    return W.mT if inputs_first else W, W_b


# Stride, padding, dilation and groups of a convolution from (4, 4, 5, 6) to (4, 6, 3, 2).
_GEOMETRY = ([2, 3], [1, 0], [1, 1], 2)
# Those of one that keeps the size of its images.
_SAME = ([1, 1], [1, 1], [1, 1], 1)


def _images(d: Draw, n: int) -> tuple[Tensor, Tensor]:
    """Inputs of a convolution, and gradients of its outputs."""
    return d(n, 40, 12, 13), d(n, 130, 12, 13)


@_formula(
    lambda d: (d(4, 4, 5, 6), d(4, 6, 3, 2), d(6, 2, 3, 2), d.maybe(d(6)), *_GEOMETRY),
    lambda d: (*(d(40, 128, 24, 24), d(40, 400, 24, 24), d(400, 128, 3, 3), d(400), *_SAME),),
)
def conv_correlation(z: Tensor, g: Tensor, V: Tensor, V_b: Maybe, *geometry: Any) -> Tensor:
    G, G_b = _conv_gradients(z, g, [*V.shape[2:]], *geometry)
    return _with_scores(G, G_b, V, V_b)[2]


@_formula(
    lambda d: (
        *(d(4, 4, 5, 6), d(4, 6, 3, 2), [3, 2], *_GEOMETRY),
        *(d.maybe(d(6, 2, 3, 2)), d.maybe(d(6))),
    ),
    lambda d: (*_images(d, 5), [3, 3], *_SAME, d(130, 40, 3, 3), d(130)),
    stored=(0, 1),
)
def conv_example_gradients(z: Tensor, g: Tensor, *others: Any) -> Results:
    *geometry, V, V_b = others
    return _with_scores(*_conv_gradients(z, g, *geometry), V, V_b)


@_formula(
    lambda d: (d(4, 4, 5, 6), d(4, 6, 3, 2), d.maybe(d.weights()), [3, 2], *_GEOMETRY),
    lambda d: (*_images(d, 24), d.weights(24), [3, 3], *_SAME),
)
def conv_weighted_gradient(z: Tensor, g: Tensor, w: Maybe, *geometry: Any) -> Results:
    G, G_b = _conv_gradients(z, g, *geometry)
    w = z.new_ones(z.shape[0]) if w is None else w
    return torch.einsum("n,n...->...", w, G), torch.einsum("n,no->o", w, G_b)


@_formula(
    lambda d: (d(4, 5, 9), d(4, 5, 9), d.maybe(d(4, 5, 1)), d.maybe(d(1, 1, 9).abs())),
    lambda d: (d(30, 300, 500), d(30, 300, 500), d(30, 300, 1), d(30, 300, 1).abs()),
    signed=True,
)
def affine_example_gradients(
    x: Tensor, g: Tensor, mean: Maybe, rstd: Maybe, sign: int = 1
) -> Results:
    normalized = x if mean is None else x - sign * mean
    if rstd is not None:
        normalized = normalized * rstd
    return (g * normalized).sum(1), g.sum(1)


@_formula(
    lambda d: (
        *(d(4, 4, 7, 6), d(4, 4, 7, 6), d(4, 2), d(4, 2).abs()),
        *(d.maybe(d(4)), 2),
    ),
    lambda d: (*(d(30, 40, 20, 20), d(30, 40, 20, 20), d(30, 8), d(30, 8).abs(), d(40), 8),),
    stored=(0,),
    signed=True,
)
def group_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Maybe, groups: int, sign: int = 1
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


@_formula(
    lambda d: (
        *(d(4, 4, 7, 6), d.maybe(d(4, 4, 7, 6)), d(4), d(4).abs()),
        *(d.maybe(d(4)), d.maybe(d(4)), d.maybe(d(4))),
    ),
    lambda d: (*(d(30, 40, 20, 20), d(30, 40, 20, 20), d(40), d(40).abs(), d(40), d(40), d(40)),),
    stored=(0,),
    signed=True,
)
def batch_norm_tangent(
    x: Tensor,
    x_tangent: Maybe,
    mean: Tensor,
    rstd: Tensor,
    weight: Maybe,
    V: Maybe,
    V_b: Maybe,
    sign: int = 1,
) -> Tensor:
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
    return result


@_formula(
    lambda d: (torch.tensor([[0, 1, 1, 2, 0], [2, 0, 1, 1, 1]] * 2), d(4, 5, 9), d(3, 9)),
    lambda d: (d.rows(900, 40, 130), d(40, 130, 500), d(900, 500)),
)
def embedding_correlation(index: Tensor, g: Tensor, V: Tensor) -> Tensor:
    return (g * V[index.long()]).sum((1, 2))


@_formula(
    lambda d: (torch.tensor([[0, 1, 1, 2, 0], [2, 0, 1, 1, 1]] * 2), d(4, 5, 9), d.weights(), 4),
    lambda d: (d.rows(300, 40, 60), d(40, 60, 200), d.weights(40), 300),
)
def embedding_weighted_gradient(index: Tensor, g: Tensor, w: Tensor, rows: int) -> Tensor:
    chosen = torch.nn.functional.one_hot(index.long(), rows).to(g.dtype)
    return torch.einsum("n,ntv,ntd->vd", w, chosen, g)


@_formula(
    lambda d: (d(4, 5, 9), d.weights()),
    lambda d: (d(300, 70, 130), d.weights(300)),
)
def weighted_sum(gradients: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("n,n...->...", w, gradients)


@_formula(lambda d: (d(5),), lambda d: (d(70_001),), stored=(0,), sums=False)
def normalize_weights(u: Tensor) -> Tensor:
    rectified = u.clamp(min=0)
    total = rectified.sum()
    return rectified / (total + float(total == 0))
