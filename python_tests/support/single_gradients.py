"""Gradients of single examples by plain autograd in float64, and models to compare them on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext import reference
from support.models import CELLS, CLASSES, cross_entropy, model_of, short_sequences
from support.oracle import as_double
from support.ranks import MODELS as OF_RANKS


def _lstm() -> nn.Module:
    return model_of(
        lambda m, x: m.head(m.rnn(x)[0][:, -1]),
        rnn=nn.LSTM(5, 6, batch_first=True),
        head=nn.Linear(6, CLASSES),
    )


def _cell() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        for t in range(x.shape[1]):
            h = m.cell(x[:, t], h)
        return m.head(h)  # type: ignore[no-any-return]

    return model_of(run, cell=CELLS["GRU"](5, 6), head=nn.Linear(6, CLASSES))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    **{
        name: OF_RANKS[name] for name in ("mlp", "convolutions", "tokens", "shared", "checkpointed")
    },
    "LSTM": (_lstm, short_sequences),
    "cell in a loop": (_cell, short_sequences),
}
"""Float64 models for which the layer-wise engine is exact, and their batches, by name."""


def direction_of(
    model: nn.Module, clean: Any, loss_fn: Any = cross_entropy, *, names: Collection[str] = ()
) -> Tensor:
    """v as one vector, of the parameters in ``names`` or of all."""
    model = copy.deepcopy(model).double()
    found = reference.clean_direction(model, loss_fn, as_double(clean))
    return torch.cat([v.flatten() for name, v in found.items() if not names or name in names])


def single_gradients(
    model: nn.Module, batch: Any, loss_fn: Any = cross_entropy, *, names: Collection[str] = ()
) -> Tensor:
    """∇f_i as rows, of the parameters in ``names`` or of all."""
    model = copy.deepcopy(model).double()
    inputs, targets = as_double(batch)
    parameters = [p for name, p in reference.trainable(model).items() if not names or name in names]
    rows = []
    for f in loss_fn(model(inputs), targets):
        found = torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(parameters, found, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])
        )
    return torch.stack(rows)
