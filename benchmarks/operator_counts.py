"""What an operator of this package must cost, from its arguments.

Floating-point operations, two for a multiply-add, and bytes, every argument read once and every
result written once. Only what the equation needs is counted: no workspace, no padding, and an
example without weight not at all; half of the examples are taken to have one, as ρ = 0.5 has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.formulas import Arguments, Results, as_results

WEIGHTED = (
    "conv_weighted_gradient",
    "embedding_weighted_gradient",
    "linear_weighted_gradient",
    "weighted_sum",
)
"""The operators that read only the examples with a weight."""

_PRODUCTS = (
    "factored_correlation",
    "factored_correlations",
    "dense_correlation",
    "conv_correlation",
    "linear_example_gradients",
    "conv_example_gradients",
    "conv_weighted_gradient",
)


def results_like(operator: str, arguments: Arguments) -> Results:
    """The operator's results without numbers: shapes and dtypes."""
    meta = pytree.tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, arguments)
    return as_results(OPERATORS[operator](*meta))


def operation_count(operator: str, arguments: Arguments) -> int:
    """Floating-point operations of the equation."""
    return _OPERATIONS[operator](*arguments)


def byte_count(operator: str, arguments: Arguments, results: Results) -> int:
    """Bytes of arguments and results, each moved once."""
    read = 0
    for argument in pytree.tree_leaves(arguments):
        if isinstance(argument, Tensor):
            # Weights and the list of active examples are vectors and read whole.
            half = operator in WEIGHTED and argument.dim() > 1
            read += argument.nbytes // 2 if half else argument.nbytes
    if operator == "embedding_correlation":
        _, g, direction = arguments
        # A row for each position, and no more than the table.
        read -= max(0, direction.nbytes - g.numel() * direction.element_size())
    return read + sum(result.nbytes for result in results)


def uses_tensor_cores(operator: str, arguments: Arguments) -> bool:
    """Whether the kernel multiplies matrices, of which groups of few channels leave none."""
    if operator not in _PRODUCTS or not operator.startswith("conv"):
        return operator in _PRODUCTS
    z, g = arguments[:2]
    groups: int = next(a for a in arguments[2:] if isinstance(a, int))
    # As csrc/cuda/ops/conv_correlation.cu decides.
    narrow = g.size(1) // groups < 8 or z.size(1) // groups * z.element_size() < 16
    return groups == 1 or not narrow


# Letters as in l2rw_ext.ops: n, m examples, t, s positions, i, o widths, c channels.


def _active(n: int) -> int:
    return (n + 1) // 2


def _factored(z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor, *_: Any) -> int:
    (n, t, i), (m, s, o) = z.shape, g_clean.shape
    # Both Gram matrices, the 1 of the bias, their product and its sum.
    return n * t * m * s * (2 * (i + o) + 3)


def _layers(*arguments: Any) -> int:
    return sum(_factored(*layer) for layer in zip(*arguments, strict=True))


def _dense(z: Tensor, g: Tensor, *_: Any) -> int:
    n, t, i = z.shape
    return n * t * g.size(-1) * (2 * i + 3)


def _conv(z: Tensor, g: Tensor, direction: Tensor, *_: Any) -> int:
    return g.numel() * (2 * direction[0].numel() + 3)


def _conv_example(
    z: Tensor, g: Tensor, kernel_size: list[int], s: Any, p: Any, d: Any, groups: int, *_: Any
) -> int:
    n, o = g.shape[:2]
    taps = z.size(1) // groups * math.prod(kernel_size)
    # G_i, <V, G_i>, G_bi and <V_b, G_bi>.
    return g.numel() * (2 * taps + 1) + n * o * (2 * taps + 2)


def _conv_weighted(
    z: Tensor, g: Tensor, w: Tensor, kernel_size: list[int], s: Any, p: Any, d: Any, groups: int
) -> int:
    taps = z.size(1) // groups * math.prod(kernel_size)
    return _active(g.size(0)) * g[0].numel() * (2 * taps + 2)


def _linear_example(z: Tensor, g: Tensor, *_: Any) -> int:
    (n, t, i), o = z.shape, g.size(-1)
    return n * o * (t * (2 * i + 1) + 2 * i + 2)


def _linear_weighted(z: Tensor, g: Tensor, *_: Any) -> int:
    return _active(g.size(0)) * g[0].numel() * (2 * z.size(-1) + 2)


def _embedding_weighted(index: Tensor, g: Tensor, *_: Any) -> int:
    return _active(g.size(0)) * 2 * g[0].numel()


def _weighted_sum(gradients: Tensor, *_: Any) -> int:
    return _active(gradients.size(0)) * 2 * gradients[0].numel()


_OPERATIONS: dict[str, Callable[..., int]] = {
    "factored_correlation": _factored,
    "factored_correlations": _layers,
    "dense_correlation": _dense,
    "conv_correlation": _conv,
    "embedding_correlation": lambda index, g, *_: 2 * g.numel(),
    "linear_example_gradients": _linear_example,
    "conv_example_gradients": _conv_example,
    "linear_weighted_gradient": _linear_weighted,
    "embedding_weighted_gradient": _embedding_weighted,
    "conv_weighted_gradient": _conv_weighted,
    "affine_example_gradients": lambda x, *_: 5 * x.numel(),
    "group_norm_backward": lambda g, *_: 10 * g.numel(),
    "batch_norm_tangent": lambda x, *_: 9 * x.numel(),
    "weighted_sum": _weighted_sum,
    "normalize_weights": lambda u: 3 * u.numel(),
}
