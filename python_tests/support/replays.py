"""A stand-in for CUDA graphs on the CPU: records the operations of a call, and runs them again.

As in a graph, a replay runs no Python of the call: the very same operations on the very same
tensors, whatever they hold by then, and results go to where they were at the recording. What was
written during the recording to memory from outside of it is put back, for a capture computes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from l2rw_ext.compiled.recording import Recording
from l2rw_ext.devices import without_autocast
from l2rw_ext.task.isolation import BelowAutograd


@dataclass
class _Call:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


_SHAPES = {
    torch.ops.aten.t_,
    torch.ops.aten.transpose_,
    torch.ops.aten.squeeze_,
    torch.ops.aten.unsqueeze_,
    torch.ops.aten.as_strided_,
    torch.ops.aten.detach_,
}
"""They change how a tensor lies, on the host alone, and once."""


def _tensors(tree: Any) -> list[Tensor]:
    """All but zeros of forward mode, which have no memory."""
    leaves = pytree.tree_leaves(tree)
    return [x for x in leaves if isinstance(x, Tensor) and not x._is_zerotensor()]


def _as_it_lies(x: Any) -> Any:
    """The same memory under the shape of now, which later calls may change in place."""
    return x.detach() if isinstance(x, Tensor) else x


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunction():
            return self._written_down(func, args, kwargs or {})

    def _written_down(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for x in _tensors((args, kwargs)):
            if _memory(x) not in self._made:
                self._before.setdefault(_memory(x), (x, x.detach().clone()))
        seen = pytree.tree_map(_as_it_lies, (args, kwargs))
        out = func(*args, **kwargs)
        self._made |= {_memory(x) for x in _tensors(out)} - self._before.keys()
        self.calls.append(_Call(func, *seen, pytree.tree_map(_as_it_lies, out)))
        return out

    def put_back(self) -> None:
        """Undo what was computed: inputs as they were, and nothing in the results."""
        with BelowAutograd():
            for x, value in self._before.values():
                x.copy_(value)
            for call in self.calls:
                for x in _tensors(call.out):
                    if _memory(x) in self._made and x.is_floating_point():
                        x.fill_(float("nan"))


class Replays:
    """What was recorded, run again: stands for ``torch.cuda.CUDAGraph``."""

    def __init__(self, calls: list[_Call]) -> None:
        self.calls = calls
        self.count = 0

    def replay(self) -> None:
        """See :class:`torch.cuda.CUDAGraph`."""
        self.count += 1
        with BelowAutograd(), without_autocast():
            for call in self.calls:
                if call.func.overloadpacket in _SHAPES:
                    continue
                again = call.func(*call.args, **call.kwargs)
                read = {_memory(x) for x in _tensors((call.args, call.kwargs))}
                for x, place in zip(_tensors(again), _tensors(call.out), strict=True):
                    if _memory(x) not in read:
                        place.copy_(x)


class Recorder:
    """A double of :class:`l2rw_ext.compiled.recording.Recorder`; captures raise ``failures``."""

    def __init__(self, device: torch.device) -> None:
        self.graphs: list[Replays] = []
        self.warm_ups = 0
        self.failures: list[BaseException] = []

    @staticmethod
    def takes(device: torch.device) -> bool:
        """The stand-in is for the CPU."""
        return device.type == "cpu"

    def join(self) -> None:
        """There is one stream."""

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run it."""
        self.warm_ups += 1
        return call()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """There is one stream."""

    def record(self, call: Callable[[], Any]) -> Recording[Any]:
        """Record a call; its results are not a number until the first replay."""
        tape = _Tape()
        try:
            with tape:
                result = call()
                if self.failures:
                    raise self.failures.pop()
        finally:
            tape.put_back()
        graph = Replays(tape.calls)
        self.graphs.append(graph)
        return Recording(graph, result)
