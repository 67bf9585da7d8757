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

from l2rw_ext.ops import _registration, arithmetic, compositions
from l2rw_ext.ops.compositions import linear
from support.operator_cases import (
    OPERATORS,
    Arguments,
    Draw,
    Results,
    assert_operator_exact,
    call,
    flat,
    lay_out,
    map_tensors,
    sample,
    wrong,
)
from support.synchronisation import NoSynchronisation, SynchronisedError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

every_operator = pytest.mark.parametrize("name", OPERATORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def compose(name: str, arguments: Arguments) -> Results:
    """The composition's results as a tuple."""
    results = getattr(compositions, name)(*arguments)
    return results if isinstance(results, tuple) else (results,)


def test_every_operator_has_one() -> None:
    assert set(compositions.__all__) == set(OPERATORS)


@every_operator
def test_arguments_are_those_of_the_operator(name: str) -> None:
    parameters = inspect.signature(getattr(compositions, name)).parameters.values()
    schema = getattr(torch.ops.l2rw_ext, name).default._schema.arguments
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
    arguments = OPERATORS[name].arguments(draw)
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


@every_operator
def test_autocast_changes_nothing(name: str) -> None:
    arguments = sample(name)
    expected = compose(name, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        results = compose(name, arguments)
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == exact.dtype
        assert torch.equal(result, exact)


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


@pytest.mark.parametrize("name", ["conv_weighted_gradient", "weighted_sum", "scale_rows"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_examples_without_weight_are_left_out(name: str, value: float) -> None:
    w = torch.tensor([0.0, 2.0])
    arguments: list[Any] = list(sample(name, torch.float64))
    arguments[2 if name == "conv_weighted_gradient" else 1] = w.double()
    expected = compose(name, tuple(arguments))
    for k in range(2):
        if isinstance(arguments[k], Tensor) and arguments[k].dim() > 1:
            poisoned = arguments[k].clone()
            poisoned[0] = value
            for result, exact in zip(
                compose(name, (*arguments[:k], poisoned, *arguments[k + 1 :])),
                expected,
                strict=True,
            ):
                assert torch.equal(result, exact)


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


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("conv_correlation", {4: [1, 1, 1]}),
        ("conv_correlation", {5: [-1, 0]}),
        ("conv_correlation", {7: 3}),
        ("conv_example_gradients", {2: [0, 2]}),
        ("conv_weighted_gradient", {4: [1, 1]}),
        ("group_norm_backward", {5: 3}),
        ("group_norm_backward", {5: 0}),
    ],
)
def test_numbers_that_do_not_fit(name: str, change: dict[int, Any]) -> None:
    arguments = tuple(change.get(k, a) for k, a in enumerate(sample(name)))
    with pytest.raises(RuntimeError, match=f"l2rw_ext::{name}: ") as composed:
        compose(name, arguments)
    with pytest.raises(RuntimeError) as compiled:
        call(name, arguments)
    assert str(composed.value) == str(compiled.value).splitlines()[0]


@every_dtype
def test_normalize_weights_of_unusual_scores(dtype: torch.dtype) -> None:
    huge, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for scores in (
        [],
        [-1.0, 0.0, -math.inf],
        [math.nan, 3.0, math.inf, 1.0, -2.0],
        [huge, huge, -huge, huge, huge],
        [smallest, smallest],
    ):
        u = torch.tensor(scores, dtype=dtype)
        assert torch.equal(*compose("normalize_weights", (u,)), *call("normalize_weights", (u,)))


@pytest.mark.parametrize(
    "name",
    [
        "conv_correlation",
        "conv_example_gradients",
        "conv_weighted_gradient",
        "group_norm_backward",
        "batch_norm_tangent",
    ],
)
def test_channels_last_images(name: str) -> None:
    arguments = sample(name, torch.float64)
    images = tuple(
        lay_out(a, "channels_last") if isinstance(a, Tensor) and a.dim() == 4 else a
        for a in arguments
    )
    for result, expected, plain in zip(
        compose(name, images), call(name, images), compose(name, arguments), strict=True
    ):
        torch.testing.assert_close(result, plain, rtol=1e-13, atol=1e-13)
        assert result.stride() == expected.stride()


def test_no_empty_convolution_reaches_torch() -> None:
    """Channels, pixels or examples that are none: sums over nothing, but the bias counts."""
    V_b = torch.ones(4)
    for z, g in (
        (torch.ones(2, 0, 5), torch.ones(2, 4, 3)),
        (torch.ones(0, 2, 5), torch.ones(0, 4, 3)),
        (torch.ones(2, 2, 2), torch.ones(2, 4, 0)),
    ):
        V = torch.ones(4, z.shape[1], 3)
        geometry = ([1], [0], [1], 1)
        for name, arguments in (
            ("conv_correlation", (z, g, V, V_b, *geometry)),
            ("conv_example_gradients", (z, g, [3], *geometry, V, V_b)),
            ("conv_weighted_gradient", (z, g, torch.ones(len(z)), [3], *geometry)),
        ):
            composed = compose(name, arguments)
            for result, expected in zip(composed, call(name, arguments), strict=True):
                torch.testing.assert_close(result, expected)


def test_workspace_is_bounded() -> None:
    limit = arithmetic.WORKSPACE_BYTES
    with NoSynchronisation() as mode:
        compositions.factored_correlation(
            torch.ones(5000, 1, 2, dtype=torch.bfloat16),
            torch.ones(5000, 1, 2, dtype=torch.bfloat16),
            torch.ones(50, 100, 2, dtype=torch.bfloat16),
            torch.ones(50, 100, 2, dtype=torch.bfloat16),
            True,
        )
        assert mode.largest <= limit
        G = torch.ones(16, 512, 1024)
        compositions.weighted_sum(G, torch.ones(16))
        assert mode.largest <= max(limit, G.numel() * 4)
        z, g = torch.ones(40, 64, 28, 28), torch.ones(40, 8, 28, 28)
        compositions.conv_example_gradients(z, g, [3, 3], [1, 1], [1, 1], [1, 1], 1)
        assert mode.largest <= max(limit, G.numel() * 4)


@every_operator
def test_cuda_key_has_kernel_or_composition(name: str) -> None:
    """With the dispatch key of CUDA, a composition runs on tensors of any device."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"l2rw_ext::{name}", "CUDA")
    if name not in _registration.COMPOSED:
        pytest.skip("a compiled kernel is registered")
    operator = getattr(torch.ops.l2rw_ext, name).default
    for optional in (True, False):
        arguments = sample(name, optional=optional)
        results = operator.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments
        )
        results = results if isinstance(results, tuple) else (results,)
        for result, expected in zip(results, compose(name, arguments), strict=True):
            assert torch.equal(result, expected)
