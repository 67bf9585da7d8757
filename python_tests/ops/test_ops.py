"""Every operator computes what plain float64 torch does, and says how it was misused."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from l2rw_ext import ops
from l2rw_ext.ops import compositions
from support.operator_cases import (
    OPERATORS,
    Draw,
    assert_operator_exact,
    call,
    convert,
    flat,
    lay_out,
    map_tensors,
    sample,
    wrong,
)
from support.tolerances import TOLERANCES

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CORRELATIONS = tuple(name for name in OPERATORS if "_correlation" in name)
OTHERS = tuple(name for name in OPERATORS if name not in CORRELATIONS)

every_operator = pytest.mark.parametrize("name", OPERATORS)
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
    assert registered() == set(OPERATORS) == set(TOLERANCES) == set(ops.__all__)


@every_dtype
@every_operator
@given(data=st.data())
def test_matches_plain_float64(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16))
    draw = Draw(data.draw, dtype, torch.Generator().manual_seed(seed))
    arguments = OPERATORS[name].arguments(draw)
    before = convert(arguments, Tensor.clone)

    results = call(name, arguments)

    assert_operator_exact(name, dtype, arguments, results)
    for argument, copy in zip(flat(arguments)[0], flat(before)[0], strict=True):
        if isinstance(argument, Tensor):
            assert torch.equal(argument, copy)


@pytest.mark.parametrize(
    "name",
    ["conv_correlation", *OTHERS[1:3], "group_norm_backward", "batch_norm_tangent"],
)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_channels_last_images(name: str, layout: str) -> None:
    arguments = sample(name, torch.float64)
    images = tuple(
        lay_out(a, layout) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments
    )
    for result, expected in zip(call(name, images), call(name, arguments), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("optional", [True, False], ids=["all", "required"])
@every_operator
def test_opcheck(name: str, optional: bool) -> None:
    operator = getattr(torch.ops.l2rw_ext, name).default
    arguments = sample(name, optional=optional)
    if name in CORRELATIONS:
        arguments = convert(arguments, lambda a: a.detach().requires_grad_())
    torch.library.opcheck(operator, arguments)


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


def test_examples_without_weight_are_not_read() -> None:
    w = torch.tensor([0.0, 2.0])
    for name in ("conv_weighted_gradient", "weighted_sum"):
        arguments = list(sample(name))
        arguments[1 if name == "weighted_sum" else 2] = w
        expected = call(name, tuple(arguments))
        for k in range(2):
            if isinstance(arguments[k], Tensor) and arguments[k].dim() > 1:
                arguments[k] = arguments[k].clone()
                arguments[k][0] = math.nan
        for result, exact in zip(call(name, tuple(arguments)), expected, strict=True):
            assert torch.equal(result, exact)


@every_dtype
def test_normalize_weights_of_unusual_scores(dtype: torch.dtype) -> None:
    def weights(*scores: float) -> list[float]:
        return ops.normalize_weights(torch.tensor(scores, dtype=dtype)).tolist()

    huge = torch.finfo(dtype).max
    assert weights() == []
    assert weights(-1.0, 0.0, -math.inf) == [0, 0, 0]
    assert weights(math.nan, 3.0, math.inf, 1.0, -2.0) == [0, 0.75, 0, 0.25, 0]
    assert weights(huge, huge, -huge, huge, huge) == [0.25, 0.25, 0, 0.25, 0.25]
    smallest = torch.finfo(dtype).smallest_normal
    assert weights(smallest, smallest) == [0.5, 0.5]


def test_scale_rows_keeps_positions_side_by_side() -> None:
    g = torch.randn(3, 4, 5)
    w, active = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 2])
    assert ops.scale_rows(g, w, active).stride() == (20, 5, 1)
    by_channel = ops.scale_rows(lay_out(g, "transposed"), w, active)
    assert by_channel.stride() == (20, 1, 4)
    assert torch.equal(by_channel, ops.scale_rows(g, w, active))


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
        with pytest.raises(RuntimeError, match=rf"active\[1\] is {row}, and g has 1 examples"):
            ops.scale_rows(g, torch.ones(1), torch.tensor([0, row]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({k: [] for k in range(5)}, "z must hold at least one layer, got none"),
        ({1: 1}, "g must hold 2 (layers of z), got 1"),
        ({2: 1}, "z_clean must hold 2 (layers of z), got 1"),
        ({3: 1}, "g_clean must hold 2 (layers of z), got 1"),
        ({4: 3}, "bias must hold 2 (layers of z), got 3"),
        ({0: torch.ones(3, 1, 3), 1: torch.ones(3, 1, 2)}, "z[1] must have size 2 (examples of"),
        ({2: torch.ones(2, 1, 3), 3: torch.ones(2, 1, 2)}, "z_clean[1] must have size 3 (exampl"),
        ({1: torch.ones(2, 2, 2)}, "g[1] must have size 1 (positions of z)"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("module", [ops, compositions], ids=["operator", "composition"])
def test_layers_that_do_not_fit(module: Any, change: dict[int, Any], message: str) -> None:
    arguments: list[Any] = [list(a) for a in sample("factored_correlations")]
    for k, value in change.items():
        if isinstance(value, Tensor):
            arguments[k][1] = value
        elif isinstance(value, int):
            arguments[k] = (arguments[k] * 2)[:value]
        else:
            arguments[k] = value
    with pytest.raises(
        RuntimeError, match=f"l2rw_ext::factored_correlations: {re.escape(message)}"
    ):
        module.factored_correlations(*arguments)


# Autograd


@pytest.mark.parametrize("optional", [True, False], ids=["all", "required"])
@pytest.mark.parametrize("name", CORRELATIONS)
def test_correlations_differentiate_twice(name: str, optional: bool) -> None:
    arguments = sample(name, torch.float64, optional)
    arguments = convert(arguments, lambda a: a.detach().clone().requires_grad_())
    leaves, rebuilt = flat(arguments)
    if not any(isinstance(a, Tensor) and a.requires_grad for a in leaves[2:]):
        leaves[0] = leaves[0].detach()

    def scores(*tensors: Tensor) -> Tensor:
        return call(name, rebuilt(tensors))[0]

    assert torch.autograd.gradcheck(scores, leaves)
    assert torch.autograd.gradgradcheck(scores, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CORRELATIONS)
def test_gradients_have_the_dtype_of_their_argument(name: str, dtype: torch.dtype) -> None:
    arguments = convert(sample(name, dtype), lambda a: a.detach().requires_grad_())
    exact = convert(sample(name, dtype), lambda a: a.detach().double().requires_grad_())
    call(name, arguments)[0].sum().backward()
    call(name, exact)[0].sum().backward()
    for argument, other in zip(flat(arguments)[0], flat(exact)[0], strict=True):
        if isinstance(argument, Tensor) and argument.requires_grad:
            assert argument.grad is not None
            assert argument.grad.dtype == dtype
            relative = (argument.grad.double() - other.grad).norm() / other.grad.norm()
            assert relative <= (2.0**-8 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_other_operators_refuse_to_be_differentiated(name: str) -> None:
    arguments = convert(sample(name), lambda a: a.detach().requires_grad_())
    result = call(name, arguments)[0]
    with pytest.raises(NotImplementedError, match=f"l2rw_ext::{name} has no derivative"):
        result.sum().backward()


@every_operator
def test_forward_mode_raises(name: str) -> None:
    leaves, rebuilt = flat(sample(name))
    position = next(
        k for k, a in enumerate(leaves) if isinstance(a, Tensor) and a.is_floating_point()
    )

    def function(tensor: Tensor) -> Any:
        return call(name, rebuilt([*leaves[:position], tensor, *leaves[position + 1 :]]))

    tensor = leaves[position]
    message = f"l2rw_ext::{name} has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (tensor,), (torch.ones_like(tensor),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(forward_ad.make_dual(tensor, torch.ones_like(tensor)))
    with forward_ad.dual_level():
        function(tensor)


@every_operator
def test_vmap_is_a_loop(name: str) -> None:
    leaves, rebuilt = flat(convert(sample(name), lambda a: torch.stack([a, a.flip(0)])))
    where = tuple(0 if isinstance(a, Tensor) and a.is_floating_point() else None for a in leaves)
    results = torch.vmap(lambda *a: call(name, rebuilt(a)), where)(*leaves)
    for k in range(2):
        single = [a[k] if dim == 0 else a for a, dim in zip(leaves, where, strict=True)]
        for result, expected in zip(results, call(name, rebuilt(single)), strict=True):
            torch.testing.assert_close(result[k], expected)


@pytest.mark.parametrize("name", CORRELATIONS)
def test_functorch_gradients_are_right_or_raise(name: str) -> None:
    leaves, rebuilt = flat(sample(name, torch.float64))

    def total(g: Tensor) -> Tensor:
        return call(name, rebuilt([leaves[0], g, *leaves[2:]]))[0].sum()

    g = leaves[1].requires_grad_()
    expected = torch.autograd.grad(total(g), g)[0]
    try:
        gradient = torch.func.grad(total)(g.detach())
    except RuntimeError as error:
        assert "setup_context" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "name", ["dense_correlation", "factored_correlations", "affine_correlation", "scale_rows"]
)
def test_compiles_without_a_graph_break(name: str) -> None:
    arguments = sample(name)
    compiled = torch.compile(
        lambda *a: call(name, a), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for result, expected in zip(compiled(*arguments), call(name, arguments), strict=True):
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()


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
    arguments = OPERATORS[name].arguments(draw)
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
