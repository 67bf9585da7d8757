"""The oracle agrees with itself: three ways lead to the scores, and equations are as printed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F

from l2rw_ext import reference
from l2rw_ext.reference import relative_error
from support.models import (
    CLASSES,
    Drawn,
    cross_entropy,
    mlp,
    model_of,
    networks_on_vectors,
    vectors,
)
from support.oracle import as_double, cosine, signed_bias


def _forward_mode_scores(model: nn.Module, loss_fn: Any, batch: Any, clean: Any) -> Tensor:
    """u = J v by a forward tangent: no second-order pass, and no single gradients."""
    parameters = dict(reference.trainable(model))
    x, y = batch
    clean_x, clean_y = clean

    def clean_objective(p: dict[str, Tensor]) -> Tensor:
        return loss_fn(functional_call(model, p, (clean_x,)), clean_y).mean()

    def losses(p: dict[str, Tensor]) -> Tensor:
        return loss_fn(functional_call(model, p, (x,)), y)

    direction = grad(clean_objective)(parameters)
    _, scores = jvp(losses, (parameters,), (direction,))
    return scores.detach()


@settings(max_examples=25)
@given(networks_on_vectors())
def test_three_ways_to_the_scores(drawn: Drawn) -> None:
    # Torch has no forward derivative of some parametrizations.
    assume(not any("Parametrized" in type(m).__name__ for m in drawn.model.modules()))
    arguments = (drawn.model, drawn.loss_fn, drawn.batch, drawn.clean)
    loop = reference.single_gradient_scores(*arguments)
    assert relative_error(reference.meta_scores(*arguments), loop) < 1e-12
    assert relative_error(_forward_mode_scores(*arguments), loop) < 1e-12


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_train_mode(affine: bool) -> None:
    """Training and clean batch are two forwards from the same buffers."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=affine), nn.Linear(8, 3))
    model = model.double()
    copies = [copy.deepcopy(model) for _ in range(3)]
    batch, clean = vectors(6), vectors(4)
    loop = reference.single_gradient_scores(copies[0], cross_entropy, batch, clean)
    meta = reference.meta_scores(copies[1], cross_entropy, batch, clean)
    assert relative_error(meta, loop) < 1e-12
    copies[2](batch[0])
    for a, b in zip(copies[1].buffers(), copies[2].buffers(), strict=True):
        assert torch.equal(a, b)


def test_finite_differences() -> None:
    """Eq. 7 from its definition: the clean loss after a look-ahead step with a small ε_i."""
    model = mlp()
    batch, clean = vectors(3), vectors(2)
    scores = reference.meta_scores(model, cross_entropy, batch, clean)
    named = reference.trainable(model)
    for i in range(3):
        values = []
        for step in (1e-5, -1e-5):
            epsilon = torch.zeros(3, dtype=torch.float64)
            epsilon[i] = step
            losses = cross_entropy(model(batch[0]), batch[1])
            gradients = torch.autograd.grad((epsilon * losses).sum(), list(named.values()))
            moved = {k: p - g for (k, p), g in zip(named.items(), gradients, strict=True)}
            out = functional_call(model, moved, (clean[0],))
            values.append(cross_entropy(out, clean[1]).mean().item())
        slope = (values[0] - values[1]) / 2e-5
        assert scores[i].item() == pytest.approx(-slope, rel=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_equation_12_as_printed(bias: bool) -> None:
    n, m = 6, 4
    model = nn.Sequential(
        nn.Linear(5, 8, bias=bias), nn.Tanh(), nn.Linear(8, CLASSES, bias=bias)
    ).double()
    batch, clean = vectors(n), vectors(m)

    def layers(x: Tensor, objective: Callable[[Tensor], Tensor]) -> Any:
        first = model[0](x)
        hidden = torch.tanh(first)
        out = model[2](hidden)
        return [x, hidden], torch.autograd.grad(objective(out), [first, out])

    z, g = layers(batch[0], lambda out: cross_entropy(out, batch[1]).sum())
    zc, gc = layers(clean[0], lambda out: cross_entropy(out, clean[1]).mean())
    scores = reference.mlp_scores(z, g, zc, gc, bias=bias)
    loop = reference.single_gradient_scores(model, cross_entropy, batch, clean)
    assert relative_error(scores.detach(), loop) < 1e-12


def test_equation_12_needs_a_layer() -> None:
    with pytest.raises(ValueError, match="no layers"):
        reference.mlp_scores([], [], [], [])


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6))
def test_weights_sum_to_one_or_are_zero(values: list[float]) -> None:
    """Eq. 8 and 9."""
    scores = torch.tensor(values, dtype=torch.float64)
    weights = reference.weights_from_scores(scores)
    assert (weights[scores <= 0] == 0).all()
    if (scores > 0).any():
        assert float(weights.sum()) == pytest.approx(1)
        best = scores.argmax()
        positive = scores > 0
        ratio = scores[positive] / scores[best]
        assert torch.allclose(weights[positive], weights[best] * ratio)
    else:
        assert not weights.any()


