"""Errors that say why a step cannot give an exact number, or cannot be captured."""

from __future__ import annotations


class NotExactError(RuntimeError):
    """An engine would give wrong numbers for this model, or none; the message names the reason."""


class NotCapturableError(RuntimeError):
    """A step cannot be captured; the message says why and what to do."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"cuda_graph=True: {reason}; {remedy}leave cuda_graph off")
        self.why = (reason, remedy)
