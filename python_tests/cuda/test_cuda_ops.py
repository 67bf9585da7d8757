"""Operators with CUDA kernels against their CPU twins, in float64 on the same rounded inputs.

The kernels run on a GPU where there is one, and everywhere else on the host (support/emulation.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from l2rw_ext import ops
from l2rw_ext.devices import float32_products
from support.operator_cases import (
    ARGUMENTS,
    Arguments,
    Draw,
    Results,
    assert_operator_exact,
    call,
    flat,
    lay_out,
    map_tensors,
    sample,
)
from support.paths import ROOT

on_a_gpu = pytest.mark.cuda

KERNELS = [
    name
    for source in sorted((ROOT / "csrc" / "cuda" / "ops").glob("*.cu"))
    for name in re.findall(r'm\.impl\("(\w+)"', source.read_text())
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

every_kernel = pytest.mark.parametrize("name", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
every_small_dtype = pytest.mark.parametrize("dtype", DTYPES[2:], ids=lambda dtype: str(dtype)[6:])


def every_path(
    argument: str, cases: Mapping[str, Any] | Sequence[Any], dtypes: Sequence[torch.dtype] = DTYPES
) -> pytest.MarkDecorator:
    """Each case in the wide dtypes, and by turns in bfloat16 and float16.

    Both of these take the same path, with another conversion and another instruction; that all
    kernels have both is tested with drawn arguments, and paths with both in every group of cases.
    The names of a mapping are given to the test, and the items of a sequence.
    """
    wide = [dtype for dtype in dtypes if dtype.itemsize > 2]
    narrow = [dtype for dtype in dtypes if dtype.itemsize == 2]
    return pytest.mark.parametrize(
        (argument, "dtype"),
        [
            pytest.param(case, dtype, id=f"{case}-{str(dtype)[6:]}")
            for k, case in enumerate(cases)
            for dtype in (*wide, narrow[k % 2])
        ],
    )


class Gpu:
    """Runs operators on the current CUDA device."""

    device = "cuda"

    def moved(self, arguments: Arguments) -> Arguments:
        moved: Arguments = map_tensors(self._moved, arguments)
        return moved

    def call(self, name: str, arguments: Arguments) -> Results:
        return call(name, self.moved(arguments))

    @contextmanager
    def settings(self, processors: int = 132, tf32: bool = False) -> Iterator[None]:
        """A GPU has the processors that it has."""
        with float32_products(tf32):
            yield

    @staticmethod
    def _moved(tensor: Tensor) -> Tensor:
        """A copy with the same strides and offset, whatever lies between the numbers."""
        whole = tensor.new_empty(0).set_(tensor.untyped_storage())
        return whole.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Emulator:
    """Runs the kernels on the host."""

    device = "cpu"

    def __init__(self, operators: Any) -> None:
        self._operators = operators

    def call(self, name: str, arguments: Arguments) -> Results:
        results = getattr(self._operators, name)(*arguments)
        return results if isinstance(results, tuple) else (results,)

    @contextmanager
    def settings(
        self,
        processors: int = 132,
        tf32: bool = False,
        warpgroups: bool = False,
        workspace: int = 2**24,
    ) -> Iterator[None]:
        self._operators.configure(processors, tf32, warpgroups, workspace)
        try:
            yield
        finally:
            self._operators.configure(132, False, False, 2**24)


Machine = Gpu | Emulator


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("gpu", marks=on_a_gpu),
        pytest.param("emulator", marks=pytest.mark.emulated),
    ],
)
def machine(request: pytest.FixtureRequest) -> Machine:
    return Gpu() if request.param == "gpu" else Emulator(request.getfixturevalue("emulator"))


# Tensor cores cut off what they add, so that their sums have fewer digits than float32's own.
_PRODUCTS = {
    torch.float64: 2e-15,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
}
_TF32 = 1e-3
TENSOR_CORES = (
    "factored_correlation",
    "factored_correlations",
    "dense_correlation",
    "conv_correlation",
    "linear_example_gradients",
    "conv_example_gradients",
    "conv_weighted_gradient",
)


def check(machine: Machine, name: str, arguments: Arguments, processors: int = 132) -> None:
    with machine.settings(processors):
        results = machine.call(name, arguments)
    compare(machine, name, arguments, results)


def compare(
    machine: Machine,
    name: str,
    arguments: Arguments,
    results: Results,
    allowed: float = 0.0,
) -> None:
    """Devices, dtypes and strides are those of the CPU, numbers those of plain float64."""
    for result, twin in zip(results, call(name, arguments), strict=True):
        assert result.device.type == machine.device
        assert (result.dtype, result.stride()) == (twin.dtype, twin.stride())
    tensors = [a for a in flat(arguments)[0] if isinstance(a, Tensor)]
    dtype = next(a.dtype for a in tensors if a.is_floating_point())
    if name in TENSOR_CORES:
        allowed = max(allowed, _PRODUCTS[dtype])
    assert_operator_exact(
        name, dtype, arguments, tuple(result.cpu() for result in results), allowed
    )


@every_dtype
@every_kernel
def test_matches_the_cpu(machine: Machine, name: str, dtype: torch.dtype) -> None:
    """The two narrow dtypes, whose paths are the same, share the number of draws of the others."""

    @settings(max_examples=30 if dtype.itemsize == 2 else 60)
    @given(data=st.data())
    def matches(data: st.DataObject) -> None:
        seed = data.draw(st.integers(0, 2**16))
        processors = data.draw(st.sampled_from((1, 4, 132)))
        draw = Draw(data.draw, dtype, torch.Generator().manual_seed(seed))
        check(machine, name, ARGUMENTS[name](draw), processors)

    matches()


# n, T, m, S, i, o, and processors that share the work: few tiles with a split depth,
# small tiles, large tiles, rows that need a copy.
PRODUCTS = (
    (256, 1, 64, 1, 512, 256, 132),
    (100, 1, 10, 1, 784, 10, 132),
    (256, 1, 256, 1, 640, 640, 4),
    (64, 1, 3, 1, 3, 1500, 132),
    (16, 64, 10, 60, 96, 40, 132),
    (8, 65, 8, 65, 192, 320, 8),
    (17, 64, 5, 140, 200, 130, 8),
    (1, 700, 2, 300, 65, 33, 132),
)


@every_path("shape", PRODUCTS)
def test_factored_paths(machine: Machine, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, t, m, s, i, o, processors = shape
    tensors = [torch.randn(size) for size in ((n, t, i), (n, t, o), (m, s, i), (m, s, o))]
    arguments = (*(tensor.to(dtype) for tensor in tensors), True)
    name = "factored_correlation"
    check(machine, name, arguments, processors)


# n, m, layers of T, S, i, o, and processors that share the work.
MLP = ((1, 1, 300, 200), (1, 1, 200, 200), (1, 1, 200, 10))
GROUPS = {
    "split depths": (100, 20, MLP, 132),
    "a shallow layer beside split ones": (70, 20, (*MLP, (1, 1, 1, 1)), 8),
    "small tiles": (70, 20, MLP, 2),
    "large tiles": (130, 128, ((1, 1, 64, 64), (1, 1, 130, 10)), 2),
    "every kind of tile": (128, 64, ((2, 2, 64, 40), (1, 1, 20, 30), (3, 4, 9, 5)), 4),
    "a deep layer beside a long one": (4, 4, ((120, 40, 8, 8), (1, 1, 900, 700)), 4),
    "parts and tiles in one call": (3, 2, ((300, 100, 8, 8), (1, 1, 700, 500)), 20),
    "one layer": (33, 9, ((2, 3, 65, 33),), 132),
    "layers without rows": (5, 3, ((0, 2, 4, 4), (2, 3, 4, 4), (2, 0, 4, 4), (2, 2, 4, 0)), 132),
    "no rows at all": (5, 3, ((0, 2, 4, 4), (2, 0, 4, 4)), 132),
    "two launches": (9, 4, tuple((1 + k % 3, 1, 3 + k, 1 + k) for k in range(23)), 132),
    "a layer more than a launch takes": (9, 4, ((1, 2, 20, 7),) * 21, 4),
}


def layers_of(n: int, m: int, layers: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> Arguments:
    shapes = [((n, t, i), (n, t, o), (m, s, i), (m, s, o)) for t, s, i, o in layers]
    tensors = [[torch.randn(shape).to(dtype) for shape in layer] for layer in shapes]
    return *map(list, zip(*tensors, strict=True)), [k % 2 == 0 for k in range(len(layers))]


@every_path("group", GROUPS)
def test_groups_of_layers(machine: Machine, group: str, dtype: torch.dtype) -> None:
    n, m, layers, processors = GROUPS[group]
    check(machine, "factored_correlations", layers_of(n, m, layers, dtype), processors)


@pytest.mark.parametrize("processors", [2, 132])
def test_groups_of_layers_in_tf32(machine: Machine, processors: int) -> None:
    arguments = layers_of(100, 40, MLP, torch.float32)
    with machine.settings(processors, tf32=True):
        results = machine.call("factored_correlations", arguments)
    compare(machine, "factored_correlations", arguments, results, _TF32)


@every_dtype
def test_a_group_of_one_is_the_layer(machine: Machine, dtype: torch.dtype) -> None:
    z, g, z_clean, g_clean, bias = layers_of(40, 30, ((3, 2, 100, 90),), dtype)
    (group,) = machine.call("factored_correlations", (z, g, z_clean, g_clean, bias))
    (single,) = machine.call("factored_correlation", (*z, *g, *z_clean, *g_clean, *bias))
    assert torch.equal(group, single)


@every_path("shape", PRODUCTS)
def test_dense_paths(machine: Machine, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A direction may have the dtype of the rows, or that of their sums, as may its bias."""
    n, t, _, _, i, o, processors = shape
    z, g, V, V_b = (torch.randn(size) for size in ((n, t, i), (n, t, o), (o, i), (o,)))
    wide = torch.promote_types(dtype, torch.float32)
    # All the same where a dtype sums in itself.
    for of_matrix, of_bias in {(dtype, dtype), (wide, wide), (wide, dtype)}:
        arguments = (z.to(dtype), g.to(dtype), V.to(of_matrix), V_b.to(of_bias))
        check(machine, "dense_correlation", arguments, processors)


