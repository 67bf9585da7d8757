"""A loop that forgets ``zero_grad()``, or calls ``loss.backward()`` as well, is told so, once."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from l2rw_ext import Reweighter
from support.models import cross_entropy, mlp, vectors

_BATCH = vectors(6)
_CLEAN = _BATCH[0].clone(), _BATCH[1].clone()
"""The same examples, so that the scores add up to a square: one is positive."""


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
        with expected as found, reweighter.accumulate():
            reweighter.backward(_BATCH, _CLEAN)
        optimizer.step()
    assert found is not None
    assert found[0].filename == __file__


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


def test_gradients_that_are_clipped_and_not_cleared() -> None:
    model, optimizer, reweighter = _made()
    reweighter.backward(_BATCH, _CLEAN)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    with pytest.warns(UserWarning, match="zero_grad"):
        reweighter.backward(_BATCH, _CLEAN)


def test_gradients_that_are_cleared_unseen_by_autograd() -> None:
    model, optimizer, reweighter = _made()
    with _silent():
        for _ in range(3):
            reweighter.backward(_BATCH, _CLEAN)
            optimizer.step()
            for p in model.parameters():
                assert p.grad is not None
                p.grad.data.zero_()


@pytest.mark.parametrize("change", ["freeze", "replace"])
def test_a_parameter_that_is_no_longer_trained(change: str) -> None:
    """The next optimizer does not clear it, and the step does not add to it."""
    model, optimizer, reweighter = _made()
    with _silent():
        for _ in range(2):
            optimizer.zero_grad()
            reweighter.backward(_BATCH, _CLEAN)
            optimizer.step()
        head = model.get_submodule("2")
        head.requires_grad_(False)
        if change == "replace":
            model.register_module("2", copy.deepcopy(head).requires_grad_(True))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            reweighter.backward(_BATCH, _CLEAN)
            optimizer.step()


def test_no_gradient_is_kept_in_memory() -> None:
    model, optimizer, reweighter = _made()
    reweighter.backward(_BATCH, _CLEAN)
    gradients = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    gc.collect()
    assert len(gradients) == 4
    assert not any(gradient() is not None for gradient in gradients)


def test_a_copy_begins_anew() -> None:
    _, _, reweighter = _made()
    reweighter.backward(_BATCH, _CLEAN)
    for copied in (copy.deepcopy(reweighter), pickle.loads(pickle.dumps(reweighter))):
        with _silent():
            copied.backward(_BATCH, _CLEAN)
