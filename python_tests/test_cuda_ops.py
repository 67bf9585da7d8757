"""Operators with CUDA kernels against their CPU twins, in float64 on the same rounded inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import OPERATORS, Arguments, Draw, Results, call, sample
from tolerances import TOLERANCES
from torch import Tensor

from l2rw_ext import ops

pytestmark = pytest.mark.cuda

KERNELS = (
    "factored_correlation",
    "dense_correlation",
    "affine_correlation",
    "affine_example_gradients",
    "embedding_correlation",
    "scale_rows",
    "weighted_sum",
    "normalize_weights",
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Tensor cores cut off what they add, so that their sums have fewer digits than float32's own.
_PRODUCTS = {
    torch.float64: 2e-15,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
}
_TF32 = 1e-3

every_kernel = pytest.mark.parametrize("name", KERNELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_cuda(tensor: Tensor) -> Tensor:
    """A copy with the same strides and offset, whatever lies between the numbers."""
    whole = tensor.new_empty(0).set_(tensor.untyped_storage())
    return whole.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def moved(arguments: Arguments) -> Arguments:
    return tuple(on_cuda(a) if isinstance(a, Tensor) else a for a in arguments)


def exactly(arguments: Arguments) -> Arguments:
    return tuple(
        a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )


def tolerance(name: str, dtype: torch.dtype) -> float:
    products = name in ("factored_correlation", "dense_correlation")
    return (_PRODUCTS if products else TOLERANCES[name])[dtype]


def check(name: str, arguments: Arguments, allowed: float, results: Results | None = None) -> None:
    """The error is measured against the same sum over absolute values."""
    if results is None:
        results = call(name, moved(arguments))
    expected = call(name, exactly(arguments))
    bounds = expected
    if name != "normalize_weights":
        absolute = tuple(
            a.abs() if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in exactly(arguments)
        )
        bounds = OPERATORS[name].plain(*absolute, sign=-1)
    cpu = call(name, arguments)
    for result, exact, bound, twin in zip(results, expected, bounds, cpu, strict=True):
        assert result.device.type == "cuda"
        assert (result.dtype, result.shape, result.stride()) == (
            twin.dtype,
            twin.shape,
            twin.stride(),
        )
        floor = torch.finfo(result.dtype).tiny
        error = (result.cpu().double() - exact).abs()
        assert (error <= allowed * bound.abs() + floor).all()


@every_dtype
@every_kernel
@given(data=st.data())
@settings(max_examples=60)
def test_matches_the_cpu(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16))
    draw = Draw(data.draw, dtype, torch.Generator().manual_seed(seed))
    check(name, OPERATORS[name].arguments(draw), tolerance(name, dtype))


# n, T, m, S, i, o: few tiles with a split depth, small tiles, large tiles, rows that need a copy
PRODUCTS = (
    (256, 1, 64, 1, 1024, 1024),
    (100, 1, 10, 1, 784, 10),
    (256, 1, 256, 1, 4096, 4096),
    (64, 1, 3, 1, 3, 5000),
    (16, 64, 10, 60, 96, 40),
    (8, 65, 8, 65, 192, 576),
    (33, 64, 9, 140, 200, 130),
    (1, 700, 2, 300, 65, 33),
)


@every_dtype
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_factored_paths(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, t, m, s, i, o = shape
    tensors = [torch.randn(size) for size in ((n, t, i), (n, t, o), (m, s, i), (m, s, o))]
    arguments = (*(tensor.to(dtype) for tensor in tensors), True)
    check("factored_correlation", arguments, tolerance("factored_correlation", dtype))


@every_dtype
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_dense_paths(shape: tuple[int, ...], wide: bool, dtype: torch.dtype) -> None:
    n, t, _, _, i, o = shape
    z, g, V, V_b = (torch.randn(size) for size in ((n, t, i), (n, t, o), (o, i), (o,)))
    direction = torch.promote_types(dtype, torch.float32) if wide else dtype
    arguments = (z.to(dtype), g.to(dtype), V.to(direction), V_b.to(direction))
    check("dense_correlation", arguments, tolerance("dense_correlation", dtype))
    mixed = (*arguments[:3], V_b.to(dtype))
    check("dense_correlation", mixed, tolerance("dense_correlation", dtype))


@pytest.mark.parametrize("name", ["factored_correlation", "dense_correlation"])
def test_tf32_follows_torch(name: str) -> None:
    n, d = 200, 1000
    z, g = torch.randn(n, 1, d), torch.randn(n, 1, d)
    arguments: Arguments = (z, g, torch.randn(d, d), torch.randn(d))
    if name == "factored_correlation":
        arguments = (z, g, torch.randn(70, 1, d), torch.randn(70, 1, d), True)
    exact = call(name, moved(arguments))
    torch.set_float32_matmul_precision("high")
    rounded = call(name, moved(arguments))
    check(name, arguments, _TF32, rounded)
    assert not torch.equal(exact[0], rounded[0])


# Sizes that take the vector loads, several parts of an example, and both orders of memory.
@every_dtype
@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("shape", [(3, 4097, 64), (200, 1, 768), (2, 100, 8), (1, 5000, 3)])
def test_affine_paths(shape: tuple[int, ...], by_position: bool, dtype: torch.dtype) -> None:
    n, t, d = shape
    x, g = torch.randn(n, t, d).to(dtype), torch.randn(n, t, d).to(dtype)
    if by_position:
        x, g = (a.transpose(1, 2).contiguous().transpose(1, 2) for a in (x, g))
    wide = torch.promote_types(dtype, torch.float32)
    statistics = ((n, t, 1), (1, 1, d), (n, 1, d))
    for size in statistics:
        mean, rstd = torch.randn(size).to(wide), torch.rand(size).to(wide)
        V, V_b = torch.randn(d).to(wide), torch.randn(d).to(dtype)
        for name, rest in (("affine_correlation", (V, V_b)), ("affine_example_gradients", ())):
            check(name, (x, g, mean, rstd, *rest), tolerance(name, dtype))


@every_dtype
def test_large_weighted_sum_and_rows(dtype: torch.dtype) -> None:
    G = torch.randn(300, 64, 48).to(dtype)
    w = torch.rand(300).to(dtype) * (torch.rand(300) > 0.5)
    check("weighted_sum", (G, w), tolerance("weighted_sum", dtype))
    check("weighted_sum", (G.movedim(1, 2), w), tolerance("weighted_sum", dtype))
    check("scale_rows", (G, w, w.nonzero().flatten()), tolerance("scale_rows", dtype))
    index = torch.randint(1000, (20, 500))
    arguments = (index, torch.randn(20, 500, 96).to(dtype), torch.randn(1000, 96).to(dtype))
    check("embedding_correlation", arguments, tolerance("embedding_correlation", dtype))


def test_examples_without_weight_are_not_read() -> None:
    G, w = torch.randn(600, 8, device="cuda"), torch.rand(600, device="cuda")
    w[::2] = 0
    expected = ops.weighted_sum(G, w)
    G[::2] = math.nan
    assert torch.equal(ops.weighted_sum(G, w), expected)


@pytest.mark.parametrize("name", ["factored_correlation", "dense_correlation"])
def test_nan_stays_in_its_example(name: str) -> None:
    z, g = torch.randn(70, 2, 100, device="cuda"), torch.randn(70, 2, 50, device="cuda")
    rest: Arguments = (torch.randn(50, 100, device="cuda"), torch.randn(50, device="cuda"))
    if name == "factored_correlation":
        rest = (
            torch.randn(5, 2, 100, device="cuda"),
            torch.randn(5, 2, 50, device="cuda"),
            True,
        )
    expected = call(name, (z, g, *rest))[0]
    z[17, 1, 3] = math.nan
    result = call(name, (z, g, *rest))[0]
    others = torch.arange(70, device="cuda") != 17
    assert result[17].isnan()
    assert torch.equal(result[others], expected[others])


@every_kernel
def test_deterministic_without_synchronisation(name: str) -> None:
    arguments = moved(sample(name))
    first = call(name, arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [call(name, arguments) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for results in again:
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


@every_kernel
def test_other_streams_and_graphs(name: str) -> None:
    arguments = moved(sample(name))
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


@every_kernel
def test_messages_are_those_of_the_cpu(name: str) -> None:
    arguments = sample(name)
    position = next(k for k, a in enumerate(arguments) if isinstance(a, Tensor))
    deeper = (
        *arguments[:position],
        arguments[position][None, None, None],
        *arguments[position + 1 :],
    )
    if name == "weighted_sum":
        deeper = (arguments[0], arguments[1][None])
    with pytest.raises(RuntimeError) as cpu:
        call(name, deeper)
    with pytest.raises(RuntimeError) as cuda:
        call(name, moved(deeper))
    assert str(cuda.value).splitlines()[0] == str(cpu.value).splitlines()[0]


@pytest.mark.parametrize("operator", ["factored", "dense"])
def test_memory_of_large_products(operator: str) -> None:
    z, g = (torch.randn(64, 256, 1024, device="cuda").bfloat16() for _ in range(2))
    clean = [torch.randn(16, 256, 1024, device="cuda").bfloat16() for _ in range(2)]
    V = torch.randn(1024, 1024, device="cuda").bfloat16()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if operator == "factored":
        ops.factored_correlation(z, g, *clean, True)
    else:
        ops.dense_correlation(z, g, V)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 2**24 + 2**20