# n, C, O, space, kernel, stride, padding, dilation, groups, and processors that share the work.
Case = tuple[int, int, int, list[int], list[int], list[int], list[int], list[int], int, int]
CONVOLUTIONS: dict[str, Case] = {
    "few outputs": (3, 16, 16, [9, 8], [3, 3], [1, 1], [1, 1], [1, 1], 1, 132),
    "three channels": (3, 3, 20, [8, 9], [3, 3], [1, 1], [1, 1], [1, 1], 1, 132),
    "one channel": (2, 1, 6, [12, 12], [5, 5], [1, 1], [2, 2], [1, 1], 1, 4),
    "large tiles": (2, 24, 250, [13, 11], [3, 3], [1, 1], [1, 1], [1, 1], 1, 2),
    "small tiles": (2, 24, 70, [13, 11], [3, 3], [1, 1], [1, 1], [1, 1], 1, 8),
    "a split depth": (1, 72, 70, [5, 5], [3, 3], [1, 1], [1, 1], [1, 1], 1, 132),
    "steps and gaps": (2, 20, 40, [11, 9], [3, 2], [2, 3], [2, 1], [2, 3], 1, 132),
    "one pixel": (130, 8, 12, [3, 3], [3, 3], [1, 1], [0, 0], [1, 1], 1, 132),
    "kernel of one": (2, 40, 33, [7, 6], [1, 1], [2, 1], [0, 0], [1, 1], 1, 132),
    "mostly padding": (2, 5, 20, [2, 2], [4, 4], [1, 1], [3, 2], [1, 1], 1, 132),
    "one dimension": (2, 8, 9, [150], [5], [2], [3], [2], 1, 132),
    "three dimensions": (2, 5, 34, [3, 4, 5], [2, 3, 2], [1, 2, 1], [1, 1, 0], [1, 1, 2], 1, 132),
    "groups": (2, 32, 80, [6, 5], [3, 3], [1, 1], [1, 1], [1, 1], 2, 132),
    "groups of an odd width": (2, 24, 27, [6, 5], [3, 3], [1, 1], [1, 1], [1, 1], 3, 132),
    "groups apart": (3, 18, 20, [6, 5], [3, 3], [1, 2], [1, 1], [1, 1], 2, 132),
    "groups on large tiles": (2, 16, 272, [9, 15], [2, 1], [1, 1], [0, 0], [1, 1], 2, 4),
    "depthwise": (3, 16, 16, [9, 7], [3, 3], [2, 1], [1, 1], [1, 2], 16, 132),
    "two outputs for each": (2, 6, 12, [8, 9], [3, 3], [1, 1], [1, 1], [1, 1], 6, 4),
    "narrow groups": (2, 12, 8, [4, 3, 5], [2, 3, 1], [1, 1, 2], [1, 1, 0], [1, 1, 1], 4, 132),
    "depthwise, one pixel": (40, 8, 8, [3], [3], [1], [0], [1], 8, 132),
}  # fmt: skip


