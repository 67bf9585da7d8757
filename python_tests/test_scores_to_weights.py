"""``weighing=``: other ways from scores to weights, in every kind of step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l2rw_ext as l2rw
from l2rw_ext import Reweighter, devices, reference, weighing
from l2rw_ext.reference import relative_error
from support.models import ENGINES, cross_entropy, mlp, vectors
from support.oracle import EXACT, flat, gradients_of, truth, unchanged
from support.synchronisation import NoSynchronisation
from support.weighings import PROPORTIONAL, WEIGHINGS, squares


@pytest.mark.parametrize("name", WEIGHINGS)
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_and_gradient(engine: Any, name: str) -> None:
    own, plain = WEIGHINGS[name]
    model, batch, clean = mlp(), vectors(7), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    weights = plain(expected.scores)
    gradients = reference.weighted_gradient(copy.deepcopy(model), cross_entropy, batch, weights)
    reweighter = Reweighter(model, cross_entropy, engine=engine, weighing=own)
    assert relative_error(reweighter.weights(batch, clean), weights) < EXACT
    step = reweighter.backward(batch, clean)
    assert relative_error(step.weights, weights) < EXACT
    assert relative_error(flat(gradients_of(model).values()), flat(gradients.values())) < 1e-11
    assert not step.degenerate
    line = f"weighing={weighing.name_of(own)}: takes the place of Eq. 8-9"
    assert (line in reweighter.explain(batch, clean).options) == (name != "rectified")


@pytest.mark.parametrize("name", WEIGHINGS)
def test_an_example_that_is_left_out_has_no_weight(name: str) -> None:
    own, plain = WEIGHINGS[name]
    model, batch, clean = mlp(), vectors(6), vectors(4)
    rest = torch.tensor([0, 1, 3, 4, 5])
    expected = truth(model, cross_entropy, (batch[0][rest], batch[1][rest]), clean)
    batch[0][2] = math.nan
    step = Reweighter(model, cross_entropy, weighing=own).backward(batch, clean)
    assert float(step.weights[2]) == 0
    assert step.nonfinite == 1
    assert relative_error(step.weights[rest], plain(expected.scores)) < EXACT


@pytest.mark.parametrize("name", PROPORTIONAL)
@pytest.mark.parametrize("sizes", [[3, 4], [1, 1, 5], [7]])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_micro_batches(name: str, sizes: list[int], scale: float) -> None:
    """With large losses a softmax of the second micro-batch exceeds that of the first by far."""
    own, plain = WEIGHINGS[name]
    model, batch, clean = mlp(), vectors(7), vectors(4)
    big = torch.arange(1.0, 8.0, dtype=torch.float64) * scale

    def loss_fn(outputs: Tensor, targets: Any) -> Tensor:
        return cross_entropy(outputs, targets[0]) * targets[1]

    batch = (batch[0], (batch[1], big))
    clean = (clean[0], (clean[1], torch.ones(4, dtype=torch.float64)))
    expected = truth(model, loss_fn, batch, clean)
    weights = plain(expected.scores)
    gradients = reference.weighted_gradient(copy.deepcopy(model), loss_fn, batch, weights)
    reweighter = Reweighter(model, loss_fn, weighing=own)
    with reweighter.accumulate() as accumulation:
        for x, y, b in zip(*(t.split(sizes) for t in (batch[0], *batch[1])), strict=True):
            reweighter.backward((x, (y, b)), clean)
    assert relative_error(torch.cat(accumulation.weights), weights) < 1e-10
    assert relative_error(flat(gradients_of(model).values()), flat(gradients.values())) < 1e-9


@pytest.mark.parametrize("name", ["top_k", "own"])
def test_what_needs_all_scores_does_not_accumulate(name: str) -> None:
    own, _ = WEIGHINGS[name]
    reweighter = Reweighter(mlp(), cross_entropy, weighing=own)
    with (
        pytest.raises(ValueError, match=r"needs the scores of all micro-batches"),
        reweighter.accumulate(),
    ):
        raise AssertionError("the body of accumulate() has begun")


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (lambda u: u[:-1], ValueError, "one weight for each score"),
    "scalar": (lambda u: u.sum(), ValueError, "one weight for each score"),
    "list": (lambda u: [1.0] * len(u), TypeError, "must return a tensor of real numbers"),
    "complex": (lambda u: u.to(torch.complex128), TypeError, "must return a tensor of real"),
    "negative": (lambda u: u * 0 - 1, ValueError, "negative or not finite"),
    "not finite": (lambda u: u / 0, ValueError, "negative or not finite"),
    "shares below zero": (
        weighing.proportional(lambda u: u * 0 - 1),
        ValueError,
        "negative or not finite",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("compile", [False, "eager"])
def test_what_is_no_weight_is_an_error(name: str, compile: Any) -> None:
    own, error, text = BAD[name]
    model, batch, clean = mlp(), vectors(6), vectors(4)
    reweighter = Reweighter(model, cross_entropy, weighing=own, compile=compile)
    for _ in range(4 if compile else 1):
        with unchanged(model), pytest.raises(error, match=text):
            reweighter.backward(batch, clean)


def test_arguments() -> None:
    for make in (
        lambda: weighing.top_k(0),
        lambda: weighing.top_k(True),
        lambda: weighing.softmax(0),
        lambda: weighing.softmax(math.inf),
        lambda: weighing.threshold(math.nan),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(TypeError, match="h must be callable"):
        weighing.proportional(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weighing must be a callable"):
        Reweighter(mlp(), cross_entropy, weighing="top_k")  # type: ignore[arg-type]


def test_fewer_examples_than_k() -> None:
    assert weighing.top_k(5)(torch.tensor([1.0, -1.0])).tolist() == [0.5, 0.5]
    assert weighing.top_k(1)(torch.tensor([-math.inf, -math.inf])).tolist() == [0, 0]


def test_softmax_of_what_is_left_out_alone() -> None:
    assert weighing.softmax(1)(torch.tensor([-math.inf, -math.inf])).tolist() == [0, 0]


@pytest.mark.parametrize("option", ["zero", "uniform", "skip"])
def test_all_weights_zero(option: Any) -> None:
    model, batch, clean = mlp(), vectors(5), vectors(3)
    above = weighing.threshold(1e6)
    step = Reweighter(model, cross_entropy, weighing=above, on_degenerate=option).backward(
        batch, clean
    )
    assert step.degenerate
    assert step.weights.tolist() == pytest.approx([0.2 if option == "uniform" else 0.0] * 5)
    assert (next(model.parameters()).grad is None) == (option == "skip")


@pytest.mark.parametrize("name", WEIGHINGS)
def test_no_weighing_of_ours_makes_the_host_wait(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "synchronous", lambda x: False)
    model, batch, clean = mlp(), vectors(6), vectors(3)
    reweighter = Reweighter(model, cross_entropy, weighing=WEIGHINGS[name][0])
    reweighter.backward(batch, clean)
    with NoSynchronisation():
        step = reweighter.backward(batch, clean)
    assert float(step.loss) > 0


def test_on_a_device_what_is_no_weight_is_an_error_when_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "synchronous", lambda x: False)
    model, batch, clean = mlp(), vectors(6), vectors(3)
    step = Reweighter(model, cross_entropy, weighing=lambda u: u / 0).backward(batch, clean)
    assert not step.weights.any()
    assert not flat(gradients_of(model).values()).any()
    with pytest.raises(ValueError, match="negative or not finite"):
        _ = step.loss


def test_in_accumulate_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "synchronous", lambda x: False)
    model, batch, clean = mlp(), vectors(6), vectors(3)
    own = weighing.proportional(torch.sqrt)  # not a number where a score is negative
    reweighter = Reweighter(model, cross_entropy, weighing=own)
    with reweighter.accumulate() as accumulation:
        reweighter.backward(batch, clean)
    assert not flat(gradients_of(model).values()).any()
    with pytest.raises(ValueError, match="negative or not finite"):
        _ = accumulation.weights


@pytest.mark.parametrize("compile", [False, "eager"])
def test_weight_for_what_is_left_out_alone_is_no_weight(compile: Any) -> None:
    model, batch, clean = mlp(), vectors(6), vectors(3)
    batch[0][2] = math.nan
    calls = []

    def own(u: Tensor) -> Tensor:
        calls.append(1)
        return (u == -math.inf).to(u.dtype)

    reweighter = Reweighter(
        model, cross_entropy, weighing=own, on_degenerate="skip", compile=compile
    )
    for _ in range(4):
        step = reweighter.backward(batch, clean)
        before = len(calls)
        assert step.degenerate
        assert len(calls) == before  # nobody who reads a result asks again
        assert next(model.parameters()).grad is None


class Learned(nn.Module):
    """A weighing with a parameter, which a step does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, u: Tensor) -> Tensor:
        return (u * self.scale).softmax(0)


def test_a_module_and_one_that_writes_to_its_scores() -> None:
    model, batch, clean = mlp(), vectors(6), vectors(3)
    step = Reweighter(model, cross_entropy, weighing=Learned()).backward(batch, clean)
    assert relative_error(step.weights, (step.scores * 2).softmax(0)) < EXACT
    step = Reweighter(model, cross_entropy, weighing=lambda u: u.exp_()).backward(batch, clean)
    assert relative_error(step.weights, step.scores.exp()) < EXACT


def test_public_names() -> None:
    assert l2rw.weighing is weighing
    assert repr(weighing.top_k(8)) == "top_k(8)"
    assert repr(weighing.proportional(squares)) == "proportional(squares)"
