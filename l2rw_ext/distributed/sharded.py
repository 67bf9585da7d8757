"""Steps on parameters that ``fully_shard`` (FSDP2) shards among ranks.

Each forward and each backward of such a model is a chain of collectives of all ranks. So the ranks
run the same forwards and backwards, and decide together what a step of one process decides alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from l2rw_ext.errors import NotExactError
from l2rw_ext.task.agreement import Agreement
from l2rw_ext.tracing.shards import Shards

from .group import Processes


class RanksAgreement(Agreement):
    """What the ranks of a group decide together."""

    shared = True

    def __init__(self, processes: Processes, shards: Shards) -> None:
        self._processes = processes
        self._shards = shards

    def any(self, *flags: bool) -> list[bool]:
        """See :class:`~l2rw_ext.task.agreement.Agreement`."""
        return self._processes.any(list(flags))

    def check_order(self, number: int) -> None:
        """See :class:`~l2rw_ext.task.agreement.Agreement`."""
        if len({told for (told,) in self._processes.meet("the order", number)}) > 1:
            raise NotExactError(
                "the forwards of the ranks use other sharded parameters, or use them in another "
                "order, so that no layer's part of the direction can be gathered"
            )

    @contextlib.contextmanager
    def at(self, place: str, *kinds: type[Exception]) -> Iterator[None]:
        """See :class:`~l2rw_ext.task.agreement.Agreement`."""
        raised: Exception | None = None
        try:
            yield
        except Exception as error:
            raised = error
        found = 0 if raised is None else len(kinds) + 1
        for number, kind in enumerate(kinds, 1):
            if isinstance(raised, kind):
                found = number
        unknown = raised if found > len(kinds) else None
        numbers = [int(number) for (number,) in self._processes.meet(place, found, error=unknown)]
        last = max(numbers)
        if last and raised is not None and found == last:
            raise raised
        if last:
            raise kinds[last - 1](f"rank {numbers.index(last)} raised it at {place}")

    @contextlib.contextmanager
    def forward(self, place: str, *kinds: type[Exception]) -> Iterator[None]:
        """See :class:`~l2rw_ext.task.agreement.Agreement`."""

        def largest(number: int) -> int:
            told = self._processes.meet("a group of parameters", number)
            return max(int(theirs) for (theirs,) in told)

        with self.at(place, *kinds), self._shards.owing(largest):
            yield
        self._shards.remember_order()

    def mean(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~l2rw_ext.task.agreement.Agreement`."""
        sums = torch.stack([losses.new_full((), losses.numel()), losses.sum()]).double()
        dist.all_reduce(sums, group=self._processes.group)
        return sums[0], (sums[1] / sums[0]).to(losses.dtype)


def said_of_shards(processes: Processes) -> str:
    """How many ranks there are and how they get the direction, for ``explain()``."""
    return (
        f"process_group: {processes.size} ranks, among which parameters are sharded, are weighed "
        "together; the direction is reduced as gradients are, and each layer gathers its part"
    )


def check_group(processes: Processes | None, group: dist.ProcessGroup) -> None:
    """Check that a step spans the ranks among which parameters are sharded.

    Args:
        processes: the ranks that the step spans; None for this one alone.
        group: the ranks among which the parameters are sharded.

    Raises:
        ValueError: it does not.
    """
    ranks = dist.get_process_group_ranks(group)
    own = [dist.get_rank()] if processes is None else dist.get_process_group_ranks(processes.group)
    if sorted(ranks) != sorted(own):
        raise ValueError(
            "process_group: the parameters are sharded among other ranks than those of the step, "
            "and no rank can be weighed alone; leave process_group='auto'"
        )
