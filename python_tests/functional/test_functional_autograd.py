"""Perturbed layers have higher derivatives, and work in forward mode, torch.func and a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from l2rw_ext import functional as PF
from support.functional_cases import SMALL_CASES, Case, random_direction

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

# Every Function once: the cheapest case of each.
FUNCTIONS = ["linear", "linear-wide", "conv1d-circular", "embedding", "layer_norm", "mul", "expand"]
# The row of padding_idx has no gradient in torch although it has a derivative.
DIFFERENTIABLE = [name for name in SMALL_CASES if name != "embedding-padding"]


def variables(
    name: str, factored: bool = False, eps: Tensor | None = None
) -> tuple[Case, Callable[..., Tensor], list[Tensor]]:
    """A layer as a function of all its differentiable tensors: x, W, b, ε and the direction's."""
    torch.manual_seed(0)
    case = SMALL_CASES[name]()
    eps = torch.randn(case.n, dtype=torch.float64) if eps is None else eps
    direction: PF.Dense | PF.Factored = random_direction(case)
    if factored:
        g_clean = torch.randn_like(case.plain(case.clean, case.weight, case.bias))
        direction = PF.Factored(case.z_clean, g_clean)
        parts = [direction.z_clean, direction.g_clean]
    else:
        parts = [direction.V, direction.V_b]
    # An expand has no input: x only says how many examples there are.
    x = case.x if name != "expand" else torch.zeros(case.x.shape, dtype=torch.int64)
    slots = [x, case.weight, case.bias, eps, *parts]
    used = [t is not None and t.is_floating_point() for t in slots]
    inputs = [t.clone().requires_grad_() for t, u in zip(slots, used, strict=True) if u]

    def function(*given: Tensor) -> Tensor:
        remaining = iter(given)
        x, weight, bias, e, first, second = (
            next(remaining) if u else t for t, u in zip(slots, used, strict=True)
        )
        kind = PF.Factored if factored else PF.Dense
        return case.perturbed(x, weight, bias, e, kind(first, second))

    return case, function, inputs


@pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str, factored: bool) -> None:
    _, function, inputs = variables(name, factored)
    assert gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradgradcheck(name: str, factored: bool) -> None:
    _, function, inputs = variables(name, factored)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


def nonlinear(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: function(*inputs).sin().square().sum()


@pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func(name: str, factored: bool) -> None:
    """grad, jacrev, jacfwd and their compositions agree with plain autograd."""
    _, function, inputs = variables(name, factored)
    loss = nonlinear(function)
    every = tuple(range(len(inputs)))
    detached = [t.detach() for t in inputs]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        for actual, wanted in zip(transform(loss, every)(*detached), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
    at = len(inputs) - 1
    hessian = torch.autograd.functional.hessian(
        lambda last: loss(*inputs[:at], last), inputs[at].detach()
    )
    for outer in (torch.func.jacrev, torch.func.jacfwd):
        for inner in (torch.func.jacrev, torch.func.jacfwd):
            actual = outer(inner(loss, at), at)(*detached)
            torch.testing.assert_close(actual, hessian, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_of_grad_over_single_examples(name: str) -> None:
    """Per-example ε gradients by vmap(grad), with ε of shape (), are the batch's ε gradients."""
    torch.manual_seed(0)
    case = SMALL_CASES[name]()
    direction = random_direction(case)
    eps = torch.randn(case.n, dtype=torch.float64)

    def loss(x: Tensor, e: Tensor) -> Tensor:
        extra = {case.eps_name: e, "direction": direction}
        y = case.function(x, case.weight, case.bias, *case.args, **case.kwargs, **extra)
        return y.sin().sum()

    if name in ("mul", "expand"):
        # Inside vmap the parameter no longer has the example's dimension.
        case.weight = case.weight.squeeze(0)
        direction = PF.Dense(direction.V.squeeze(0))
    actual = torch.func.vmap(torch.func.grad(loss, 1), (case.example_dim, 0))(case.x, eps)
    e = eps.clone().requires_grad_()
    case.perturbed(case.x, case.weight, case.bias, e, direction).sin().sum().backward()
    torch.testing.assert_close(actual, e.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_over_directions(name: str) -> None:
    """Several directions at once: the scores of each, as one by one."""
    torch.manual_seed(0)
    case = SMALL_CASES[name]()
    V = torch.randn(3, *case.weight.shape, dtype=torch.float64)

    def scores(V: Tensor) -> Tensor:
        def loss(eps: Tensor) -> Tensor:
            return case.perturbed(case.x, case.weight, case.bias, eps, PF.Dense(V)).sin().sum()

        return torch.func.grad(loss)(torch.zeros(case.n, dtype=torch.float64))

    actual = torch.func.vmap(scores)(V)
    expected = torch.stack([scores(v) for v in V])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_through_an_earlier_backward(name: str) -> None:
    """A tangent that enters only in backward, with grad mode off, is not dropped."""
    _, function, inputs = variables(name)
    y = function(*inputs)
    g, tangent = torch.randn_like(y), torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, tangent, retain_graph=True)
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(y, inputs, forward_ad.make_dual(g, tangent))
        actual = [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]
    torch.testing.assert_close(actual, list(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])
def test_compile_without_breaks_or_recompiles(factored: bool) -> None:
    """One graph for all layers, forward and backward, traced once for two batches."""
    torch.manual_seed(0)
    cases = [SMALL_CASES[name]() for name in FUNCTIONS]
    directions: list[Any] = [random_direction(case) for case in cases]
    if factored:
        directions = [
            PF.Factored(c.z_clean, torch.randn_like(c.plain(c.clean, c.weight, c.bias)))
            for c in cases
        ]

    def losses(*eps: Tensor) -> Tensor:
        outputs = [
            case.perturbed(case.x, case.weight, case.bias, e, direction).sin().sum()
            for case, e, direction in zip(cases, eps, directions, strict=True)
        ]
        return torch.stack(outputs).sum()

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            eps = [torch.randn(case.n, dtype=torch.float64) for case in cases]
            results = []
            for function in (losses, compiled):
                e = [t.clone().requires_grad_() for t in eps]
                value = function(*e)
                results.append([value, *torch.autograd.grad(value, e)])
            torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


def test_compile_trains_all_inputs() -> None:
    """Gradients of every input of a layer whose direction is made inside the compiled graph.

    The backend is the compiler's own up to code generation, which takes most of its time and sees
    nothing but operations of torch: its tracing, decompositions and partition of the backward.
    """
    _, function, inputs = variables("linear-tokens")
    torch._dynamo.reset()
    compiled = torch.compile(
        nonlinear(function), fullgraph=True, backend="aot_eager_decomp_partition"
    )
    expected = torch.autograd.grad(nonlinear(function)(*inputs), inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = torch.autograd.grad(compiled(*inputs), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
