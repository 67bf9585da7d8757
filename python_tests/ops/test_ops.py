"""Every operator computes what plain float64 torch does, and says how it was misused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from l2rw_ext import ops
from l2rw_ext.ops._operator import OPERATORS
from l2rw_ext.ops.formulas import FORMULAS, Results, convert, sample
from support.operator_cases import (
    ARGUMENTS,
    EDGES,
    Draw,
    assert_operator_exact,
    call,
    channels_last,
    compose,
    flat,
    lay_out,
    map_tensors,
    named_arguments,
    wrong,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LISTS = "factored_correlations"  # takes lists of tensors, one for each layer

every_operator = pytest.mark.parametrize("name", OPERATORS)
both = pytest.mark.parametrize("function", [call, compose])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.split("::")[1] for name in names if name.startswith("l2rw_ext::")}


def test_every_registered_operator_is_tested() -> None:
    assert registered() == set(OPERATORS) == set(ops.__all__) == set(ARGUMENTS) == set(FORMULAS)


@every_dtype
@every_operator
@given(data=st.data())
def test_matches_plain_float64(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16))
    draw = Draw(data.draw, dtype, torch.Generator().manual_seed(seed))
    arguments = ARGUMENTS[name](draw)
    before = convert(arguments, Tensor.clone)

    results = call(name, arguments)

    assert_operator_exact(name, dtype, arguments, results)
    for argument, copy in zip(flat(arguments)[0], flat(before)[0], strict=True):
        if isinstance(argument, Tensor):
            assert torch.equal(argument, copy)


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str) -> None:
    assert_operator_exact(name, torch.float32, EDGES[name], call(name, EDGES[name]))


@every_operator
@both
def test_channels_last_images(function: Callable[..., Results], name: str) -> None:
    arguments = sample(name, torch.float64)
    images = channels_last(arguments)
    for result, compiled, expected in zip(
        function(name, images), call(name, images), call(name, arguments), strict=True
    ):
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)
        assert result.stride() == compiled.stride()


@every_operator
def test_deterministic(name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def large(a: Tensor) -> Tensor:
        return torch.randn(a.shape, generator=generator).abs()

    arguments = convert(sample(name), large)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        first = call(name, arguments)
        for _ in range(5):
            again = call(name, arguments)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "name",
    [n for n in OPERATORS if "weights" in named_arguments(n)],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@both
def test_examples_without_weight_are_not_read(
    function: Callable[..., Results], name: str, value: float
) -> None:
    arguments = list(sample(name, torch.float64))
    expected = function(name, tuple(arguments))
    without = int((arguments[named_arguments(name).index("weights")] == 0).nonzero())
    for k, argument in enumerate(arguments[:2]):
        if isinstance(argument, Tensor) and argument.is_floating_point() and argument.dim() > 1:
            arguments[k] = argument.clone()
            arguments[k][without] = value
            for result, exact in zip(function(name, tuple(arguments)), expected, strict=True):
                assert torch.equal(result, exact)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "reversed", "sliced"])
@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (5, 40), (5, 1, 3), (5, 7, 3)], ids=str)
@both
def test_linear_rows_without_weight_are_not_read(
    function: Callable[..., Results], shape: tuple[int, ...], layout: str
) -> None:
    """However the rows are found, in whatever layout; without any weight the gradient is zero."""
    for w in ([0.5, 0, 2, 0, 1], [0, 0, 0, 0, 3], [0] * 5):
        weights = torch.tensor(w, dtype=torch.float64)
        kept, left_out = weights != 0, weights == 0
        z, g = torch.randn(*shape, 6).double(), torch.randn(*shape, 4).double()
        for inputs_first in (False, True):
            flags = True, inputs_first, True
            expected = FORMULAS["linear_weighted_gradient"].exact(
                (z[kept], g[kept], weights[kept], *flags)
            )
            poisoned = [lay_out(a.clone(), layout) for a in (z, g)]
            for a in poisoned:
                a[left_out] = math.nan
            found = function("linear_weighted_gradient", (*poisoned, weights, *flags))
            for result, exact in zip(found, expected, strict=True):
                torch.testing.assert_close(result, exact, rtol=1e-13, atol=1e-13)


@both
@every_operator
def test_autocast_changes_nothing(function: Callable[..., Results], name: str) -> None:
    arguments = sample(name)
    expected = function(name, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        results = function(name, arguments)
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == exact.dtype
        assert torch.equal(result, exact)


@every_dtype
@both
def test_normalize_weights_of_unusual_scores(
    function: Callable[..., Results], dtype: torch.dtype
) -> None:
    def weights(*scores: float) -> list[float]:
        return function("normalize_weights", (torch.tensor(scores, dtype=dtype),))[0].tolist()

    huge = torch.finfo(dtype).max
    assert weights() == []
    assert weights(-1.0, 0.0, -math.inf) == [0, 0, 0]
    assert weights(math.nan, 3.0, math.inf, 1.0, -2.0) == [0, 0.75, 0, 0.25, 0]
    assert weights(huge, huge, -huge, huge, huge) == [0.25, 0.25, 0, 0.25, 0.25]
    smallest = torch.finfo(dtype).smallest_normal
    assert weights(smallest, smallest) == [0.5, 0.5]


# Errors


@every_operator
def test_messages_name_operator_argument_and_value(name: str) -> None:
    for what, arguments, words in wrong(name, int16="Short"):
        with pytest.raises(RuntimeError) as error:
            call(name, arguments)
        message = str(error.value)
        for word in (f"l2rw_ext::{name}: ", *words):
            assert word in message, f"{what}: {word!r} is not in {message!r}"


def test_rows_out_of_range() -> None:
    g, V = torch.ones(1, 2, 3), torch.ones(4, 3)
    for row in (4, -1):
        with pytest.raises(
            RuntimeError, match=rf"index\[0, 1\] is {row}, and direction has 4 rows"
        ):
            ops.embedding_correlation(torch.tensor([[0, row]]), g, V)
        with pytest.raises(
            RuntimeError, match=rf"index\[0, 1\] is {row}, and the weight has 4 rows"
        ):
            ops.embedding_weighted_gradient(torch.tensor([[0, row]]), g, torch.ones(1), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: 1}, "g must hold 2 (layers of z), got 1"),
        ({2: 1}, "z_clean must hold 2 (layers of z), got 1"),
        ({3: 1}, "g_clean must hold 2 (layers of z), got 1"),
        ({4: 3}, "bias must hold 2 (layers of z), got 3"),
        ({0: torch.ones(3, 1, 6), 1: torch.ones(3, 1, 9)}, "z[1] must have size 4 (examples of"),
        ({2: torch.ones(2, 1, 6), 3: torch.ones(2, 1, 9)}, "z_clean[1] must have size 3 (exampl"),
        ({1: torch.ones(4, 2, 9)}, "g[1] must have size 1 (positions of z)"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
@both
def test_layers_that_do_not_fit(
    function: Callable[..., Any], change: dict[int, Any], message: str
) -> None:
    arguments: list[Any] = [list(a) for a in sample(LISTS)]
    for k, value in change.items():
        if isinstance(value, Tensor):
            arguments[k][1] = value
        else:
            arguments[k] = (arguments[k] * 2)[:value]
    with pytest.raises(RuntimeError, match=f"l2rw_ext::{LISTS}: {re.escape(message)}"):
        function(LISTS, tuple(arguments))


def test_no_layer_is_an_error() -> None:
    """Torch's own, as there is no tensor whose device would choose a kernel."""
    with pytest.raises(RuntimeError, match=rf"l2rw_ext::{LISTS}\b.* non-empty list of Tensors"):
        ops.factored_correlations([], [], [], [], [])


