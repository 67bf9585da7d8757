"""Gradients that are in ``p.grad`` before a step adds to them, mostly by a mistake of the loop."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor, nn


class LeftOver:
    """Notices that ``p.grad`` was not cleared, or that something else than a step has filled it.

    It looks at the smallest parameter alone. Steps must not wait for a device, so that it reads
    values of its gradient before the first step, and then once at most: when that gradient seems to
    be left over. A gradient that is spread over ranks is not looked at.
    """

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[nn.Parameter], weakref.ref[Tensor], int] | None = None
        """The parameter, its gradient and its version; models and gradients may go meanwhile."""
        self._decided = False
        """Whether a gradient that seemed to be left over has been read."""

    def __reduce__(self) -> tuple[type[LeftOver], tuple[()]]:
        """A copy begins anew: it knows other parameters."""
        return LeftOver, ()

    def mistake(self, parameters: Sequence[nn.Parameter]) -> str | None:
        """What the loop seems to have forgotten; None if nothing tells of a mistake.

        A gradient that is where the last step has left it, beside a parameter that has changed
        since, was used by an optimizer, and is to be zero by now. Without a change, gradients
        accumulate on purpose.
        """
        if self._decided:
            return None
        if self._seen is None:
            return _before_the_first_step(parameters)
        remembered, gradient, used = self._seen
        p = remembered()
        if p is None or p.grad is None or p.grad is not gradient() or p._version == used:
            return None
        if not any(p is other for other in parameters):  # frozen by now, or not of the model
            return None
        self._decided = True
        if not p.grad.any():
            return None
        return (
            "p.grad still holds the gradient of the last step, although the optimizer has stepped "
            "since; this step adds to it. Call optimizer.zero_grad() after optimizer.step()"
        )

    def note(self, parameters: Sequence[nn.Parameter]) -> None:
        """Remember what a step has left, without keeping it in memory."""
        if self._decided:
            return
        p = None if self._seen is None else self._seen[0]()
        p = _smallest(parameters) if p is None else p
        if p is not None and type(p.grad) is Tensor:
            self._seen = weakref.ref(p), weakref.ref(p.grad), p._version


def _smallest(parameters: Sequence[nn.Parameter]) -> nn.Parameter | None:
    """The smallest parameter that has a gradient of one rank."""
    found = (p for p in parameters if type(p.grad) is Tensor)
    return min(found, key=Tensor.numel, default=None)


def _before_the_first_step(parameters: Sequence[nn.Parameter]) -> str | None:
    p = _smallest(parameters)
    if p is None or p.grad is None or not p.grad.any():
        return None
    return (
        "p.grad holds a gradient before the first step, which adds to it. backward() of the "
        "Reweighter takes the place of loss.backward(): leave that call out, or clear p.grad "
        "by optimizer.zero_grad(). If the sum is what you want, ignore this warning"
    )
