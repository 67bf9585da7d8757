"""An engine's own errors go on to the next engine; those of plain training are the user's."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import NotExactError, Reweighter
from support.models import CLASSES, ENGINE_OPTIONS, cross_entropy, model_of, vectors
from support.oracle import assert_exact, assert_exact_steps, unchanged

every_option = pytest.mark.parametrize("engine", ENGINE_OPTIONS)
pytestmark = pytest.mark.filterwarnings("ignore:l2rw_ext")

# Inner gradients.


def _net(x: Tensor, parameters: Any) -> Tensor:
    weight, bias, head, head_bias = parameters
    return F.linear(torch.tanh(F.linear(x, weight, bias)), head, head_bias)


def _adapted(parameters: Any, gradients: Any) -> list[Tensor]:
    return [p if g is None else p - 0.4 * g for p, g in zip(parameters, gradients, strict=True)]


def _one_support_set(s: Any, x: Tensor, support: Tensor, labels: Tensor) -> Tensor:
    """MAML on the union of all support sets, as for a batch of one task."""
    own = list(s.parameters())
    inner = F.cross_entropy(_net(support, own).flatten(0, -2), labels.flatten())
    return _net(x, _adapted(own, torch.autograd.grad(inner, own, create_graph=True)))


def _one_for_each_example(s: Any, x: Tensor, support: Tensor, labels: Tensor) -> Tensor:
    own = list(s.parameters())
    outs = []
    for query, few, label in zip(x, support, labels, strict=True):
        inner = F.cross_entropy(_net(few, own), label)
        outs.append(_net(query, _adapted(own, torch.autograd.grad(inner, own, create_graph=True))))
    return torch.stack(outs)


def _tasks(n: int) -> Any:
    x, y = vectors(n)
    return (x, torch.randn(n, 3, 5, dtype=x.dtype), torch.randint(CLASSES, (n, 3))), y


@pytest.mark.parametrize("forward", [_one_support_set, _one_for_each_example])
def test_inner_steps(forward: Any) -> None:
    model = model_of(forward, a=nn.Linear(5, 6), head=nn.Linear(6, CLASSES))
    reweighter = Reweighter(model, cross_entropy)
    assert_exact_steps(
        *(model, cross_entropy, _tasks(6), _tasks(4), reweighter), engine="double_backward"
    )


def _allowing_unused(s: Any, x: Tensor, *, create_graph: bool) -> Tensor:
    own = list(s.a.parameters())
    inner = s.a(x).pow(2).mean()
    gradients = torch.autograd.grad(inner, own, create_graph=create_graph, allow_unused=True)
    return s.head(torch.tanh(F.linear(x, *_adapted(own, gradients))))


def _first_order(s: Any, x: Tensor) -> Tensor:
    return _allowing_unused(s, x, create_graph=False)


def _second_order(s: Any, x: Tensor) -> Tensor:
    return _allowing_unused(s, x, create_graph=True)


def _functional(s: Any, x: Tensor) -> Tensor:
    own = dict(s.a.named_parameters())
    inner = lambda p: torch.func.functional_call(s.a, p, (x,)).pow(2).mean()  # noqa: E731
    gradients = torch.func.grad(inner)(own)
    return s.head(torch.tanh(F.linear(x, *_adapted(own.values(), gradients.values()))))


def _force(s: Any, x: Tensor) -> Tensor:
    """The gradient of an energy by the positions, as in models of molecules."""
    x = x.detach().requires_grad_()
    energy = s.head(torch.tanh(s.a(x))).pow(2).sum()
    return torch.autograd.grad(energy, x, create_graph=True)[0]


def _adversarial(s: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(s.head(torch.tanh(s.a(x))).pow(2).sum(), x)
    return s.head(torch.tanh(s.a(x.detach() + 0.1 * g)))


INNER: dict[Callable[..., Tensor], str] = {
    _first_order: "forward",
    _second_order: "double_backward",
    _functional: "double_backward",
    _force: "double_backward",
    _adversarial: "layerwise",
}


@pytest.mark.parametrize("forward", INNER)
def test_gradients_inside_the_forward(forward: Any) -> None:
    """Where torch is allowed to say that a parameter is unused, nothing would raise."""
    model = model_of(forward, a=nn.Linear(5, 6), head=nn.Linear(6, CLASSES))
    batch, clean = vectors(6), vectors(4)
    if forward is _force:
        model.a = nn.Linear(CLASSES, 6).double()
        (batch, clean) = (vectors(n, CLASSES) for n in (6, 4))
    assert_exact(model, cross_entropy, batch, clean, engine=INNER[forward])


def test_a_penalty_on_the_gradient_of_the_inputs() -> None:
    def forward(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = s.head(torch.tanh(s.a(x)))
        return out, torch.autograd.grad(out.sum(), x, create_graph=True)[0]

    def loss(out: Any, y: Tensor) -> Tensor:
        return cross_entropy(out[0], y) + (out[1].norm(dim=1) - 1).pow(2)

    model = model_of(forward, a=nn.Linear(5, 6), head=nn.Linear(6, CLASSES))
    assert_exact(model, loss, vectors(6), vectors(4), engine="double_backward")


def test_a_gradient_of_a_parameter_that_the_forward_reads() -> None:
    """A value of before the step, whichever engine; layer-wise it would be of before as well."""
    model = model_of(lambda s, x: s.a(x) * s.a.weight.grad.sum(), a=nn.Linear(5, CLASSES))
    model.a.weight.grad = torch.rand(CLASSES, 5, dtype=torch.float64)
    refused = pytest.raises(NotExactError, match=r"asks for the gradient of a\.weight")
    batches = vectors(6), vectors(4)
    with refused, unchanged(model):
        Reweighter(model, cross_entropy, engine="layerwise").backward(*batches)


# Whose error it is.


class MyError(Exception):
    """One that only a user knows."""


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise MyError("in the backward")


def _raising(s: Any, x: Tensor) -> Tensor:
    raise MyError("in the forward")


def _failing_on_clean(s: Any, x: Tensor) -> Tensor:
    if len(x) == 4:
        raise MyError("in the clean forward")
    return s.a(x)


def _failing_loss(out: Tensor, y: Tensor) -> Tensor:
    raise MyError("in the loss")


FAILURES: dict[str, tuple[Any, Any]] = {
    "in the forward": (_raising, cross_entropy),
    "in the clean forward": (_failing_on_clean, cross_entropy),
    "in the loss": (lambda s, x: s.a(x), _failing_loss),
    "in the backward": (lambda s, x: _FailingBackward.apply(s.a(x)), cross_entropy),
}


@every_option
@pytest.mark.parametrize("where", FAILURES)
def test_an_error_of_plain_training_comes_out_as_it_is(where: str, engine: Any) -> None:
    forward, loss = FAILURES[where]
    model = model_of(forward, a=nn.Linear(5, CLASSES))
    batches = vectors(6), vectors(4)
    with unchanged(model), pytest.raises(MyError) as caught:
        Reweighter(model, loss, engine=engine).backward(*batches)
    error = caught.value
    assert str(error) == where
    assert error.__cause__ is error.__context__ is None
    assert traceback.extract_tb(error.__traceback__)[-1].filename == __file__


def test_the_engine_stays_after_an_error_of_the_users() -> None:
    model = model_of(lambda s, x: s.a(x), a=nn.Linear(5, CLASSES))
    reweighter = Reweighter(model, cross_entropy)
    (x, y), clean = vectors(6), vectors(4)
    with pytest.raises((IndexError, RuntimeError)) as caught:
        reweighter.backward((x, y + CLASSES), clean)
    assert not isinstance(caught.value, NotExactError)
    assert reweighter.backward((x, y), clean).engine == "layerwise"


@every_option
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt])
def test_some_errors_end_a_step_at_once(error: Any, engine: Any) -> None:
    calls: list[int] = []

    def forward(s: Any, x: Tensor) -> Tensor:
        calls.append(len(x))
        raise error("no more")

    model, batches = model_of(forward, a=nn.Linear(5, CLASSES)), (vectors(6), vectors(4))
    with unchanged(model), pytest.raises(error):
        Reweighter(model, cross_entropy, engine=engine).backward(*batches)
    assert len(calls) <= 2  # a merged batch is tried before the separate ones


class _Deformed(torch.autograd.Function):
    """As torchvision's operators say that they have no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _DeformedBackward.apply(g, *ctx.saved_tensors)


