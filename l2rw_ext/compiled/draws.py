"""Random numbers in a trace: what is drawn from one state of a generator is drawn once.

A checkpoint puts the generator back, to draw its masks again when it recomputes. A graph records
operations and no state of a generator, so that it would draw other masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from l2rw_ext.errors import NotYetCompilableError
from l2rw_ext.task.isolation import Generators
from l2rw_ext.tracing.dispatch import DispatchMode


@dataclass
class _Draw:
    """An operation that drew, its arguments but for those it wrote to, and copies of its results.

    The results are the tensors that it wrote to, and those that it returned.
    """

    func: Any
    read: Sequence[Any]
    results: Sequence[Tensor]

    def matches(self, func: Any, read: Sequence[Any]) -> bool:
        """Whether it is the same operation on equal arguments."""
        return func is self.func and all(map(_equal, self.read, read))


class Draws(DispatchMode):
    """Keeps what random operations draw, and gives it again where a generator was put back.

    Args:
        devices: whose generators there are.

    Raises:
        NotYetCompilableError: a generator is where no operation of the trace has left it, or
            another operation draws from there. Perhaps another thread drew, and a later trace
            succeeds.
    """

    def __init__(self, devices: set[torch.device]) -> None:
        super().__init__()
        self._devices = devices
        self._draws: dict[bytes, _Draw] = {}
        self._state = self._now()

    def check(self) -> None:
        """Raise unless the generators are where the last draw has left them."""
        if self._now() != self._state:
            raise NotYetCompilableError(
                "the forward sets torch's generator of random numbers; draw them before the step, "
                "and give them with the batch"
            )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            written, read = _arguments(func, args, kwargs)
            before = self._now()
            draw = self._draws.get(before)
            if draw is not None and draw.matches(func, read):
                return self._again(draw, func, args, kwargs, written)
            out = _drawn(func, args, kwargs)
            after = self._now()
            if after != before:
                if draw is not None or before != self._state:
                    self._state = b""
                    self.check()
                results = [x.clone() for x in (*written, *_tensors(out))]
                self._draws[before] = _Draw(func, read, results)
                self._state = after
            return out

    def _again(
        self, draw: _Draw, func: Any, args: Any, kwargs: Any, written: Sequence[Tensor]
    ) -> Any:
        """The results of a draw, and the generators as it leaves them."""
        with disable_proxy_modes_tracing():
            out = _drawn(func, args, kwargs)
        results = iter(draw.results)
        for x in written:
            x.copy_(next(results))
        same = {id(x) for x in written}
        pairs = zip(_tensors(out), results, strict=True)
        again = iter([x if id(x) in same else y for x, y in pairs])
        return pytree.tree_map_only(Tensor, lambda _: next(again), out)

    def _now(self) -> bytes:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return Generators(self._devices).key()


def _drawn(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives; tensors without values move the generator of the CPU."""
    out = func(*args, **kwargs)
    if any(isinstance(x, FakeTensor) for x in _tensors(out)):
        with _disable_current_modes():
            torch.rand((), device="cpu")
    return out


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _arguments(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Any]]:
    """The tensors that an operation writes to, and its other arguments."""
    written: list[Any] = []
    read: list[Any] = []
    for given, argument in _named(func, args, kwargs):
        writes = argument.alias_info is not None and argument.alias_info.is_write
        (written if writes else read).append(given)
    return written, pytree.tree_leaves(read)


def _named(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """The arguments that are given, each with its entry in the schema."""
    arguments = func._schema.arguments
    yield from zip(args, arguments, strict=False)
    named = {a.name: a for a in arguments}
    yield from ((x, named[name]) for name, x in kwargs.items())


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, as far as they have values."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a == b) if type(a) is type(b) else False
    if (str(a.shape), a.dtype, a.device) != (str(b.shape), b.dtype, b.device):
        return False
    if isinstance(a, FakeTensor):
        return True
    with disable_proxy_modes_tracing():
        return bool(((a == b) | ((a != a) & (b != b))).all())
