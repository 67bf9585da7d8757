"""A gradient scaler changes nothing but the scale of ``p.grad``; an overflow skips the step."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn

from l2rw_ext import Reweighter, devices
from l2rw_ext.reference import relative_error
from support.models import ENGINES, cross_entropy, mlp, model_of, vectors
from support.oracle import EXACT, flat, gradients_of, truth, unchanged


def _scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"l2": 0.1}])
@pytest.mark.parametrize("clean_width", [5, 4])
def test_weights_do_not_depend_on_the_scale(
    engine: Any, options: dict[str, Any], clean_width: int
) -> None:
    model = nn.Sequential(nn.LazyLinear(7), nn.Tanh(), nn.Linear(7, 3)).double()
    batch, clean = vectors(6), vectors(4)
    model(batch[0])
    plain = Reweighter(model, cross_entropy, engine=engine, **options).backward(batch, clean)
    gradients = flat(gradients_of(model).values())
    model.zero_grad()
    scaler = _scaler(1024.0 if clean_width == 5 else 3.0)
    step = Reweighter(model, cross_entropy, engine=engine, **options).backward(
        batch, clean, grad_scaler=scaler
    )
    assert relative_error(step.scores, plain.scores) < EXACT
    assert relative_error(step.weights, plain.weights) < EXACT
    scaled = flat(gradients_of(model).values())
    assert relative_error(scaled, gradients * scaler.get_scale()) < EXACT


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_of_the_scaler(engine: Any) -> None:
    model = mlp(dtype=torch.float32)
    twin = copy.deepcopy(model)
    batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    Reweighter(twin, cross_entropy, engine=engine).backward(batch, clean)
    plain.step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = _scaler(2.0**12)
    Reweighter(model, cross_entropy, engine=engine).backward(batch, clean, scaler)
    scaler.step(optimizer)
    scaler.update()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(p.detach(), q.detach()) < 1e-6


@pytest.mark.parametrize("engine", ["layerwise", "forward", "double_backward"])
@pytest.mark.parametrize("warm", [False, True])
def test_overflow_skips_the_step_and_lowers_the_scale(engine: Any, warm: bool) -> None:
    model = mlp(dtype=torch.float32)
    batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reweighter = Reweighter(model, cross_entropy, engine=engine)

    def step(scaler: torch.amp.GradScaler) -> Any:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            return reweighter.backward(batch, clean, grad_scaler=scaler)

    expected = truth(model, cross_entropy, batch, clean)
    if warm:
        step(_scaler(2.0**8))
    before = copy.deepcopy(model.state_dict())
    scaler = _scaler(2.0**40)
    found = step(scaler)
    assert all(p.grad is not None and p.grad.isinf().all() for p in model.parameters())
    assert found.nonfinite == 6
    assert not found.weights.any()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    found = step(_scaler(2.0**8))
    assert found.engine == engine
    assert relative_error(found.weights, expected.weights) < 1e-2  # float16: eps is 1e-3


@pytest.mark.parametrize("low_memory", [False, True])
def test_overflow_in_a_first_step_whose_values_are_not_readable(
    low_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "synchronous", lambda x: False)
    model = mlp(dtype=torch.float32)
    batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
    reweighter = Reweighter(model, cross_entropy, engine="layerwise", low_memory=low_memory)
    with torch.autocast("cpu", torch.float16):
        step = reweighter.backward(batch, clean, grad_scaler=_scaler(2.0**40))
    assert not step.weights.any()
    assert all(p.grad is not None and p.grad.isinf().all() for p in model.parameters())


@pytest.mark.parametrize("engine", ["layerwise", "forward", "double_backward"])
@pytest.mark.parametrize(
    "options", [{"direction_decay": 0.5}, {"every": 3}, {"every": 3, "reuse": "scores"}]
)
def test_a_step_after_an_overflow_is_as_if_that_had_not_been(
    engine: Any, options: dict[str, Any]
) -> None:
    model = mlp(dtype=torch.float32)
    batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)

    def step(reweighter: Reweighter, scale: float) -> Any:
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            return reweighter.backward(
                batch, clean, grad_scaler=_scaler(scale), index=torch.arange(6)
            )

    plain = step(Reweighter(model, cross_entropy, engine=engine), 2.0**8)
    reweighter = Reweighter(model, cross_entropy, engine=engine, **options)
    assert step(reweighter, 2.0**40).nonfinite == 6
    assert not reweighter.record.visits.any()
    assert reweighter.needs_clean
    found = step(reweighter, 2.0**8)
    assert found.engine == engine
    assert relative_error(found.weights, plain.weights) < 1e-2  # float16: eps is 1e-3


@pytest.mark.parametrize("on_degenerate", ["zero", "uniform", "skip"])
@pytest.mark.parametrize("scales", [(2.0**40,), (2.0**40, 2.0**8), (2.0**8, 2.0**40)])
@pytest.mark.parametrize("accumulated", [False, True])
def test_overflow_is_left_for_the_scaler(
    on_degenerate: Any, scales: tuple[float, ...], accumulated: bool
) -> None:
    model = mlp(dtype=torch.float32)
    batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
    reweighter = Reweighter(model, cross_entropy, on_degenerate=on_degenerate)
    with (
        reweighter.accumulate() if accumulated else contextlib.nullcontext(),
        torch.autocast("cpu", torch.float16),
    ):
        for scale in scales:
            reweighter.backward(batch, clean, grad_scaler=_scaler(scale))
    assert all(p.grad is not None and not p.grad.isfinite().any() for p in model.parameters())


def test_an_example_with_an_infinite_loss_is_no_overflow() -> None:
    model = mlp()
    x, y = vectors(6)
    x[2] = float("nan")
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    step = reweighter.backward((x, y), vectors(4), grad_scaler=_scaler(8.0))
    assert step.nonfinite == 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_accumulation_under_a_scale() -> None:
    model, (x, y), clean = mlp(), vectors(6), vectors(4)
    expected = truth(model, cross_entropy, (x, y), clean)
    reweighter = Reweighter(model, cross_entropy)
    with reweighter.accumulate():
        for part in (slice(0, 2), slice(2, 6)):
            reweighter.backward((x[part], y[part]), clean, grad_scaler=_scaler(64.0))
    found = flat(gradients_of(model).values())
    assert relative_error(found, 64 * flat(expected.gradients.values())) < EXACT


def test_a_disabled_scaler_changes_nothing() -> None:
    model, batch, clean = mlp(), vectors(6), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    Reweighter(model, cross_entropy).backward(batch, clean, grad_scaler=scaler)
    found = flat(gradients_of(model).values())
    assert relative_error(found, flat(expected.gradients.values())) < EXACT


def test_what_is_no_scaler() -> None:
    model, batch, clean = mlp(), vectors(6), vectors(4)
    with unchanged(model), pytest.raises(TypeError, match="grad_scaler must be"):
        Reweighter(model, cross_entropy).backward(batch, clean, grad_scaler=3)  # type: ignore


def test_overflow_in_the_second_attempt_of_a_first_step() -> None:
    """The model is tried again, with repeated parameters as data, and only then overflows."""
    model = model_of(
        lambda s, x: torch.atan2(x @ s.w, s.p.expand(len(x), 3)),
        w=torch.randn(5, 3),
        p=torch.randn(3),
    ).float()
    batch, clean = ((x.float(), y) for x, y in (vectors(6), vectors(4)))
    step = Reweighter(model, cross_entropy).backward(batch, clean, grad_scaler=_scaler(2.0**127))
    assert bool(step.scores.isnan().all())
