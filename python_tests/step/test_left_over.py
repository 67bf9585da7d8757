"""A loop that forgets ``zero_grad()``, or calls ``loss.backward()`` as well, is told so, once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from l2rw_ext import Reweighter
from support.models import cross_entropy, mlp, vectors

_BATCH, _CLEAN = vectors(6), vectors(4)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _made() -> tuple[nn.Module, torch.optim.Optimizer, Reweighter]:
    model = mlp()
    return model, torch.optim.SGD(model.parameters(), 0.1), Reweighter(model, cross_entropy)


def test_gradients_that_nobody_clears() -> None:
    _, optimizer, reweighter = _made()
    with _silent():
        reweighter.backward(_BATCH, _CLEAN)
    optimizer.step()
    with pytest.warns(UserWarning, match=r"Call optimizer.zero_grad\(\)") as found:
        reweighter.backward(_BATCH, _CLEAN)
    assert found[0].filename == __file__
    optimizer.step()
    with _silent():
        reweighter.backward(_BATCH, _CLEAN)


def test_gradients_that_nobody_clears_after_accumulation() -> None:
    _, optimizer, reweighter = _made()
    for k in range(2):
        expected = _silent() if k == 0 else pytest.warns(UserWarning, match="zero_grad")
        with expected, reweighter.accumulate():
            reweighter.backward(_BATCH, _CLEAN)
        optimizer.step()


def test_plain_backward_as_well() -> None:
    model, _, reweighter = _made()
    cross_entropy(model(_BATCH[0]), _BATCH[1]).mean().backward()
    with pytest.warns(UserWarning, match=r"takes the place of loss.backward\(\)"):
        reweighter.backward(_BATCH, _CLEAN)
    with _silent():
        reweighter.backward(_BATCH, _CLEAN)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_loops_without_a_mistake(set_to_none: bool) -> None:
    model, optimizer, reweighter = _made()
    with _silent():
        for _ in range(3):
            optimizer.zero_grad(set_to_none)
            for _ in range(2):  # gradients accumulate on purpose
                reweighter.backward(_BATCH, _CLEAN)
                cross_entropy(model(_BATCH[0]), _BATCH[1]).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def test_frozen_parameters() -> None:
    model, optimizer, reweighter = _made()
    reweighter.backward(_BATCH, _CLEAN)
    optimizer.step()
    optimizer.zero_grad()
    with _silent():
        model.get_parameter("2.bias").requires_grad_(False)
        reweighter.backward(_BATCH, _CLEAN)
