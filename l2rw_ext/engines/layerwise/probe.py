"""How the layer-wise engine knows that a step is exact where values decide which examples meet.

A second backward over the same graph, in which the loss of example i has the seed r_i, returns
r_i g on every row that belongs to example i alone. That yields the row-to-example map of each use
and exposes coupling, wherever it hides. The seeds are powers of two, so that a row that belongs to
one example is scaled without rounding, and a dependence on another shows even when it is small.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from l2rw_ext.errors import NotExactError
from l2rw_ext.layers.base import RowMap, Use
from l2rw_ext.ops.arithmetic import accumulation_dtype


def seeds(count: int, device: torch.device, exponents: Iterable[int]) -> Tensor:
    """One power of two for each example, different for examples close in the batch."""
    choices = list(exponents)
    draw = random.Random(count)
    drawn: list[int] = []
    while len(drawn) < count:
        draw.shuffle(choices)
        drawn += choices
    return torch.tensor([2.0**e for e in drawn[:count]], dtype=torch.float32, device=device)


@dataclass(frozen=True)
class _Rows:
    """The part of a gradient that is kept between the two backwards to recognise each row by."""

    prints: Tensor
    """Sums of the row under random signs, (rows, 4); scaling by a power of two scales them."""
    sizes: Tensor
    """Sum of the row's absolute values, (rows,)."""

    @classmethod
    def of(cls, g: Tensor, leading: int) -> _Rows:
        """From a gradient whose first ``leading`` dimensions count rows."""
        rows = g.reshape(math.prod(g.shape[:leading]), -1).to(accumulation_dtype(g.dtype))
        if rows.shape[1] == 1:
            return cls(rows, rows.abs().squeeze(1))
        generator = torch.Generator("cpu").manual_seed(rows.shape[1])
        signs = torch.randint(0, 2, (rows.shape[1], 4), generator=generator, device="cpu") * 2 - 1
        return cls(rows @ signs.to(rows), rows.abs().sum(1))


class Probe:
    """Compares the reports of a seeded backward with those of a plain one.

    Between the two backwards the engine sets :attr:`seeds`, the seeds r of the examples of each
    part.
    """

    def __init__(self, *, narrow: bool = False) -> None:
        self.seeds: dict[str, Tensor] = {}
        self.narrow = narrow
        """Whether some gradient of the plain backward has the small range of float16."""
        self._largest = 0.0
        self.finite = True
        """Whether all gradients of the plain backward are finite."""
        self.maps: dict[int, RowMap | None] = {}
        """The row map by index of the use; None if the gradient is zero and shows nothing."""
        self.mixed: NotExactError | None = None
        """That no map explains how the rows of a use were scaled. It is not raised at once, because
        the backward is of other processes, too, where parameters are sharded."""
        self._plain: dict[int, _Rows] = {}

    def exponents(self) -> range:
        """Exponents of the seeds: few for float16, negative if a loss scale uses the range."""
        if not self.narrow:
            return range(-30, 31)
        return range(8) if self._largest < 1 else range(-7, 1)

    def report(self, use: Use, g: Tensor) -> None:
        """Take the first report of a use from the plain backward, the second as seeded."""
        if g.numel() == 0:
            self.maps[use.index] = None
            return
        found = _Rows.of(g, use.layer.leading(use, g))
        plain = self._plain.pop(use.index, None)
        if plain is None:
            self._plain[use.index] = found
            self.finite = self.finite and bool(found.sizes.isfinite().all())
            if g.dtype == torch.float16:
                self.narrow = True
                self._largest = max(self._largest, float(g.abs().amax().nan_to_num()))
            return
        r = self.seeds[use.part]
        if not bool(plain.sizes.any()):
            self.maps[use.index] = None
            return
        eps = torch.finfo(g.dtype).eps
        # Where some gradient is float16, others may have lost bits below its smallest normal.
        smallest = torch.finfo(torch.float16 if self.narrow else g.dtype).smallest_normal
        fitting = (
            rows
            for rows in use.layer.maps(use, g, r.numel())
            if _scaled_by(plain, found, r, rows, eps, smallest)
        )
        rows = next(fitting, None)
        if rows is None:
            self.mixed = self.mixed or NotExactError(
                f"the gradient at {use.operation} on {tuple(use.shape)} mixes examples, or their "
                "order within the batch is not that of its rows"
            )
        self.maps[use.index] = rows


def _scaled_by(
    plain: _Rows, seeded: _Rows, r: Tensor, rows: RowMap, eps: float, smallest: float
) -> bool:
    shape = (rows.outer, rows.size, rows.inner, -1)
    expected = plain.prints.reshape(shape) * r.to(plain.prints.dtype).view(1, rows.size, 1, 1)
    found = seeded.prints.reshape(shape)
    finite = plain.prints.isfinite().reshape(shape)
    error = (found - expected).abs().masked_fill(~finite, 0).amax((0, 2, 3))
    sizes = plain.sizes.reshape(shape[:-1])
    largest = sizes.masked_fill(~sizes.isfinite(), 0).amax((0, 2))
    # Example by example, so that what one with a small seed receives from another shows.
    allowed = 16 * eps * r * largest.clamp(min=eps * float(largest.max()))
    return bool((error <= allowed + smallest * r.clamp(min=1)).all())
