"""The CPU kernels are right on every path that sizes, instruction sets and threads select."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from l2rw_ext import ops
from l2rw_ext.ops import _native
from l2rw_ext.ops.formulas import FORMULAS
from support import cpu_kernel_cases
from support.cpu_kernel_cases import (
    CASES,
    OF_CONVOLUTIONS,
    arguments_of,
    check_case,
    check_rows,
    draw,
    geometry,
)
from support.operator_cases import call
from support.paths import TESTS
from support.tolerances import tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_convolution_paths(name: str, dtype: torch.dtype) -> None:
    check_case(name, dtype)
    check_case(name, dtype, channels_last=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_of_rows(dtype: torch.dtype) -> None:
    check_rows(dtype)


# The tests above run on the instruction set that this process has chosen.
@pytest.mark.parametrize(
    "isa", [isa for isa in ("baseline", "avx2", "avx512") if isa != _native.instruction_set()]
)
def test_every_other_instruction_set(isa: str) -> None:
    environment = dict(os.environ, L2RW_CPU_ISA=isa, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS), *filter(None, [os.getenv("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-m", "support.cpu_kernel_cases", isa],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode == cpu_kernel_cases.OTHER_INSTRUCTION_SET:
        pytest.skip(f"this processor has {done.stdout.strip()} only")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["planes", "output channels", "input channels, a tail", "groups"])
def test_an_example_of_weight_zero_is_never_read(name: str) -> None:
    z, g = draw(name, torch.float32)
    w = torch.rand(z.size(0))
    w[1] = 0
    kept = [i for i in range(z.size(0)) if i != 1]
    expected = ops.conv_weighted_gradient(
        z[kept], g[kept], w[kept], CASES[name][4], *geometry(name)
    )
    z[1], g[1] = float("nan"), float("inf")
    result = ops.conv_weighted_gradient(z, g, w, CASES[name][4], *geometry(name))
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", CASES)
def test_a_bad_example_stays_alone(name: str) -> None:
    z, g = draw(name, torch.float32)
    if z.size(0) == 1:
        pytest.skip("one example")
    direction = torch.randn(g.size(1), z.size(1) // CASES[name][8], *CASES[name][4])
    clean = ops.conv_example_gradients(z, g, CASES[name][4], *geometry(name), direction)
    z[0], g[0] = float("nan"), float("nan")
    result = ops.conv_example_gradients(z, g, CASES[name][4], *geometry(name), direction)
    assert bool(result[2][0].isnan())
    for got, want in zip(result, clean, strict=True):
        assert torch.equal(got[1:], want[1:])


@pytest.mark.parametrize("name", CASES)
def test_the_same_from_run_to_run(name: str) -> None:
    z, g = draw(name, torch.float32)
    w = torch.rand(z.size(0))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            runs = [
                ops.conv_weighted_gradient(z, g, w, CASES[name][4], *geometry(name))
                + ops.conv_example_gradients(z, g, CASES[name][4], *geometry(name))
                for _ in range(3)
            ]
            for run in runs[1:]:
                for got, want in zip(run, runs[0], strict=True):
                    assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_more_threads_than_examples(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check_case("one example, many threads", torch.float32)
        check_case("groups", torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [9, 30, 100])
def test_equal_terms(rows: int) -> None:
    """The rounding of equal terms has one sign: no sum is so long that it adds up to much."""
    geometry = ([1, 1, 3], [2, 1, 1], [0, 0, 1], [1, 1, 1], 1)
    formula = FORMULAS["conv_weighted_gradient"]
    ratios = []
    for seed in range(6):
        torch.manual_seed(seed)
        z = torch.randn(5, 3, 1, 9, 2).half().expand(-1, -1, 2 * rows, -1, -1)
        g = torch.randn(5, 4, 1, 9, 2).half().expand(-1, -1, rows, -1, -1)
        w = torch.full((5,), 0.7).half()
        arguments = (z, g, w, *geometry)
        found, _ = ops.conv_weighted_gradient(*arguments)
        (exact, _), (terms, _) = formula.exact(arguments), formula.magnitudes(arguments)
        ratios.append(float(((found.double() - exact).abs() / terms).max()))
    assert max(ratios) <= tolerance(torch.float32)


def test_infinities_of_narrow_types_are_read() -> None:
    values = torch.tensor([float("inf"), -float("inf"), 6e-8, 65504.0, -0.0, 6.1e-5])
    for dtype in (torch.float16, torch.bfloat16):
        z = values.to(dtype).reshape(6, 1, 1)
        u = ops.dense_correlation(z, torch.ones_like(z), torch.ones(1, 1))
        assert torch.equal(u, z.flatten().float())
        nan = torch.full((1, 1, 1), float("nan"), dtype=dtype)
        assert bool(ops.dense_correlation(nan, torch.ones_like(nan), torch.ones(1, 1)).isnan())


@pytest.mark.parametrize("operator", OF_CONVOLUTIONS)
def test_autocast_does_not_reach_inside(operator: str) -> None:
    """The path through torch's convolution stays in the dtype of its arguments."""
    name = "wide layer, few pixels"
    arguments = arguments_of(operator, name, *draw(name, torch.float32))
    plain = call(operator, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for result, expected in zip(call(operator, arguments), plain, strict=True):
            assert torch.equal(result, expected)
