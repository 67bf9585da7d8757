"""``ExampleRecord``: what steps with an index leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from l2rw_ext import ExampleRecord, Reweighter
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


def test_tables_add_up_in_float32_at_least() -> None:
    record = ExampleRecord()
    for _ in range(3000):
        record.add(torch.tensor([0]), torch.tensor([1.0], dtype=torch.float16))
    assert record.visits.tolist() == [3000]
    assert record.kept_share.tolist() == [1.0]
    assert record.mean_scores.dtype == torch.float32


def test_adding_scores_does_not_read_them() -> None:
    """Tensors on "meta" have no values to read."""
    record, index = ExampleRecord(), torch.tensor([4, 1])
    record.add(index, torch.empty(2, device="meta"))
    record.add(index, torch.empty(2, device="meta"))
    assert len(record) == 5


@pytest.mark.cuda
def test_adding_scores_on_cuda_does_not_wait_for_them() -> None:
    record, index = ExampleRecord(), torch.tensor([4, 1])
    scores = torch.tensor([1.0, -1.0], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        record.add(index, scores)
        record.add(index, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert record.visits.tolist() == [0, 2, 0, 0, 2]
    issues = record.issues(torch.zeros(5, dtype=torch.int64, device="cuda"))
    assert issues.is_label_issue.tolist() == [False, True, False, False, False]
