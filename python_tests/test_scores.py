"""Scores alone: along the direction of one clean batch, or of several in one training pass."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.engines.layerwise.scoring import Scoring
from l2rw_ext.reference import relative_error
from l2rw_ext.task.task import Combination
from support.models import CLASSES, ENGINES, cross_entropy, mlp, model_of, normed, vectors
from support.oracle import EXACT, unchanged
from support.single_gradients import MODELS, direction_of, single_gradients

Model = tuple[nn.Module, Any, dict[str, Any]]


def _drawn(name: str, n: int = 5) -> Model:
    torch.manual_seed(0)
    make, batch = MODELS[name]
    return make(), batch(n), {"first": batch(3), "second": batch(4), "third": batch(1)}


def _exact(model: nn.Module, batch: Any, sets: dict[str, Any]) -> Tensor:
    gradients = single_gradients(model, batch)
    return torch.stack([gradients @ direction_of(model, clean) for clean in sets.values()], 1)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_several_sets(name: str, low_memory: bool) -> None:
    model, batch, sets = _drawn(name)
    reweighter = Reweighter(model, cross_entropy, engine="layerwise", low_memory=low_memory)
    exact = _exact(model, batch, sets)
    for _ in range(2):  # the first makes a plan and a proof, the second follows the plan
        with unchanged(model):
            scores = reweighter.scores(batch, sets)
        assert scores.shape == (5, 3)
        assert not scores.requires_grad
        assert relative_error(scores, exact) <= EXACT
    assert relative_error(reweighter.scores(batch, {"only": sets["third"]}), exact[:, 2:]) <= EXACT


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_one_set_is_that_of_a_step(engine: Any) -> None:
    model, batch, sets = _drawn("mlp")
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    with unchanged(model):
        scores = reweighter.scores(batch, sets["first"])
    assert scores.shape == (5,)
    assert relative_error(scores, _exact(model, batch, sets)[:, 0]) <= EXACT
    assert relative_error(scores, reweighter.backward(batch, sets["first"]).scores) <= EXACT


@pytest.mark.parametrize("engine", ["auto", "forward", "double_backward"])
def test_a_model_whose_examples_meet(engine: Any) -> None:
    torch.manual_seed(0)
    model, batch = normed(), vectors(6)
    sets = {"first": vectors(4), "second": vectors(3)}
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    exact = _exact(model, batch, sets)
    for _ in range(2):
        with unchanged(model):
            assert relative_error(reweighter.scores(batch, sets), exact) <= EXACT


def test_a_forced_engine_that_is_not_exact_is_an_error() -> None:
    model, batch, clean = normed(), vectors(6), vectors(4)
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    with pytest.raises(NotExactError, match="BatchNorm"), unchanged(model):
        reweighter.scores(batch, {"first": clean})


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm1d])
def test_all_columns_have_the_same_masks(norm: Any) -> None:
    torch.manual_seed(0)
    batch, clean = vectors(6), vectors(4)
    model = model_of(
        lambda m, x: m.last(F.dropout(m.norm(m.first(x)), 0.5, training=x.shape[0] == 6)),
        first=nn.Linear(5, 8),
        norm=norm(8),
        last=nn.Linear(8, CLASSES),
    )
    scores = Reweighter(model, cross_entropy).scores(batch, {"a": clean, "b": clean})
    assert torch.equal(scores[:, 0], scores[:, 1])


@pytest.mark.parametrize(
    "options", [{"layers": ["2"]}, {"l2": 0.3}, {"preconditioner": "sgd"}, {"compile": "eager"}]
)
def test_options_apply_to_each_set(options: dict[str, Any]) -> None:
    model, batch, sets = _drawn("mlp")
    if "preconditioner" in options:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        Reweighter(model, cross_entropy).backward(batch, sets["first"])
        optimizer.step()
        optimizer.zero_grad()
        options = {"preconditioner": optimizer}
    reweighter = Reweighter(model, cross_entropy, **options)
    with unchanged(model):
        scores = reweighter.scores(batch, sets)
    for column, clean in zip(scores.T, sets.values(), strict=True):
        own = Reweighter(model, cross_entropy, **options).scores(batch, clean)
        assert relative_error(column, own) <= EXACT


def test_sets_that_are_opposite_or_zero_or_of_other_sizes_of_gradient() -> None:
    """The proof compares a combination in which no direction may hide."""
    model, batch, _ = _drawn("mlp")

    def clean_loss(outputs: Tensor, factors: Tensor) -> Tensor:
        return (
            F.cross_entropy(outputs, torch.zeros_like(factors).long(), reduction="none") * factors
        )

    x = torch.randn(3, 5, dtype=torch.float64)
    factors = {"one": 1.0, "opposite": -1.0, "small": 1e-9, "zero": 0.0}
    sets = {name: (x, torch.full((3,), c, dtype=torch.float64)) for name, c in factors.items()}
    reweighter = Reweighter(model, cross_entropy, clean_loss_fn=clean_loss, engine="layerwise")
    scores = reweighter.scores(batch, sets)
    for column, c in zip(scores.T, factors.values(), strict=True):
        assert relative_error(column, c * scores[:, 0]) <= EXACT
    assert scores[:, 0].abs().min() > 0


@pytest.mark.parametrize("wrong", range(3))
def test_the_proof_covers_every_set(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Scoring.finish

    def finish_wrongly(self: Scoring) -> None:
        self._sums[wrong] *= 1.01
        finish(self)

    monkeypatch.setattr(Scoring, "finish", finish_wrongly)
    model, batch, sets = _drawn("mlp")
    sets["second"] = (1e-6 * sets["second"][0], sets["second"][1])
    with pytest.raises(NotExactError, match="plain autograd"):
        Reweighter(model, cross_entropy, engine="layerwise").scores(batch, sets)


def test_a_combination_is_a_mapping() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([2.0])
    found = Combination([{1: a}, {1: 2 * a, 2: b}, {}])
    assert (list(found), len(found), found.get(3)) == ([1, 2], 2, None)
    first, second, third = found.factors.tolist()
    assert (first, third) == (0.2, 0.0)
    torch.testing.assert_close(found[1], (first + 2 * second) * a)
    torch.testing.assert_close(found[2], second * b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, batch = mlp(dtype=torch.float32), vectors(6, dtype=torch.float32)
    sets = {name: vectors(5, dtype=torch.float32) for name in "ab"}
    exact = _exact(model, batch, sets)
    with torch.autocast("cpu", dtype):
        scores = Reweighter(model, cross_entropy, engine="layerwise").scores(batch, sets)
    assert scores.dtype == torch.float32
    assert relative_error(scores, exact) <= 8 * torch.finfo(dtype).eps


def test_an_example_that_is_not_finite_has_no_score() -> None:
    model, (x, y), sets = _drawn("mlp")
    x[2] = float("nan")
    scores = Reweighter(model, cross_entropy).scores((x, y), sets)
    assert scores.isfinite().all(1).tolist() == [True, True, False, True, True]


def test_errors_name_the_set() -> None:
    model, batch, sets = _drawn("mlp")
    reweighter = Reweighter(model, cross_entropy)
    for broken in ((torch.randn(3, 4).double(), sets["first"][1]), None):
        with pytest.raises((RuntimeError, TypeError)) as raised, unchanged(model):
            reweighter.scores(batch, {**sets, "broken": broken})
        if sys.version_info >= (3, 11):
            assert any("clean batch 'broken'" in note for note in raised.value.__notes__)
    infinite = torch.full((3, 5), float("inf"), dtype=torch.float64), sets["first"][1]
    with pytest.raises(ValueError, match="mean loss is nan"), unchanged(model):
        reweighter.scores(batch, {**sets, "broken": infinite})
    with pytest.raises(ValueError, match="mapping is empty"):
        reweighter.scores(batch, {})
    for options in ({"every": 2}, {"direction_decay": 0.5}):
        for given in (sets, sets["first"]):
            with pytest.raises(ValueError, match="remember a direction"):
                Reweighter(model, cross_entropy, **options).scores(batch, given)  # type: ignore[arg-type]
    with reweighter.accumulate(), pytest.raises(RuntimeError, match="outside of accumulate"):
        reweighter.scores(batch, sets)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_scores_ask_no_weighing_and_leave_what_is_not_finite(engine: Any) -> None:
    model, batch, sets = _drawn("mlp")
    batch[0][2] = float("nan")
    rest = torch.tensor([0, 1, 3, 4])
    exact = _exact(model, tuple(x[rest] for x in batch), sets)
    reweighter = Reweighter(model, cross_entropy, engine=engine, weighing=lambda u: u - 1e9)
    scores = reweighter.scores(batch, sets["first"])
    assert scores.isnan().tolist() == [False, False, True, False, False]
    assert relative_error(scores[rest], exact[:, 0]) <= EXACT
