"""The fixed cases of ``benchmarks kernels``: arguments of one operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from l2rw_ext.ops.formulas import Arguments

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Precision:
    """A dtype, and whether TF32 may stand in for float32 in products."""

    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = {
    "bf16": Precision(torch.bfloat16),
    "fp16": Precision(torch.float16),
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, tf32=True),
}


class Draw:
    """Draws tensors of one dtype on one device, the same at every call for a device.

    On ``meta`` they have a shape and no numbers.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self.device = device
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.to(self.dtype)

    def positive(self, *shape: int) -> Tensor:
        values = torch.rand(shape, generator=self.generator, device=self.device)
        return (values + 0.5).to(self.dtype)

    def index(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator, device=self.device)

    def half_of_weights(self, n: int) -> Tensor:
        """(n,) weights of which every other one is zero, as ρ = 0.5 has it."""
        weights = self.positive(n)
        weights[1::2] = 0
        return weights


@dataclass(frozen=True)
class KernelCase:
    """One operator at one size.

    ``arguments`` draws what the operator takes from ``sizes``. ``library`` is torch's product of
    all arguments but g, for an operator that is such a product and a dot.
    """

    name: str
    title: str
    operator: str
    sizes: Sizes
    arguments: Callable[..., Arguments]
    precisions: tuple[str, ...]
    device: str = "cuda"
    library: Callable[..., Tensor] | None = None

    def draw(self, precision: str, device: str) -> Arguments:
        """The operator's arguments."""
        return self.arguments(Draw(PRECISIONS[precision].dtype, device), *self.sizes)

    def tf32(self, precision: str) -> bool:
        """Whether products of float32 may be rounded to TF32.

        A composition that converts a convolution's narrow arguments to float32 loses nothing by it.
        """
        chosen = PRECISIONS[precision]
        narrow = chosen.dtype.itemsize == 2
        return chosen.tf32 or (narrow and self.operator == "conv_correlation")


# Letters as in l2rw_ext.ops: n, m examples, t, s positions, i, o widths, c channels.


def _factored(d: Draw, n: int, t: int, m: int, s: int, i: int, o: int) -> Arguments:
    return d.normal(n, t, i), d.normal(n, t, o), d.normal(m, s, i), d.normal(m, s, o), True


def _layers_of_mlp(d: Draw, n: int, m: int, *widths: int) -> Arguments:
    layers = [_factored(d, n, 1, m, 1, i, o) for i, o in pairwise(widths)]
    return tuple(map(list, zip(*layers, strict=True)))


def _dense(d: Draw, n: int, t: int, i: int, o: int) -> Arguments:
    return d.normal(n, t, i), d.normal(n, t, o), d.normal(o, i), d.normal(o)


