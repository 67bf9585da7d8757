"""What the program computes with in a forward besides data and members: numbers and constants.

The size of a batch may enter what is computed (a sum divided by ``len(x)``) where values do not
show it, because a zero multiplies it. Forwards of batches of other sizes compute with the same
numbers and constants unless the size enters.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .dispatch import argument
from .example_map import ExampleMap
from .example_map.call import Call
from .example_map.ids import MIXED, NONE, counted, full, join, squash, unowned
from .example_map.map import PICKING
from .example_map.storages import Pair, Storage, geometry, key, plain

_COUNTING = ("arange", "range", "linspace")
"""Operations whose numbers say how many elements there are; what they make is a constant."""

_SHAPED = re.compile(
    "view|_unsafe_view|_reshape_alias|expand|repeat|new_.*|native_group_norm|convolution"
    "|affine_grid_generator|_cudnn_rnn|miopen_rnn"
)
"""Operations that are given sizes among which are numbers of examples."""

_ROW_BY_ROW = re.compile(
    "mm|bmm|addmm|baddbmm|cat|stack|copy_|_to_copy|_unsafe_view|unsafe_split|unsafe_chunk|repeat"
    "|native_layer_norm|_softmax|embedding|index"
)
"""Operations that do the same to each row, besides views and pointwise ones."""


Found = tuple[Any, Any, Any]
"""What an operation takes, and its sizes: as they are, and for each example if it has rows."""


def agree(*found: set[Found]) -> bool:
    """Whether forwards take the same, of sizes that are the same or of as many rows as examples."""
    as_they_are = [{(what, sizes) for what, sizes, _ in each} for each in found]
    by_example = [{(what, sizes) for what, _, sizes in each} for each in found]
    return all(
        all((what, sizes) in each for each in as_they_are)
        or all((what, of_rows) in each for each in by_example)
        for what, sizes, of_rows in set.union(*found)
    )


class Numbers(ExampleMap):
    """Collects numbers, and constants that meet data or members, with what operation takes them.

    Of a member, and of what is computed from members alone, the shape is collected, because its
    values may change. So are sizes, dimensions and places that an operation on data or members is
    given. Drawn numbers do not count.

    What counts examples is left out. A first hidden state of zeros has equal rows, and counts as
    one row if each of them meets the data of one example only. Where such *rows* meet members
    first, they are followed as an example map follows data: a row of the result is like the others
    if it is computed from one row, by an operation that does the same to each, and by what is the
    same for forwards of other sizes.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.found: dict[str, set[Found]] = {}
        """By part of the forward, see :meth:`part`."""
        self._drawn: set[int] = set()
        self._of_members: set[int] = set(self._permanent)
        """Storages of parameters and buffers, and of what is computed from them without data."""
        self._rows: dict[int, Storage] = {}
        """Which of equal rows the elements are computed from, in what members were computed to."""

    @contextlib.contextmanager
    def part(self, name: str, first: int = 0, count: int | None = None) -> Iterator[None]:
        """A context for a part of the forward, which has some examples from the first on."""
        self._into = self.found.setdefault(name, set())
        self._first, self.count = first, count or self.count
        with self:
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = getattr(func, "_opname", "")
        if name and not self._resting and name not in _COUNTING:
            for where in _numbers(func):
                value = argument(*where, args, kwargs)
                if isinstance(value, (int, float, complex)):
                    self._add(name, value)
            if name == "as_strided" and plain(args[0]) and key(args[0]) in self._rows:
                self._add(name, self.count)  # it may make rows of parts of rows
        return out

    def _add(self, name: str, what: Any, sizes: Any = None, of_rows: Any = None) -> None:
        self._into.add(((name, what), sizes, of_rows))

    def _follow(self, c: Call) -> None:
        made = [*c.outs, *c.writes]
        drawn = torch.Tag.nondeterministic_seeded in c.func.tags
        if drawn or any(key(x) in self._drawn for x in c.tensors if plain(x)):
            self._drawn.update(key(x) for x in made if plain(x))
        super()._follow(c)

    def _without_data(self, c: Call) -> None:
        if any(key(x) in self._of_members for x in c.tensors if plain(x)):
            # A member that is zero would hide the constant where both together meet data.
            self._carry_on(c, self._collect(c, {}))
            self._of_members.update(key(x) for x in (*c.outs, *c.writes) if plain(x))
        super()._without_data(c)

    def _meets_constants(self, c: Call, pairs: list[Pair]) -> None:
        ids = zip(c.tensors, pairs, strict=True)
        self._collect(c, {id(x): pair[0] for x, pair in ids if not all(map(unowned, pair))})

    def _collect(self, c: Call, owners: dict[int, Tensor]) -> dict[int, Tensor]:
        """Collect what an operation takes.

        Args:
            c: the operation, on data or members.
            owners: the ids of data, by tensor.

        Returns:
            the owners, and the ids of equal rows: with data those of the examples that they meet,
            else one for each row.
        """
        self._collect_places(c, owners)
        found = dict(owners)
        for x in c.tensors:
            member = plain(x) and key(x) in self._of_members
            if id(x) in owners or not plain(x) or (key(x) in self._drawn and not member):
                continue
            sizes = [*x.shape]
            for d in self._alike(x, member):
                ids = self._row(x) if member else counted(x.dim(), d, 0, sizes[d])
                if owners:
                    ids = counted(x.dim(), d, 0, sizes[d]) // (sizes[d] // self.count)
                    ids = ids + self._first
                if self._apart(c, found, found | {id(x): ids}):
                    found[id(x)] = ids
                    sizes[d] //= self.count
                    break
            if member and id(x) not in found and not unowned(self._row(x)):
                found[id(x)] = full(x.dim(), MIXED)  # rows that were mixed or picked
                sizes.append(self.count)
            if c.name != "clone":
                digest = None if member else _digest(x)
                self._add(c.name, digest, tuple(x.shape), tuple(sizes))
        return found

    def _collect_places(self, c: Call, owners: dict[int, Tensor]) -> None:
        """Collect sizes, dimensions and places, but for those that count and pick examples."""
        x = c.tensors[0]
        if c.name in PICKING:
            whole = all(out.shape == x.shape for out in c.outs)
            if whole or self._takes_places(c, owners.get(id(x), full(x.dim()))):
                return
        if owners and c.name in ("expand", "repeat"):
            self._add(c.name, tuple(_times(x, c.outs[0]).values()))
        elif not _SHAPED.fullmatch(c.name):
            given = [a for a in c.args.values() if _whole(a)]
            if given:
                self._add(c.name, str(given))

    def _alike(self, x: Tensor, member: bool) -> list[int]:
        """Dimensions along which x may hold the same for each example, the likeliest first."""
        if self.count == 1:
            return []  # all is for one example
        dims = [d for d, size in enumerate(x.shape) if size and size % self.count == 0]
        if not member:
            dims.sort(key=lambda d: x.shape[d] != self.count)
            return [d for d in dims if bool((x == x.narrow(d, 0, 1)).all())]
        ids = self._row(x)
        rows = int(ids.max()) + 1
        if not rows or rows % self.count or ids.numel() % rows:
            return []
        in_order = torch.arange(rows).repeat_interleave(ids.numel() // rows)
        clean = torch.equal(ids.reshape(-1).long(), in_order)
        return [d for d in dims if clean and ids.shape[d] == ids.numel()]

    def _row(self, x: Tensor) -> Tensor:
        """Which of equal rows the elements of x are computed from."""
        found = self._rows.get(key(x))
        return full(x.dim()) if found is None else squash(found.get(x)[0])

    def _results(self, c: Call, found: dict[int, Tensor]) -> list[Tensor]:
        return self._ids(c.read(lambda x: found.get(id(x), full(x.dim())), join))

    def _apart(self, c: Call, before: dict[int, Tensor], after: dict[int, Tensor]) -> bool:
        """Whether no result becomes mixed by the ids that are new."""
        results = zip(self._results(c, before), self._results(c, after), strict=True)
        return all(bool(((a == b) | ((b < 0) & (a != MIXED))).all()) for b, a in results)

    def _carry_on(self, c: Call, found: dict[int, Tensor]) -> None:
        """Follow equal rows through an operation on members, or begin with what it repeats."""
        results = {id(x): x for x in (*c.writes, *c.outs)}
        made = dict(zip(map(id, c.outs or c.writes), self._results(c, found), strict=True))
        if found:
            first = c.tensors[0]
            same = torch.Tag.pointwise in c.func.tags or c.func.is_view
            same = same or _ROW_BY_ROW.fullmatch(c.name) is not None
            if not same or self._takes_places(c, found.get(id(first), full(first.dim()))):
                made = {}
        elif c.name in ("expand", "repeat") and self.count > 1:
            made = {id(c.outs[0]): self._repeated(c.tensors[0], c.outs[0])}
        for at, x in results.items():
            ids = made.get(at, full(x.dim(), MIXED if found else NONE))
            if plain(x) and (key(x) in self._rows or not unowned(ids)):
                storage = self._rows.setdefault(key(x), Storage(x, sound=True))
                if any(x is y for y in c.writes):
                    storage.set(x, (ids, ids))
                else:
                    storage.views.setdefault(geometry(x), (ids, ids))

    def _repeated(self, x: Tensor, out: Tensor) -> Tensor:
        """Which repetition of x an element belongs to, along a dimension that may be examples'."""
        times = {d: n for d, n in _times(x, out).items() if n % self.count == 0}
        if not times:
            return full(out.dim())
        d = min(times, key=lambda d: times[d] != self.count)
        return counted(out.dim(), d, 0, out.shape[d]) // (out.shape[d] // times[d])


def _whole(a: Any) -> bool:
    """Whether an argument is a whole number or some."""
    return isinstance(a, int) or (isinstance(a, (list, tuple)) and all(map(_whole, a)))


def _times(x: Tensor, out: Tensor) -> dict[int, int]:
    """The dimensions along which ``out`` repeats x, and how often."""
    sizes = (1,) * (out.dim() - x.dim()) + tuple(x.shape)
    times = (new // max(old, 1) for old, new in zip(sizes, out.shape, strict=True))
    return {d: n for d, n in enumerate(times) if n > 1}


def _digest(x: Tensor) -> tuple[Any, ...]:
    """Elements of a constant, one of those that are alike along a dimension."""
    for d, size in enumerate(x.shape):
        if size > 1 and bool((x == x.narrow(d, 0, 1)).all()):
            x = x.narrow(d, 0, 1)
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tuple(x.shape), x.dtype, hash(data.numpy().tobytes())


@functools.cache
def _numbers(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that may be numbers to compute with."""
    kinds = ("number", "float", "Tensor")  # a tensor may be given as a number
    return tuple(
        (position, a.name)
        for position, a in enumerate(func._schema.arguments)
        if str(a.real_type).removeprefix("Optional[").rstrip("]") in kinds
    )
