"""``accumulate()`` over micro-batches, normalised once, is the step on their union."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from l2rw_ext import Reweighter, reference
from l2rw_ext.reference import relative_error
from support.models import CLASSES, ENGINES, cross_entropy, mlp, vectors
from support.oracle import EXACT, flat, gradients_of, truth, unchanged


def _parts(batch: Any, sizes: list[int]) -> list[Any]:
    return list(zip(*(x.split(sizes) for x in batch), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 100))
def test_micro_batches_are_the_step_on_their_union(
    engine: Any, sizes: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    model, batch, clean = mlp(), vectors(sum(sizes)), vectors(3)
    expected = truth(model, cross_entropy, batch, clean)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    before = {p: torch.randn_like(p) for p in model.parameters()}
    for p, g in before.items():
        p.grad = g.clone()
    with reweighter.accumulate() as accumulation:
        for number, part in enumerate(_parts(batch, sizes)):
            assert reweighter.needs_clean == (number == 0)
            reweighter.backward(part, clean if number == 0 else None)
        assert all(torch.equal(p.grad, g) for p, g in before.items())  # type: ignore[arg-type]
    assert [w.numel() for w in accumulation.weights] == sizes
    assert relative_error(torch.cat(accumulation.weights), expected.weights) < EXACT
    added = [p.grad - g for p, g in before.items() if p.grad is not None]
    assert relative_error(flat(added), flat(expected.gradients.values())) < 1e-11


def test_one_direction_serves_all() -> None:
    model, batch, clean = mlp(), vectors(6), vectors(3)
    expected = truth(model, cross_entropy, batch, clean)
    reweighter = Reweighter(model, cross_entropy)
    with reweighter.accumulate():
        for number, part in enumerate(_parts(batch, [2, 4])):
            reweighter.backward(part, clean if number == 0 else vectors(3))
    found = flat(gradients_of(model).values())
    assert relative_error(found, flat(expected.gradients.values())) < EXACT


def _negated(outputs: Tensor, targets: Tensor) -> Tensor:
    return -cross_entropy(outputs, targets)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("option", ["zero", "uniform", "skip"])
@pytest.mark.parametrize("order", [(0, 0), (0, 1), (1, 0), (0, 1, 0)])
def test_micro_batches_without_a_positive_score(
    engine: Any, option: Any, order: tuple[int, ...]
) -> None:
    """0: a part on which no score is positive; 1: one on which all are."""
    model = mlp()
    x, y = vectors(1)
    good = (x.expand(3, 5).contiguous(), y.expand(3))
    clean = (x.clone(), y)
    # Against the clean gradient: the same input with the label that gains least.
    u = [
        float(
            reference.single_gradient_scores(
                copy.deepcopy(model), cross_entropy, (x, torch.tensor([c])), clean
            )
        )
        for c in range(CLASSES)
    ]
    worst = torch.tensor(u).argmin()
    assert u[int(worst)] < 0
    bad = (good[0], worst.expand(3))
    parts = [(bad, good)[k] for k in order]
    union = tuple(torch.cat(t) for t in zip(*parts, strict=True))
    reweighter = Reweighter(model, cross_entropy, engine=engine, on_degenerate=option)
    with reweighter.accumulate() as accumulation:
        for part in parts:
            reweighter.backward(part, clean)
    expected = truth(model, cross_entropy, union, clean)
    weights = expected.weights
    if not weights.any():
        if option == "skip":
            assert all(p.grad is None for p in model.parameters())
            return
        if option == "uniform":
            weights = torch.full_like(weights, 1 / len(weights))
    assert relative_error(torch.cat(accumulation.weights), weights) < EXACT
    exact = reference.weighted_gradient(copy.deepcopy(model), cross_entropy, union, weights)
    found = gradients_of(model)
    if not weights.any():
        assert all(g is not None and not g.any() for g in found.values())
    else:
        assert relative_error(flat(found.values()), flat(exact.values())) < EXACT


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_equal_weights_beside_a_micro_batch_without_a_finite_loss(bad: int) -> None:
    model, clean = mlp(), vectors(1)
    parts = [(clean[0].expand(n, 5).clone(), clean[1].expand(n)) for n in (2, 3, 1)]
    parts[bad][0].fill_(float("nan"))
    one, other = (
        Reweighter(m, cross_entropy, clean_loss_fn=_negated, on_degenerate="uniform")
        for m in (model, copy.deepcopy(model))
    )
    with one.accumulate() as accumulation:
        for part in parts:
            one.backward(part, clean)
    step = other.backward(tuple(torch.cat(t) for t in zip(*parts, strict=True)), clean)
    assert step.weights.any()
    assert relative_error(torch.cat(accumulation.weights), step.weights) < EXACT
    found, expected = (flat(gradients_of(x.model).values()) for x in (one, other))
    assert relative_error(found, expected) < EXACT


def test_an_error_inside_leaves_nothing() -> None:
    model, batch, clean = mlp(), vectors(6), vectors(3)
    reweighter = Reweighter(model, cross_entropy)

    def interrupted() -> None:
        with reweighter.accumulate() as held:
            reweighter.backward(batch, clean)
            with pytest.raises(RuntimeError, match="known when the accumulate"):
                _ = held.weights
            raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        interrupted()
    expected = truth(model, cross_entropy, batch, clean)
    step = reweighter.backward(batch, clean)
    assert relative_error(step.weights, expected.weights) < EXACT


def test_contexts_do_not_nest() -> None:
    reweighter = Reweighter(mlp(), cross_entropy)
    with (
        pytest.raises(RuntimeError, match="entered twice"),
        reweighter.accumulate(),
        reweighter.accumulate(),
    ):
        pass


def test_an_empty_context_changes_nothing() -> None:
    model = mlp()
    with unchanged(model), Reweighter(model, cross_entropy).accumulate() as accumulation:
        pass
    assert accumulation.weights == []


def test_examples_with_infinite_losses_are_left_out() -> None:
    model = nn.Linear(5, CLASSES).double()
    x, y = vectors(6)
    x[1] = float("inf")
    clean = vectors(3)
    rest = [0, 2, 3, 4, 5]
    expected = truth(model, cross_entropy, (x[rest], y[rest]), clean)
    with Reweighter(model, cross_entropy).accumulate() as accumulation:
        pass
    reweighter = Reweighter(model, cross_entropy)
    with reweighter.accumulate() as accumulation:
        for part in _parts((x, y), [3, 3]):
            reweighter.backward(part, clean)
    weights = torch.cat(accumulation.weights)
    assert weights[1] == 0
    assert relative_error(weights[rest], expected.weights) < EXACT
    found = flat(gradients_of(model).values())
    assert relative_error(found, flat(expected.gradients.values())) < EXACT


def test_a_state_that_is_averaged_moves_once() -> None:
    model = mlp()
    reweighter = Reweighter(model, cross_entropy, every=2)
    clean = vectors(3)
    with reweighter.accumulate():
        for _ in range(3):
            reweighter.backward(vectors(2), clean)
    assert not reweighter.needs_clean
    with reweighter.accumulate():
        reweighter.backward(vectors(2))
    assert reweighter.needs_clean


def test_parameters_that_change_between_micro_batches() -> None:
    model, batch, clean = mlp(), vectors(6), vectors(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reweighter = Reweighter(model, cross_entropy)
    reweighter.backward(batch, clean)
    match = r"call optimizer.step\(\) when the context has ended"
    with reweighter.accumulate():
        reweighter.backward(batch, clean)
        optimizer.step()
        with pytest.raises(RuntimeError, match=match):
            reweighter.backward(batch, clean)


def test_effective_sample_size_is_that_of_all_micro_batches() -> None:
    reweighter = Reweighter(mlp(), cross_entropy)
    x, y = vectors(8)
    with reweighter.accumulate() as accumulation:
        assert repr(accumulation) == "Accumulation(not ended)"
        for part in (slice(0, 5), slice(5, 8)):
            reweighter.backward((x[part], y[part]), vectors(4))
    w = torch.cat(accumulation.weights)
    size = 1 / float((w**2).sum())
    assert accumulation.effective_sample_size == pytest.approx(size)
    assert repr(accumulation) == f"Accumulation(n=[5, 3], effective_sample_size={size:.4g})"
