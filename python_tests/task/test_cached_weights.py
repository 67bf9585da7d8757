"""Steps inside ``parametrize.cached()`` are those of a forward with a cache for itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from l2rw_ext import Reweighter
from l2rw_ext.reference import relative_error
from support.models import CLASSES, ENGINES, Function, cross_entropy, model_of, vectors
from support.oracle import EXACT, assert_matches, truth

pytestmark = pytest.mark.filterwarnings("ignore:l2rw_ext")


def _forward(s: Any, x: Tensor) -> Tensor:
    """The weight is used twice: computed twice, spectral norm would take two steps of its power."""
    return s.head(torch.tanh(s.norm(s.a(s.a(x)))))


def _with_a_cache(s: Any, x: Tensor) -> Tensor:
    with parametrize.cached():
        return _forward(s, x)


def _model(parametrization: Any, norm: nn.Module) -> Function:
    a = parametrization(nn.Linear(5, 5))
    return model_of(_forward, a=a, norm=norm, head=nn.Linear(5, CLASSES))


@pytest.mark.parametrize(
    ("engine", "coupled"),
    [(engine, False) for engine in ENGINES] + [("forward", True), ("double_backward", True)],
)
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_steps_inside_one_cache(name: str, engine: Any, coupled: bool) -> None:
    """Plain training would need a cache for each step: its backward frees the weight's graph."""
    norm = nn.BatchNorm1d(5) if coupled else nn.Identity()
    model = _model(getattr(parametrizations, name), norm)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = copy.deepcopy(model)
    plain._fn = _with_a_cache
    for _ in range(3):
        plain.load_state_dict(model.state_dict())
        batch, clean = vectors(6), vectors(4)
        expected = truth(plain, cross_entropy, batch, clean)
        with parametrize.cached():
            optimizer.zero_grad()
            reweighter.weights(batch, clean)
            step = reweighter.backward(batch, clean)
        assert_matches(step, model, expected)
        optimizer.step()


def test_what_was_kept_before_a_step_is_kept_after_it() -> None:
    model = _model(parametrizations.weight_norm, nn.Identity())
    batch, clean = vectors(6), vectors(4)
    with parametrize.cached():
        before = model.a.weight
        losses = cross_entropy(model(batch[0]), batch[1])
        Reweighter(model, cross_entropy).backward(batch, clean)
        assert model.a.weight is before
        losses.sum().backward()
    assert not parametrize._cache


def test_a_loop_inside_one_cache() -> None:
    """A weight of before the optimizer's step is not taken for the present one."""
    model = _model(parametrizations.weight_norm, nn.Identity())
    reweighter = Reweighter(model, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = [(vectors(6), vectors(4)) for _ in range(3)]
    states, found = [], []
    with parametrize.cached():
        for batch, clean in steps:
            states.append(copy.deepcopy(model.state_dict()))
            optimizer.zero_grad()
            found.append(reweighter.backward(batch, clean).scores)
            optimizer.step()
    for (batch, clean), state, scores in zip(steps, states, found, strict=True):
        model.load_state_dict(state)
        expected = truth(model, cross_entropy, batch, clean).scores
        assert relative_error(scores, expected) <= EXACT
