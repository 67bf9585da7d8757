"""Layers of every family, drawn at random: what the tests of the perturbed layers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from l2rw_ext import functional as PF

Plain = Callable[[Any, Any, Any], Tensor]


@dataclass
class Case:
    """One layer with its inputs; ``plain`` is torch's and takes (input, weight, bias)."""

    name: str
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    plain: Plain
    function: Callable[..., Tensor]
    clean: Tensor
    example_dim: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    eps_name: str = "eps"
    padding_idx: int | None = None

    @property
    def n(self) -> int:
        return self.x.shape[self.example_dim]

    @property
    def z_clean(self) -> Tensor | None:
        return None if self.name in ("add", "expand") else self.clean

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in (self.weight, self.bias) if p is not None]

    def perturbed(self, x: Tensor, weight: Any, bias: Any, eps: Any, direction: Any) -> Tensor:
        extra = {self.eps_name: eps, "direction": direction, "example_dim": self.example_dim}
        return self.function(x, weight, bias, *self.args, **self.kwargs, **extra)

    def example(self, i: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The plain layer on example i alone."""
        return self.plain(self.x.narrow(self.example_dim, i, 1), weight, bias)

    def by_example(self, eps: Tensor, V: Tensor | None, V_b: Tensor | None) -> Tensor:
        """The definition: torch's layer on each example with its own weights W + ε_i V."""
        if self.n == 0:
            return self.plain(self.x, self.weight, self.bias)
        outputs = [
            self.example(
                i,
                self.weight if V is None else self.weight + eps[i] * V,
                self.bias if V_b is None else self.bias + eps[i] * V_b,
            )
            for i in range(self.n)
        ]
        return torch.cat(outputs, self.example_dim)

    def to(self, dtype: torch.dtype) -> Case:
        def convert(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        return Case(
            self.name,
            convert(self.x),
            convert(self.weight),
            convert(self.bias),
            self.plain,
            self.function,
            convert(self.clean),
            self.example_dim,
            tuple(convert(a) for a in self.args),
            self.kwargs,
            self.eps_name,
            self.padding_idx,
        )


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def random_direction(case: Case) -> PF.Dense:
    V = None if case.weight is None else torch.randn_like(case.weight)
    V_b = None if case.bias is None else torch.randn_like(case.bias)
    return PF.Dense(V, V_b)


def linear_case(
    n: int,
    d_in: int,
    d_out: int,
    middle: tuple[int, ...] = (),
    example_dim: int = 0,
    bias: bool = True,
    m: int = 2,
) -> Case:
    def shaped(examples: int) -> Tensor:
        return randn(examples, *middle, d_in).movedim(0, example_dim).contiguous()

    return Case(
        "linear",
        shaped(n),
        randn(d_out, d_in),
        randn(d_out) if bias else None,
        F.linear,
        PF.linear,
        shaped(m),
        example_dim,
    )


def padded_convolution(dims: int, args: tuple[Any, ...], mode: str) -> Plain:
    """The convolution of ``torch.nn.Conv{dims}d``, through the module itself."""
    stride, padding, dilation, groups = args
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims]

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        module = kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride,
            padding,
            dilation,
            groups,
            bias is not None,
            mode,
            device="meta",
        )
        return module._conv_forward(x, weight, bias)

    return plain


def conv_case(
    dims: int,
    n: int,
    spatial: tuple[int, ...],
    kernel: tuple[int, ...],
    in_per_group: int = 1,
    out_per_group: int = 2,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    mode: str = "zeros",
    bias: bool = True,
    m: int = 2,
) -> Case:
    args = (stride, padding, dilation, groups)
    channels, filters = in_per_group * groups, out_per_group * groups
    return Case(
        f"conv{dims}d",
        randn(n, channels, *spatial),
        randn(filters, in_per_group, *kernel),
        randn(filters) if bias else None,
        padded_convolution(dims, args, mode),
        getattr(PF, f"conv{dims}d"),
        randn(m, channels, *spatial),
        args=args,
        kwargs={"padding_mode": mode},
    )


def embedding_case(
    n: int,
    middle: tuple[int, ...] = (2,),
    rows: int = 4,
    width: int = 3,
    padding_idx: int | None = None,
    example_dim: int = 0,
    m: int = 2,
) -> Case:
    def shaped(examples: int) -> Tensor:
        index = torch.randint(rows, (examples, *middle))
        return index.movedim(0, example_dim).contiguous()

    def function(index: Tensor, weight: Tensor, _: None, **kwargs: Any) -> Tensor:
        return PF.embedding(index, weight, padding_idx, **kwargs)

    return Case(
        "embedding",
        shaped(n),
        randn(rows, width),
        None,
        lambda index, weight, _: F.embedding(index, weight, padding_idx),
        function,
        shaped(m),
        example_dim,
        padding_idx=padding_idx,
    )


