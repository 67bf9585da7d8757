"""The state that a forward may change: tensors and attributes of the model and of losses."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext.data.batch import is_plain
from l2rw_ext.tracing.members import Members
from l2rw_ext.tracing.writes import storage_of

_WRAPPERS = ("torch.nn.parallel.", "torch._dynamo.")
"""Packages of modules whose attributes are torch's bookkeeping of its hooks and compiled code."""
_ABSENT = object()


class State:
    """Tensors and attributes as they are now, to be put back.

    Both forwards of a step start from the same state, and afterwards the state is that of one plain
    training forward; after an error it is that before the step. A forward may write to a buffer, a
    parameter or a tensor that is an attribute, and it may assign something else to a name: all are
    undone. What is inside of a container or an object that is an attribute is not followed.

    Buffers are copied. Of parameters and other tensors, those are copied that the forward is known
    to write to; :meth:`before_writes` copies others at the last moment.

    Args:
        members: of the model and of the losses.
        start: the state before the step, if this one is a later one.
        whole: copy every tensor.
    """

    def __init__(
        self, members: Members, *, start: State | None = None, whole: bool = False
    ) -> None:
        self._written = members.written
        names = self._written.names
        self._tables: list[tuple[Any, dict[str, Any]]] = []
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._held: dict[int, _Held] = {}
        before = {} if start is None else start._held
        for prefix, module in members.modules:
            tables: list[Any] = [module._modules, module._parameters, module._buffers]
            self._tables += [(table, dict(table.items())) for table in tables]
            if not type(module).__module__.startswith(_WRAPPERS):
                attributes = module.__dict__
                self._attributes.append((attributes, attributes.copy()))
                tables.append(attributes)
            for table in tables[1:]:
                for name, x in table.items():
                    if isinstance(x, Tensor) and id(x) not in self._held:
                        full = f"{prefix}.{name}" if prefix else name
                        copied = whole or table is module._buffers or full in names
                        self._held[id(x)] = _Held(x, full, copied, before.get(id(x)))

    def before_writes(self) -> dict[int, list[Callable[[], None]]]:
        """By storage, what copies its tensors before it is written to."""
        calls: dict[int, list[Callable[[], None]]] = {}
        for held in self._held.values():
            storage = storage_of(held.tensor)
            if storage is not None and held.values is None:
                calls.setdefault(storage, []).append(functools.partial(self._copy, held))
        return calls

    def _copy(self, held: _Held) -> None:
        if held.values is None:
            held.copy()
            self._written.names.add(held.name)

    def changed(self, *, values: bool = False) -> str | None:
        """The name of something that is not as it was, if there is any.

        Without ``values`` it is known of tensors by their version counters, which the kernels of
        batch norm do not advance. With ``values``, dense tensors that are copied are compared.
        """
        return next(self._changes(values), None)

    def _changes(self, values: bool) -> Iterator[str]:
        for table, saved in self._tables:
            yield from _assigned(table, saved)
        for attributes, saved in self._attributes:
            yield from _assigned(attributes, saved, _another)
        for held in self._held.values():
            if held.changed(values):
                yield held.name

    def assigned(self) -> str | None:
        """The name of a tensor that is another or lies elsewhere than it did, if there is one."""
        names = (name for table, saved in self._tables for name in _assigned(table, saved))
        moved = (held.name for held in self._held.values() if held.moved())
        return next(itertools.chain(names, moved), None)

    def rebind(self) -> None:
        """Put back what was assigned to a name; tensors keep the values that they have."""
        for table, saved in (*self._attributes, *self._tables):
            _put_back(table, saved)

    def restore(self) -> list[str]:
        """Put everything back; returns the names of tensors for which that was not possible.

        The copies go through ``.data`` and version counters are put back too, so that a backward
        that saved a tensor does not consider it modified: the values that it saw are the ones that
        are put back, or the operation saved a copy.
        """
        self.rebind()
        lost = [held.name for held in self._held.values() if not held.restore()]
        if lost:
            self._written.forget()
        return lost


class _Held:
    """A tensor as it was: where it was, its version, and its values if they are copied."""

    def __init__(self, tensor: Tensor, name: str, copied: bool, before: _Held | None) -> None:
        self.tensor = tensor
        self.name = name
        self._before = before
        self._version = _version(tensor)
        self._place = _place(tensor)
        self._data = None if self._place is None else tensor.data
        self._own: Tensor | None = None
        if copied:
            self.copy()

    @property
    def values(self) -> Tensor | None:
        """A copy, if there is one. What is not copied later was not written to before."""
        if self._own is None and self._before is not None:
            return self._before.values
        return self._own

    def copy(self) -> None:
        """Copy the values that the tensor has now."""
        self._own = (self.tensor if self._data is None else self._data).detach().clone()

    def moved(self) -> bool:
        """Whether ``.data`` is another tensor than it was."""
        return _place(self.tensor) != self._place

    def changed(self, values: bool) -> bool:
        """See :meth:`State.changed`."""
        if _version(self.tensor) != self._version or self.moved():
            return True
        if not values or self._own is None or self._place is None:
            return False
        return not torch.equal(self.tensor, self._own)

    def restore(self) -> bool:
        """Whether the tensor is as it was."""
        x, values = self.tensor, self.values
        moved = self.moved()
        written = _version(x) != self._version
        if (moved or written) and self._data is not None:
            x.data = self._data
        if values is not None:
            x.data.copy_(values)
        elif written and not moved:
            return False
        if written:
            torch._C._autograd._unsafe_set_version_counter((x,), (self._version,))
        return True


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _place(x: Tensor) -> tuple[Any, ...] | None:
    """Where a tensor lies and how; None for kinds of tensors of which that cannot be said."""
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or x.is_nested:
        return None
    return x.data_ptr(), x.shape


def _assigned(
    table: Any, saved: dict[str, Any], another: Callable[[Any, Any], bool] = lambda now, saved: True
) -> Iterator[str]:
    """Names whose value in the table is another than the saved one, also to ``another``."""
    found = table if isinstance(table, dict) else dict(table.items())  # of a scripted module
    for name, value in saved.items():
        now = found.get(name, _ABSENT)
        if now is not value and another(now, value):
            yield name
    if len(found) != len(saved):
        yield from (name for name in found if name not in saved)


def _another(now: Any, saved: Any) -> bool:
    """Whether an attribute has another value, as far as attributes are followed."""
    if _all_plain(now) and _all_plain(saved):
        return type(now) is not type(saved) or repr(now) != repr(saved)  # equal bits of NaN and -0
    return any(x is _ABSENT or is_plain(x) or isinstance(x, (Tensor, tuple)) for x in (now, saved))


def _all_plain(x: Any) -> bool:
    return is_plain(x) or (isinstance(x, tuple) and all(map(_all_plain, x)))


def _put_back(table: Any, saved: dict[str, Any]) -> None:
    if next(_assigned(table, saved), None) is None:
        return
    if not isinstance(table, dict):  # which takes no other names
        for name, value in saved.items():
            table[name] = value
        return
    if any(name not in table for name in saved):
        table.clear()  # so that the order is as it was
    table.update(saved)
    for name in [name for name in table if name not in saved]:
        del table[name]
