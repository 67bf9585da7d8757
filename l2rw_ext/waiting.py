"""Whether the host may look at values.

The host runs ahead of a CUDA device, and reading a value there means waiting until the device has
computed it. A step therefore decides by values only where they are at hand, and elsewhere works
such that it need not know: examples without weight are masked instead of left out, errors are
raised when a result is read. What a plan is made from is read on any device.
"""

from __future__ import annotations

from torch import Tensor


def at_hand(x: Tensor) -> bool:
    """Whether reading values of ``x`` waits for no device."""
    return x.device.type == "cpu"
