"""Rows that are alike for all examples are no reason for two passes, and rows that may differ are.

A buffer that is zero at first hides in each model whether the number of examples enters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import Reweighter
from support.models import (
    CELLS,
    CLASSES,
    RECURRENT,
    cross_entropy,
    model_of,
    short_sequences,
    vectors,
)
from support.oracle import assert_exact

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both ways": {"bidirectional": True},
    "both ways in two layers, time first": {
        "num_layers": 2,
        "bidirectional": True,
        "batch_first": False,
    },
}

STATES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "zeros": lambda s, x: x.new_zeros(1, len(x), 6),
    "one number for all": lambda s, x: x.new_full((1, len(x), 6), 0.5),
    "trained, expanded": lambda s, x: s.state.expand(1, len(x), 6).contiguous(),
    "trained, repeated": lambda s, x: s.state.repeat(1, len(x), 1),
    "trained, squashed": lambda s, x: torch.tanh(s.state + x.new_zeros(1, len(x), 1)),
}


SIZES = ((6, 4), (4, 4), (2, 8))
"""n and m, some of which are also numbers of features or of layers."""


def _check_merged(model: nn.Module, make: Callable[[int], Any] = short_sequences) -> None:
    """One pass with the oracle's numbers, whatever the sizes of the batches are."""
    for sizes in SIZES:
        reweighter = Reweighter(model, cross_entropy, engine="layerwise")
        batch, clean = map(make, sizes)
        assert "one merged" in reweighter.explain(batch, clean).passes
        assert_exact(model, cross_entropy, batch, clean, reweighter=reweighter)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_take_one_pass(kind: str, options: str) -> None:
    layer = RECURRENT[kind](5, 6, **{"batch_first": True, **OPTIONS[options]})

    def forward(s: Any, x: Tensor) -> Tensor:
        if s.layer.batch_first:
            return s.head(s.layer(x)[0][:, -1])
        return s.head(s.layer(x.transpose(0, 1))[0][-1])

    head = nn.Linear(6 * (1 + layer.bidirectional), CLASSES)
    _check_merged(model_of(forward, layer=layer, head=head))


@pytest.mark.parametrize("state", STATES)
def test_initial_states_that_are_alike(state: str) -> None:
    model = model_of(
        lambda s, x: s.head(s.layer(x, STATES[state](s, x))[0][:, -1]),
        layer=nn.GRU(5, 6, batch_first=True),
        head=nn.Linear(6, CLASSES),
        state=torch.randn(1, 1, 6),
    )
    _check_merged(model)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_in_a_loop_take_one_pass(kind: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 6)
        state: Any = (h, h) if kind == "LSTM" else h
        for x_t in x.unbind(1):
            state = s.cell(x_t, state)
        return s.head(state[0] if kind == "LSTM" else state)

    _check_merged(model_of(forward, cell=CELLS[kind](5, 6), head=nn.Linear(6, CLASSES)))


def _rows(model: Any, h: Tensor, size: int) -> Tensor:
    """Equal rows that are zero at first, one for each example."""
    rows: Tensor = model.gate * h.new_ones(len(h), size)
    return rows


ALIKE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a product of rows": lambda s, h: h + torch.tanh(_rows(s, h, 3) @ s.table[:3]),
    "an embedding of one number": lambda s, h: (
        h + F.embedding(torch.zeros(len(h), dtype=torch.int64), s.gate * s.table)
    ),
    "a table for each example": lambda s, h: (
        h.view(-1, 2, 4) + (s.gate * s.table[:2, :4]).expand(len(h), 2, 4)
    ).flatten(1),
    "a table for each example, in a row": lambda s, h: (
        h.reshape(-1, 4) + (s.gate * s.table[:1, :4]).repeat(2 * len(h), 1)
    ).view(-1, 8),
    "parts of rows": lambda s, h: h * torch.cat(_rows(s, h, 8).chunk(2, 1)[::-1], 1).softmax(1),
    "a constant as long as a batch": lambda s, h: (
        h + (s.gate * s.table[0, :4] * h.new_ones(4, 4)).sum(1).repeat(2)
    ),
    "rows written to a tensor": lambda s, h: h + h.new_zeros(len(h), 8).copy_(_rows(s, h, 8)),
}


def _first_zero(rows: Tensor) -> Tensor:
    out = torch.zeros_like(rows)
    out[1:] = rows[1:]
    return out


def _moved_down(rows: Tensor) -> Tensor:
    out = rows.new_zeros(len(rows) + 1, *rows.shape[1:])
    out[1:] = rows
    return out[:-1]