def test_random_weights() -> None:
    """Eq. 16: rectified normal numbers, normalised, from the given generator."""
    weights = [
        reference.random_weights(50, generator=torch.Generator().manual_seed(k)) for k in (1, 1, 2)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].sum()) == pytest.approx(1)
    assert (weights[0] >= 0).all()
    assert 10 < int((weights[0] == 0).sum()) < 40


def test_another_loss_for_the_clean_batch() -> None:
    model = mlp()
    batch, clean = vectors(6), vectors(4)
    other = lambda out, y: (out - F.one_hot(y, CLASSES)).pow(2).sum(1)  # noqa: E731
    arguments = (model, cross_entropy, batch, clean)
    loop = reference.single_gradient_scores(*arguments, clean_loss_fn=other)
    assert relative_error(reference.meta_scores(*arguments, clean_loss_fn=other), loop) < 1e-12
    assert relative_error(reference.single_gradient_scores(*arguments), loop) > 1e-2


def test_a_loss_that_reads_the_model_sees_the_look_ahead() -> None:
    model = model_of(
        lambda s, x: s.head(x), head=nn.Linear(5, CLASSES), temperature=torch.rand(CLASSES)
    )
    loss = lambda out, y: cross_entropy(out * model.temperature, y)  # noqa: E731
    arguments = (model, loss, vectors(6), vectors(4))
    loop = reference.single_gradient_scores(*arguments)
    assert relative_error(reference.meta_scores(*arguments), loop) < 1e-12


def test_a_module_with_two_names_and_a_tied_weight_keep_their_parameters() -> None:
    inner = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 5))
    inner[3].weight = inner[0].weight
    model = model_of(lambda s, x: s.first(x)[:, :CLASSES], first=inner, second=inner)
    before = list(model.named_parameters(remove_duplicate=False))
    arguments = (model, cross_entropy, vectors(6), vectors(4))
    loop = reference.single_gradient_scores(*arguments)
    assert relative_error(reference.meta_scores(*arguments), loop) < 1e-12
    after = model.named_parameters(remove_duplicate=False)
    assert all(p is q for (_, p), (_, q) in zip(before, after, strict=True))


def test_inputs_as_tuple_and_dict() -> None:
    model = model_of(lambda s, a, b: s.a(a) + s.b(b), a=nn.Linear(5, 3), b=nn.Linear(5, 3))
    (a, y), (b, _), (clean_a, clean_y), (clean_b, _) = (
        vectors(6),
        vectors(6),
        vectors(4),
        vectors(4),
    )
    found = [
        scores(model, cross_entropy, (inputs, y), (clean_inputs, clean_y))
        for scores in (reference.meta_scores, reference.single_gradient_scores)
        for inputs, clean_inputs in (
            ((a, b), (clean_a, clean_b)),
            ({"b": b, "a": a}, {"a": clean_a, "b": clean_b}),
        )
    ]
    for other in found[1:]:
        assert relative_error(other, found[0]) < 1e-12


def test_weighted_gradient_leaves_out_and_keeps_none() -> None:
    model = mlp()
    model.extra = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    x, y = vectors(4)
    weights = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    gradients = reference.weighted_gradient(model, cross_entropy, (x, y), weights)
    assert gradients["extra.weight"] is None
    plain = torch.autograd.grad(0.5 * cross_entropy(model(x[1:3]), y[1:3]).sum(), model[0].weight)[
        0
    ]
    assert gradients["0.weight"] is not None
    assert relative_error(gradients["0.weight"], plain) < 1e-12


def test_frozen_parameters_do_not_count() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    arguments = (model, cross_entropy, vectors(6), vectors(4))
    direction = reference.clean_direction(model, cross_entropy, arguments[3])
    assert set(direction) == {"2.weight", "2.bias"}
    loop = reference.single_gradient_scores(*arguments)
    assert relative_error(reference.meta_scores(*arguments), loop) < 1e-12


def test_relative_error() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a) == 0
    assert relative_error(1.1 * a, a) == pytest.approx(0.1)
    assert relative_error(a, torch.zeros(2)) == float("inf")
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.tensor([float("nan")]), a[:1]) != 0
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        relative_error(a[:1], a)


def test_cosine() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert cosine(a, 5 * a) == pytest.approx(1)
    assert cosine(a, b) == 0
    assert cosine(a, -a) == pytest.approx(-1)
    assert cosine(0 * a, 0 * a) == 1
    assert cosine(0 * a, a) == 0


def test_signed_bias_sees_what_the_relative_error_hides() -> None:
    exact = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    noise = 0.01 * torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    assert abs(signed_bias(exact + noise, exact)) < 1e-3
    assert signed_bias(exact + 0.01, exact) == pytest.approx(0.0125, rel=0.05)
    assert signed_bias(exact, exact) == 0


def test_as_double_leaves_indices() -> None:
    tree = {"x": torch.zeros(2), "i": (torch.zeros(2, dtype=torch.int32), 3)}
    doubled = as_double(tree)
    assert doubled["x"].dtype == torch.float64
    assert doubled["i"][0].dtype == torch.int32