def layer_norm_case(
    n: int,
    shape: tuple[int, ...] = (3,),
    middle: tuple[int, ...] = (),
    example_dim: int = 0,
    weight: bool = True,
    bias: bool = True,
    m: int = 2,
) -> Case:
    def shaped(examples: int) -> Tensor:
        return randn(examples, *middle, *shape).movedim(0, example_dim).contiguous()

    return Case(
        "layer_norm",
        shaped(n),
        randn(*shape) if weight else None,
        randn(*shape) if bias else None,
        lambda x, w, b: F.layer_norm(x, shape, w, b),
        lambda x, w, b, **kwargs: PF.layer_norm(x, shape, w, b, **kwargs),
        shaped(m),
        example_dim,
        eps_name="perturbation",
    )


def rms_norm_case(
    n: int,
    shape: tuple[int, ...] = (3,),
    middle: tuple[int, ...] = (),
    example_dim: int = 0,
    m: int = 2,
) -> Case:
    def shaped(examples: int) -> Tensor:
        return randn(examples, *middle, *shape).movedim(0, example_dim).contiguous()

    return Case(
        "rms_norm",
        shaped(n),
        randn(*shape),
        None,
        lambda x, w, _: F.rms_norm(x, shape, w, 1e-3),
        lambda x, w, _, **kwargs: PF.rms_norm(x, shape, w, 1e-3, **kwargs),
        shaped(m),
        example_dim,
        eps_name="perturbation",
    )


def group_norm_case(
    n: int,
    groups: int = 2,
    per_group: int = 2,
    spatial: tuple[int, ...] = (3,),
    weight: bool = True,
    bias: bool = True,
    m: int = 2,
) -> Case:
    channels = groups * per_group
    return Case(
        "group_norm",
        randn(n, channels, *spatial),
        randn(channels) if weight else None,
        randn(channels) if bias else None,
        lambda x, w, b: F.group_norm(x, groups, w, b),
        lambda x, w, b, **kwargs: PF.group_norm(x, groups, w, b, **kwargs),
        randn(m, channels, *spatial),
        eps_name="perturbation",
    )


def batch_norm_case(
    n: int,
    channels: int = 3,
    spatial: tuple[int, ...] = (2,),
    weight: bool = True,
    bias: bool = True,
    m: int = 2,
) -> Case:
    mean, var = randn(channels), randn(channels).square() + 0.5

    def function(x: Tensor, w: Any, b: Any, mean: Tensor, var: Tensor, **kwargs: Any) -> Tensor:
        return PF.batch_norm(x, mean, var, w, b, **kwargs)

    return Case(
        "batch_norm",
        randn(n, channels, *spatial),
        randn(channels) if weight else None,
        randn(channels) if bias else None,
        lambda x, w, b: F.batch_norm(x, mean.to(x.dtype), var.to(x.dtype), w, b),
        function,
        randn(m, channels, *spatial),
        args=(mean, var),
        eps_name="perturbation",
    )


def broadcast_case(
    name: str,
    n: int,
    middle: tuple[int, ...],
    p: tuple[int, ...],
    example_dim: int = 0,
    m: int = 2,
) -> Case:
    """``add``, ``mul`` or ``expand``; x of an ``expand`` only says how many examples there are."""

    def shaped(examples: int) -> Tensor:
        return randn(examples, *middle).movedim(0, example_dim).contiguous()

    plain: dict[str, Plain] = {
        "add": lambda x, p, _: torch.add(x, p, alpha=2),
        "mul": lambda x, p, _: torch.mul(x, p),
        "expand": lambda x, p, _: p.expand(x.shape),
    }
    functions: dict[str, Callable[..., Tensor]] = {
        "add": lambda x, p, _, **kwargs: PF.add(x, p, alpha=2, **kwargs),
        "mul": lambda x, p, _, **kwargs: PF.mul(x, p, **kwargs),
        "expand": lambda x, p, _, **kwargs: PF.expand(p, *x.shape, **kwargs),
    }
    return Case(
        name, shaped(n), randn(*p), None, plain[name], functions[name], shaped(m), example_dim
    )