DIFFERENT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    # The rows differ.
    "times their number": lambda s, h: h * (s.gate * torch.arange(len(h)).to(h)[:, None]),
    "a table by number": lambda s, h: h + s.gate * s.table[torch.arange(len(h))],
    "an embedding of numbers": lambda s, h: h + F.embedding(torch.arange(len(h)), s.gate * s.table),
    "a part of a table": lambda s, h: h + s.gate * s.table[: len(h)],
    "a triangle of rows": lambda s, h: h * _rows(s, h, 8).tril(),
    "a triangle of data": lambda s, h: h + s.gate * h.tril(),
    "sums up to each row": lambda s, h: h * _rows(s, h, 1).cumsum(0),
    "all rows but the first": lambda s, h: h * _first_zero(_rows(s, h, 1)),
    "rows that move down": lambda s, h: h * _moved_down(_rows(s, h, 1)),
    "rows that are padded": lambda s, h: h * F.pad(_rows(s, h, 1), (0, 0, 1, 0))[:-1],
    "rows with one replaced": lambda s, h: (
        h * _rows(s, h, 8).index_copy(0, torch.tensor([0]), h.new_zeros(1, 8))
    ),
    "rows in another order": lambda s, h: (
        h * (s.gate * s.table[0, :2]).repeat(len(h)).view(2, len(h))[0][:, None]
    ),
    "rows seen aslant": lambda s, h: (
        h * (s.gate * s.table[0]).expand(len(h), 8).contiguous().as_strided((len(h), 1), (7, 1))
    ),
    "data without its diagonal": lambda s, h: h + s.gate * h.clone().fill_diagonal_(0.0),
    # The rows are alike and are counted.
    "a sum of expanded rows": lambda s, h: h * s.gate.expand(len(h)).sum(),
    "a sum of repeated rows": lambda s, h: h * s.gate.repeat(len(h), 1).sum(),
    "a sum of twice as many": lambda s, h: h * s.gate.expand(2 * len(h)).sum(),
    "a product that is a sum": lambda s, h: (
        h * (h.new_ones(1, len(h)) @ s.gate.expand(len(h), 1)).sum()
    ),
    "a sum after the data": lambda s, h: (
        h * (h[:, :1] @ s.gate.expand(1, len(h))).sum(1, keepdim=True)
    ),
    "a sum of joined rows": lambda s, h: h * torch.cat([_rows(s, h, 1)] * 2).sum(),
    "a constant that repeats data": lambda s, h: (
        h + s.gate * h * (h[:, :1] + h.new_zeros(len(h))).sum(1, keepdim=True)
    ),
    # The size is an argument.
    "data expanded": lambda s, h: h + s.gate * h[:, :1].expand(-1, len(h)).sum(1, keepdim=True),
    "data repeated": lambda s, h: h + s.gate * h[:, :1].repeat(1, len(h)).sum(1, keepdim=True),
    "data padded": lambda s, h: h + s.gate * F.pad(h, (0, len(h)), value=1.0).sum(1, keepdim=True),
    "features up to a size": lambda s, h: h + s.gate * h[:, : len(h)].sum(1, keepdim=True),
    "a feature by a size": lambda s, h: h + s.gate * h[:, len(h) % 8, None],
    "a row of a table by a size": lambda s, h: h + s.gate * s.table[len(h)],
    "features that roll": lambda s, h: h + s.gate * h.roll(len(h) % 3, 1),
    "features interpolated": lambda s, h: (
        h + s.gate * F.interpolate(h[:, None], size=len(h)).sum(2)
    ),
}


def _gated(function: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    model = model_of(
        lambda s, x: s.b(function(s, torch.tanh(s.a(x)))),
        a=nn.Linear(5, 8),
        b=nn.Linear(8, CLASSES),
    )
    model.register_buffer("gate", torch.zeros((), dtype=torch.float64))
    model.register_buffer("table", torch.randn(20, 8, dtype=torch.float64))
    return model


@pytest.mark.parametrize("name", ALIKE)
def test_rows_that_are_alike(name: str) -> None:
    model = _gated(ALIKE[name])
    _check_merged(model, vectors)


def test_a_constant_of_the_losses() -> None:
    """It has a row for each of their examples, which are a part of the merged ones."""

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * outputs.new_full((len(targets),), 0.5)

    for sizes in ((6, 4), (4, 4), (6, 1)):
        model = _gated(lambda s, h: h)
        reweighter = Reweighter(model, losses)
        batch, clean = map(vectors, sizes)
        assert "one merged" in reweighter.explain(batch, clean).passes
        assert_exact(model, losses, batch, clean, reweighter=reweighter)


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.filterwarnings("ignore:l2rw_ext")
def test_sizes_that_enter_behind_a_zero(name: str) -> None:
    model = _gated(DIFFERENT[name])
    reweighter = Reweighter(model, cross_entropy)
    for value in (0.0, 0.5):
        model.get_buffer("gate").fill_(value)
        assert_exact(model, cross_entropy, vectors(6), vectors(4), reweighter=reweighter)
