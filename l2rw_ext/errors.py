"""Errors that say why a step cannot give an exact number or become one graph, and warnings."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from types import FrameType

_INSIDE = re.compile(r"l2rw_ext\.|contextlib$")


class NotExactError(RuntimeError):
    """An engine would give wrong numbers for this model, or none; the message names the reason."""


class RankError(RuntimeError):
    """Another rank of the process group has failed in this step; the message says which, and why.

    Attributes:
        rank: the first rank that has failed, by its number in the group; None if none has, but they
            are at different calls.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class NotCompilableError(RuntimeError):
    """A step cannot become one graph; the message says why, and what to change if that is known."""


class NotYetCompilableError(NotCompilableError):
    """A step has no plan to be traced by, or another thread drew; a later trace may succeed."""


@contextlib.contextmanager
def noted(place: str) -> Iterator[None]:
    """Say beneath an error of the user's code where in a step it was raised (Python 3.11)."""
    try:
        yield
    except Exception as error:
        if sys.version_info >= (3, 11):
            error.add_note(f"l2rw_ext: raised in the {place}")
        raise


def warn(text: str) -> None:
    """Warn at the line of the user's that called this package."""
    frame: FrameType | None = sys._getframe(1)
    levels = 2
    # A context of this package is left through a frame of contextlib.
    while frame is not None and _INSIDE.match(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        levels += 1
    warnings.warn(f"l2rw_ext: {text}", stacklevel=levels)
