"""Loss functions that are modules, with parameters and buffers of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import Reweighter, reference
from l2rw_ext.reference import relative_error
from support.models import CLASSES, ENGINES, cross_entropy, mlp, model_of, vectors
from support.oracle import (
    EXACT,
    assert_exact,
    assert_exact_steps,
    assert_matches,
    flat,
    gradients_of,
    truth,
    unchanged,
    zero_grad,
)


class _Arc(nn.Module):
    """ArcFace without its margin: cosines with one trained row for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, CLASSES, dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(outputs), F.normalize(self.weight))
        return cross_entropy(8 * cosines, targets)


def _normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)
    ).double()


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_of_the_loss_belong_to_the_step(engine: Any) -> None:
    model = mlp() if engine == "layerwise" else _normed()
    loss = _Arc()
    reweighter = Reweighter(model, loss, engine=engine)
    assert_exact_steps(model, loss, vectors(6), vectors(4), reweighter, engine=engine)
    assert loss.weight.grad is not None
    assert (
        relative_error(
            reweighter.weights(b := vectors(6), c := vectors(4)), truth(model, loss, b, c).weights
        )
        <= EXACT
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_loss_is_trained(engine: Any) -> None:
    model, loss = mlp().requires_grad_(False), _Arc()
    assert_exact_steps(
        model, loss, vectors(6), vectors(4), Reweighter(model, loss, engine=engine), engine=engine
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_clean_loss_of_its_own(engine: Any) -> None:
    """What only the clean loss reaches has no gradient, and no part in the scores."""
    model, loss, clean_loss = mlp(), _Arc(), _Arc()
    clean_loss.shared = loss
    reweighter = Reweighter(model, loss, clean_loss_fn=clean_loss, engine=engine)
    assert_exact(
        *(model, loss, vectors(6), vectors(4)), reweighter=reweighter, clean_loss_fn=clean_loss
    )
    assert clean_loss.weight.grad is None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_of_both_counts_once(engine: Any) -> None:
    arc = _Arc()
    model = model_of(lambda s, x: s.body(x), body=mlp(), arc=arc)
    for loss in (arc, _Through(arc)):
        reweighter = Reweighter(model, loss, engine=engine)
        assert_exact(model, loss, vectors(6), vectors(4), reweighter=reweighter)
        assert list(reference.trainable(model, loss)) == list(reference.trainable(model))
        assert arc.weight.grad is not None


class _Through(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = self.inner(outputs, targets)
        return losses


def test_reference_agrees_with_itself() -> None:
    arguments = (_normed(), _Arc(), vectors(6), vectors(4))
    for clean_loss in (None, _Arc(), arguments[1]):
        found = [
            scores(*copy.deepcopy(arguments), clean_loss_fn=copy.deepcopy(clean_loss))
            for scores in (reference.meta_scores, reference.single_gradient_scores)
        ]
        assert relative_error(*found) <= EXACT
    named = reference.trainable(arguments[0], arguments[1], arguments[1])
    assert list(named) == [*dict(arguments[0].named_parameters()), "loss_fn.weight"]


@pytest.mark.parametrize("engine", ENGINES)
def test_scores_over_the_loss_alone(engine: Any) -> None:
    model, loss = mlp(), _Arc()
    batch, clean = vectors(6), vectors(4)
    step = Reweighter(model, loss, engine=engine, layers=["loss_fn.*"]).backward(batch, clean)
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert relative_error(step.scores, truth(frozen, loss, batch, clean).scores) <= EXACT
    assert model[0].weight.grad is not None
    for name in ("loss_fn", "loss_fn.weight"):
        other = Reweighter(model, loss, engine=engine, layers=[name])
        assert relative_error(other.weights(batch, clean), step.weights) <= EXACT


def test_a_direction_is_held_with_the_loss() -> None:
    model, loss = mlp(), _Arc()
    batch, clean = vectors(6), vectors(4)
    reweighter = Reweighter(model, loss, every=2)
    first = reweighter.backward(batch, clean)
    state = reweighter.state_dict()
    assert "loss_fn.weight" in state["direction"]["direction"]["values"]
    other = Reweighter(model, loss, every=2)
    other.load_state_dict(state)
    assert not other.needs_clean
    assert relative_error(other.weights(batch), first.weights) <= EXACT
    with pytest.raises(ValueError, match=r"'loss_fn\.weight'; the model has no such parameter"):
        Reweighter(model, cross_entropy, every=2).load_state_dict(state)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{"l2": 0.1}, {"direction_decay": 0.5}], ids=str)
def test_options_reach_the_loss(options: Any, engine: Any) -> None:
    model, loss = mlp(), _Arc()
    batch, clean = vectors(6), vectors(4)
    l2 = options.get("l2", 0.0)
    v = reference.clean_direction(model, loss, clean)
    named = reference.trainable(model, loss)
    values = {k: v[k] + l2 * p.detach() * (p.dim() > 1) for k, p in named.items()}
    losses = loss(model(batch[0]), batch[1])
    scores = []
    for f in losses:
        found = torch.autograd.grad(f, list(named.values()), retain_graph=True)
        scores.append(sum((g * values[k]).sum() for k, g in zip(named, found, strict=True)))
    step = Reweighter(model, loss, engine=engine, **options).backward(batch, clean)
    assert relative_error(step.scores, torch.stack(scores)) <= EXACT


def test_an_optimiser_that_holds_the_loss_is_a_preconditioner() -> None:
    model, loss = mlp(), _Arc()
    optimizer = torch.optim.SGD(
        [{"params": model.parameters()}, {"params": loss.parameters(), "lr": 0.3}], lr=0.1
    )
    batch, clean = vectors(6), vectors(4)
    step = Reweighter(model, loss, preconditioner=optimizer).backward(batch, clean)
    plain, over_loss = (
        Reweighter(model, loss, layers=names).backward(batch, clean).scores
        for names in (["[0-9].*"], ["loss_fn"])
    )
    assert relative_error(step.scores, plain + 3 * over_loss) <= EXACT


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches(engine: Any) -> None:
    model, loss = mlp(), _Arc()
    (x, y), clean = vectors(6), vectors(4)
    Reweighter(model, loss, engine=engine).backward((x, y), clean)
    whole = flat(gradients_of(model, loss).values())
    zero_grad(model, loss)
    reweighter = Reweighter(model, loss, engine=engine)
    with reweighter.accumulate():
        for part in (slice(0, 2), slice(2, 6)):
            reweighter.backward((x[part], y[part]), clean)
    assert relative_error(flat(gradients_of(model, loss).values()), whole) <= EXACT


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_scale(engine: Any) -> None:
    model, loss = mlp(), _Arc()
    batch, clean = vectors(6), vectors(4)
    expected = truth(model, loss, batch, clean)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    step = Reweighter(model, loss, engine=engine).backward(batch, clean, grad_scaler=scaler)
    for p in reference.trainable(model, loss).values():
        assert p.grad is not None
        p.grad /= 64
    assert_matches(step, model, expected, loss_fn=loss)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("clean_only", [False, True])
def test_a_parameter_that_nobody_holds_is_an_error(
    engine: Any, normed: bool, clean_only: bool
) -> None:
    if normed and engine == "layerwise":
        return  # refused before any loss is known
    model, head = (_normed() if normed else mlp()), nn.Linear(CLASSES, CLASSES).double()
    loss = lambda out, y: cross_entropy(head(out), y)  # noqa: E731
    losses = {"loss_fn": cross_entropy, "clean_loss_fn": loss} if clean_only else {"loss_fn": loss}
    reweighter = Reweighter(model, engine=engine, **losses)
    batch, clean = vectors(6), vectors(4)
    for _ in range(2):
        with (
            unchanged(model),
            pytest.raises(ValueError, match=r"parameter of shape \(3, 3\) .*; register it in one"),
        ):
            reweighter.backward(batch, clean)
    head.requires_grad_(False)
    reweighter.backward(batch, clean)


def test_a_remembered_step_knows_the_parameter_that_nobody_holds() -> None:
    model, head = mlp(), nn.Linear(CLASSES, CLASSES).double().requires_grad_(False)
    loss = lambda out, y: cross_entropy(head(out), y)  # noqa: E731
    reweighter = Reweighter(model, loss, every=2, reuse="scores")
    index = torch.arange(6)
    batch = vectors(6)
    reweighter.backward(batch, vectors(4), index=index)
    head.requires_grad_()
    with unchanged(model), pytest.raises(ValueError, match="register it in one"):
        reweighter.backward(batch, index=index)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_leaf_that_is_no_parameter_is_an_input(engine: Any) -> None:
    """In the loss, in the forward, and as an input, whose flag the forward of another step set."""
    margin = torch.full((), 0.5, dtype=torch.float64, requires_grad=True)
    model = model_of(lambda s, x: s.head(x.requires_grad_()), head=nn.Linear(5, CLASSES))
    loss = lambda out, y: cross_entropy(out * margin, y)  # noqa: E731
    reweighter = Reweighter(model, loss, engine=engine)
    batch, clean = vectors(6), vectors(4)
    for _ in range(3):
        assert_exact(model, loss, batch, clean, reweighter=reweighter)
        assert margin.grad is None
        assert batch[0].grad is None


def test_names_that_clash() -> None:
    model = mlp()
    model.loss_fn = _Arc()
    with pytest.raises(ValueError, match="have the same name"):
        Reweighter(model, _Arc())
    Reweighter(model, model.loss_fn)
    Reweighter(model, cross_entropy)
