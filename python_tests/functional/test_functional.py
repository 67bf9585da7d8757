"""The perturbed layers are what their definition says, and score as single gradients do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from l2rw_ext import functional as PF
from l2rw_ext.reference import relative_error
from support.functional_cases import (
    SMALL_CASES,
    Case,
    broadcast_cases,
    conv_cases,
    embedding_cases,
    linear_cases,
    normalization_cases,
    random_direction,
)

# Torch says once per process that an even "same" kernel costs it a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

FLOAT64 = 1e-12

drawn = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def together(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The relative error of several results as one vector.

    The input gradient of a normalization over two values is a sum that cancels: torch's own two
    ways to it agree in no digit. Next to the other gradients it counts with its size.
    """
    assert [t.shape for t in actual] == [t.shape for t in expected]
    return relative_error(
        torch.cat([t.detach().reshape(t.numel()) for t in actual]),
        torch.cat([t.detach().reshape(t.numel()) for t in expected]),
    )


def single_gradient_scores(case: Case, V: Tensor | None, V_b: Tensor | None, c: Tensor) -> Tensor:
    """<∇f_i, v> one example at a time, where f_i = Σ c_i · y_i."""
    scores = []
    for i in range(case.n):
        parameters = [p.detach().requires_grad_() for p in case.parameters]
        named = iter(parameters)
        weight = None if case.weight is None else next(named)
        bias = None if case.bias is None else next(named)
        f = (case.example(i, weight, bias) * c.narrow(case.example_dim, i, 1)).sum()
        gradients = torch.autograd.grad(f, parameters)
        directions = [d for d in (V, V_b) if d is not None]
        scores.append(sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)))
    return torch.stack(scores) if scores else torch.zeros(0, dtype=torch.float64)


def cotangent(y: Tensor) -> Tensor:
    """A cotangent without symmetries in which sums would cancel, the same for equal shapes."""
    return torch.linspace(0, 3, y.numel(), dtype=y.dtype).exp().sin().reshape(y.shape) + 0.1


def leaves(*tensors: Tensor | None) -> list[Any]:
    return [
        t.detach().clone().requires_grad_(t.is_floating_point()) if t is not None else None
        for t in tensors
    ]


def differentiable(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None and t.requires_grad]


def without_padding(case: Case, direction: PF.Dense) -> PF.Dense:
    """Zeroes the row of ``padding_idx``: it has no gradient, so that no V holds it."""
    if case.padding_idx is not None and direction.V is not None:
        direction.V[case.padding_idx] = 0
    return direction


def check_plain(case: Case) -> None:
    results = []
    for run in (case.plain, lambda x, w, b: case.perturbed(x, w, b, None, None)):
        x, w, b = leaves(case.x, case.weight, case.bias)
        y = run(x, w, b)
        gradients = torch.autograd.grad(
            y, differentiable(x, w, b), torch.ones_like(y), allow_unused=True
        )
        results.append([y, *gradients])
    for expected, actual in zip(*results, strict=True):
        assert (expected is None) == (actual is None)
        assert expected is None or torch.equal(expected, actual)


def check_definition(case: Case) -> None:
    """Values and all first gradients at ε ≠ 0 are those of W + ε_i V, example by example."""
    direction = without_padding(case, random_direction(case))
    eps = torch.randn(case.n, dtype=torch.float64)
    results = []
    for defined in (True, False):
        x, w, b, e, V, V_b = leaves(case.x, case.weight, case.bias, eps, direction.V, direction.V_b)
        if defined:
            one = Case(**{**vars(case), "x": x, "weight": w, "bias": b})
            y = one.by_example(e, V, V_b)
        else:
            y = case.perturbed(x, w, b, e, PF.Dense(V, V_b))
        c = cotangent(y)
        inputs = differentiable(x, w, b, e, V, V_b)
        gradients = torch.autograd.grad(y, inputs, c, allow_unused=True)
        zeros = [torch.zeros_like(i) for i in inputs]
        filled = [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]
        results.append([y, *filled])
    assert together(results[1], results[0]) <= FLOAT64


