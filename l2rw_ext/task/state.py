"""The state that a forward may change: tensors and attributes of the model and of losses."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext import devices
from l2rw_ext.data.batch import is_plain
from l2rw_ext.tracing.members import Members
from l2rw_ext.tracing.writes import storage_of

_WRAPPERS = ("torch.nn.parallel.", "torch._dynamo.")
"""Packages of modules whose attributes are torch's bookkeeping of its hooks and compiled code."""
_ABSENT = object()


class Layout:
    """What names stand for, and where tensors lie: the same at each step, if nothing is assigned.

    Args:
        modules: names and modules.
        exchanged: ids of sharded parameters; FSDP exchanges them for others and back, so that the
            tables that hold them are not followed.
    """

    def __init__(
        self, modules: Sequence[tuple[str, nn.Module]], exchanged: Collection[int] = ()
    ) -> None:
        self._modules = [module for _, module in modules]
        self.tables: list[tuple[Any, dict[str, Any]]] = []
        self.attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.tensors: list[Tensor] = []
        self.names: list[str] = []
        self.index: dict[int, int] = {}
        """By id of the tensor: where it is in the lists."""
        self.buffers: list[int] = []
        for prefix, module in modules:
            comes_and_goes = any(id(p) in exchanged for p in module._parameters.values())
            held = [] if comes_and_goes else [module._parameters]
            tables: list[Any] = [module._modules, *held, module._buffers]
            self.tables += [(table, dict(table.items())) for table in tables]
            if not type(module).__module__.startswith(_WRAPPERS):
                self.attributes.append((module.__dict__, module.__dict__.copy()))
                tables.append(module.__dict__)
            for table in tables[1:]:
                for name, x in table.items():
                    if isinstance(x, Tensor) and id(x) not in self.index:
                        if table is module._buffers:
                            self.buffers.append(len(self.tensors))
                        self.index[id(x)] = len(self.tensors)
                        self.tensors.append(x)
                        self.names.append(f"{prefix}.{name}" if prefix else name)
        self._counted = [not x.is_inference() for x in self.tensors]
        self.data = [x.data if _is_plain_tensor(x) else None for x in self.tensors]
        """Aliases, by which a tensor is found again after ``x.data = other``."""
        self.places = self.places_now()
        # All names and objects in a row each, because many small loops would cost more than a step
        # of a small model can spare.
        found = [table for table, _ in (*self.tables, *self.attributes)]
        self._tables = [table for table in found if isinstance(table, dict)]
        self._scripted = [pair for pair in self.tables if not isinstance(pair[0], dict)]
        self._lengths = list(map(len, self._tables))
        self._names, self._objects = self._in_a_row()

    def fits(self, modules: Sequence[tuple[str, nn.Module]]) -> bool:
        """Whether nothing was assigned or moved since."""
        return (
            len(modules) == len(self._modules)
            and all(map(operator.is_, (module for _, module in modules), self._modules))
            and self.unassigned()
            and self.places_now() == self.places
        )

    def unassigned(self) -> bool:
        """Whether all names stand for the same objects, in the same order."""
        names, objects = self._in_a_row()
        return (
            list(map(len, self._tables)) == self._lengths
            and names == self._names
            and all(map(operator.is_, objects, self._objects))
            and all(itertools.starmap(_same, self._scripted))
        )

    def _in_a_row(self) -> tuple[list[str], list[Any]]:
        chain = itertools.chain.from_iterable
        return list(chain(self._tables)), list(chain(map(dict.values, self._tables)))

    def versions(self) -> list[int]:
        """The version counters, as they are now."""
        return [x._version if c else 0 for x, c in zip(self.tensors, self._counted, strict=True)]

    def places_now(self) -> list[tuple[Any, ...] | None]:
        """Where the tensors lie and how; None for kinds of which that cannot be said."""
        pairs = zip(self.tensors, self.data, strict=True)
        return [None if data is None else (x.data_ptr(), x.shape) for x, data in pairs]

    def copy(self, i: int) -> Tensor:
        """The values of a tensor now, where it lay first."""
        data = self.data[i]
        return (self.tensors[i] if data is None else data).detach().clone()