# Autograd


@every_operator
def test_reverse_mode_raises(name: str) -> None:
    arguments = convert(sample(name), lambda a: a.detach().requires_grad_())
    result = call(name, arguments)[0]
    message = f"l2rw_ext::{name} has no derivative; differentiate the layers of l2rw_ext.functional"
    with pytest.raises(NotImplementedError, match=message):
        result.sum().backward()
    with torch.no_grad():
        assert not call(name, arguments)[0].requires_grad


@every_operator
def test_functorch_gradients_raise(name: str) -> None:
    leaves, rebuilt = flat(sample(name))
    position = next(
        k for k, a in enumerate(leaves) if isinstance(a, Tensor) and a.is_floating_point()
    )

    def total(tensor: Tensor) -> Tensor:
        return call(name, rebuilt([*leaves[:position], tensor, *leaves[position + 1 :]]))[0].sum()

    with pytest.raises(RuntimeError):
        torch.func.grad(total)(leaves[position])


@every_operator
def test_forward_mode_raises(name: str) -> None:
    leaves, rebuilt = flat(sample(name))
    position = next(
        k for k, a in enumerate(leaves) if isinstance(a, Tensor) and a.is_floating_point()
    )

    def function(tensor: Tensor) -> Any:
        return call(name, rebuilt([*leaves[:position], tensor, *leaves[position + 1 :]]))

    tensor = leaves[position]
    message = f"l2rw_ext::{name} has no forward-mode derivative; .* l2rw_ext.functional"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (tensor,), (torch.ones_like(tensor),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(forward_ad.make_dual(tensor, torch.ones_like(tensor)))
    with forward_ad.dual_level():
        function(tensor)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != LISTS])
