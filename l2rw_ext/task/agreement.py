"""What processes have to decide alike, because each forward and backward is collectives of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class Agreement:
    """The decisions of a step whose forwards and backwards are this process's own."""

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        return list(flags)

    @contextlib.contextmanager
    def at(self, place: str, *kinds: type[Exception]) -> Iterator[None]:
        """A body that all processes run; an error of a process in it is one in each.

        If a process raises an exception of one of the ``kinds``, all raise one of the last of the
        kinds that was raised. If it raises another one, the others raise
        :class:`~l2rw_ext.RankError`.
        """
        yield

    def total(self, number: int) -> int:
        """The sum of the numbers of all processes."""
        return number