class _DeformedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        return g * x.cos()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        raise RuntimeError("double backwards on deform_conv2d not supported")


def _deformed(*, coupled: bool) -> nn.Module:
    return model_of(
        lambda s, x: s.head(_Deformed.apply(s.norm(s.a(x)))),
        a=nn.Linear(5, 6),
        norm=nn.BatchNorm1d(6) if coupled else nn.Identity(),
        head=nn.Linear(6, CLASSES),
    )


def test_without_a_second_derivative() -> None:
    model = _deformed(coupled=False)
    batch, clean = vectors(6), vectors(4)
    assert_exact(model, cross_entropy, batch, clean, engine="layerwise")
    message = (
        "the double_backward engine fails where plain training does not: RuntimeError: double "
        "backwards on deform_conv2d not supported"
    )
    with unchanged(model), pytest.raises(NotExactError, match=message) as caught:
        Reweighter(model, cross_entropy, engine="double_backward").backward(batch, clean)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_if_no_engine_is_exact_the_error_says_why_of_each() -> None:
    model = _deformed(coupled=True)
    batch, clean = vectors(6), vectors(4)
    message = (
        "no engine is exact for this model: layerwise: a BatchNorm in train mode couples.*; "
        "forward: the forward engine fails where plain training does not: .*forward mode AD.*; "
        "double_backward: .*deform_conv2d not supported"
    )
    with unchanged(model), pytest.raises(NotExactError, match=message):
        Reweighter(model, cross_entropy).backward(batch, clean)


def test_an_engine_that_failed_is_not_tried_again() -> None:
    sizes: list[int] = []

    def forward(s: Any, x: Tensor) -> Tensor:
        sizes.append(len(x))
        if s.fails and torch.overrides._get_current_function_mode_stack():
            raise RuntimeError("not under a mode")
        return s.a(x)

    model = model_of(forward, a=nn.Linear(5, CLASSES))
    model.fails = True
    reweighter = Reweighter(model, cross_entropy)
    batch, clean = vectors(6), vectors(4)
    for merged in (2, 0):  # plain autograd's for a proof, and the engine's
        sizes.clear()
        with pytest.raises(NotExactError, match=r"no engine is exact.* not under a mode"):
            reweighter.backward(batch, clean)
        assert sizes.count(10) == merged
    # Only that kind of step, and where the layer-wise engine was not asked for by name.
    model.fails = False
    assert reweighter.backward(vectors(5), clean).engine == "layerwise"
    forced = Reweighter(model, cross_entropy, engine="layerwise")
    model.fails = True
    with pytest.raises(NotExactError, match="not under a mode"):
        forced.backward(batch, clean)
    model.fails = False
    assert forced.backward(batch, clean).engine == "layerwise"
