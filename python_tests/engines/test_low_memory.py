"""``low_memory`` gives the same numbers by a second backward, and keeps nothing of the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from l2rw_ext import Reweighter
from l2rw_ext.engines.layerwise.scoring import Scoring
from support.models import (
    CLASSES,
    DRAWN_NETWORKS,
    cross_entropy,
    model_of,
    vectors,
)
from support.oracle import EXACT, assert_drawn_exact, assert_matches, truth


@pytest.mark.parametrize("kind", ["vectors", "images"])
@given(data=st.data())
def test_drawn_networks(kind: str, data: st.DataObject) -> None:
    assert_drawn_exact(data.draw(DRAWN_NETWORKS[kind]), low_memory=True)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """What each step has kept of its layers."""
    kept: list[list[Any]] = []
    original = Scoring.weighted_gradients

    def spy(self: Scoring, weights: Any, *, keep: bool = False) -> Any:
        if not keep:
            kept.append(list(self._kept))
        return original(self, weights, keep=keep)

    monkeypatch.setattr(Scoring, "weighted_gradients", spy)
    return kept


def test_nothing_is_kept(kept: list[list[Any]]) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)).double()
    for low_memory in (False, True):
        Reweighter(model, cross_entropy, low_memory=low_memory).backward(vectors(6), vectors(4))
    assert [len(k) for k in kept] == [3, 0]


def _block(s: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(s.b(x))


def _offloaded(s: Any, x: torch.Tensor) -> torch.Tensor:
    with save_on_cpu():
        return _block(s, x)


def _offloaded_checkpoint(s: Any, x: torch.Tensor) -> torch.Tensor:
    with save_on_cpu():
        return checkpoint(_block, s, x, use_reentrant=False)


BLOCKS: dict[str, tuple[Any, bool]] = {
    "plain": (_block, False),
    "checkpoint": (lambda s, x: checkpoint(_block, s, x, use_reentrant=False), True),
    "reentrant checkpoint": (lambda s, x: checkpoint(_block, s, x, use_reentrant=True), True),
    "checkpoint without parameters": (
        lambda s, x: checkpoint(torch.tanh, s.b(x), use_reentrant=False),
        False,
    ),
    "other hooks": (_offloaded, False),
    "checkpoint inside of other hooks": (_offloaded_checkpoint, True),
    "other hooks inside of a checkpoint": (
        lambda s, x: checkpoint(_offloaded, s, x, use_reentrant=False),
        False,
    ),
}


@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_auto_is_on_where_the_model_checkpoints(
    name: str, two_passes: bool, kept: list[list[Any]]
) -> None:
    block, low_memory = BLOCKS[name]
    model = model_of(
        lambda s, x: s.c(block(s, torch.tanh(s.a(x)))),
        a=nn.Linear(5, 8),
        b=nn.Linear(8, 8),
        c=nn.Linear(8, CLASSES),
    ).double()
    plain = model_of(
        lambda s, x: s.c(_block(s, torch.tanh(s.a(x)))), a=model.a, b=model.b, c=model.c
    )
    batch, clean = vectors(6), vectors(4)
    expected = truth(plain, cross_entropy, batch, clean)
    layers = ["*"] if two_passes else None
    reweighter = Reweighter(model, cross_entropy, engine="layerwise", layers=layers)
    for _ in range(2):
        model.zero_grad()
        assert_matches(reweighter.backward(batch, clean), model, expected)
    assert [bool(k) for k in kept] == [not low_memory] * 2
    explanation = reweighter.explain(batch, clean)
    assert ("low_memory='auto': the model checkpoints" in explanation.memory) is low_memory
    assert bool(explanation.kept_bytes) is not low_memory


def test_auto_follows_a_model_that_begins_to_checkpoint(kept: list[list[Any]]) -> None:
    model = model_of(
        lambda s, x: s.c(BLOCKS["checkpoint" if s.saves else "plain"][0](s, torch.tanh(s.a(x)))),
        a=nn.Linear(5, 8),
        b=nn.Linear(8, 8),
        c=nn.Linear(8, CLASSES),
    ).double()
    batch, clean = vectors(6), vectors(4)
    model.saves = False
    expected = truth(model, cross_entropy, batch, clean)
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    for saves in (False, True, False, True):
        model.saves = saves
        model.zero_grad()
        assert_matches(reweighter.backward(batch, clean), model, expected)
    assert [bool(k) for k in kept] == [True, False, True, False]


def test_checkpointed_blocks_are_computed_again_for_both_backwards() -> None:
    calls = 0

    def block(s: Any, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.tanh(s.b(x))

    model = model_of(
        lambda s, x: s.c(checkpoint(block, s, torch.tanh(s.a(x)), use_reentrant=False)),
        a=nn.Linear(5, 8),
        b=nn.Linear(8, 8),
        c=nn.Linear(8, CLASSES),
    )
    batch, clean = vectors(6), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    reweighter = Reweighter(model, cross_entropy, low_memory=True)
    reweighter.backward(batch, clean)
    model.zero_grad()
    calls = 0
    step = reweighter.backward(batch, clean)
    assert step.engine == "layerwise"
    assert calls == 3
    assert_matches(step, model, expected)


@pytest.mark.parametrize("weights", ["zero", "skip"])
def test_no_positive_score(weights: Any) -> None:
    model, batch = nn.Linear(5, CLASSES).double(), vectors(1)
    step = Reweighter(
        model,
        cross_entropy,
        clean_loss_fn=lambda out, y: -cross_entropy(out, y),
        low_memory=True,
        on_degenerate=weights,
    ).backward(batch, (batch[0].clone(), batch[1]))
    assert step.degenerate
    if weights == "skip":
        assert model.weight.grad is None
    else:
        assert model.weight.grad is not None
        assert not model.weight.grad.any()


def test_examples_that_are_not_finite_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    x, y = vectors(6)
    x[2] = float("nan")
    clean = vectors(4)
    rest = [0, 1, 3, 4, 5]
    expected = truth(model, cross_entropy, (x[rest], y[rest]), clean)
    step = Reweighter(model, cross_entropy, low_memory=True).backward((x, y), clean)
    assert step.nonfinite == 1
    for name, p in model.named_parameters():
        g = expected.gradients[name]
        assert p.grad is not None
        assert g is not None
        assert float((p.grad - g).norm() / g.norm()) < EXACT


def test_tied_weights() -> None:
    model = model_of(lambda s, x: torch.tanh(s.a(x)) @ s.a.weight[:, :CLASSES], a=nn.Linear(5, 7))
    batch, clean = vectors(6), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    step = Reweighter(model, cross_entropy, low_memory=True).backward(batch, clean)
    assert step.engine == "layerwise"
    assert_matches(step, model, expected)
