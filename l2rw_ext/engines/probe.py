"""How the layer-wise engine knows that it is exact, instead of assuming it.

A second backward over the same graph, in which the loss of example i has the seed r_i, returns
r_i g on every row that belongs to example i alone. That yields the row-to-example map of each use
and exposes coupling, wherever it hides. The seeds are powers of two, so that a row that belongs to
one example is scaled without rounding, and a dependence on another shows even when it is small.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..batch import tensors
from ..rules.base import RowMap, Use
from .base import NotExactError


def seeds(count: int, device: torch.device, *, narrow: bool = False) -> Tensor:
    """One power of two for each example, different for any examples that are close in the batch.

    From 2^-30 to 2^30; ``narrow`` for the small range of float16: from 2^-4 to 2^3.
    """
    choices = list(range(-4, 4)) if narrow else list(range(-30, 31))
    draw = random.Random(count)
    exponents: list[int] = []
    while len(exponents) < count:
        draw.shuffle(choices)
        exponents += choices
    return torch.tensor([2.0**e for e in exponents[:count]], dtype=torch.float32, device=device)


class Probe:
    """Compares the reports of the seeded backward with those of the plain one.

    Args:
        plain: reports of the plain backward, (use, g) by index of the use.
        seeds: r of the examples of each part.
    """

    def __init__(self, plain: dict[int, tuple[Use, Tensor]], seeds: dict[str, Tensor]) -> None:
        self._plain = plain
        self.seeds = seeds
        self.maps: dict[int, RowMap | None] = {}
        """By index of the use; None where the gradient is zero and shows nothing."""
        self.certain = True
        """False where more than one map fits, as with a gradient that is zero on most rows."""

    def compare(self, use: Use, seeded: Tensor) -> None:
        """Find the map under which each row was scaled by its example's seed.

        Raises:
            NotExactError: there is none.
        """
        _, plain = self._plain[use.index]
        r = self.seeds[use.part]
        if not bool(plain.any()):
            self.maps[use.index] = None
            return
        shows = bool((plain.isfinite() & (plain != 0)).any())
        fitting = [
            rows
            for rows in use.rule.maps(use, plain, r.numel())
            if _scaled_by(plain, seeded, r, rows)
        ]
        if not fitting:
            raise NotExactError(
                f"the gradient at {use.operation} on {tuple(use.shape)} mixes examples, or their "
                "order within the batch is not that of its rows"
            )
        self.certain = self.certain and shows and (len(fitting) == 1 or r.numel() == 1)
        self.maps[use.index] = fitting[0]


def _scaled_by(plain: Tensor, seeded: Tensor, r: Tensor, rows: RowMap) -> bool:
    scale = r.to(plain.dtype).view(1, rows.size, 1, 1)
    shape = (rows.outer, rows.size, rows.inner, -1)
    expected = plain.reshape(shape) * scale
    found = seeded.reshape(shape)
    finite = expected.isfinite() & found.isfinite()
    error = (found - expected).abs().masked_fill(~finite, 0).amax((0, 2, 3))
    largest = plain.reshape(shape).abs().masked_fill(~finite, 0).amax((0, 2, 3))
    info = torch.finfo(plain.dtype)
    # Example by example, so that what one with a small seed receives from another shows.
    allowed = 16 * info.eps * scale.flatten() * largest.clamp(min=info.eps * float(largest.max()))
    return bool((error <= allowed + info.smallest_normal).all())


def with_other_clean_rows(inputs: Any, n: int, m: int) -> Any:
    """Merged inputs whose clean rows are training rows, over and over."""
    return _rows_taken(inputs, [*range(n), *(j % n for j in range(m))])


def with_other_training_rows(inputs: Any, n: int, m: int) -> Any:
    """Merged inputs whose training rows are clean rows, over and over."""
    return _rows_taken(inputs, [*(n + i % m for i in range(n)), *range(n, n + m)])


def _rows_taken(inputs: Any, order: list[int]) -> Any:
    def take(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() and x.size(0) == len(order):
            return x.index_select(0, torch.tensor(order, device=x.device))
        return x

    return pytree.tree_map(take, inputs)


def shares_examples(inputs: Any, n: int, m: int) -> bool:
    """Whether some clean example of merged inputs is also a training example.

    The mean or the largest value of such a batch may be the same as without its clean rows.
    """
    batched = [
        x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        for x in tensors(inputs)
        if x.dim() and x.size(0) == n + m
    ]
    for j in range(n, n + m):
        same = torch.stack([(x[:n] == x[j]).all(1) for x in batched]).all(0)
        if bool(same.any()):
            return True
    return False


def same_rows(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two results of the same rows agree, relative to the largest."""
    finite = a.isfinite() & b.isfinite()
    error = (a - b).abs().masked_fill(~finite, 0).max()
    scale = a.abs().masked_fill(~finite, 0).max()
    return torch.equal(a.isfinite(), b.isfinite()) and bool(error <= tolerance * scale)