SMALL_CASES: dict[str, Callable[[], Case]] = {
    "linear": lambda: linear_case(3, 4, 2),
    "linear-wide": lambda: linear_case(2, 9, 8, m=1),
    "linear-tokens": lambda: linear_case(2, 3, 2, middle=(3,), example_dim=1),
    "linear-no-bias": lambda: linear_case(2, 3, 2, bias=False),
    "conv1d-circular": lambda: conv_case(
        1, 2, (5,), (3,), stride=2, padding=2, mode="circular", groups=2
    ),
    "conv2d": lambda: conv_case(2, 2, (4, 3), (2, 2), in_per_group=2, stride=(2, 1), padding=1),
    "conv2d-same": lambda: conv_case(2, 2, (3, 3), (2, 3), padding="same", bias=False),
    "conv3d-reflect": lambda: conv_case(
        3, 2, (2, 3, 2), (2, 2, 1), padding=(1, 1, 0), mode="reflect", dilation=(1, 2, 1)
    ),
    "embedding": lambda: embedding_case(3),
    "embedding-padding": lambda: embedding_case(3, (2, 3), padding_idx=-1, example_dim=1),
    "layer_norm": lambda: layer_norm_case(2, (2, 2), middle=(2,), example_dim=1),
    "layer_norm-no-weight": lambda: layer_norm_case(3, weight=False),
    "rms_norm": lambda: rms_norm_case(3, middle=(2,)),
    "group_norm": lambda: group_norm_case(2),
    "batch_norm-no-weight": lambda: batch_norm_case(2, weight=False),
    "batch_norm": lambda: batch_norm_case(3),
    "batch_norm-no-bias": lambda: batch_norm_case(3, spatial=(), bias=False),
    "add": lambda: broadcast_case("add", 3, (2, 4), (4,)),
    "mul": lambda: broadcast_case("mul", 3, (4, 2), (1, 4, 1)),
    "mul-scalar": lambda: broadcast_case("mul", 2, (3,), (), example_dim=1),
    "expand": lambda: broadcast_case("expand", 3, (2, 4), (1, 1, 4)),
}

few = st.integers(0, 3)
some = st.integers(1, 3)


@st.composite
def linear_cases(draw: st.DrawFn) -> Case:
    middle = draw(st.lists(few, max_size=2).map(tuple))
    dim = draw(st.integers(0, len(middle)))
    return linear_case(draw(few), draw(few), draw(few), middle, dim, draw(st.booleans()), draw(few))


@st.composite
def conv_cases(draw: st.DrawFn) -> Case:
    dims = draw(some)
    each = lambda values: draw(st.tuples(*[values] * dims))  # noqa: E731
    kernel, dilation = each(some), each(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    kind = draw(st.sampled_from(["numbers", "number", "same", "valid"]))
    stride: Any = 1 if kind == "same" else each(some)
    padding: Any = {
        "numbers": each(st.integers(0, 2)),
        "number": draw(st.integers(0, 2)),
    }.get(kind, kind)
    # Large enough for one output and for reflection, which needs size > padding.
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    spatial = tuple(max(e, 3 if mode != "zeros" else 1) + draw(st.integers(0, 1)) for e in extent)
    if kind == "same" and mode == "reflect":
        spatial = tuple(max(s, e) for s, e in zip(spatial, extent, strict=True))
    return conv_case(
        dims,
        draw(few),
        spatial,
        kernel,
        draw(some),
        draw(some),
        stride,
        padding,
        dilation,
        draw(some),
        mode,
        draw(st.booleans()),
        draw(few),
    )


@st.composite
def embedding_cases(draw: st.DrawFn) -> Case:
    middle = draw(st.lists(few, max_size=2).map(tuple))
    rows = draw(some)
    padding = draw(st.none() | st.integers(-rows, rows - 1))
    dim = draw(st.integers(0, len(middle)))
    return embedding_case(draw(few), middle, rows, draw(few), padding, dim, draw(few))


@st.composite
def normalization_cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["layer_norm", "rms_norm", "group_norm", "batch_norm"]))
    weight = draw(st.booleans())
    bias = draw(st.booleans()) or not weight
    middle = draw(st.lists(few, max_size=2).map(tuple))
    n, m = draw(few), draw(few)
    if kind == "batch_norm":
        return batch_norm_case(n, draw(some), middle, weight, bias, m)
    if kind == "group_norm":
        spatial = draw(st.lists(some, max_size=2).map(tuple))
        # Torch refuses groups of one value, and has no backward for a bias without a weight.
        per_group = draw(some) + (math.prod(spatial) == 1)
        return group_norm_case(n, draw(some), per_group, spatial, True, bias, m)
    shape = draw(st.lists(some, min_size=1, max_size=2).map(tuple))
    dim = draw(st.integers(0, len(middle)))
    if kind == "rms_norm":
        return rms_norm_case(n, shape, middle, dim, m)
    # Of one value without a bias everything is zero, and no error is relative to that.
    bias = bias or math.prod(shape) == 1
    return layer_norm_case(n, shape, middle, dim, weight, bias, m)


@st.composite
def broadcast_cases(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(["add", "mul", "expand"]))
    middle = draw(st.lists(few, max_size=3).map(tuple))
    dim = draw(st.integers(0, len(middle)))
    shape = [*middle[:dim], 1, *middle[dim:]]
    p = [size if draw(st.booleans()) else 1 for size in shape]
    p = p[draw(st.integers(0, len(p))) :]
    return broadcast_case(name, draw(few), middle, tuple(p), dim, draw(few))


def all_cases() -> st.SearchStrategy[Case]:
    return st.one_of(
        linear_cases(), conv_cases(), embedding_cases(), normalization_cases(), broadcast_cases()
    )