def convolution(name: str, dtype: torch.dtype, direction: torch.dtype) -> Arguments:
    n, inputs, outputs, space, kernel, stride, padding, dilation, groups, _ = CONVOLUTIONS[name]
    pixels = [
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(space, kernel, stride, padding, dilation, strict=True)
    ]
    z, g = torch.randn(n, inputs, *space), torch.randn(n, outputs, *pixels)
    V, V_b = torch.randn(outputs, inputs // groups, *kernel), torch.randn(outputs)
    tensors = z.to(dtype), g.to(dtype), V.to(direction), V_b.to(direction)
    return *tensors, stride, padding, dilation, groups


def channels_side_by_side(arguments: Arguments) -> Arguments:
    return tuple(
        a.movedim(1, -1).contiguous().movedim(-1, 1) if isinstance(a, Tensor) and a.dim() > 1 else a
        for a in arguments
    )


@every_path("name", CONVOLUTIONS)
def test_convolution_paths(machine: Machine, name: str, dtype: torch.dtype) -> None:
    processors = CONVOLUTIONS[name][-1]
    arguments = convolution(name, dtype, dtype)
    check(machine, "conv_correlation", arguments, processors)
    check(machine, "conv_correlation", channels_side_by_side(arguments), processors)
    if dtype.itemsize == 2:
        z, g, V, V_b, *geometry = convolution(name, dtype, torch.float32)
        check(machine, "conv_correlation", (z, g, V, V_b, *geometry), processors)
        mixed = channels_side_by_side((z, g, V, V_b.to(dtype), *geometry))
        check(machine, "conv_correlation", mixed, processors)


@pytest.mark.parametrize("name", ["large tiles", "few outputs"])
def test_convolutions_round_to_tf32_as_products_do(machine: Machine, name: str) -> None:
    arguments = convolution(name, torch.float32, torch.float32)
    processors = CONVOLUTIONS[name][-1]
    with machine.settings(processors):
        (exact,) = machine.call("conv_correlation", arguments)
    with machine.settings(processors, tf32=True):
        rounded = machine.call("conv_correlation", arguments)
    compare(machine, "conv_correlation", arguments, rounded, _TF32)
    assert not torch.equal(exact, rounded[0])


def check_warpgroups(
    emulator: Any,
    name: str,
    arguments: Arguments,
    processors: int,
    columns: int,
    workspace: int = 2**24,
) -> None:
    """The same on large tiles of so many columns, which no other kernel has the memory of."""
    machine = Emulator(emulator)
    with machine.settings(processors, warpgroups=True, workspace=workspace):
        results = machine.call(name, arguments)
        stages = 5 * (128 + columns) * 128
        assert stages <= emulator.largest_shared() < stages + 4096
    compare(machine, name, arguments, results)


# n, T, m, S, i, o, processors, bytes of workspace, columns of a tile.
LARGE = {
    "parts of tiles": (140, 2, 280, 2, 900, 550, 4, 2**24, 192),
    "narrower tiles": (140, 2, 128, 2, 130, 256, 4, 2**24, 128),
    "one step": (130, 1, 180, 1, 8, 180, 2, 2**24, 192),
    "several tiles for a block": (130, 1, 570, 1, 600, 560, 4, 130 * 4, 192),
    "several narrower tiles": (130, 1, 250, 1, 70, 256, 4, 130 * 4, 128),
}


@pytest.mark.emulated
@every_path("case", LARGE, DTYPES[2:])
def test_products_of_warpgroups(emulator: Any, case: str, dtype: torch.dtype) -> None:
    n, t, m, s, i, o, processors, workspace, columns = LARGE[case]
    z, g, z_clean, g_clean, V, V_b = (
        torch.randn(size).to(dtype)
        for size in ((n, t, i), (n, t, o), (m, s, i), (m, s, o), (o, i), (o,))
    )
    dense, factored = (z, g, V, V_b), (z, g, z_clean, g_clean, True)
    check_warpgroups(emulator, "dense_correlation", dense, processors, columns, workspace)
    check_warpgroups(emulator, "factored_correlation", factored, processors, columns, workspace)


@pytest.mark.emulated
@every_path("name", ["large tiles", "groups on large tiles"], DTYPES[2:])
def test_convolutions_by_warpgroups(emulator: Any, name: str, dtype: torch.dtype) -> None:
    arguments = convolution(name, dtype, dtype)
    check_warpgroups(emulator, "conv_correlation", arguments, CONVOLUTIONS[name][-1], 128)


@pytest.mark.emulated
@every_small_dtype
def test_layers_by_warpgroups(emulator: Any, dtype: torch.dtype) -> None:
    layers = ((1, 1, 64, 64), (1, 1, 130, 10), (2, 3, 40, 1))
    arguments = layers_of(130, 192, layers, dtype)
    check_warpgroups(emulator, "factored_correlations", arguments, 2, 192)


@pytest.mark.emulated
@every_dtype
@pytest.mark.parametrize("operator", ["dense_correlation", "factored_correlation"])
def test_several_tiles_for_a_block(emulator: Any, operator: str, dtype: torch.dtype) -> None:
    n, m, i, o = 70, 260, 40, 270
    z, g, z_clean, g_clean, V, V_b = (
        torch.randn(size).to(dtype)
        for size in ((n, 1, i), (n, 1, o), (m, 1, i), (m, 1, o), (o, i), (o,))
    )
    arguments: Arguments = (z, g, V, V_b)
    if operator == "factored_correlation":
        arguments = (z, g, z_clean, g_clean, True)
    machine = Emulator(emulator)
    for processors in (1, 8):  # large and small tiles
        with machine.settings(processors, workspace=n * 4):
            results = machine.call(operator, arguments)
        compare(machine, operator, arguments, results)


# Enough rows and columns for large tiles on all processors of a GPU, enough depth for every stage
# to be loaded twice and for sums to be handed over.
@on_a_gpu
@every_dtype
def test_large_tiles(dtype: torch.dtype) -> None:
    n, m, i, o, c = 2100, 2500, 1100, 2600, 700
    z, z_clean, g, V, V_b, h, h_clean = (
        torch.randn(size).to(dtype)
        for size in ((n, 1, i), (m, 1, i), (n, 1, o), (o, i), (o,), (n, 1, c), (m, 1, c))
    )
    images, gradients = torch.randn(40, 128, 24, 24), torch.randn(40, 400, 24, 24)
    tensors = (images, gradients, torch.randn(400, 128, 3, 3), torch.randn(400))
    convolved = [a.to(dtype) for a in tensors]
    for name, arguments in (
        ("dense_correlation", (z, g, V, V_b)),
        ("factored_correlation", (z, h, z_clean, h_clean, True)),
        ("conv_correlation", (*convolved, [1, 1], [1, 1], [1, 1], 1)),
    ):
        moved = Gpu().moved(arguments)
        results = call(name, moved)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(results, call(name, moved), strict=True))
        compare(Gpu(), name, arguments, results)


