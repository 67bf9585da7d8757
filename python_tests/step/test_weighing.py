"""From scores to weights, steps without a positive score, and what a ``Step`` says of itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from l2rw_ext import Reweighter, Step, reference
from support.models import ENGINE_OPTIONS, cross_entropy, mlp, vectors


def _opposed(n: int) -> tuple[nn.Module, Any, Any]:
    """Batches on which no score is positive: the clean loss is the training loss, negated."""
    return mlp(), vectors(n), lambda out, y: -cross_entropy(out, y)


def test_statistics() -> None:
    model = mlp()
    batch, clean = vectors(6), vectors(4)
    losses = cross_entropy(model(batch[0]), batch[1]).detach()
    clean_losses = cross_entropy(model(clean[0]), clean[1]).detach()
    step = Reweighter(model, cross_entropy).backward(batch, clean)
    assert torch.allclose(step.losses, losses)
    assert torch.allclose(step.clean_loss, clean_losses.mean())
    assert torch.allclose(step.loss, (step.weights * losses).sum())
    assert float(step.weights.sum()) == pytest.approx(1)
    squares = float((step.weights**2).sum())
    assert step.effective_sample_size == pytest.approx(1 / squares)
    assert (step.degenerate, step.nonfinite) == (False, 0)
    for t in (step.weights, step.scores, step.losses, step.loss, step.clean_loss):
        assert not t.requires_grad
        assert t.grad_fn is None
    assert step.clean_loss.shape == step.loss.shape == ()


def test_effective_sample_size_of_equal_weights_is_n() -> None:
    def step(weights: Tensor) -> Step:
        return Step(weights, weights, weights, "layerwise", torch.zeros(()), None)

    assert step(torch.full((8,), 1 / 8)).effective_sample_size == pytest.approx(8)
    assert step(torch.eye(8)[3]).effective_sample_size == 1
    assert step(torch.zeros(8)).effective_sample_size == 0
    assert step(torch.zeros(8)).degenerate


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
@pytest.mark.parametrize("option", ["zero", "uniform", "skip"])
@pytest.mark.parametrize("grads", [False, True])
def test_no_positive_score(engine: Any, option: Any, grads: bool) -> None:
    model, batch, negated = _opposed(5)
    if grads:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    reweighter = Reweighter(
        model, cross_entropy, engine=engine, on_degenerate=option, clean_loss_fn=negated
    )
    x, y = batch
    one = (x[:1].expand(5, 5).contiguous(), y[:1].expand(5).contiguous())
    clean = (x[:1].clone(), y[:1])
    uniform = reference.weighted_gradient(
        copy.deepcopy(model), cross_entropy, one, torch.full((5,), 0.2)
    )
    before = {name: p.grad for name, p in model.named_parameters()}
    step = reweighter.backward(one, clean)
    assert step.degenerate
    assert (step.scores < 0).all()
    expected = torch.full((5,), 0.2 if option == "uniform" else 0.0, dtype=torch.float64)
    assert torch.allclose(step.weights, expected)
    assert torch.allclose(reweighter.weights(one, clean), expected)
    assert step.effective_sample_size == (pytest.approx(5) if option == "uniform" else 0)
    for name, p in model.named_parameters():
        if option == "skip":
            assert p.grad is before[name]
            if grads:
                assert p.grad is not None
                assert (p.grad == 1).all()
            continue
        assert p.grad is not None
        added = p.grad - 1 if grads else p.grad
        exact = uniform[name]
        assert exact is not None
        want = exact if option == "uniform" else torch.zeros_like(p)
        assert torch.allclose(added, want, atol=1e-14)


def test_uniform_weights_leave_out_what_is_not_finite() -> None:
    model, (x, y), negated = _opposed(4)
    x = x[:1].repeat(4, 1)
    y = y[:1].repeat(4)
    clean = (x[:1].clone(), y[:1])
    x[1] = float("nan")
    step = Reweighter(
        model, cross_entropy, on_degenerate="uniform", clean_loss_fn=negated
    ).backward((x, y), clean)
    assert (step.degenerate, step.nonfinite) == (True, 1)
    assert torch.allclose(step.weights, torch.tensor([1, 0, 1, 1]).double() / 3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("option", ["zero", "uniform", "skip"])
def test_no_example_with_a_finite_loss(option: Any) -> None:
    model = mlp()
    x, y = vectors(4)
    step = Reweighter(model, cross_entropy, on_degenerate=option).backward(
        (x * float("nan"), y), vectors(3)
    )
    assert (step.degenerate, step.nonfinite) == (True, 4)
    assert not step.weights.any()
    assert float(step.loss) == 0
    for p in model.parameters():
        assert p.grad is None if option == "skip" else not p.grad.any()  # type: ignore[union-attr]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
def test_weights_are_a_distribution_or_zero(n: int, m: int, seed: int) -> None:
    torch.manual_seed(seed)
    weights = Reweighter(mlp(), cross_entropy).weights(vectors(n), vectors(m))
    assert weights.shape == (n,)
    assert (weights >= 0).all()
    total = float(weights.sum())
    assert math.isclose(total, 1, rel_tol=1e-12) or total == 0


def test_a_step_prints_as_one_line() -> None:
    x, y = vectors(6)
    step = Reweighter(mlp(), cross_entropy).backward((x, y), vectors(4))
    weighted, size = int((step.weights > 0).sum()), step.effective_sample_size
    assert str(step) == (
        f"Step(n=6, engine='layerwise', loss={float(step.loss):.4g}, "
        f"clean_loss={float(step.clean_loss):.4g}, weighted={weighted}, "
        f"effective_sample_size={size:.4g})"
    )
    spoiled = x.clone()
    spoiled[2] = float("nan")
    step = Reweighter(mlp(), cross_entropy).backward((spoiled, y), vectors(4))
    assert str(step).endswith(", nonfinite=1)")


def test_a_step_whose_numbers_mean_nothing_prints() -> None:
    w = torch.zeros(3)
    text = str(Step(w, w, w, "layerwise", torch.tensor(float("nan")), None))
    assert text.startswith("Step(n=3, engine='layerwise', error='clean batch: the mean loss is nan")
