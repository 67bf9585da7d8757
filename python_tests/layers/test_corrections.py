"""Where torch's own derivatives disagree (kinks, ties, some options), every engine is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.layers import corrections
from support.models import CLASSES, ENGINE_OPTIONS, cross_entropy, model_of, vectors
from support.oracle import assert_exact, unchanged


def _dead(x: Tensor) -> Tensor:
    """Zeros in half of the places, as ReLU and padding leave them."""
    return x * (torch.arange(x.shape[1]) % 2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "prelu at zero": lambda: model_of(
        lambda s, x: s.b(F.prelu(_dead(s.a(x)), s.slope)),
        a=nn.Linear(5, 8),
        slope=torch.rand(1),
        b=nn.Linear(8, CLASSES),
    ),
    "prelu by channel at zero": lambda: model_of(
        lambda s, x: s.b(_dead(s.a(x)).prelu(s.slope)),
        a=nn.Linear(5, 8),
        slope=torch.rand(8),
        b=nn.Linear(8, CLASSES),
    ),
    "fmax and fmin of equals": lambda: model_of(
        lambda s, x: s.b(torch.fmax(s.a(x), 2 * _dead(s.a(x))).fmin(_dead(s.a(x)))),
        a=nn.Linear(5, 8),
        b=nn.Linear(8, CLASSES),
    ),
    "layer norm with a bias alone": lambda: model_of(
        lambda s, x: s.b(F.layer_norm(s.a(x), (8,), None, s.bias)),
        a=nn.Linear(5, 8),
        bias=torch.randn(8),
        b=nn.Linear(8, CLASSES),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_derivatives_are_those_of_the_gradient(name: str, engine: Any) -> None:
    model = MODELS[name]()
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)


def test_corrections_compute_what_torch_does() -> None:
    x = torch.randn(4, 6, 3).masked_fill(torch.rand(4, 6, 3) < 0.3, 0)
    y = x.flip(0).masked_fill(torch.rand(4, 6, 3) < 0.2, float("nan"))
    for slope in (torch.rand(1), torch.rand(6)):
        assert torch.equal(corrections.prelu(x, slope), F.prelu(x, slope))
    assert torch.equal(corrections.fmax(x, y), torch.fmax(x, y))
    assert torch.equal(corrections.fmin(x, y), torch.fmin(x, y))
    bias = torch.randn(3)
    exact = F.layer_norm(x, (3,), None, bias)
    assert torch.allclose(corrections.layer_norm(x, (3,), None, bias), exact, atol=1e-6)


@pytest.mark.filterwarnings("ignore:l2rw_ext")
@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_gradients_divided_by_counts_are_refused(engine: Any) -> None:
    model = nn.Sequential(
        nn.Embedding(4, 5, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(15, CLASSES)
    ).double()
    batch = torch.randint(4, (6, 3)), torch.randint(CLASSES, (6,))
    clean = torch.randint(4, (4, 3)), torch.randint(CLASSES, (4,))
    with unchanged(model), pytest.raises(NotExactError):
        Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)