# Pixels of five channels start at multiples of 16 bytes and are read where they are.
@pytest.mark.parametrize("name", ["mostly padding", "depthwise"])
def test_what_lies_between_pixels_is_not_read(machine: Machine, name: str) -> None:
    def spread(a: object) -> object:
        if not isinstance(a, Tensor) or a.dim() == 1:
            return a
        wide = a.new_full((a.shape[0], *a.shape[2:], a.shape[1] + 8), math.nan)
        return wide[..., : a.shape[1]].copy_(a.movedim(1, -1)).movedim(-1, 1)

    arguments = convolution(name, torch.float64, torch.float64)
    check(machine, "conv_correlation", tuple(spread(a) for a in arguments))


@pytest.mark.parametrize("processors", [2, 132])
@pytest.mark.parametrize("name", ["factored_correlation", "dense_correlation"])
def test_tf32_follows_torch(machine: Machine, name: str, processors: int) -> None:
    n, d = 200, 600
    z, g = torch.randn(n, 1, d), torch.randn(n, 1, d)
    arguments: Arguments = (z, g, torch.randn(d, d), torch.randn(d))
    if name == "factored_correlation":
        arguments = (z, g, torch.randn(70, 1, d), torch.randn(70, 1, d), True)
    with machine.settings(processors):
        exact = machine.call(name, arguments)
    with machine.settings(processors, tf32=True):
        rounded = machine.call(name, arguments)
    compare(machine, name, arguments, rounded, _TF32)
    assert not torch.equal(exact[0], rounded[0])


