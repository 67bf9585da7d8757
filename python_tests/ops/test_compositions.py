"""Every operator is also a composition of torch's operations, tested on the CPU for the GPU."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from l2rw_ext import ops
from l2rw_ext.ops import arithmetic, linear
from l2rw_ext.ops._kernels import COMPOSED
from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.formulas import as_results, sample
from support.operator_cases import (
    ARGUMENTS,
    Draw,
    assert_operator_exact,
    call,
    compose,
    flat,
    map_tensors,
    named_arguments,
    wrong,
)
from support.synchronisation import NoSynchronisation, SynchronisedError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

every_operator = pytest.mark.parametrize("name", OPERATORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@every_operator
def test_signature_is_that_of_the_schema(name: str) -> None:
    parameters = inspect.signature(OPERATORS[name]).parameters.values()
    schema = OPERATORS[name].compiled._schema.arguments
    assert [p.name for p in parameters] == [argument.name for argument in schema]
    for parameter, argument in zip(parameters, schema, strict=True):
        has_default = parameter.default is not inspect.Parameter.empty
        assert has_default == argument.has_default_value()
        assert not has_default or parameter.default == argument.default_value


@contextlib.contextmanager
def workspace_of(limit: int) -> Iterator[None]:
    """Compositions divide their work into parts of so many bytes, of three columns if it is one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (arithmetic, linear):
            patch.setattr(module, "WORKSPACE_BYTES", limit)
        if limit == 1:
            patch.setattr(linear, "_COLUMNS", 3)
        yield


def check_composition(name: str, dtype: torch.dtype, workspace: int, data: st.DataObject) -> None:
    """Exact, of the operator's form, without synchronisation; arguments stay as they were."""
    seed = data.draw(st.integers(0, 2**16))
    draw = Draw(data.draw, dtype, torch.Generator().manual_seed(seed))
    arguments = ARGUMENTS[name](draw)
    copies = map_tensors(Tensor.clone, arguments)

    with workspace_of(workspace), NoSynchronisation():
        results = compose(name, arguments)

    assert_operator_exact(name, dtype, arguments, results)
    for result, other in zip(results, call(name, arguments), strict=True):
        assert (result.shape, result.dtype) == (other.shape, other.dtype)
        if result.numel() > 1:
            assert result.stride() == other.stride()
    for argument, copy in zip(flat(arguments)[0], flat(copies)[0], strict=True):
        assert not isinstance(argument, Tensor) or torch.equal(argument, copy)


@every_dtype
@every_operator
@given(data=st.data())
def test_matches_the_operator_without_synchronisation(
    name: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    check_composition(name, dtype, arithmetic.WORKSPACE_BYTES, data)


# Those that form an intermediate result in parts, as large as the workspace allows.
DIVIDED = (
    "factored_correlation",
    "factored_correlations",
    "linear_example_gradients",
    "conv_example_gradients",
    "weighted_sum",
)


@pytest.mark.parametrize("workspace", [700, 1])
@every_dtype
@pytest.mark.parametrize("name", DIVIDED)
@given(data=st.data())
def test_divided_work_matches_the_operator(
    name: str, dtype: torch.dtype, workspace: int, data: st.DataObject
) -> None:
    check_composition(name, dtype, workspace, data)


@every_operator
def test_which_compositions_divide_their_work(name: str) -> None:
    """The others run the same operations however small the workspace is.

    In bfloat16, for one of them divides only what it must convert.
    """
    arguments, calls = sample(name, torch.bfloat16), []
    for limit in (arithmetic.WORKSPACE_BYTES, 1):
        with workspace_of(limit), NoSynchronisation() as mode:
            compose(name, arguments)
        calls.append(mode.calls)
    assert (calls[1] > calls[0]) == (name in DIVIDED)


def test_what_would_synchronise_is_found() -> None:
    x, mask = torch.ones(3), torch.tensor([True, False, True])
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.nonzero(),
        lambda: x[mask],
        lambda: x.masked_select(mask),
        lambda: torch.equal(x, x),
        lambda: x.unique(),
        lambda: torch.tensor(1.0),
        lambda: x.to("meta"),
        lambda: x.repeat_interleave(torch.arange(3)),
    ):
        with NoSynchronisation(), pytest.raises(SynchronisedError):
            wait()