def test_vmap_is_a_loop(name: str) -> None:
    leaves, rebuilt = flat(convert(sample(name), lambda a: torch.stack([a, a.flip(0)])))
    where = tuple(0 if isinstance(a, Tensor) and a.is_floating_point() else None for a in leaves)
    results = torch.vmap(lambda *a: call(name, rebuilt(a)), where)(*leaves)
    for k in range(2):
        single = [a[k] if dim == 0 else a for a, dim in zip(leaves, where, strict=True)]
        for result, expected in zip(results, call(name, rebuilt(single)), strict=True):
            torch.testing.assert_close(result[k], expected)


def test_vmap_refuses_lists_of_tensors() -> None:
    leaves, rebuilt = flat(convert(sample(LISTS), lambda a: torch.stack([a, a])))
    where = tuple(0 if isinstance(a, Tensor) else None for a in leaves)
    with pytest.raises(RuntimeError, match=LISTS):
        torch.vmap(lambda *a: call(LISTS, rebuilt(a)), where)(*leaves)


def test_meta_tensors() -> None:
    for name in OPERATORS:
        arguments = map_tensors(lambda a: a.to("meta"), sample(name, torch.bfloat16))
        expected = call(name, sample(name, torch.bfloat16))
        for result, real in zip(call(name, arguments), expected, strict=True):
            assert (result.shape, result.dtype) == (real.shape, real.dtype)


def _on_cuda(a: Tensor) -> Tensor:
    """The tensor with its strides on the device."""
    count = a.untyped_storage().nbytes() // a.element_size()
    storage = a.as_strided((count,), (1,), 0).cuda()
    return storage.as_strided(a.shape, a.stride(), a.storage_offset())


@pytest.mark.cuda
@every_dtype
@every_operator
@given(data=st.data())
def test_matches_plain_float64_on_cuda(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16))
    draw = Draw(data.draw, dtype, torch.Generator().manual_seed(seed))
    arguments = ARGUMENTS[name](draw)
    here = map_tensors(_on_cuda, arguments)
    # The table is for float32 products that are not rounded to TF32, as torch's convolutions are.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        results = call(name, here)
    assert all(result.is_cuda for result in results)
    assert_operator_exact(name, dtype, arguments, tuple(result.cpu() for result in results))
    expected = call(name, arguments)
    assert [r.stride() for r in results if r.numel() > 1] == [
        r.stride() for r in expected if r.numel() > 1
    ]


@pytest.mark.cuda
@every_operator
def test_no_synchronisation_with_the_device(name: str) -> None:
    arguments = map_tensors(_on_cuda, sample(name))
    expected = call(name, arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = call(name, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.cuda
@every_dtype
@given(n=st.integers(0, 700))
@settings(max_examples=10)
def test_normalize_weights_on_cuda(dtype: torch.dtype, n: int) -> None:
    u = torch.randn(n, dtype=dtype)
    expected = ops.normalize_weights(u)
    result = ops.normalize_weights(u.cuda()).cpu()
    torch.testing.assert_close(result, expected)
