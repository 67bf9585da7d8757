"""``ExampleRecord.issues``: a report of one row an example."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l2rw_ext.data.example_record import ExampleRecord


def _record(*steps: list[float], device: str = "cpu") -> ExampleRecord:
    """Steps with one score for each of the examples 0, 1, 2, ..."""
    record = ExampleRecord()
    for scores in steps:
        record.add(torch.arange(len(scores)), torch.tensor(scores, device=device))
    return record


def test_columns() -> None:
    issues = _record([1.0, -1.0, math.nan]).issues([7, 8, 9, 9])
    assert issues.dtype.names == ("index", "is_label_issue", "label_score", "given_label")
    assert issues.index.tolist() == [0, 1, 2, 3]
    assert issues.is_label_issue.tolist() == [False, True, False, False]
    assert issues.label_score[:2].tolist() == [1.0, 0.0]
    assert np.isnan(issues.label_score[2:]).all()
    assert issues.given_label.tolist() == [7, 8, 9, 9]


def test_a_score_counts_by_its_sign_and_zero_counts_half() -> None:
    record = _record(
        [9.0, 1.0, 0.0, 0.0, 1.0], [-1.0, -9.0, 0.0, -1.0, 0.0], [1.0, -1.0, 0.0, 0, 0]
    )
    issues = record.issues([0] * 5)
    assert np.allclose(issues.label_score, np.array([4, 2, 3, 2, 4]) / 6)
    assert issues.is_label_issue.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    record = ExampleRecord()
    record.add(torch.arange(2), torch.tensor([300.0, -300.0], dtype=dtype))
    issues = record.issues([0, 1], torch.eye(2, dtype=dtype))
    assert issues.label_score.tolist() == [1.0, 0.0]
    assert issues.predicted_label.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (np.array(["cat", "dog"], dtype=object), ["cat", "dog"]),
        (np.array([3, 4], dtype=np.uint8), [3, 4]),
        (torch.tensor([3, 4]), [3, 4]),
        ((True, False), [True, False]),
    ],
)
def test_labels_and_predicted_labels(labels: Any, expected: list[Any]) -> None:
    issues = _record([1.0, -1.0]).issues(labels, labels)
    assert issues.given_label.tolist() == expected
    assert issues.predicted_label.tolist() == expected


def test_outputs_of_classes() -> None:
    outputs = torch.tensor([[0.1, 0.9], [3.0, -3.0]], requires_grad=True)
    for found in (outputs, outputs.detach().numpy(), outputs.tolist()):
        assert _record([1.0, -1.0]).issues([0, 0], found).predicted_label.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "outputs", "error", "message"),
    [
        ([0], None, ValueError, "there are 1, but the record has scores of example 1"),
        ([0.5, 1.0], None, TypeError, "labels must hold integers or strings, got float64"),
        ([[0], [1]], None, ValueError, r"labels must have shape \(N,\), got \(2, 1\)"),
        ([0, 1], [0], ValueError, "outputs must have 2 rows as labels has, got 1"),
        ([0, 1], [0.5, 1.0], TypeError, "outputs must hold integers or strings, got float64"),
        ([0, 1], [[[0]], [[1]]], ValueError, r"outputs must have shape \(N,\)"),
        (["a", "b"], [[0.0, 1.0], [1.0, 0.0]], ValueError, "labels are strings: give predicted"),
        ([0, 1], [[-2.0], [2.0]], ValueError, r"a column for each class, got shape \(2, 1\)"),
        ([0, 1], 1, ValueError, r"outputs must have shape \(N,\), got \(\)"),
        (np.array(["a", np.nan], object), None, TypeError, "integers or strings, got both"),
    ],
)
def test_errors(labels: Any, outputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _record([1.0, -1.0]).issues(labels, outputs)


def test_without_steps() -> None:
    with pytest.raises(ValueError, match=r"no scores: give backward.*index="):
        ExampleRecord().issues([0, 1])
    record = ExampleRecord()
    record.add(torch.tensor([0]), torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="no scores"):
        record.issues([0, 1])


def test_a_record_prints_as_one_line() -> None:
    record = ExampleRecord()
    record.add(torch.tensor([0, 2, 2]), torch.tensor([1.0, -1.0, 2.0]))
    assert repr(record) == "ExampleRecord(2 of 3 examples scored, visits=3)"


def test_csv_of_selected_rows(tmp_path: Path) -> None:
    issues = _record([1.0, 1.0, -3.0], [1.0, -1.0, -3.0], [1.0, -1.0, -3.0]).issues(
        ["a", "b, c", "d", "e"]
    )
    found = issues[issues.is_label_issue]
    found[found.label_score.argsort()].to_csv(tmp_path / "issues.csv")
    with open(tmp_path / "issues.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == ["2", "1"]
    assert [row["given_label"] for row in rows] == ["d", "b, c"]
    assert [float(row["label_score"]) for row in rows] == sorted(found.label_score)


def test_a_table_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(_record([1.0, -1.0]).issues(["a", "b", "c"], ["a", "a", "a"]))
    assert list(table.columns)[1:] == [
        "is_label_issue",
        "label_score",
        "given_label",
        "predicted_label",
    ]
    assert table.is_label_issue.tolist() == [False, True, False]
    assert _record([1.0, -1.0]).issues(table.given_label[:2]).given_label.tolist() == ["a", "b"]


def test_states() -> None:
    record = _record([1.0, -1.0], [2.0, 1.0])
    again = ExampleRecord()
    again.load_state_dict(record.state_dict())
    again.add(torch.tensor([3]), torch.tensor([1.0]))
    assert again.issues([0] * 4)[:2].tolist() == record.issues([0, 0]).tolist()
    assert again.visits.tolist() == [2, 2, 0, 1]

    old = {k: v for k, v in record.state_dict().items() if k != "negative"}
    again.load_state_dict(old)
    assert again.issues([0, 0]).tolist() == record.issues([0, 0]).tolist()
