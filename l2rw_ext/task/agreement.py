"""What processes have to decide alike, because each forward and backward is collectives of all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor


class Agreement:
    """The decisions of a step whose forwards and backwards are this process's own."""

    shared: ClassVar[bool] = False
    """Whether other processes have to take part in each forward and backward."""

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        return list(flags)

    def check_order(self, number: int) -> None:
        """Check that all processes are about to gather the same, which a number stands for.

        Raises:
            NotExactError: they are not.
        """

    @contextlib.contextmanager
    def at(self, place: str, *kinds: type[Exception]) -> Iterator[None]:
        """A body that all processes run, and whose end all reach unless they raise.

        If a process raises an exception of one of the ``kinds``, all raise one of the last kind
        that any of them has raised. If a process raises another one, the others raise
        :class:`~l2rw_ext.RankError`.
        """
        yield

    @contextlib.contextmanager
    def forward(self, place: str, *kinds: type[Exception]) -> Iterator[None]:
        """As :meth:`at`, for a body that runs the model forward once.

        A process that fails on the way takes part in what the others wait for.
        """
        yield

    def mean(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """The number of losses in all processes, and their mean, shape () each."""
        return losses.new_full((), losses.numel()), losses.mean()