def _pixels(size: int, k: int, stride: int) -> int:
    return (size + 2 * (k // 2) - k) // stride + 1


def _images(
    d: Draw, n: int, c: int, o: int, size: int, k: int, stride: int, groups: int
) -> tuple[Tensor, Tensor, tuple[list[int], list[int], list[int], int]]:
    """Inputs z, gradients g, channels side by side; stride, padding, dilation and groups."""
    pixels = _pixels(size, k, stride)
    z = d.normal(n, size, size, c).movedim(-1, 1)
    g = d.normal(n, pixels, pixels, o).movedim(-1, 1)
    return z, g, ([stride] * 2, [k // 2] * 2, [1, 1], groups)


def _kernel(d: Draw, o: int, c: int, k: int) -> Tensor:
    return d.normal(o, k, k, c).movedim(-1, 1)


def _conv(
    d: Draw, n: int, c: int, o: int, size: int, k: int, stride: int, groups: int = 1
) -> Arguments:
    z, g, geometry = _images(d, n, c, o, size, k, stride, groups)
    return z, g, _kernel(d, o, c // groups, k), d.normal(o), *geometry


def _conv_example(
    d: Draw, n: int, c: int, o: int, size: int, k: int, stride: int, groups: int = 1
) -> Arguments:
    z, g, geometry = _images(d, n, c, o, size, k, stride, groups)
    return z, g, [k, k], *geometry, _kernel(d, o, c // groups, k), d.normal(o)


def _conv_weighted(
    d: Draw, n: int, c: int, o: int, size: int, k: int, stride: int, groups: int = 1
) -> Arguments:
    z, g, geometry = _images(d, n, c, o, size, k, stride, groups)
    return z, g, d.half_of_weights(n), [k, k], *geometry


def _linear_example(d: Draw, n: int, t: int, i: int, o: int) -> Arguments:
    return d.normal(n, t, i), d.normal(n, t, o), d.normal(o, i), d.normal(o)


def _linear_weighted(d: Draw, n: int, t: int, i: int, o: int) -> Arguments:
    # A product with a weight of one is not rounded to the dtype of g.
    weights = d.half_of_weights(n).ceil()
    return d.normal(n, t, i), d.normal(n, t, o), weights, True, False, True


def _affine(d: Draw, n: int, t: int, c: int) -> Arguments:
    return d.normal(n, t, c), d.normal(n, t, c), d.normal(n, t, 1), d.positive(n, t, 1)


def _embedding(d: Draw, n: int, t: int, c: int, v: int) -> Arguments:
    return d.index(v, n, t), d.normal(n, t, c), d.normal(v, c)


def _embedding_weighted(d: Draw, n: int, t: int, c: int, v: int) -> Arguments:
    return d.index(v, n, t), d.normal(n, t, c), d.half_of_weights(n), v


def _group_norm(d: Draw, n: int, c: int, size: int, groups: int) -> Arguments:
    shape = (n, c, size, size)
    statistics = d.normal(n, groups), d.positive(n, groups)
    return d.normal(*shape), d.normal(*shape), *statistics, d.normal(c), groups


def _batch_norm(d: Draw, n: int, c: int, size: int) -> Arguments:
    shape = (n, c, size, size)
    vectors = d.normal(c), d.positive(c), d.normal(c), d.normal(c), d.normal(c)
    return d.normal(*shape), d.normal(*shape), *vectors


def _weighted_sum(d: Draw, n: int, *shape: int) -> Arguments:
    return d.normal(n, *shape), d.half_of_weights(n)


def _normalize(d: Draw, n: int) -> Arguments:
    return (d.normal(n),)


_MAKERS: dict[str, Callable[..., Arguments]] = {
    "factored_correlation": _factored,
    "factored_correlations": _layers_of_mlp,
    "dense_correlation": _dense,
    "conv_correlation": _conv,
    "embedding_correlation": _embedding,
    "linear_example_gradients": _linear_example,
    "conv_example_gradients": _conv_example,
    "linear_weighted_gradient": _linear_weighted,
    "embedding_weighted_gradient": _embedding_weighted,
    "conv_weighted_gradient": _conv_weighted,
    "affine_example_gradients": _affine,
    "group_norm_backward": _group_norm,
    "batch_norm_tangent": _batch_norm,
    "weighted_sum": _weighted_sum,
    "normalize_weights": _normalize,
}
_LIBRARY: dict[str, Callable[..., Tensor]] = {
    "dense_correlation": F.linear,
    "conv_correlation": F.conv2d,
}
_PRODUCTS = ("bf16", "fp16", "fp32", "tf32")
_CONVOLUTIONS = ("bf16", "fp32", "tf32")
_PASSES = ("bf16", "fp32")


def _case(
    name: str,
    title: str,
    operator: str,
    sizes: Sizes,
    precisions: tuple[str, ...],
    device: str = "cuda",
) -> KernelCase:
    return KernelCase(
        name,
        title,
        operator,
        sizes,
        _MAKERS[operator],
        precisions,
        device,
        _LIBRARY.get(operator),
    )


def _layers(
    net: str, layers: tuple[tuple[int, int, int, int], ...], operator: str, suffix: str = ""
) -> list[KernelCase]:
    """3x3 convolutions of a net at batch 100: input and output channels, input size, stride."""
    return [
        _case(
            f"{net}-{c}-{o}-{size}{suffix}",
            f"{c}->{o}, 3x3, {size}x{size}{f', stride {stride}' if stride > 1 else ''}, n 100",
            operator,
            (100, c, o, size, 3, stride),
            _CONVOLUTIONS,
        )
        for c, o, size, stride in layers
    ]


_RESNET = (
    (3, 16, 32, 1),
    (16, 16, 32, 1),
    (16, 32, 32, 2),
    (32, 32, 16, 1),
    (32, 64, 16, 2),
    (64, 64, 8, 1),
)
# Of MobileNet and ResNeXt: channels, input size, groups.
_GROUPED = (("depthwise", 144, 28, 144), ("grouped", 128, 28, 32))
_WIDE = ((160, 160, 32, 1), (160, 320, 32, 2), (320, 320, 16, 1), (640, 640, 8, 1))
_SOME = (_RESNET[1], _RESNET[5])

KERNEL_CASES: dict[str, KernelCase] = {
    case.name: case
    for case in (
        _case(
            "factored-256",
            "n = m = 256, T 1, 4096->4096",
            "factored_correlation",
            (256, 1, 256, 1, 4096, 4096),
            _PRODUCTS,
        ),
        _case(
            "factored-16384",
            "nT 16384, mT' 4096, 1024->1024",
            "factored_correlation",
            (64, 256, 16, 256, 1024, 1024),
            _PRODUCTS,
        ),
        _case(
            "factored-mlp",
            "n 256, m 64, 784-1024-1024-10",
            "factored_correlations",
            (256, 64, 784, 1024, 1024, 10),
            _PRODUCTS,
        ),
        _case(
            "factored-deep-mlp",
            "n 256, m 64, 12 layers 512->512",
            "factored_correlations",
            (256, 64, *[512] * 13),
            _PRODUCTS,
        ),
        _case(
            "dense-16384",
            "nT 16384, 4096->4096",
            "dense_correlation",
            (64, 256, 4096, 4096),
            _PRODUCTS,
        ),
        *_layers("resnet32", _RESNET, "conv_correlation"),
        *_layers("wrn28", _WIDE, "conv_correlation"),
        *_layers("resnet32", _SOME, "conv_example_gradients", "-examples"),
        *_layers("resnet32", _SOME, "conv_weighted_gradient", "-weighted"),
        *_layers("wrn28", (_WIDE[0], _WIDE[3]), "conv_weighted_gradient", "-weighted"),
        _case(
            "linear-examples",
            "n 64, T 65, 192->192",
            "linear_example_gradients",
            (64, 65, 192, 192),
            _PRODUCTS,
        ),
        _case(
            "layer-norm-examples",
            "n 64, T 256, d 1024",
            "affine_example_gradients",
            (64, 256, 1024),
            _PASSES,
        ),
        _case(
            "embedding",
            "n 64, T 256, d 1024, 32000 rows",
            "embedding_correlation",
            (64, 256, 1024, 32000),
            _PASSES,
        ),
        _case(
            "group-norm", "100x64x32x32, 8 groups", "group_norm_backward", (100, 64, 32, 8), _PASSES
        ),
        _case("batch-norm", "100x64x32x32", "batch_norm_tangent", (100, 64, 32), _PASSES),
        _case("weighted-sum", "n 100, 576x512", "weighted_sum", (100, 576, 512), _PASSES),
        _case(
            "linear-weighted",
            "128 of 256, T 64, 1024->1024",
            "linear_weighted_gradient",
            (256, 64, 1024, 1024),
            _PRODUCTS,
        ),
        _case(
            "embedding-weighted",
            "32 of 64, T 256, d 1024, 32000 rows",
            "embedding_weighted_gradient",
            (64, 256, 1024, 32000),
            _PASSES,
        ),
        _case("normalize", "n 256", "normalize_weights", (256,), ("fp32",)),
        *(
            _case(
                f"{name}-{c}-{size}{suffix}",
                f"{c}->{c}, 3x3, {size}x{size}, {groups} groups, n 100",
                operator,
                (100, c, c, size, 3, 1, groups),
                _CONVOLUTIONS,
            )
            for name, c, size, groups in _GROUPED
            for operator, suffix in (
                ("conv_correlation", ""),
                ("conv_example_gradients", "-examples"),
                ("conv_weighted_gradient", "-weighted"),
            )
        ),
        # Sizes for the CPU, one of each operator.
        *(
            _case(f"small-{name}", title, operator, sizes, _PASSES, "cpu")
            for name, title, operator, sizes in (
                (
                    "factored",
                    "n 100, m 10, T 1, 256->256",
                    "factored_correlation",
                    (100, 1, 10, 1, 256, 256),
                ),
                (
                    "factored-mlp",
                    "n 100, m 10, 256-256-10",
                    "factored_correlations",
                    (100, 10, 256, 256, 10),
                ),
                ("dense", "n 16, T 65, 192->192", "dense_correlation", (16, 65, 192, 192)),
                ("conv", "16->16, 3x3, 16x16, n 20", "conv_correlation", (20, 16, 16, 16, 3, 1)),
                (
                    "conv-examples",
                    "16->16, 3x3, 16x16, n 20",
                    "conv_example_gradients",
                    (20, 16, 16, 16, 3, 1),
                ),
                (
                    "conv-weighted",
                    "16->16, 3x3, 16x16, n 20",
                    "conv_weighted_gradient",
                    (20, 16, 16, 16, 3, 1),
                ),
                (
                    "linear-examples",
                    "n 16, T 65, 64->64",
                    "linear_example_gradients",
                    (16, 65, 64, 64),
                ),
                (
                    "layer-norm-examples",
                    "n 16, T 65, d 192",
                    "affine_example_gradients",
                    (16, 65, 192),
                ),
                (
                    "embedding",
                    "n 16, T 64, d 64, 1000 rows",
                    "embedding_correlation",
                    (16, 64, 64, 1000),
                ),
                ("group-norm", "20x16x16x16, 4 groups", "group_norm_backward", (20, 16, 16, 4)),
                ("batch-norm", "20x16x16x16", "batch_norm_tangent", (20, 16, 16)),
                ("weighted-sum", "n 20, 64x64", "weighted_sum", (20, 64, 64)),
                (
                    "linear-weighted",
                    "50 of 100, T 1, 256->256",
                    "linear_weighted_gradient",
                    (100, 1, 256, 256),
                ),
                (
                    "linear-weighted-blocked",
                    "8 of 16, T 65, 192->192",
                    "linear_weighted_gradient",
                    (16, 65, 192, 192),
                ),
                (
                    "embedding-weighted",
                    "8 of 16, T 64, d 64, 1000 rows",
                    "embedding_weighted_gradient",
                    (16, 64, 64, 1000),
                ),
                ("normalize", "n 256", "normalize_weights", (256,)),
            )
        ),
    )
}


def default_kernel_cases(device: str) -> list[str]:
    """The names of the cases that run on a device when none is asked for."""
    kind = device.split(":")[0]
    return [name for name, case in KERNEL_CASES.items() if case.device == kind]
