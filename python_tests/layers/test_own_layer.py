"""A torch function of one's own becomes a layer by one description and one entry."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.layers import LAYERS
from l2rw_ext.layers.base import Call, Function
from l2rw_ext.layers.normalization import Layout, Scale
from support.models import CLASSES, ENGINES, cross_entropy, model_of
from support.oracle import assert_exact


def mean_absolute_norm(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Divide by the mean absolute value of the last dimension; scale and shift."""
    operands = (input, weight, bias)
    if has_torch_function(operands):
        return handle_torch_function(mean_absolute_norm, operands, *operands)
    out = _normalized(input) * weight
    return out if bias is None else out + bias


def _normalized(x: Tensor) -> Tensor:
    return x / x.abs().mean(-1, keepdim=True)


class MeanAbsoluteNorm(Scale):
    """As the norms of ``l2rw_ext/layers/normalization.py``."""

    functions: ClassVar[tuple[Function, ...]] = (mean_absolute_norm,)

    def bind(
        self, func: Function, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Call:
        return Call("mean_absolute_norm", input, weight, bias, Layout(1, _normalized))


def batch(n: int, length: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, length, 5, dtype=torch.float64), torch.randint(CLASSES, (n,))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return model_of(
        lambda s, x: s.head(
            mean_absolute_norm(
                torch.tanh(s.first(mean_absolute_norm(x, s.before))), s.scale, s.shift
            ).mean(1)
        ),
        before=torch.randn(5),
        first=nn.Linear(5, 6),
        scale=torch.randn(6),
        shift=torch.randn(6),
        head=nn.Linear(6, CLASSES),
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_norm_of_ones_own(engine: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, mean_absolute_norm, MeanAbsoluteNorm())

    def check(*batches: tuple[Tensor, Tensor]) -> None:
        reweighter = Reweighter(model, cross_entropy, engine=engine)
        assert_exact(model, cross_entropy, *batches, reweighter=reweighter, engine=engine)

    check(batch(6), batch(4))
    check(batch(5), batch(3, 7))
    model.scale.requires_grad_(False)
    check(batch(6), batch(4))


def test_without_a_description_it_is_refused_by_name(model: nn.Module) -> None:
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    with pytest.raises(
        NotExactError, match="goes into mean_absolute_norm, which has no layer-wise rule"
    ):
        reweighter.backward(batch(6), batch(4))
