"""``ExampleRecord``: what steps with an index leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from l2rw_ext import Reweighter
from support.models import cross_entropy, mlp, vectors
from support.oracle import unchanged


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.arange(5), ValueError, "one number for each of the 6 training examples"),
        (torch.arange(6.0), TypeError, "index must hold whole numbers, got torch.float32"),
        (list("abcdef"), TypeError, "index must hold whole numbers, got .'a', 'b'"),
        (torch.arange(6) - 1, ValueError, "index must not be negative, got -1"),
    ],
)
def test_bad_index(index: Any, error: type[Exception], message: str) -> None:
    model, batch, clean = mlp(), vectors(6), vectors(4)
    with unchanged(model), pytest.raises(error, match=message):
        Reweighter(model, cross_entropy).backward(batch, clean, index=index)


def test_record_of_examples() -> None:
    model = mlp()
    reweighter = Reweighter(model, cross_entropy)
    batch = vectors(4)
    a = reweighter.backward(batch, vectors(3), index=[3, 0, 9, 4]).scores
    b = reweighter.backward(batch, vectors(3), index=[3, 1, 9, 5]).scores
    record = reweighter.record
    assert len(record) == 10
    assert record.visits.tolist() == [1, 1, 0, 2, 1, 1, 0, 0, 0, 2]
    assert torch.equal(record.scores[[3, 0, 9, 4]], torch.stack([b[0], a[1], b[2], a[3]]))
    assert torch.allclose(record.mean_scores[[3, 9]], (a + b)[[0, 2]] / 2)
    assert record.kept_share[9] == ((a[2] > 0).double() + (b[2] > 0).double()) / 2
    assert record.scores[2].isnan()
    assert record.mean_scores[2].isnan()


def test_scores_that_are_not_finite_are_not_recorded() -> None:
    model, (x, y), clean = mlp(), vectors(4), vectors(3)
    x[2] = float("nan")
    reweighter = Reweighter(model, cross_entropy, engine="layerwise")
    reweighter.backward((x, y), clean, index=range(4))
    assert reweighter.record.visits.tolist() == [1, 1, 0, 1]
    assert reweighter.record.scores.isnan().tolist() == [False, False, True, False]