@pytest.mark.parametrize("name", [n for n in OPERATORS if "correlation" in n or "example" in n])
def test_a_nan_stays_in_its_example(name: str) -> None:
    arguments = sample(name, torch.float64)
    expected = compose(name, arguments)
    leaves, rebuilt = flat(arguments)
    for k in range(len(flat(arguments[:2])[0])):
        if not leaves[k].is_floating_point():
            continue
        poisoned = leaves[k].clone()
        poisoned[0] = math.nan
        results = compose(name, rebuilt([*leaves[:k], poisoned, *leaves[k + 1 :]]))
        for result, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(result[1:], exact[1:], rtol=1e-14, atol=1e-14)
        assert results[-1][0].isnan().all() or results[0][0].isnan().all()


@every_operator
def test_messages_name_operator_argument_and_value(name: str) -> None:
    for what, arguments, words in wrong(name, int16="int16"):
        with pytest.raises(RuntimeError) as error:
            compose(name, arguments)
        message = str(error.value)
        for word in (f"l2rw_ext::{name}: ", *words):
            assert word in message, f"{what}: {word!r} is not in {message!r}"


WRONG_NUMBERS = (
    ("kernel_size", [0, 2]),
    ("stride", [1, 1, 1]),
    ("padding", [-1, 0]),
    ("dilation", [1]),
    ("groups", 3),
    ("groups", 0),
)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        (name, argument, value)
        for name in OPERATORS
        for argument, value in WRONG_NUMBERS
        if argument in named_arguments(name)
    ],
)
def test_numbers_that_do_not_fit(name: str, argument: str, value: Any) -> None:
    arguments = list(sample(name))
    arguments[named_arguments(name).index(argument)] = value
    with pytest.raises(RuntimeError, match=f"l2rw_ext::{name}: {argument} ") as composed:
        compose(name, tuple(arguments))
    with pytest.raises(RuntimeError) as compiled:
        call(name, tuple(arguments))
    assert str(composed.value) == str(compiled.value).splitlines()[0]


def test_workspace_is_bounded() -> None:
    limit = arithmetic.WORKSPACE_BYTES
    with NoSynchronisation() as mode:
        ops.factored_correlation.composition(
            torch.ones(5000, 1, 2, dtype=torch.bfloat16),
            torch.ones(5000, 1, 2, dtype=torch.bfloat16),
            torch.ones(50, 100, 2, dtype=torch.bfloat16),
            torch.ones(50, 100, 2, dtype=torch.bfloat16),
            True,
        )
        assert mode.largest <= limit
        G = torch.ones(16, 512, 1024)
        ops.weighted_sum.composition(G, torch.ones(16))
        assert mode.largest <= max(limit, G.numel() * 4)
        z, g = torch.ones(40, 64, 28, 28), torch.ones(40, 8, 28, 28)
        ops.conv_example_gradients.composition(z, g, [3, 3], [1, 1], [1, 1], [1, 1], 1)
        assert mode.largest <= max(limit, G.numel() * 4)


@every_operator
def test_cuda_key_has_kernel_or_composition(name: str) -> None:
    """With the dispatch key of CUDA, a composition runs on tensors of any device."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"l2rw_ext::{name}", "CUDA")
    if name not in COMPOSED:
        pytest.skip("a compiled kernel is registered")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for optional in (True, False):
        arguments = sample(name, optional=optional)
        results = as_results(OPERATORS[name].compiled.redispatch(key, *arguments))
        for result, expected in zip(results, compose(name, arguments), strict=True):
            assert torch.equal(result, expected)
