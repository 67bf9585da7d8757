"""Padding is exact: ``ignore_index`` in the loss, masks in attention, parts of two lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import Reweighter
from support.models import CLASSES, ENGINE_OPTIONS
from support.oracle import assert_exact, assert_matches, truth

PAD = -100


class _Tagger(nn.Module):
    """Classes of every token, with attention that does not look at padding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8, padding_idx=0)
        self.kind = kind
        if kind == "attention":
            self.inner: nn.Module = nn.MultiheadAttention(8, 2, batch_first=True)
        elif kind == "encoder":
            self.inner = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        else:
            self.inner = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, index: Tensor) -> Tensor:
        x, padding = self.embedding(index), index == 0
        if self.kind == "attention":
            x = x + self.inner(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        elif self.kind == "encoder":
            x = self.inner(x, src_key_padding_mask=padding)
        else:
            x = self.inner(x)[0]
        return self.head(x)


def _summed(outputs: Tensor, targets: Tensor) -> Tensor:
    """The sum over the tokens that are no padding."""
    losses = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=PAD, reduction="none")
    return losses.sum(1)


def _mean(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over the tokens that are no padding; 0 where all are."""
    return _summed(outputs, targets) / (targets != PAD).sum(1).clamp(min=1)


def _padded(lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    index = torch.zeros(len(lengths), width, dtype=torch.int64)
    targets = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        index[row, :length] = torch.randint(1, 7, (length,))
        targets[row, :length] = torch.randint(CLASSES, (length,))
    return index, targets


@pytest.mark.parametrize("kind", ["attention", "encoder", "recurrent"])
@pytest.mark.parametrize("loss_fn", [_summed, _mean])
@pytest.mark.parametrize("clean_width", [4, 6])
@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_padded_sequences(kind: str, loss_fn: Any, clean_width: int, engine: Any) -> None:
    model = _Tagger(kind).double()
    batch, clean = _padded([4, 1, 3, 2], 4), _padded([clean_width, 2, 3], clean_width)
    reweighter = Reweighter(model, loss_fn, engine=engine)
    for _ in range(2):
        step = assert_exact(model, loss_fn, batch, clean, reweighter=reweighter)
    if engine == "auto":
        assert step.engine == "layerwise"


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_more_padding_changes_nothing(engine: Any) -> None:
    model = _Tagger("attention").double()
    (index, targets), clean = _padded([3, 1, 2], 3), _padded([2, 3], 3)
    expected = truth(model, _mean, (index, targets), clean)
    wider = F.pad(index, (0, 2)), F.pad(targets, (0, 2), value=PAD)
    step = Reweighter(model, _mean, engine=engine).backward(wider, clean)
    assert_matches(step, model, expected)


@pytest.mark.parametrize("engine", ["auto", "layerwise"])
def test_an_example_of_padding_alone_has_no_weight(engine: Any) -> None:
    model = _Tagger("recurrent").double()
    batch, clean = _padded([3, 0, 2], 3), _padded([2, 3], 3)
    expected = truth(model, _mean, batch, clean)
    step = Reweighter(model, _mean, engine=engine).backward(batch, clean)
    assert_matches(step, model, expected)
    assert float(step.scores[1]) == float(step.weights[1]) == 0