@pytest.mark.parametrize("path", ["narrow, split depth", "more taps than columns", "large tiles"])
def test_gradients_in_tf32(machine: Machine, path: str) -> None:
    shape = GRADIENTS[path]
    examples, weighted = convolution_gradients(shape, torch.float32, "channels_last")
    for name, arguments in (
        ("conv_example_gradients", examples),
        ("conv_weighted_gradient", weighted),
    ):
        with machine.settings(shape[-1]):
            exact = machine.call(name, arguments)
        with machine.settings(shape[-1], tf32=True):
            rounded = machine.call(name, arguments)
        compare(machine, name, arguments, rounded, _TF32)
        assert not torch.equal(exact[0], rounded[0])


# n, T, i, o: narrow and other tiles of output channels, several hand-overs of a sum.
@every_path("shape", [(3, 1, 100, 16), (2, 65, 150, 130), (1, 1100, 7, 20)])
def test_linear_gradient_paths(
    machine: Machine, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    n, t, i, o = shape
    z, g, V = torch.randn(n, t, i).to(dtype), torch.randn(n, t, o).to(dtype), torch.randn(o, i)
    wide = torch.promote_types(dtype, torch.float32)
    arguments = (z, g, V.to(wide), torch.randn(o).to(dtype))
    check(machine, "linear_example_gradients", arguments)


# n, C, O, image, kernel, stride, padding, dilation, groups, and processors that share the work.
GRADIENTS = {
    "narrow, split depth": (2, 16, 16, (31, 33), (3, 3), 1, 1, 1, 1, 132),
    "more taps than columns": (2, 3, 70, (9, 9), (5, 5), 1, 2, 1, 1, 8),
    "first layer": (1, 3, 20, (21, 21), (7, 7), 2, 3, 1, 1, 132),
    "large tiles": (3, 20, 130, (6, 6), (3, 3), 1, 1, 1, 1, 2),
    "large tiles, shares": (5, 100, 140, (5, 7), (1, 1), 1, 0, 1, 1, 12),
    "one dimension": (2, 40, 70, (150,), (3,), 2, 2, 2, 1, 132),
    "three dimensions": (2, 9, 17, (4, 5, 6), (2, 1, 3), 1, 1, 1, 1, 132),
    "wide groups": (2, 64, 96, (6, 6), (3, 3), 1, 1, 1, 4, 132),
    "odd groups": (2, 27, 63, (6, 6), (3, 3), 2, 1, 1, 3, 132),
    "depthwise": (3, 40, 80, (35, 35), (3, 3), 1, 1, 1, 40, 132),
    "depthwise, many taps": (2, 36, 36, (7, 7), (5, 5), 2, 2, 1, 36, 8),
    "few channels a group": (2, 24, 16, (7, 7), (3, 3), 1, 0, 1, 8, 132),
}


def convolution_gradients(
    shape: tuple[Any, ...], dtype: torch.dtype, layout: str
) -> tuple[Arguments, Arguments]:
    """Arguments of conv_example_gradients and of conv_weighted_gradient."""
    n, channels, outputs, image, kernel, stride, padding, dilation, groups, _ = shape
    pixels = [
        (size + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        for size, k in zip(image, kernel, strict=True)
    ]
    z = lay_out(torch.randn(n, channels, *image).to(dtype), layout)
    g = lay_out(torch.randn(n, outputs, *pixels).to(dtype), layout)
    wide = torch.promote_types(dtype, torch.float32)
    V, V_b = torch.randn(outputs, channels // groups, *kernel), torch.randn(outputs)
    w = torch.rand(n).to(wide)
    w[n // 2] = 0
    rank = len(image)
    geometry = (list(kernel), [stride] * rank, [padding] * rank, [dilation] * rank, groups)
    return (z, g, *geometry, V.to(dtype), V_b.to(wide)), (z, g, w, *geometry)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@every_path("path", GRADIENTS)
def test_convolution_gradient_paths(
    machine: Machine, path: str, layout: str, dtype: torch.dtype
) -> None:
    shape = GRADIENTS[path]
    examples, weighted = convolution_gradients(shape, dtype, layout)
    check(machine, "conv_example_gradients", examples, shape[-1])
    check(machine, "conv_weighted_gradient", weighted, shape[-1])


# Sizes that take the vector loads, several parts of an example, and both orders of memory.
@pytest.mark.parametrize("by_position", [False, True])
@every_path("shape", [(3, 1025, 64), (100, 1, 768), (2, 100, 8), (1, 1250, 3)])
def test_affine_paths(
    machine: Machine, shape: tuple[int, ...], by_position: bool, dtype: torch.dtype
) -> None:
    n, t, d = shape
    x, g = torch.randn(n, t, d).to(dtype), torch.randn(n, t, d).to(dtype)
    if by_position:
        x, g = (a.transpose(1, 2).contiguous().transpose(1, 2) for a in (x, g))
    wide = torch.promote_types(dtype, torch.float32)
    statistics = ((n, t, 1), (1, 1, d), (n, 1, d))
    for size in statistics:
        mean, rstd = torch.randn(size).to(wide), torch.rand(size).to(wide)
        check(machine, "affine_example_gradients", (x, g, mean, rstd))


@every_dtype
def test_large_weighted_sum_and_rows(machine: Machine, dtype: torch.dtype) -> None:
    def checked(name: str, *arguments: Tensor) -> None:
        check(machine, name, arguments)

    G = torch.randn(300, 64, 48).to(dtype)
    w = torch.rand(300).to(dtype) * (torch.rand(300) > 0.5)
    checked("weighted_sum", G, w)
    checked("weighted_sum", G.movedim(1, 2), w)
    index = torch.randint(1000, (20, 100))
    g, V = torch.randn(20, 100, 96).to(dtype), torch.randn(1000, 96).to(dtype)
    checked("embedding_correlation", index, g, V)


def test_examples_without_weight_are_not_read(machine: Machine) -> None:
    G, w = torch.randn(600, 8), torch.rand(600)
    w[::2] = 0
    (expected,) = machine.call("weighted_sum", (G, w))
    G[::2] = math.nan
    (result,) = machine.call("weighted_sum", (G, w))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("groups", [1, 8])
def test_gradients_without_weight_have_no_part(machine: Machine, groups: int, layout: str) -> None:
    shape = (300, 8, 16, (3, 3), (3, 3), 1, 1, 1, groups, 4)
    _, (z, g, w, *geometry) = convolution_gradients(shape, torch.float32, layout)
    w[::3] = 0
    expected = machine.call("conv_weighted_gradient", (z, g, w, *geometry))
    z[::3] = g[::3] = math.nan
    results = machine.call("conv_weighted_gradient", (z, g, w, *geometry))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    w[7] = math.nan
    results = machine.call("conv_weighted_gradient", (z, g, w, *geometry))
    assert all(result.isnan().all() for result in results)


@pytest.mark.parametrize("groups", [1, 8])
def test_nan_stays_in_the_gradients_of_its_example(machine: Machine, groups: int) -> None:
    shape = (4, 8, 16, (5, 5), (3, 3), 1, 1, 1, groups, 132)
    (z, g, *rest), _ = convolution_gradients(shape, torch.bfloat16, "channels_last")
    expected = machine.call("conv_example_gradients", (z, g, *rest))
    g[2, 3, 1, 1] = math.nan
    results = machine.call("conv_example_gradients", (z, g, *rest))
    others = torch.arange(4, device=results[0].device) != 2
    for result, before in zip(results, expected, strict=True):
        assert torch.equal(result[others], before[others])
        assert result[2].isnan().any()
    rows = torch.arange(16, device=results[0].device) != 3
    assert torch.equal(results[0][2][rows], expected[0][2][rows])


@pytest.mark.parametrize("name", ["factored_correlation", "dense_correlation"])
def test_nan_stays_in_its_example(machine: Machine, name: str) -> None:
    z, g = torch.randn(70, 2, 100), torch.randn(70, 2, 50)
    rest: Arguments = (torch.randn(50, 100), torch.randn(50))
    if name == "factored_correlation":
        rest = (torch.randn(5, 2, 100), torch.randn(5, 2, 50), True)
    (expected,) = machine.call(name, (z, g, *rest))
    z[17, 1, 3] = math.nan
    (result,) = machine.call(name, (z, g, *rest))
    others = torch.arange(70, device=result.device) != 17
    assert result[17].isnan()
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("case", ["few outputs", "one pixel", "groups", "depthwise"])
def test_nan_of_an_image_stays_in_it(machine: Machine, case: str) -> None:
    z, *rest = convolution(case, torch.float32, torch.float32)
    (expected,) = machine.call("conv_correlation", (z, *rest))
    z[1, 2, 1] = math.nan
    (result,) = machine.call("conv_correlation", (z, *rest))
    others = torch.arange(z.shape[0], device=result.device) != 1
    assert result[1].isnan()
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("wide", ["z", "g"])
def test_channels_that_32_bits_do_not_count(machine: Machine, wide: str) -> None:
    groups = 2**20
    outputs, inputs = (1, 2**11) if wide == "z" else (2**11, 1)
    shapes = (1, groups * inputs, 1), (1, groups * outputs, 1), (groups * outputs, inputs, 1)
    z, g, V = (torch.zeros(1).expand(shape) for shape in shapes)
    with pytest.raises(RuntimeError, match="at most 1073741824 channels in narrow groups"):
        machine.call("conv_correlation", (z, g, V, None, [1], [0], [1], groups))


@every_kernel
def test_messages_are_those_of_the_cpu(machine: Machine, name: str) -> None:
    arguments = sample(name)
    leaves, rebuilt = flat(arguments)
    position = next(k for k, a in enumerate(leaves) if isinstance(a, Tensor))
    deeper = rebuilt(
        [*leaves[:position], leaves[position][None, None, None], *leaves[position + 1 :]]
    )
    if name == "weighted_sum":
        deeper = (arguments[0], arguments[1][None])
    with pytest.raises(RuntimeError) as cpu:
        call(name, deeper)
    with pytest.raises(RuntimeError) as cuda:
        machine.call(name, deeper)
    assert str(cuda.value).splitlines()[0] == str(cpu.value).splitlines()[0]


@on_a_gpu
@every_kernel
def test_deterministic_without_synchronisation(name: str) -> None:
    arguments = Gpu().moved(sample(name))
    first = call(name, arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [call(name, arguments) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for results in again:
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@on_a_gpu
@every_kernel
def test_other_streams_and_graphs(name: str) -> None:
    arguments = Gpu().moved(sample(name))
    expected = call(name, arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = call(name, arguments)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(name, arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@on_a_gpu
@pytest.mark.parametrize("operator", ["factored", "layers", "dense"])
def test_memory_of_large_products(operator: str) -> None:
    z, g = (torch.randn(64, 256, 1024, device="cuda").bfloat16() for _ in range(2))
    clean = [torch.randn(16, 256, 1024, device="cuda").bfloat16() for _ in range(2)]
    V = torch.randn(1024, 1024, device="cuda").bfloat16()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if operator == "factored":
        ops.factored_correlation(z, g, *clean, True)
    elif operator == "layers":
        layers = [[x] * 3 for x in (z, g, *clean)]
        ops.factored_correlations(*layers, [True] * 3)
    else:
        ops.dense_correlation(z, g, V)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 2**24 + 2**20
