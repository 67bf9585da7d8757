"""What differs between forwards and shows in no value at first: sizes, wiring, places."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import Reweighter
from support.models import CLASSES, cross_entropy, model_of, vectors
from support.oracle import assert_exact


def _hidden(s: Any, x: Tensor) -> Tensor:
    out: Tensor = torch.tanh(s.a(x))
    return out


def _all_but_the_first(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[1:] = h[1:]
    return out


SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "number": lambda h: h / len(h),
    "tensor of a number": lambda h: h * torch.tensor(float(len(h))),
    "tensor of numbers": lambda h: h * torch.tensor([len(h), 1.0]).sum(),
    "sum of ones": lambda h: h * torch.ones(len(h)).sum(),
    "places": lambda h: h * torch.arange(len(h))[:, None],
    "spaced": lambda h: h * torch.linspace(0, 1, len(h))[:, None],
    "triangle": lambda h: h * torch.ones(len(h), len(h)).triu().sum(1, keepdim=True),
    "parity of the row": lambda h: h * (torch.arange(len(h)) % 2)[:, None],
    "all but the first": _all_but_the_first,
    "branch": lambda h: h if len(h) > 7 else 2 * h,
}


@pytest.mark.parametrize("gate", ["parameter", "buffer", "product"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_sizes_behind_a_gate_that_is_zero_at_first(name: str, gate: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = _hidden(s, x)
        if gate == "product":  # the gate meets what depends on the size before it meets data
            return s.b(h + SIZES[name](s.gate * torch.ones(len(h), 1, dtype=h.dtype)) * h)
        return s.b(h + s.gate * SIZES[name](h))

    model = model_of(forward, a=nn.Linear(5, 8), b=nn.Linear(8, CLASSES))
    zero = torch.zeros((), dtype=torch.float64)
    if gate == "parameter":
        model.gate = nn.Parameter(zero)
    else:
        model.register_buffer("gate", zero)
    reweighter = Reweighter(model, cross_entropy)
    for value in (0.0, 0.5):
        zero.fill_(value)
        assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)


class _Way(enum.IntEnum):
    ALONG = 1
    ACROSS = 0


FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], Any, Any]] = {
    "wiring": (lambda s, h: h - (h.mean(1, keepdim=True), h.mean(0, keepdim=True))[s.k], 0, 1),
    "wiring without grad": (
        lambda s, h: h - ((d := h.detach()).mean(1, keepdim=True), d.mean(0))[s.k],
        0,
        1,
    ),
    "order of two views": (lambda s, h: h + (h.flip(1), h.flip(0))[s.k], 0, 1),
    "places by a number": (lambda s, h: h + h[(torch.arange(len(h)) + s.k) % len(h)], 0, 1),
    "places by two numbers": (
        lambda s, h: h + h[torch.linspace(*s.k, len(h)).long()],
        (0, 3),
        (3, 0),
    ),
    "dimension of NumPy": (lambda s, h: h - h.mean(s.k, keepdim=True), np.int64(1), np.int64(0)),
    "dimension of an enum": (lambda s, h: h - h.mean(s.k, keepdim=True), _Way.ALONG, _Way.ACROSS),
    "shift by a tensor": (lambda s, h: h + h.roll(s.k, 0), torch.tensor(0), torch.tensor(1)),
    "dimensions of a tuple": (lambda s, h: h + h.flip(s.k), (1,), (0,)),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_a_forward_that_becomes_another(name: str) -> None:
    function, first, later = FORMS[name]
    model = model_of(
        lambda s, x: s.b(function(s, _hidden(s, x))), a=nn.Linear(5, 8), b=nn.Linear(8, CLASSES)
    )
    reweighter = Reweighter(model, cross_entropy)
    for k in (first, first, later, first, later):
        model.k = k
        assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)


@pytest.mark.parametrize("source", [random.random, np.random.random])
def test_layers_that_are_left_out_by_chance(source: Callable[[], float]) -> None:
    """Generators of Python and NumPy are put back where forwards are compared."""
    layers = {f"layer{k}": nn.Linear(8, 8) for k in range(4)}

    def forward(s: Any, x: Tensor) -> Tensor:
        h = _hidden(s, x)
        for name in layers:
            h = h if source() < 0.3 else h + torch.tanh(s.get_submodule(name)(h))
        return s.b(h)

    model = model_of(forward, a=nn.Linear(5, 8), b=nn.Linear(8, CLASSES), **layers)
    for seed in range(10):
        random.seed(seed)
        np.random.seed(seed)
        reweighter = Reweighter(model, cross_entropy, engine="layerwise")
        for _ in range(20):
            reweighter.backward(vectors(6), vectors(4))


@pytest.mark.parametrize("margin", [0, 8, 12, 14, 16, 18])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_losses_that_are_nearly_zero(norm: Any, margin: float) -> None:
    """Their gradients are rounding errors, which are no disagreement with plain autograd."""
    model = nn.Sequential(nn.Linear(5, 16), norm(16), nn.ReLU(), nn.Linear(16, CLASSES))
    batch, clean = (vectors(n, dtype=torch.float32) for n in (40, 20))

    def losses(out: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(0.1 * out + margin * F.one_hot(y, CLASSES), y)

    for engine in ("auto", "forward", "double_backward"):
        Reweighter(model, losses, engine=engine).backward(batch, clean)  # type: ignore[arg-type]
