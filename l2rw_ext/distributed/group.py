"""The ranks of a process group, and the places at which their steps meet.

Between two meetings a rank may fail. The others learn it at the next meeting, where all raise. So
that no rank waits for one that has failed, collectives are begun only where all ranks are known to
begin them, and a rank that fails on its way to one takes part in it all the same.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from l2rw_ext.errors import RankError

# Its name until torch 2.12 is deprecated.
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_MARK = "_announced"

_NUMBERS = 5
"""How many numbers a rank may tell the others at a meeting."""


@dataclass
class Meeting:
    """What the ranks tell each other at a place."""

    tell: tuple[float, ...] = ()
    """What this rank tells the others: at most five numbers."""
    told: list[list[float]] = field(default_factory=list)
    """What each rank has told, by rank."""


class Processes:
    """The ranks of a process group of at least two.

    Args:
        group: their process group; all ranks of it make the object at the same time.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        on_host = torch.device("cpu") in group._device_types
        ranks = dist.get_process_group_ranks(group)
        # A meeting on the host does not wait for the device.
        self._host: Any = (
            group
            if on_host
            else dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        )
        self._announced: object = None
        """What marks the error that all ranks know of and that is on its way to the caller."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())  # a copy of what holds it finds its group again

    def meet(
        self, place: str, *numbers: float, error: BaseException | None = None
    ) -> list[list[float]]:
        """The numbers that all ranks tell each other, by rank; all raise if any rank has failed.

        Args:
            place: what the ranks have come to; ranks that are at different places have failed.
            numbers: what to tell the others, at most five.
            error: why this rank has failed, if it has.

        Raises:
            BaseException: the error of this rank.
            RankError: another rank has failed, or is at another place.
        """
        told = [zlib.crc32(place.encode()), error is not None, *numbers]
        told += [0] * (2 + _NUMBERS - len(told))
        own = torch.tensor(told, dtype=torch.float64, device="cpu")
        found = own.new_empty(self.size * own.numel())
        all_gather(found, own, group=self._host)
        ranks: list[list[float]] = found.view(self.size, -1).tolist()
        if any(failed for _, failed, *_ in ranks):
            self._raise(error)
        if len({where for where, *_ in ranks}) > 1:
            places: list[Any] = [None] * self.size
            dist.all_gather_object(places, place, group=self._host)
            listed = ", ".join(f"rank {r} at {p!r}" for r, p in enumerate(places))
            self.fail(RankError(f"the ranks are at different places: {listed}"))
        return [told[: len(numbers)] for _, _, *told in ranks]

    @contextlib.contextmanager
    def together(self, place: str) -> Iterator[Meeting]:
        """Meet at the end of the body; what a rank raises in it, all ranks raise.

        The body may say in the meeting what to tell the others, and read there what they have told
        when it is over.

        Raises:
            RankError: another rank has failed.
        """
        self._announced = None
        meeting = Meeting()
        try:
            yield meeting
        except BaseException as error:
            if not any(map(self._knows, _chain(error))):
                self.meet(place, error=error)
            raise
        meeting.told = self.meet(place, *meeting.tell)

    @contextlib.contextmanager
    def owing(self, pay: Callable[[], object]) -> Iterator[None]:
        """A body after which all ranks begin collectives; a rank that fails in it calls ``pay``."""
        try:
            yield
        except BaseException:
            pay()
            raise

    def gather(self, x: Tensor, lengths: list[int]) -> list[Tensor]:
        """The vectors of all ranks, whose lengths are known."""
        group = self._host if x.device.type == "cpu" else self.group
        longest = max(lengths)
        padded = torch.nn.functional.pad(x, (0, longest - x.numel()))
        found = padded.new_empty(self.size * longest)
        all_gather(found, padded, group=group)
        rows = found.view(self.size, longest)
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def any(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        found = torch.tensor(flags, dtype=torch.uint8, device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._host)
        return [bool(flag) for flag in found.tolist()]

    def fail(self, error: BaseException) -> NoReturn:
        """Raise what all ranks raise here, because they decide it from the same facts."""
        # The mark is on the error, for to hold the error would hold the tensors of its frames, and
        # another error may get its id.
        self._announced = object()
        vars(error)[_MARK] = self._announced
        raise error

    def _knows(self, error: BaseException) -> bool:
        """Whether all ranks know of an error."""
        return self._announced is not None and vars(error).get(_MARK) is self._announced

    def _raise(self, error: BaseException | None) -> NoReturn:
        """Raise this rank's error, or one that names the first rank that has failed."""
        said = None if error is None else f"{type(error).__name__}: {error}"
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, said, group=self._host)
        if error is not None:
            self.fail(error)
        rank = next(r for r, said in enumerate(errors) if said is not None)
        self.fail(RankError(f"rank {rank} failed: {errors[rank]}", rank))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those in whose place it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Membership:
    """The processes that take part in the steps of a reweighter.

    Args:
        given: a process group; "auto" for that of the model; None for no other process.

    Raises:
        TypeError: it is none of these.
    """

    def __init__(self, given: dist.ProcessGroup | str | None) -> None:
        group = getattr(dist, "ProcessGroup", ())
        if given is not None and given != "auto" and not isinstance(given, group):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup, 'auto' or None, got "
                f"{given!r:.80}"
            )
        self.given = given
        self._processes: Processes | None = None

    def __deepcopy__(self, memo: Any) -> Membership:
        return Membership(self.given)

    def processes(self, own: dist.ProcessGroup | None) -> Processes | None:
        """The ranks of the group, if there are others; ``own`` is the group of the model.

        Raises:
            ValueError: this process is none of them.
        """
        group = self.given
        if isinstance(group, str):
            group = own
        if group is None:
            return None
        if dist.get_rank(group) < 0:
            raise ValueError("process_group: this process is not a rank of the group")
        if dist.get_world_size(group) == 1:
            return None
        if self._processes is None or self._processes.group is not group:
            self._processes = Processes(group)
        return self._processes

    def alone(self) -> str | None:
        """Why it may be a mistake that the model has no group; None if nobody expects one."""
        if self.given != "auto" or not dist.is_available() or not dist.is_initialized():
            return None
        ranks = dist.get_world_size()
        if ranks == 1:
            return None
        return (
            f"torch.distributed has {ranks} ranks, but the model is no DistributedDataParallel, so "
            "that each rank weighs its own batch alone. Give the Reweighter the wrapper, or a "
            "process_group; process_group=None says that this is on purpose"
        )


def _nothing() -> None:
    """What a copy of :class:`Processes` is."""
