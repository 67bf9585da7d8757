"""Compiled steps keep no batch, gradient, parameter or model alive."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2rw_ext import Reweighter
from support.models import CLASSES, cross_entropy, mlp, vectors
from support.pairs import graphs


def _gone(found: list[weakref.ref[Any]]) -> bool:
    gc.collect()
    return all(x() is None for x in found)


class Seen(nn.Module):
    """Remembers weakly what passes."""

    def __init__(self, found: list[weakref.ref[Any]]) -> None:
        super().__init__()
        self._found = found

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self._found.append(weakref.ref(x))
        return x


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_batches_gradients_and_activations(count: int, batch_norm: bool) -> None:
    seen: list[weakref.ref[Any]] = []
    norm: nn.Module = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
    model = nn.Sequential(nn.Linear(5, 8), norm, Seen(seen), nn.Linear(8, CLASSES)).double()
    reweighter = Reweighter(model, cross_entropy, compile="eager")
    for _ in range(count):
        batch, clean = vectors(6), vectors(4)
        step = reweighter.backward(batch, clean)
        gradients = [p.grad for p in model.parameters()]
        tensors = (*batch, *clean, step.scores, step.weights, step.losses, *gradients)
        seen += [weakref.ref(x) for x in tensors]
        model.zero_grad()
        del batch, clean, step, gradients, tensors
    assert _gone(seen)


def test_a_reweighter_that_is_gone() -> None:
    model = mlp()
    with graphs() as made:
        reweighter = Reweighter(model, cross_entropy, compile="eager")
        for _ in range(3):
            reweighter.backward(vectors(6), vectors(4))
    found = [weakref.ref(reweighter), weakref.ref(made[0].module), weakref.ref(model[0].weight)]
    del reweighter
    made.clear()
    assert _gone(found[:2])
    del model
    assert _gone(found)


def test_parameters_that_are_exchanged_do_not_pile_up() -> None:
    """Those of the last step that ran eagerly may stay until the next such step."""
    model = mlp()
    reweighter = Reweighter(model, cross_entropy, compile="eager")
    found = []
    with graphs() as made:
        for _ in range(6):
            for _ in range(3):
                reweighter.backward(vectors(6), vectors(4))
            found += [weakref.ref(p) for p in model.parameters()]
            model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert len(made) == 1
    reweighter.backward(vectors(6), vectors(4))
    gc.collect()
    assert sum(x() is not None for x in found) <= len(list(model.parameters()))


def test_graphs_of_models_that_are_gone_do_not_pile_up() -> None:
    found = []
    with graphs() as made:
        for _ in range(3):
            reweighter = Reweighter(mlp(), cross_entropy, compile="eager")
            for _ in range(3):
                reweighter.backward(vectors(6), vectors(4))
            found += [weakref.ref(graph.module) for graph in made]
            made.clear()
    assert not _gone(found)
    assert sum(x() is not None for x in found) == 1
