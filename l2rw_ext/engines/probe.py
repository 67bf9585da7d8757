"""How the layer-wise engine knows that it is exact, instead of assuming it.

A second backward over the same graph, in which the loss of example i has the seed r_i, returns
r_i g on every row that belongs to example i alone. That yields the row-to-example map of each use
and exposes coupling, wherever it hides. The seeds are powers of two, so that a row that belongs to
one example is scaled without rounding, and a dependence on another shows even when it is small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..rules.base import RowMap, Use
from .base import NotExactError


def seeds(count: int, device: torch.device) -> Tensor:
    """One power of two for each example, from 1/16 to 8; distinct for up to eight examples."""
    if count <= 8:
        exponents = torch.arange(count) - 4
    else:
        generator = torch.Generator().manual_seed(count)
        exponents = torch.randint(-4, 4, (count,), generator=generator)
    return torch.exp2(exponents.to(torch.float32)).to(device)


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
        self.certain = self.certain and len(fitting) == 1
        self.maps[use.index] = fitting[0]


def _scaled_by(plain: Tensor, seeded: Tensor, r: Tensor, rows: RowMap) -> bool:
    scale = r.to(plain.dtype).view(1, rows.size, 1, 1)
    shape = (rows.outer, rows.size, rows.inner, -1)
    expected = plain.reshape(shape) * scale
    found = seeded.reshape(shape)
    finite = expected.isfinite() & found.isfinite()
    error = (found - expected).where(finite, torch.zeros((), dtype=plain.dtype)).abs().max()
    largest = expected.where(finite, torch.zeros((), dtype=plain.dtype)).abs().max()
    info = torch.finfo(plain.dtype)
    return bool(error <= 16 * info.eps * largest + info.smallest_normal)


def with_other_clean_rows(inputs: Any, n: int, m: int) -> Any:
    """Merged inputs whose clean rows are the first training rows, over and over."""
    return _rows_taken(inputs, torch.cat([torch.arange(n), torch.arange(m) % n]))


def with_other_training_rows(inputs: Any, n: int, m: int) -> Any:
    """Merged inputs whose training rows are the clean rows, over and over."""
    return _rows_taken(inputs, torch.cat([n + torch.arange(n) % m, n + torch.arange(m)]))


def _rows_taken(inputs: Any, order: Tensor) -> Any:
    def take(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() and x.size(0) == order.numel():
            return x.index_select(0, order.to(x.device))
        return x

    return pytree.tree_map(take, inputs)


def same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same rows agree to rounding."""
    finite = a.isfinite() & b.isfinite()
    zero = torch.zeros((), dtype=a.dtype, device=a.device)
    error = (a - b).where(finite, zero).abs().max()
    scale = a.where(finite, zero).abs().max()
    return bool((a.isfinite() == b.isfinite()).all()) and bool(
        error <= 256 * torch.finfo(a.dtype).eps * scale
    )
