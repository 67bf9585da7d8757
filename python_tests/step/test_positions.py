"""``per="position"``: a score and a weight for each position of each example."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from l2rw_ext import NotExactError, Reweighter, weighing
from l2rw_ext.reference import relative_error
from support.models import CLASSES, mlp
from support.oracle import EXACT, flat, gradients_of, unchanged
from support.positions import (
    LENGTH,
    MODELS,
    PADDING,
    Language,
    expected_of,
    masked,
    next_word,
    words,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ["auto", "forward", "double_backward"])
def test_scores_weights_and_gradient(engine: Any, name: str) -> None:
    make, draw, loss_fn = MODELS[name]
    model = make().double()
    batch, clean = draw(5), draw(3)
    scores, weights, gradients = expected_of(model, loss_fn, batch, clean)
    reweighter = Reweighter(model, loss_fn, per="position", engine=engine)
    assert relative_error(reweighter.weights(batch, clean), weights) < EXACT
    step = reweighter.backward(batch, clean)
    assert step.engine == ("forward" if engine == "auto" else engine)
    assert step.scores.shape == step.weights.shape == step.losses.shape == batch[1].shape
    assert relative_error(step.scores, scores) < 1e-11
    assert relative_error(step.weights, weights) < 1e-11
    assert relative_error(flat(gradients_of(model).values()), flat(gradients)) < 1e-10
    assert float(step.weights.sum()) == pytest.approx(1)
    if loss_fn is masked:
        assert step.mask is not None
        assert torch.equal(step.mask, batch[1] != PADDING)
        for zero in (step.weights, step.scores, step.losses):
            assert not zero[~step.mask].any()
    assert step.nonfinite == 0
    assert not step.degenerate
    if engine == "auto":
        reason = reweighter.explain(batch, clean).reason
        assert "per='position': the positions of an example share activations" in reason


def test_other_weighings_leave_out_what_ismasked() -> None:
    """Of the masked positions, whose score is zero, none is among the best or in a softmax."""
    model = Language().double()
    batch, clean = words(5), words(3)
    for own, plain in (
        (weighing.softmax(0.5), lambda u: (u / 0.5).softmax(0)),
        (weighing.top_k(6), lambda u: torch.zeros_like(u).index_fill(0, u.argsort()[-6:], 1 / 6)),
    ):
        _, weights, _ = expected_of(model, masked, batch, clean, plain)
        reweighter = Reweighter(model, masked, per="position", weighing=own)
        assert relative_error(reweighter.weights(batch, clean), weights) < 1e-11


def test_micro_batches_are_one_normalisation() -> None:
    model = Language().double()
    batch, clean = words(6), words(3)
    _, weights, gradients = expected_of(model, masked, batch, clean)
    reweighter = Reweighter(model, masked, per="position")
    with reweighter.accumulate() as accumulation:
        for part in (slice(0, 2), slice(2, 6)):
            reweighter.backward((batch[0][part], batch[1][part]), clean)
    assert [tuple(w.shape) for w in accumulation.weights] == [(2, LENGTH), (4, LENGTH)]
    assert relative_error(torch.cat(accumulation.weights), weights) < 1e-11
    assert relative_error(flat(gradients_of(model).values()), flat(gradients)) < 1e-10


def test_a_mask_that_is_written_to_later() -> None:
    model = Language().double()
    x, y = words(5)
    mask = y != PADDING

    def loss_fn(outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        return next_word(outputs, targets[0]), targets[1]

    reweighter = Reweighter(model, loss_fn, per="position")
    step = reweighter.backward((x, (y, mask)), (x.clone(), (y, mask)))
    before = mask.clone()
    mask.zero_()
    assert step.mask is not None
    assert torch.equal(step.mask, before)


def test_no_position_has_a_positive_score() -> None:
    model = Language().double()
    batch = words(4)

    def negated(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, mask = masked(outputs, targets)
        return -losses, mask

    one = tuple(x[1:2, :2] for x in batch)
    clean = tuple(x.clone() for x in one)
    for option, share in (("zero", 0.0), ("uniform", 0.5)):
        reweighter = Reweighter(
            model,
            lambda out, y: (next_word(out, y).sum(1, True).expand(-1, 2), y > -1),
            clean_loss_fn=negated,
            per="position",
            on_degenerate=option,  # type: ignore[arg-type]
        )
        step = reweighter.backward(one, clean)
        assert step.degenerate
        assert step.weights.tolist() == [[share, share]]


def test_options() -> None:
    model = Language().double()
    batch, clean = words(4), words(3)
    with pytest.raises(ValueError, match=r"share activations"):
        Reweighter(model, masked, per="position", engine="layerwise")
    with pytest.raises(ValueError, match="of examples, not of positions"):
        Reweighter(model, masked, per="position", reuse="scores", every=2)
    with pytest.raises(ValueError, match="per must be one of 'example', 'position'"):
        Reweighter(model, masked, per="token")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by example, not by position"):
        Reweighter(model, masked, per="position").backward(batch, clean, index=torch.arange(4))


@pytest.mark.parametrize(
    ("loss_fn", "error", "text"),
    [
        (
            lambda out, y: next_word(out, y).mean(1),
            ValueError,
            r"shape \(3, \.\.\.\).* got shape \(3,\)\n",
        ),
        (lambda out, y: next_word(out, y).flatten(), ValueError, r"losses.view\(3, 4\)"),
        (
            lambda out, y: (next_word(out, y), y.float()),
            TypeError,
            "mask of losses must be a bool",
        ),
        (lambda out, y: (next_word(out, y), y[:, 1:] > 0), ValueError, "the shape of the losses"),
        (lambda out, y: (next_word(out, y), y < 0), ValueError, "mean loss is nan"),
    ],
)
def test_wrong_losses(loss_fn: Any, error: type[Exception], text: str) -> None:
    model = Language().double()
    reweighter = Reweighter(model, loss_fn, per="position")
    batch, clean = words(4), words(3)
    with unchanged(model), pytest.raises(error, match=text):
        reweighter.backward(batch, clean)


def test_without_the_option_the_error_names_it() -> None:
    for loss_fn in (next_word, lambda out, y: next_word(out, y).flatten()):
        with pytest.raises(ValueError, match="per='position'"):
            Reweighter(Language().double(), loss_fn).backward(words(4), words(3))


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    """The forward engine cannot leave out a position."""
    model = mlp()
    batch = torch.randn(4, 3, 5, dtype=torch.float64), torch.randint(CLASSES, (4, 3))
    clean = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(CLASSES, (2, 3))
    batch[0][1, 2] = math.nan

    reweighter = Reweighter(model, next_word, per="position")
    with unchanged(model), pytest.raises(ValueError, match=r"examples \[\[1, 2\]\] are not finite"):
        reweighter.backward(batch, clean)


def test_no_engine_is_exact() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    model = mlp()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return next_word(Hidden.apply(outputs), targets)

    batch = torch.randn(4, 3, 5, dtype=torch.float64), torch.randint(CLASSES, (4, 3))
    with pytest.raises(NotExactError, match=r"no engine is exact.*forward.*double_backward"):
        Reweighter(model, loss_fn, per="position").backward(batch, batch)
