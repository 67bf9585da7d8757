"""Arguments that reach every path of the CPU kernels.

Run as a script with the name of an instruction set, this module checks the kernels of that one.

The kernels choose among three ways to multiply (input channels, output channels or pixels along a
vector) and cut each into tiles and blocks: the sizes here leave a remainder in each of them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from l2rw_ext.ops import _native
from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.arithmetic import accumulation_dtype
from support.operator_cases import assert_operator_exact, call, named_arguments

OTHER_INSTRUCTION_SET = 77
"""The exit status of the script where the processor lacks the instruction set."""

# name: n, C, O, space, kernel, stride, padding, dilation, groups
Case = tuple[int, int, int, list[int], list[int], list[int], list[int], list[int], int]
CASES: dict[str, Case] = {
    "input channels, whole vectors": (3, 32, 24, [6, 7], [3, 3], [1, 1], [1, 1], [1, 1], 1),
    "input channels, a tail": (2, 19, 5, [5, 9], [3, 2], [1, 1], [0, 1], [1, 1], 1),
    "input channels, stride and dilation": (2, 33, 17, [11, 9], [3, 3], [2, 3], [2, 1], [2, 1], 1),
    "input channels, kernel of one": (2, 20, 21, [7, 5], [1, 1], [1, 1], [0, 0], [1, 1], 1),
    "output channels": (3, 6, 16, [9, 8], [5, 5], [1, 1], [0, 0], [1, 1], 1),
    "output channels, dilated": (2, 5, 33, [12, 13], [3, 4], [1, 2], [3, 0], [1, 3], 1),
    "output channels, wide kernel": (2, 1, 48, [6, 20], [1, 11], [1, 1], [0, 5], [1, 1], 1),
    "planes": (3, 1, 6, [28, 28], [5, 5], [1, 1], [2, 2], [1, 1], 1),
    "planes in phases": (2, 2, 3, [13, 17], [3, 5], [2, 3], [1, 2], [1, 1], 1),
    "planes in phases, dilated": (2, 2, 3, [15, 17], [3, 2], [3, 2], [1, 3], [2, 3], 1),
    "planes in phases, 3-D": (2, 1, 2, [5, 6, 7], [2, 3, 2], [2, 1, 3], [1, 0, 2], [1, 2, 1], 1),
    "planes longer than a block": (1, 1, 4, [50, 61], [3, 3], [1, 1], [1, 1], [1, 1], 1),
    "depthwise": (2, 12, 24, [8, 9], [3, 3], [2, 1], [1, 1], [1, 1], 12),
    "groups": (2, 36, 40, [6, 5], [3, 3], [1, 1], [1, 1], [1, 1], 2),
    "several blocks of rows": (1, 64, 8, [40, 40], [3, 3], [1, 1], [1, 1], [1, 1], 1),
    "a row longer than a block": (1, 16, 16, [3000], [1], [1], [0], [1], 1),
    "one dimension": (3, 4, 9, [31], [7], [3], [4], [2], 1),
    "three dimensions": (2, 17, 18, [4, 5, 6], [2, 3, 2], [1, 2, 1], [1, 1, 0], [1, 1, 2], 1),
    "wide layer, few pixels": (3, 40, 72, [4, 3], [3, 3], [1, 1], [1, 1], [1, 1], 1),
    "wide layer, one pixel": (3, 32, 32, [2], [3], [2], [1], [1], 1),
    "wide groups": (2, 64, 64, [3, 3, 3], [1, 3, 3], [1, 2, 1], [0, 1, 1], [1, 1, 1], 2),
    "kernel larger than the input": (2, 3, 20, [2, 2], [4, 4], [1, 1], [1, 1], [1, 1], 1),
    "stride beyond the input": (2, 1, 1, [2, 3], [1, 1], [5, 7], [0, 0], [1, 1], 1),
    "one example, many threads": (1, 16, 64, [8, 8], [3, 3], [1, 1], [1, 1], [1, 1], 1),
}  # fmt: skip


def draw(name: str, dtype: torch.dtype, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    n, inputs, outputs, space, kernel, stride, padding, dilation, _ = CASES[name]
    places = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(space, kernel, stride, padding, dilation, strict=True)
    ]
    z = torch.randn(n, inputs, *space, dtype=torch.float64).to(dtype)
    g = torch.randn(n, outputs, *places, dtype=torch.float64).to(dtype)
    if channels_last:
        z, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (z, g))
    return z, g


def geometry(name: str) -> tuple[list[int], list[int], list[int], int]:
    return CASES[name][5:]


OF_CONVOLUTIONS = tuple(name for name in OPERATORS if "dilation" in named_arguments(name))


def arguments_of(operator: str, name: str, z: Tensor, g: Tensor) -> tuple[Any, ...]:
    """What the operator of convolutions takes in a case; a direction and weights are drawn."""
    kernel, (stride, padding, dilation, groups) = CASES[name][4], geometry(name)
    wide = accumulation_dtype(z.dtype)
    weights = torch.randn(z.size(0), dtype=wide)
    weights[0] = 0
    values = {
        "z": z,
        "g": g,
        "direction": torch.randn(g.size(1), z.size(1) // groups, *kernel, dtype=wide),
        "direction_bias": torch.randn(g.size(1), dtype=wide),
        "weights": weights,
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    return tuple(values[argument] for argument in named_arguments(operator))


def check(operator: str, arguments: tuple[Any, ...]) -> None:
    assert_operator_exact(operator, arguments[0].dtype, arguments, call(operator, arguments))


def check_case(name: str, dtype: torch.dtype, channels_last: bool = False) -> None:
    z, g = draw(name, dtype, channels_last)
    for operator in OF_CONVOLUTIONS:
        check(operator, arguments_of(operator, name, z, g))


def check_rows(dtype: torch.dtype) -> None:
    """The products of rows: several panels of columns, several blocks of rows, a long depth."""
    for n, positions, m, inputs, outputs in (
        (3, 70, 5, 37, 130),
        (130, 1, 61, 20, 9),
        (2, 3, 1, 2100, 3),
        (2, 3, 4, 3, 1300),
    ):
        z, g, z_clean, g_clean = (
            torch.randn(*shape, dtype=torch.float64).to(dtype)
            for shape in (
                (n, positions, inputs),
                (n, positions, outputs),
                (m, positions, inputs),
                (m, positions, outputs),
            )
        )
        check("factored_correlation", (z, g, z_clean, g_clean, False))
        direction = torch.einsum("mso,msi->oi", g_clean.double(), z_clean.double())
        check("dense_correlation", (z, g, direction.to(accumulation_dtype(dtype)), None))


if __name__ == "__main__":
    if _native.instruction_set() != sys.argv[1]:
        print(_native.instruction_set())
        sys.exit(OTHER_INSTRUCTION_SET)
    torch.manual_seed(0)
    for case in CASES:
        for kind in (torch.float64, torch.float32):
            check_case(case, kind)
            check_case(case, kind, channels_last=True)
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        check_case("input channels, a tail", kind)
        check_rows(kind)
