"""Which examples are probably mislabelled: a report of one row an example."""

from __future__ import annotations

import csv
import os
from typing import Any

import numpy as np
from torch import Tensor


class LabelIssues(np.recarray):
    """A NumPy record array with one row an example, as :meth:`ExampleRecord.issues` returns it.

    Rows can be selected and sorted as those of any array: each names its example in ``index``.
    """

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a file of comma-separated values, under a line with their names.

        Raises:
            OSError: the file cannot be written.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.dtype.names or ())
            writer.writerows(self.tolist())


def find_issues(label_scores: Tensor, labels: Any, outputs: Any = None) -> LabelIssues:
    """The report of :meth:`ExampleRecord.issues`.

    Args:
        label_scores: shape (K,), in [0, 1], below a half for examples that are probably
            mislabelled, and NaN for those that were never scored.
        labels: what :meth:`ExampleRecord.issues` takes.
        outputs: likewise.
    """
    given = _labels("labels", labels)
    if len(given) < len(label_scores):
        raise ValueError(
            f"labels must have one label for each example of the training set: there are "
            f"{len(given)}, but the record has scores of example {len(label_scores) - 1}"
        )
    values = np.full(len(given), np.nan)
    values[: len(label_scores)] = label_scores.cpu().double().numpy()
    columns = {
        "index": np.arange(len(given)),
        "is_label_issue": values < 0.5,
        "label_score": values,
        "given_label": given,
    }
    if outputs is not None:
        columns["predicted_label"] = _predictions(outputs, given)
    fields = [(name, column.dtype) for name, column in columns.items()]
    issues = np.empty(len(given), fields).view(LabelIssues)
    for name, column in columns.items():
        issues[name] = column
    return issues


def _predictions(outputs: Any, given: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The predicted label of each example."""
    found = _array(outputs)
    if found.ndim != 2:
        found = _labels("outputs", found)
    if len(found) != len(given):
        raise ValueError(f"outputs must have {len(given)} rows as labels has, got {len(found)}")
    if found.ndim == 1:
        return found
    if found.shape[1] < 2:
        raise ValueError(
            f"outputs must have a column for each class, got shape {found.shape}: "
            "give predicted labels of shape (N,), such as outputs[:, 0] > 0 of one logit"
        )
    if given.dtype.kind == "U":
        raise ValueError(
            "outputs of shape (N, classes) number the classes, but labels are strings: "
            "give predicted labels of shape (N,)"
        )
    predicted: np.ndarray[Any, Any] = found.argmax(1)
    return predicted


def _labels(name: str, values: Any) -> np.ndarray[Any, Any]:
    """Labels as an array of integers or of strings, shape (N,)."""
    found = _array(values)
    if found.dtype.kind in "OT":  # what pandas keeps strings in
        items = found.tolist()
        if len({isinstance(item, str) for item in items}) > 1:  # a missing one is no "nan"
            raise TypeError(f"{name} must hold integers or strings, got both, or missing ones")
        found = np.asarray(items)
    if found.ndim != 1:
        raise ValueError(f"{name} must have shape (N,), got {found.shape}")
    if found.dtype.kind not in "biuU" and len(found):
        raise TypeError(f"{name} must hold integers or strings, got {found.dtype}")
    return found


def _array(values: Any) -> np.ndarray[Any, Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.is_floating_point() else values)
    return np.asarray(values)
