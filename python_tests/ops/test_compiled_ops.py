"""Every operator is ready for torch.compile: its fake, its strides and its layouts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn import functional as F

from l2rw_ext import ops
from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.formulas import Arguments, Results, sample
from support.operator_cases import call, channels_last, lay_out, map_tensors

every_operator = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _sample(name: str, dtype: torch.dtype, layout: str, optional: bool = True) -> Arguments:
    arguments = sample(name, dtype, optional=optional)
    if layout == "channels_last":
        return channels_last(arguments)
    laid_out: Arguments = map_tensors(lambda a: lay_out(a, layout), arguments)
    return laid_out


@pytest.mark.parametrize("optional", [True, False], ids=["all", "required"])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "contiguous"),
        (torch.float64, "transposed"),
        (torch.bfloat16, "channels_last"),
        (torch.float16, "expanded"),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
@every_operator
def test_opcheck(name: str, dtype: torch.dtype, layout: str, optional: bool) -> None:
    """The schema, autograd's kernel, and the fake's shapes, dtypes and strides, also symbolic."""
    arguments = _sample(name, dtype, layout, optional)
    torch.library.opcheck(OPERATORS[name].compiled, arguments)


@every_operator
def test_compiles_without_a_graph_break(name: str) -> None:
    arguments = sample(name)
    compiled = torch.compile(
        lambda *a: call(name, a), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for result, expected in zip(compiled(*arguments), call(name, arguments), strict=True):
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()


@pytest.mark.parametrize(("layout", "dynamic"), [("channels_last", False), ("transposed", True)])
def test_inductor_gives_the_same(layout: str, dynamic: bool) -> None:
    """One function that calls all operators, some on buffers that inductor has made."""
    arguments = {name: _sample(name, torch.float64, layout) for name in OPERATORS}

    def function(arguments: dict[str, Arguments]) -> list[Tensor]:
        results: list[Tensor] = []
        for name, (first, *others) in arguments.items():
            made = map_tensors(lambda a: a.abs() if a.is_floating_point() else a, first)
            results.extend(call(name, (made, *others)))
        return results

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for result, expected in zip(compiled(arguments), function(arguments), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_inductor_copies_no_image_back() -> None:
    """Where it has changed the layout of images, the operators read, and return, the new one."""

    def function(x: Tensor, kernel: Tensor, weights: Tensor) -> Results:
        z = F.conv2d(x, kernel).relu()
        mean, rstd = z.mean((1, 2, 3)).view(-1, 1), z.var((1, 2, 3)).view(-1, 1)
        g, *of_norm = ops.group_norm_backward(z.sin(), z, mean, rstd, None, 1)
        of_conv = ops.conv_weighted_gradient(z, g, weights, [1, 1], [1, 1], [0, 0], [1, 1], 1)
        return *of_norm, *of_conv

    if not torch.backends.mkldnn.is_available():
        pytest.skip("inductor changes no layout here")
    arguments = torch.randn(4, 3, 9, 9), torch.randn(8, 3, 3, 3), torch.rand(4)
    with fresh_cache():  # tags are no part of the keys of inductor's cache
        results, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), *arguments)
    made = {strides for strides in ("(392, 1, 56, 8)", "(392, 49, 7, 1)") if strides in code}
    assert made == {"(392, 1, 56, 8)"}
    for result, expected in zip(results, function(*arguments), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
