"""The row map of a use from the labels of its output, as an example map found them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2rw_ext.errors import NotExactError
from l2rw_ext.layers.base import RowMap, Use
from l2rw_ext.tracing.example_map import MIXED


def labelled(use: Use, labels: Tensor) -> bool:
    """Whether each element of the output belongs to one example; an empty output does."""
    return 0 in use.output_shape or bool(((labels >= 0) & (labels != MIXED)).all())


def rows_of(use: Use, labels: Tensor, first: int, size: int) -> RowMap | None:
    """Which row of the output belongs to which of ``size`` examples from ``first`` on.

    The result is None for an empty output.

    Raises:
        NotExactError: no map of the layer says what the labels say.
    """
    like = torch.empty(use.output_shape, device="meta")
    if like.numel() == 0:
        return None
    leading = use.layer.leading(use, like)
    if all(k == 1 for k in labels.shape[leading:]):
        count = math.prod(use.output_shape[:leading])
        found = labels.expand(*use.output_shape[:leading], *labels.shape[leading:]).flatten()
        order = torch.arange(count, dtype=found.dtype, device="cpu")
        for rows in use.layer.maps(use, like, size):
            if torch.equal(found, first + order // rows.inner % rows.size):
                return rows
    raise NotExactError(
        f"the order of the examples within the batch is not that of the rows of {use.operation} on "
        f"{tuple(use.shape)}"
    )
