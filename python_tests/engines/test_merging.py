"""Layers in factored form may be computed together, as on CUDA; here they are on the CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l2rw_ext import Reweighter, ops
from l2rw_ext.engines.layerwise import engine as layerwise
from l2rw_ext.engines.layerwise import scoring
from l2rw_ext.engines.layerwise.scoring import Scoring
from l2rw_ext.reference import relative_error
from support.models import (
    CLASSES,
    DRAWN_NETWORKS,
    Drawn,
    cross_entropy,
    mlp,
    model_of,
    vectors,
)
from support.oracle import assert_drawn_exact, assert_exact, truth


@pytest.fixture(autouse=True)
def _grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer that can take the factored form takes it, and waits."""

    def factored(use: Any, size: Any, *, without: tuple[str, ...] = ()) -> Any:
        costs = use.layer.costs(use, size)
        allowed = [form for form in ("factored", *costs) if form in costs and form not in without]
        return allowed[0], costs

    monkeypatch.setattr(layerwise, "choose_form", factored)
    monkeypatch.setattr(scoring, "in_groups", lambda g: True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.dtype]]:
    """The dtypes of the layers of each call of the grouped operator."""
    found: list[list[torch.dtype]] = []
    original = ops.factored_correlations

    def spy(z: Any, *rest: Any) -> Tensor:
        found.append([x.dtype for x in z])
        return original(z, *rest)

    monkeypatch.setattr(ops, "factored_correlations", spy)
    return found


@pytest.mark.parametrize(("kind", "count"), [("vectors", 40), ("images", 20), ("tokens", 20)])
def test_drawn_networks(kind: str, count: int) -> None:
    @settings(max_examples=count)
    @given(DRAWN_NETWORKS[kind])
    def check(drawn: Drawn) -> None:
        assert_drawn_exact(drawn)

    check()


def test_one_call_for_all_layers(calls: list[list[torch.dtype]]) -> None:
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(24)), nn.Linear(5, CLASSES)).double()
    batch, clean = vectors(6), vectors(4)
    reweighter = Reweighter(model, cross_entropy)
    for _ in range(2):
        assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)
    assert calls == [[torch.float64] * 25] * 2


def test_a_call_for_each_dtype(calls: list[list[torch.dtype]]) -> None:
    model = model_of(
        lambda s, x: s.c(torch.tanh(s.b(torch.tanh(s.a(x)).double()))),
        a=nn.Linear(5, 6),
        b=nn.Linear(6, 6),
        c=nn.Linear(6, CLASSES),
    )
    model.double()
    model.get_submodule("a").float()
    batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
    expected = truth(model, cross_entropy, batch, clean)
    step = Reweighter(model, cross_entropy).backward(batch, clean)
    assert relative_error(step.scores, expected.scores) < 1e-6
    assert sorted(map(str, (set(c) for c in calls))) == ["{torch.float32}", "{torch.float64}"]
    assert sorted(map(len, calls)) == [1, 2]


def test_layers_of_shared_weights_do_not_wait(calls: list[list[torch.dtype]]) -> None:
    model = model_of(
        lambda s, x: s.c(torch.tanh(s.a(torch.tanh(s.a(x))))),
        a=nn.Linear(5, 5),
        c=nn.Linear(5, CLASSES),
    )
    assert_exact(model, cross_entropy, vectors(6), vectors(4), engine="layerwise")
    assert calls == [[torch.float64]]


def test_examples_that_are_not_finite_stay_alone() -> None:
    model, (x, y), clean = mlp(), vectors(6), vectors(4)
    rest = [0, 1, 3, 4, 5]
    expected = truth(model, cross_entropy, (x[rest], y[rest]), clean)
    x[2] = math.nan
    step = Reweighter(model, cross_entropy).backward((x, y), clean)
    assert step.nonfinite == 1
    assert relative_error(step.scores[rest], expected.scores) < 1e-12


def test_nothing_waits_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a step does not grow: what waits lies where the kept rows lie."""
    found = []
    original = Scoring.finish

    def spy(self: Scoring) -> None:
        kept = {
            x.untyped_storage().data_ptr() for k in self._kept for x in (k.z, k.g) if x is not None
        }
        for layers in self._groups.values():
            for *tensors, _ in layers:
                found.append({x.untyped_storage().data_ptr() for x in tensors} <= kept)
        original(self)
        assert not self._groups

    monkeypatch.setattr(Scoring, "finish", spy)
    encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
    model = model_of(
        lambda s, x: s.head(s.encoder(x.transpose(0, 1)).mean(0)),
        encoder=encoder,
        head=nn.Linear(8, CLASSES),
    )
    x, clean_x = (torch.randn(size, 4, 8, dtype=torch.float64) for size in (5, 3))
    batch, clean = (x, torch.randint(CLASSES, (5,))), (clean_x, torch.randint(CLASSES, (3,)))
    reweighter = Reweighter(model, cross_entropy)
    for _ in range(2):
        assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)
    assert len(found) == 10
    assert all(found)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_waits_in_low_memory(calls: list[list[torch.dtype]], checkpointed: bool) -> None:
    def block(s: Any, x: Tensor) -> Tensor:
        return torch.tanh(s.b(x))

    def forward(s: Any, x: Tensor) -> Tensor:
        h = torch.tanh(s.a(x))
        return s.c(checkpoint(block, s, h, use_reentrant=False) if checkpointed else block(s, h))

    model = model_of(forward, a=nn.Linear(5, 8), b=nn.Linear(8, 8), c=nn.Linear(8, CLASSES))
    batch, clean = vectors(6), vectors(4)
    for low_memory in (True, False):
        reweighter = Reweighter(model, cross_entropy, low_memory=low_memory)
        for _ in range(2):
            assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)
        assert bool(calls) is not low_memory
