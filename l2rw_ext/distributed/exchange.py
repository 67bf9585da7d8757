"""The direction of a merged backward, exchanged between ranks layer by layer while it runs.

What the ranks have agreed on says which collectives a backward has, and in what order. So a rank
that fails in the middle takes part in the rest with zeros, and no rank waits for it.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .group import Processes, all_gather

T = TypeVar("T")

Key = tuple[str, int]
"""Whose part of the direction it is: ("use", its index) or ("parameter", its place)."""

_PACKET_BYTES = 2**20
_PACKET_MESSAGES = 4
"""Small layers share a collective up to these sizes; the rows of a layer wait for its sum."""

CLEAN_LOSS: Key = ("clean loss", 0)


@dataclass(frozen=True)
class Message:
    """What ranks tell each other in a merged backward, which is added up or gathered."""

    key: Key
    numel: int
    """How many elements a rank hands over."""
    dtype: torch.dtype
    device: torch.device
    ranks: int
    gathered: bool = False

    @property
    def bytes(self) -> float:
        """What a rank sends by a ring algorithm, as NCCL and gloo use for large messages."""
        factor = self.ranks - 1 if self.gathered else 2 * (self.ranks - 1) / self.ranks
        return factor * self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Agreed:
    """What all ranks know of a merged step."""

    n: int
    """The largest number of training examples of a rank."""
    m: tuple[int, ...]
    """The number of clean examples of each rank."""
    alike: bool
    """Whether an example has as many positions in each layer on all ranks."""


@dataclass
class _Packet:
    """A collective, by which one message goes, or a few small ones that are added up."""

    messages: list[Message]
    shapes: list[list[torch.Size]] = field(default_factory=list)
    """Of each message the shapes of what this rank has sent."""
    result: Tensor | None = None
    work: Any = None

    def takes(self, message: Message) -> bool:
        """Whether one message more is small enough, and of the same kind."""
        first, last = self.messages[0], self.messages[-1]
        alike = (first.dtype, first.device) == (message.dtype, message.device)
        if last.key[0] == "use" and message.key[0] != "use":
            return False  # it is sent when all uses have been scored
        size = sum(m.numel * m.dtype.itemsize for m in (*self.messages, message))
        small = size <= _PACKET_BYTES and len(self.messages) < _PACKET_MESSAGES
        return alike and small and not (first.gathered or message.gathered)


class _NotMergedError(Exception):
    """Some rank cannot merge its batches, or merges them by another plan."""


class Exchange:
    """The collectives of one merged step.

    The step calls :meth:`agree` once, then :meth:`begin`, and then :meth:`send` and :meth:`take`
    once for each message.
    """

    def __init__(self, processes: Processes) -> None:
        self.ranks = processes.size
        self.failed = False
        """Whether this rank is one of those that could not make the step."""
        self._processes = processes
        self._meeting = False
        self._counts: tuple[int, ...] = ()
        """The number of clean examples of each rank, once that is agreed."""
        self._ahead: deque[_Packet] = deque()
        self._held: dict[Key, Sequence[Tensor]] = {}
        """What was sent before its turn."""
        self._begun: dict[Key, _Packet] = {}

    @property
    def m(self) -> int:
        """The number of clean examples of all ranks, once that is agreed."""
        return sum(self._counts)

    def run(self, score: Callable[[], T]) -> T | None:
        """The result of a step in which this exchange is used; None on all ranks if one fails.

        An ``Exception`` is not raised: if it is the user's, the step has it again when it goes the
        other way. Others are raised when this rank has met its obligations.

        Raises:
            RankError: another rank has failed otherwise.
        """
        try:
            result = score()
        except _NotMergedError:
            return None
        except BaseException as error:
            if self._meeting:
                raise
            self._pay()
            if not isinstance(error, Exception):
                raise
            self.failed = True
        if self.failed and not self._counts:
            self._meet(_PLAN, 0, 0, 0, 0)
            return None
        told = self._meet("the scores of a merged step", not self.failed)
        return result if all(succeeds for (succeeds,) in told) else None

    def agree(self, n: int, m: int, structure: object, positions: object) -> Agreed:
        """Meet the others with a plan.

        Args:
            n: the number of training examples.
            m: the number of clean examples.
            structure: what has to be the same on all ranks; its text is compared.
            positions: what has to be the same where clean rows are gathered.
        """
        told = self._meet(_PLAN, n, m, _digest(structure), _digest(positions))
        counts, clean_counts, structures, places = zip(*told, strict=True)
        if not all(clean_counts) or len(set(structures)) > 1:
            raise _NotMergedError
        self._counts = tuple(map(int, clean_counts))
        return Agreed(int(max(counts)), self._counts, len(set(places)) == 1)

    def begin(self, messages: Sequence[Message]) -> None:
        """Take the list of all messages, in the order that all ranks keep."""
        for message in messages:
            if self._ahead and self._ahead[-1].takes(message):
                self._ahead[-1].messages.append(message)
            else:
                self._ahead.append(_Packet([message]))

    def send(self, key: Key, parts: Sequence[Tensor]) -> None:
        """Begin a collective as soon as it is complete and all those before it have begun.

        Parts of a message that adds up have any shapes; those of one that gathers have the clean
        examples first.
        """
        self._held[key] = parts
        own, largest = self._counts[self._processes.rank], max(self._counts)
        while self._ahead and all(m.key in self._held for m in self._ahead[0].messages):
            packet = self._ahead[0]
            sent = [self._held.pop(message.key) for message in packet.messages]
            packet.shapes = [[x.shape for x in parts] for parts in sent]
            flat = [
                _flat(message, parts, own, largest)
                for message, parts in zip(packet.messages, sent, strict=True)
            ]
            self._start(torch.cat(flat) if len(flat) > 1 else flat[0])

    def arrived(self, key: Key, *, due: bool = False) -> bool:
        """Whether a result can be taken without waiting; if it is ``due``, with waiting."""
        packet = self._begun.get(key)
        return packet is not None and (due or packet.work.is_completed())

    def take(self, key: Key) -> list[Tensor]:
        """Wait for the sums in the shapes of what was sent, or for the clean examples of all."""
        packet = self._begun.pop(key)
        packet.work.wait()
        assert packet.result is not None
        place = [message.key for message in packet.messages].index(key)
        shapes = packet.shapes[place]
        if not packet.messages[place].gathered:
            whole = packet.result.split([message.numel for message in packet.messages])[place]
            parts = whole.split([shape.numel() for shape in shapes])
            return [x.view(shape) for x, shape in zip(parts, shapes, strict=True)]
        sizes = [math.prod(shape[1:]) for shape in shapes]
        rows = packet.result.view(self.ranks, max(self._counts), sum(sizes))
        rows = torch.cat([x[:m] for x, m in zip(rows, self._counts, strict=True)])
        parts = rows.split(sizes, 1)
        return [x.reshape(-1, *shape[1:]) for x, shape in zip(parts, shapes, strict=True)]

    def _start(self, flat: Tensor) -> None:
        """Begin the next collective."""
        packet, group = self._ahead.popleft(), self._processes.group
        if packet.messages[0].gathered:
            packet.result = flat.new_empty(self.ranks * flat.numel())
            packet.work = all_gather(packet.result, flat, group=group, async_op=True)
        else:
            packet.result = flat
            packet.work = dist.all_reduce(flat, group=group, async_op=True)
        self._begun.update({message.key: packet for message in packet.messages})

    def _pay(self) -> None:
        """Take part with zeros in what is ahead."""
        while self._ahead:
            first, *_ = messages = self._ahead[0].messages
            numel = sum(message.numel for message in messages)
            self._start(torch.zeros(numel, dtype=first.dtype, device=first.device))
        for packet in self._begun.values():
            packet.work.wait()

    def _meet(self, place: str, *numbers: float) -> list[list[float]]:
        """See :meth:`Processes.meet`, whose errors all ranks have."""
        self._meeting = True
        told = self._processes.meet(place, *numbers)
        self._meeting = False
        return told


_PLAN = "a plan for a merged step"


def _flat(message: Message, parts: Sequence[Tensor], m: int, largest: int) -> Tensor:
    """What a rank hands over, as one vector; gathered rows are padded to the largest number."""
    if message.gathered:
        rows = torch.cat([x.reshape(m, -1) for x in parts], 1)
        flat = torch.nn.functional.pad(rows, (0, 0, 0, largest - m)).view(-1)
    else:
        flat = torch.cat([x.reshape(-1) for x in parts])
    if (
        flat.numel() != message.numel
        or torch.promote_types(flat.dtype, message.dtype) != message.dtype
    ):
        raise AssertionError(f"{flat.dtype}[{flat.numel()}] is not what {message} says")
    return flat.to(message.dtype)


def _digest(agreed: object) -> int:
    """A number that fits a float64 and is the same in all processes for equal texts."""
    return int.from_bytes(hashlib.blake2b(repr(agreed).encode(), digest_size=6).digest(), "big")
