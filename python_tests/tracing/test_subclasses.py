"""Inputs of a subclass of ``Tensor``: the user's forward sees them, and the step is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from l2rw_ext import Reweighter
from l2rw_ext.reference import relative_error
from support.models import CLASSES, ENGINES, Function, cross_entropy, model_of, vectors
from support.oracle import EXACT, assert_matches, truth


class Named(Tensor):
    """As torch makes them: what is computed of it is of its class too."""


class Unwrapping(Tensor):
    """As the tensors of torchvision: what is computed of it is plain."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Described(Tensor):
    """As the tensors of MONAI: the results have the attributes of the first argument."""

    scale: float

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        given = pytree.tree_leaves(args)
        found = next((a.scale for a in given if hasattr(a, "scale")), None)
        if isinstance(out, Described) and found is not None:
            out.scale = found
        return out


KINDS = (Named, Unwrapping, Described)
Batch = tuple[Tensor, Tensor]


def _of(kind: type[Tensor], batch: Batch, *, scale: float = 1.0) -> Batch:
    x = batch[0].as_subclass(kind)
    if isinstance(x, Described):
        x.scale = scale
    return x, batch[1]


def _written_in_place(s: Any, x: Tensor) -> Tensor:
    """After a layer and after a norm, which are custom functions of the layer-wise engine."""
    x = s.norm(s.a(x))
    x[:, :2] *= 2
    return s.head(F.relu(s.b(F.relu(x, inplace=True)), inplace=True))


def _model(norm: nn.Module) -> Function:
    return model_of(
        _written_in_place,
        a=nn.Linear(5, 8),
        norm=norm,
        b=nn.Linear(8, 8),
        head=nn.Linear(8, CLASSES),
    )


@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps(kind: Any, engine: Any, targets: bool) -> None:
    """What a step gives is plain, and no engine mistakes the class for a hidden computation."""
    model = _model(nn.GroupNorm(2, 8) if engine == "layerwise" else nn.BatchNorm1d(8))
    batch, clean = vectors(6), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(2):
        model.zero_grad()
        (x, y), clean_of_kind = _of(kind, batch), _of(kind, clean)
        step = reweighter.backward((x, y.as_subclass(kind) if targets else y), clean_of_kind)
        assert_matches(step, model, expected)
        tensors = [a for a in vars(step).values() if isinstance(a, Tensor)]
        assert {type(a) for a in (*tensors, *(p.grad for p in model.parameters()))} == {Tensor}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_sees_what_it_sees_in_training(kind: Any, engine: Any) -> None:
    seen: list[type] = []

    def forward(s: Any, x: Tensor) -> Tensor:
        hidden = s.a(x)
        seen.extend((type(x), type(hidden), type(torch.tanh(hidden)), type(x + 1)))
        return s.head(torch.tanh(hidden))

    model = model_of(forward, a=nn.Linear(5, 8), head=nn.Linear(8, CLASSES))
    batch, clean = _of(kind, vectors(6)), _of(kind, vectors(4))
    model(batch[0])
    plain = seen.copy()
    seen.clear()
    Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)
    assert seen == plain * (len(seen) // len(plain))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_batch_knows_beside_its_values_is_not_merged(engine: Any) -> None:
    """Equal in the first step, so that no comparison of values would show it."""
    model = model_of(lambda s, x: s.a(x) * x.scale, a=nn.Linear(5, CLASSES))
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for scale in (1.0, 3.0):
        batch, clean = vectors(6), vectors(4)
        scaled = [model_of(lambda s, x, k=k: s.a(x) * k, a=model.a) for k in (1.0, scale)]
        expected = truth(_Either(*scaled), cross_entropy, batch, clean)
        model.zero_grad()
        step = reweighter.backward(
            _of(Described, batch, scale=1.0), _of(Described, clean, scale=scale)
        )
        assert relative_error(step.scores, expected.scores) <= EXACT


class _Either(nn.Module):
    """One model for six examples, another for four."""

    def __init__(self, train: nn.Module, clean: nn.Module) -> None:
        super().__init__()
        self.train_model, self.clean_model = train, clean

    def forward(self, x: Tensor) -> Any:
        return (self.train_model if len(x) == 6 else self.clean_model)(x)