def check_scores(case: Case) -> None:
    direction = random_direction(case)
    eps = torch.zeros(case.n, dtype=torch.float64, requires_grad=True)
    y = case.perturbed(case.x, case.weight, case.bias, eps, direction)
    plain = case.plain(case.x, case.weight, case.bias)
    if case.weight is None:
        # A bias without a weight: the layer stands in ones for the weight.
        assert relative_error(y, plain) <= FLOAT64
    else:
        assert torch.equal(y, plain)
    c = torch.randn_like(y)
    (y * c).sum().backward()
    expected = single_gradient_scores(case, direction.V, direction.V_b, c)
    assert relative_error(eps.grad, expected) <= FLOAT64


def check_factored(case: Case) -> None:
    """Factored equals Dense with the gradient that its factors stand for."""
    parameters = [p.detach().requires_grad_() for p in case.parameters]
    named = iter(parameters)
    weight = None if case.weight is None else next(named)
    bias = None if case.bias is None else next(named)
    y_clean = case.plain(case.clean, weight, bias)
    g_clean = torch.randn_like(y_clean)
    gradients = iter(torch.autograd.grad(y_clean, parameters, g_clean))
    V = None if weight is None else next(gradients)
    V_b = None if bias is None else next(gradients)
    eps = torch.randn(case.n, dtype=torch.float64)
    results = []
    for direction in (PF.Dense(V, V_b), PF.Factored(case.z_clean, g_clean)):
        x, w, b, e = leaves(case.x, case.weight, case.bias, eps)
        y = case.perturbed(x, w, b, e, direction)
        c = cotangent(y)
        inputs = differentiable(x, w, b, e)
        results.append([y, *torch.autograd.grad(y, inputs, c, allow_unused=True)])
    assert [t is None for t in results[0]] == [t is None for t in results[1]]
    assert together(*[[t for t in result if t is not None] for result in results]) <= FLOAT64


CHECKS: list[Callable[[Case], None]] = [check_plain, check_definition, check_scores, check_factored]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", SMALL_CASES)
def test_small_cases(name: str, check: Callable[[Case], None]) -> None:
    torch.manual_seed(0)
    check(SMALL_CASES[name]())


@drawn
@given(st.integers(0, 2**31), st.data())
@pytest.mark.parametrize(
    "cases",
    [linear_cases, conv_cases, embedding_cases, normalization_cases, broadcast_cases],
    ids=lambda cases: cases.__name__,
)
def test_drawn_cases(cases: Callable[[], st.SearchStrategy[Case]], seed: int, data: Any) -> None:
    torch.manual_seed(seed)
    case = data.draw(cases())
    for check in CHECKS:
        check(case)


