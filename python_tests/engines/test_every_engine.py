"""What all engines must do alike is tested once, for every engine that it holds for."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from l2rw_ext import Reweighter
from l2rw_ext.reference import relative_error
from support.models import (
    CLASSES,
    DRAWN_NETWORKS,
    ENGINES,
    Drawn,
    cross_entropy,
    model_of,
    vectors,
)
from support.oracle import assert_exact, truth

every_engine = pytest.mark.parametrize("engine", ENGINES)

# How many networks an engine is tried on: most of the code is the layer-wise engine's.
DRAWS = {
    ("layerwise", "vectors"): 100,
    ("layerwise", "images"): 60,
    ("layerwise", "tokens"): 30,
    ("forward", "vectors"): 30,
    ("forward", "images"): 30,
    ("forward", "tokens"): 20,
}


@pytest.mark.parametrize(("engine", "kind"), DRAWS)
def test_drawn_networks(engine: Any, kind: str) -> None:
    """No warning either, but for one of torch's own."""

    @settings(max_examples=DRAWS[engine, kind])
    @given(DRAWN_NETWORKS[kind])
    def check(drawn: Drawn) -> None:
        with warnings.catch_warnings():
            if engine == "layerwise":
                warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
            reweighter = Reweighter(drawn.model, drawn.loss_fn, engine=engine)
            assert_exact(
                drawn.model, drawn.loss_fn, drawn.batch, drawn.clean, reweighter=reweighter
            )

    check()


@every_engine
@pytest.mark.parametrize("by", ["attribute", "reference"])
def test_parameters_in_the_loss_function(engine: Any, by: str) -> None:
    model = model_of(
        lambda s, x: s.head(x), head=nn.Linear(5, CLASSES), temperature=torch.rand(CLASSES)
    )
    held = list(model.parameters())

    def loss(out: Tensor, y: Tensor) -> Tensor:
        parameters = held if by == "reference" else list(model.parameters())
        penalty = sum(p.pow(2).sum() for p in parameters)
        return cross_entropy(out * model.temperature, y) + 0.1 * penalty

    reweighter = Reweighter(model, loss, engine=engine)
    assert_exact(model, loss, vectors(6), vectors(4), reweighter=reweighter, copied=False)


@every_engine
def test_parameters_that_only_one_batch_reaches(engine: Any) -> None:
    model = model_of(
        lambda s, x: {"a": s.a(h := torch.tanh(s.trunk(x))), "b": s.b(h)},
        trunk=nn.Linear(5, 6),
        a=nn.Linear(6, CLASSES),
        b=nn.Linear(6, CLASSES),
    )
    loss = lambda out, y: cross_entropy(out["a"], y)  # noqa: E731
    clean_loss = lambda out, y: cross_entropy(out["b"], y)  # noqa: E731
    reweighter = Reweighter(model, loss, engine=engine, clean_loss_fn=clean_loss)
    batches = vectors(6), vectors(4)
    assert_exact(model, loss, *batches, reweighter=reweighter, clean_loss_fn=clean_loss)
    assert model.b.weight.grad is None


@every_engine
@pytest.mark.parametrize("bend", [torch.tanh, lambda x: x], ids=["bent", "straight"])
def test_batches_that_share_no_parameter_score_zero(engine: Any, bend: Any) -> None:
    model = model_of(
        lambda s, x: (s.a(x), s.b(x)), a=nn.Linear(5, CLASSES), b=nn.Linear(5, CLASSES)
    )
    step = Reweighter(
        model,
        lambda out, y: cross_entropy(bend(out[0]), y),
        clean_loss_fn=lambda out, y: cross_entropy(out[1], y),
        engine=engine,
    ).backward(vectors(6), vectors(4))
    assert not step.scores.any()


@every_engine
@pytest.mark.parametrize("derived", [False, True])
def test_hooks_on_parameters_fire_once_on_the_gradient(engine: Any, derived: bool) -> None:
    model = model_of(
        (lambda s, x: x @ s.a.weight.t() + s.a.bias) if derived else (lambda s, x: s.a(x)),
        a=nn.Linear(5, CLASSES),
    )
    batch, clean = vectors(6), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    seen: list[Tensor] = []
    accumulated: list[Tensor] = []

    def double(g: Tensor) -> Tensor:
        seen.append(g)
        return 2 * g

    handle = model.a.weight.register_hook(double)
    model.a.weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p))
    step = Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)
    assert (len(seen), len(accumulated)) == (1, 1)
    assert relative_error(step.scores, expected.scores) < 1e-12
    exact = expected.gradients["a.weight"]
    assert exact is not None
    assert model.a.weight.grad is not None
    assert relative_error(model.a.weight.grad, 2 * exact) < 1e-12
    handle.remove()
    Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)
    assert len(seen) == 1