class State:
    """Tensors and attributes as they are now, to be put back.

    Both forwards of a step start from the same state, and afterwards the state is that of one plain
    training forward; after an error it is that before the step. A forward may write to a buffer, a
    parameter or a tensor that is an attribute, and it may assign something else to a name: all are
    undone. What is inside of a container or an object that is an attribute is not followed.

    Buffers are copied. Of parameters and other tensors, those are copied that the forward is known
    to write to; :meth:`before_writes` copies others at the last moment. In a step that is traced it
    copies all that are copied, so that the graph has no copy of a buffer that is only read.

    Args:
        members: of the model and of the losses.
        start: the state before the step, if this one is a later one.
        whole: copy every tensor.
    """

    def __init__(
        self, members: Members, *, start: State | None = None, whole: bool = False
    ) -> None:
        self._written = written = members.written
        layout = written.layout
        if not isinstance(layout, Layout) or not layout.fits(members.modules):
            exchanged = () if members.shards is None else members.shards.whole
            layout = written.layout = Layout(members.modules, exchanged)
        self._layout = layout
        self._before = start
        self._versions = layout.versions()
        copied: Iterable[int] = range(len(layout.tensors)) if whole else layout.buffers
        if devices.tracing():
            copied = [] if start is None else sorted(start._copies)
        elif written.names and not whole:
            known = (i for i, name in enumerate(layout.names) if name in written.names)
            copied = sorted({*copied, *known})
        self._copies: dict[int, Tensor] = {i: layout.copy(i) for i in copied}

    def before_writes(self) -> dict[int, list[Callable[[], None]]]:
        """By storage, what copies its tensors before it is written to."""
        calls: dict[int, list[Callable[[], None]]] = {}
        for i, x in enumerate(self._layout.tensors):
            storage = storage_of(x)
            if storage is not None and i not in self._copies:
                calls.setdefault(storage, []).append(functools.partial(self._copy, i))
        return calls

    def written(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of what a traced step has written to."""
        return [(self._layout.names[i], self._layout.tensors[i]) for i in self._copies]

    def _copy(self, i: int) -> None:
        if i not in self._copies:
            self._copies[i] = self._layout.copy(i)
            self._written.names.add(self._layout.names[i])

    def _values(self, x: Tensor) -> Tensor | None:
        """A copy, if there is one. What is not copied later was not written to before."""
        found = self._copies.get(self._layout.index.get(id(x), -1))
        return found if found is not None or self._before is None else self._before._values(x)

    def changed(self, *, values: bool = False) -> str | None:
        """The name of something that is not as it was, if there is any.

        Without ``values`` it is known of tensors by their version counters, which the kernels of
        batch norm do not advance. With ``values``, dense tensors that are copied are compared.
        """
        return next(self._changes(values), None)

    def _changes(self, values: bool) -> Iterator[str]:
        layout = self._layout
        yield from self._assigned()
        if layout.versions() != self._versions or layout.places_now() != layout.places:
            yield from (layout.names[i] for i in self._touched())
        for i, copy in self._copies.items() if values else ():
            if layout.places[i] is not None and not torch.equal(layout.tensors[i], copy):
                yield layout.names[i]

    def assigned(self) -> str | None:
        """A name that stands for something else than it did, if there is one."""
        return next(self._assigned(), None)

    def _assigned(self) -> Iterator[str]:
        layout = self._layout
        if not layout.unassigned():
            for table, saved in layout.tables:
                yield from _assigned(table, saved)
            for attributes, saved in layout.attributes:
                yield from _assigned(attributes, saved, _another)

    def _touched(self) -> list[int]:
        """Tensors that were moved, or written to as far as their version counters say."""
        layout = self._layout
        now = zip(layout.versions(), layout.places_now(), strict=True)
        then = zip(self._versions, layout.places, strict=True)
        return [i for i, (a, b) in enumerate(zip(now, then, strict=True)) if a != b]

    def rebind(self) -> None:
        """Put back what was assigned to a name; tensors keep the values that they have."""
        if not self._layout.unassigned():
            for table, saved in (*self._layout.attributes, *self._layout.tables):
                _put_back(table, saved)

    def restore(self) -> list[str]:
        """Put everything back; returns the names of tensors for which that was not possible.

        The copies go through ``.data`` and version counters are put back too, so that a backward
        that saved a tensor does not consider it modified: the values that it saw are the ones that
        are put back, or the operation saved a copy.
        """
        self.rebind()
        layout = self._layout
        touched = self._touched()
        lost = [layout.names[i] for i in touched if not self._restore(i)]
        for i, copy in self._copies.items():
            if i not in touched:  # batch norm's kernels do not advance a version
                layout.tensors[i].data.copy_(copy)
        if lost:
            self._written.forget()
        return lost

    def _restore(self, i: int) -> bool:
        """Put a tensor back; False if its values are not known."""
        x, data, version = self._layout.tensors[i], self._layout.data[i], self._versions[i]
        values = self._values(x)
        moved = data is not None and (x.data_ptr(), x.shape) != self._layout.places[i]
        if data is not None:
            x.data = data
        if values is not None:
            x.data.copy_(values)
        elif not moved:
            return False
        if not x.is_inference() and x._version != version:
            torch._C._autograd._unsafe_set_version_counter((x,), (version,))
        return True


def _is_plain_tensor(x: Tensor) -> bool:
    """Whether it can be said where a tensor lies."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_nested


def _same(table: Any, saved: dict[str, Any]) -> bool:
    """Whether the names of a table stand for the same objects in the same order."""
    found = table if isinstance(table, dict) else dict(table.items())  # of a scripted module
    return (
        len(found) == len(saved)
        and all(map(operator.is_, found.values(), saved.values()))
        and all(map(operator.eq, found, saved))
    )


def _assigned(
    table: Any, saved: dict[str, Any], another: Callable[[Any, Any], bool] = lambda now, saved: True
) -> Iterator[str]:
    """Names whose value in the table is another than the saved one, also to ``another``."""
    if _same(table, saved):
        return
    found = table if isinstance(table, dict) else dict(table.items())
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