# Half a unit in the last place of what a layer stores in its dtype: V z + V_b or x̂.
STORED = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NORMALIZATION = ("layer_norm", "rms_norm", "group_norm", "batch_norm")


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("name", SMALL_CASES)
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Scores of a narrow model in float32, with V in either dtype, against float64."""
    torch.manual_seed(0)
    case = SMALL_CASES[name]().to(dtype)
    exact = case.to(torch.float64)
    for direction_dtype in dict.fromkeys([dtype, torch.float32]):
        wide = without_padding(case, random_direction(exact))
        V, V_b = (None if t is None else t.to(direction_dtype) for t in (wide.V, wide.V_b))
        V64, V_b64 = (None if t is None else t.double() for t in (V, V_b))
        eps = torch.zeros(case.n, requires_grad=True)
        y = case.perturbed(case.x, case.weight, case.bias, eps, PF.Dense(V, V_b))
        assert y.dtype == dtype
        c = torch.randn_like(y)
        y.backward(c)
        expected = single_gradient_scores(exact, V64, V_b64, c.double())
        # Layers whose operator reads the stored input itself sum in float32 without a rounding.
        tolerance = 1e-6 + (2 * STORED[dtype] if case.name in NORMALIZATION else 0)
        assert eps.grad.dtype == torch.float32
        assert relative_error(eps.grad, expected) <= tolerance

        eps = torch.randn(case.n).to(dtype)
        y = case.perturbed(case.x, case.weight, case.bias, eps, PF.Dense(V, V_b))
        expected = exact.by_example(eps.double(), V64, V_b64)
        assert relative_error(y, expected) <= 1e-6 + 4 * STORED[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """Under autocast the perturbation follows the dtype that torch's layer chose."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)
    V, V_b = torch.randn(2, 4), torch.randn(2)
    eps = torch.zeros(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = PF.linear(x, weight, bias, eps=eps, direction=PF.Dense(V, V_b))
        z = PF.layer_norm(y, (2,), V_b, perturbation=eps, direction=PF.Dense(bias.to(dtype)))
    assert y.dtype == dtype
    z.sum().backward()
    assert eps.grad.isfinite().all()
    assert eps.grad.abs().sum() > 0


class Net(torch.nn.Module):
    """Layers of every family, of which one is used twice; perturbed where a direction is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 6)
        self.conv = torch.nn.Conv1d(6, 6, 4, padding="same", padding_mode="circular", groups=2)
        self.norm = torch.nn.GroupNorm(2, 6)
        self.scale = torch.nn.Parameter(torch.randn(6, 1))
        self.token = torch.nn.Parameter(torch.randn(1, 6, 1))
        self.linear = torch.nn.Linear(6, 6)
        self.double()

    def forward(self, index: Tensor, eps: Tensor | None = None, v: Any = None) -> Tensor:
        v = {} if v is None else v

        def along(name: str) -> dict[str, Any]:
            if eps is None:
                return {}
            key = "perturbation" if name == "norm" else "eps"
            weight = v[f"{name}.weight"] if f"{name}.weight" in v else v[name]
            return {key: eps, "direction": PF.Dense(weight, v.get(f"{name}.bias"))}

        x = PF.embedding(index, self.embed.weight, **along("embed")).mT
        x = PF.conv1d(
            x,
            self.conv.weight,
            self.conv.bias,
            padding="same",
            groups=2,
            padding_mode="circular",
            **along("conv"),
        )
        x = PF.group_norm(x, 2, self.norm.weight, self.norm.bias, **along("norm"))
        x = PF.mul(x, self.scale, **along("scale"))
        token = PF.expand(self.token, index.shape[0], -1, -1, **along("token"))
        x = torch.cat([token, x], 2).permute(2, 0, 1)
        for _ in range(2):
            x = PF.linear(
                x, self.linear.weight, self.linear.bias, example_dim=1, **along("linear")
            ).tanh()
        return x.sum((0, 2))


def test_model_scores_are_inner_products_of_gradients() -> None:
    """One backward gives <∇f_i, v> of a whole model; a layer used twice takes v in both uses."""
    torch.manual_seed(0)
    net = Net()
    index, clean = torch.randint(5, (4, 7)), torch.randint(5, (3, 7))
    names, parameters = zip(*net.named_parameters(), strict=True)
    v = dict(zip(names, torch.autograd.grad(net(clean).mean(), parameters), strict=True))
    eps = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    net(index, eps, v).sum().backward()
    expected = [
        sum(
            (g * d).sum()
            for g, d in zip(
                torch.autograd.grad(net(index[i : i + 1]).sum(), parameters),
                v.values(),
                strict=True,
            )
        )
        for i in range(4)
    ]
    assert relative_error(eps.grad, torch.stack(expected)) <= FLOAT64


def test_gradient_of_eps_alone_keeps_no_other_gradient() -> None:
    weight, bias = torch.randn(3, 2, requires_grad=True), torch.randn(3, requires_grad=True)
    x, eps = torch.randn(4, 2, requires_grad=True), torch.zeros(4, requires_grad=True)
    direction = PF.Dense(torch.randn(3, 2), torch.randn(3))
    y = PF.linear(x, weight, bias, eps=eps, direction=direction)
    (u,) = torch.autograd.grad(y.sum(), eps)
    assert u.shape == (4,)
    assert all(t.grad is None for t in (weight, bias, x, eps))


def test_single_example_without_an_example_dimension() -> None:
    """ε of shape () and, for linear and convolution, of shape (1,)."""
    torch.manual_seed(0)
    x, weight, V = torch.randn(4), torch.randn(3, 4), torch.randn(3, 4)
    for eps in (torch.tensor(0.5), torch.tensor([0.5])):
        y = PF.linear(x, weight, eps=eps, direction=PF.Dense(V))
        torch.testing.assert_close(y, F.linear(x, weight + 0.5 * V))
    x, weight, V = torch.randn(2, 5), torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    for eps in (torch.tensor(0.5), torch.tensor([0.5])):
        y = PF.conv1d(x, weight, eps=eps, direction=PF.Dense(V))
        torch.testing.assert_close(y, F.conv1d(x, weight + 0.5 * V))
    half, p, V = torch.tensor(0.5), torch.randn(4), torch.randn(4)
    x = torch.randn(3, 4)
    v = PF.Dense(V)
    torch.testing.assert_close(PF.add(x, p, eps=half, direction=v), x + (p + 0.5 * V))
    torch.testing.assert_close(PF.mul(x, p, eps=half, direction=v), x * (p + 0.5 * V))
    y = PF.expand(p, (3, 4), eps=half, direction=v)
    torch.testing.assert_close(y, (p + 0.5 * V).expand(3, 4))
    y = PF.rms_norm(x, (4,), p, perturbation=half, direction=v)
    torch.testing.assert_close(y, F.rms_norm(x, (4,), p + 0.5 * V))
    y = PF.layer_norm(x, (4,), p, perturbation=half, direction=v)
    torch.testing.assert_close(y, F.layer_norm(x, (4,), p + 0.5 * V))
    table, V = torch.randn(3, 2), torch.randn(3, 2)
    y = PF.embedding(torch.tensor([2, 0]), table, eps=half, direction=PF.Dense(V))
    torch.testing.assert_close(y, (table + 0.5 * V)[[2, 0]])


def test_embedding_options() -> None:
    """max_norm scales the table in place as in torch; a sparse gradient of the table stays so."""
    torch.manual_seed(0)
    index, V = torch.tensor([[0, 1], [2, 2]]), torch.randn(3, 2)
    eps = torch.randn(2, requires_grad=True)
    expected_table, table = (torch.nn.Parameter(5 * torch.ones(3, 2)) for _ in range(2))
    plain = F.embedding(index, expected_table, max_norm=1.0)
    y = PF.embedding(index, table, max_norm=1.0, eps=eps, direction=PF.Dense(V))
    assert torch.equal(table, expected_table)
    torch.testing.assert_close(y, plain + eps[:, None, None] * V[index])

    y = PF.embedding(index, table, sparse=True, eps=eps, direction=PF.Dense(V))
    y.sum().backward()
    assert table.grad.is_sparse
    torch.testing.assert_close(eps.grad, V[index].sum((1, 2)))


def test_frozen_bias_in_a_factored_direction() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)
    z_clean, g_clean = torch.randn(2, 4), torch.randn(2, 2)
    eps = torch.randn(3)
    y = PF.linear(x, weight, bias, eps=eps, direction=PF.Factored(z_clean, g_clean, bias=False))
    expected = PF.linear(x, weight, bias, eps=eps, direction=PF.Dense(g_clean.T @ z_clean))
    torch.testing.assert_close(y, expected)


def test_non_contiguous_tensors() -> None:
    """Channels-last images, transposed matrices and expanded gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    weight, V = (torch.randn(2, 3, 3, 3, dtype=torch.float64) for _ in range(2))
    scores = []
    for layout in (torch.contiguous_format, torch.channels_last):
        eps = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        y = PF.conv2d(
            x.contiguous(memory_format=layout),
            weight.contiguous(memory_format=layout),
            eps=eps,
            direction=PF.Dense(V.contiguous(memory_format=layout)),
        )
        y.sum().backward()
        scores.append(eps.grad)
    assert relative_error(scores[1], scores[0]) <= FLOAT64
    eps = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    x, W, V = (torch.randn(3, size, dtype=torch.float64) for size in (4, 2, 2))
    PF.linear(x.T, W.T, eps=eps, direction=PF.Dense(V.T)).sum().backward()
    assert relative_error(eps.grad, (x.T @ V).sum(1)) <= FLOAT64
