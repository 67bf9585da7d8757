"""Compiled models run eagerly during a step.

A compiled forward shows no torch function to the interception and no second derivative to double
backward. ``torch.compiler.set_stance("force_eager")`` runs the same Python code uncompiled. The
compiled code is kept, and calls outside of a step use it as before.
"""

from __future__ import annotations

import sys
from typing import Any

from .shared import Shared


class _Eager(Shared):
    """The stance, for all threads of the process, also outside of a step."""

    _stance: Any = None

    def change(self) -> None:
        """See :class:`~l2rw_ext.task.shared.Shared`."""
        # If dynamo was never imported, nothing is compiled; importing it takes seconds.
        if "torch._dynamo" in sys.modules:
            from torch.compiler import set_stance

            try:
                self._stance = set_stance("force_eager")
            except RuntimeError as error:
                raise RuntimeError(
                    "a step cannot run inside torch.compile: compile the model, and call the step "
                    "from code that is not compiled"
                ) from error

    def put_back(self) -> None:
        """See :class:`~l2rw_ext.task.shared.Shared`."""
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None


eagerly = _Eager()
"""A context in which compiled code runs as the Python code that it was made from."""
