"""Gradients that are in ``p.grad`` before a step adds to them, mostly by a mistake of the loop."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class LeftOver:
    """Notices that ``p.grad`` was not cleared, or that something else than a step has filled it.

    It looks at the smallest parameter alone, and reads values of its gradient before the first step
    only: later steps must not wait for a device.
    """

    def __init__(self) -> None:
        self._seen: tuple[nn.Parameter, Tensor, int, int] | None = None

    def mistake(self, parameters: Sequence[nn.Parameter]) -> str | None:
        """What the loop seems to have forgotten; None if nothing tells of a mistake.

        A gradient that the last step has left, beside a parameter that has changed since, was used
        by an optimizer and not cleared. Without a change, gradients accumulate on purpose.
        """
        if self._seen is not None:
            p, gradient, version, used = self._seen
            if p.grad is gradient and gradient._version == version and p._version != used:
                return (
                    "p.grad still holds the gradient of the last step, although the optimizer has "
                    "stepped since; this step adds to it. Call optimizer.zero_grad() after "
                    "optimizer.step()"
                )
            return None
        # A gradient that is spread over ranks is not looked at.
        found = [p.grad for p in parameters if type(p.grad) is Tensor]
        if not found or not min(found, key=Tensor.numel).any():
            return None
        return (
            "p.grad holds a gradient before the first step, which adds to it. backward() of the "
            "Reweighter takes the place of loss.backward(): leave that call out, or clear p.grad "
            "by optimizer.zero_grad(). If the sum is what you want, ignore this warning"
        )

    def note(self, parameters: Sequence[nn.Parameter]) -> None:
        """Remember what a step has left."""
        found = [(p, p.grad) for p in parameters if p.grad is not None]
        if found:
            p, gradient = min(found, key=lambda pair: pair[0].numel())
            self._seen = p, gradient, gradient._version, p._version
