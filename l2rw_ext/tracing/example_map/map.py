"""Follows a forward, and keeps beside every tensor whose example each element is.

Two kinds of ids are kept. *Values* name the example whose data an element is computed from.
*Labels* name the example whose loss may have a gradient at an element; they go where autograd goes,
and a tensor that requires no grad passes none on. A label starts where a trained parameter meets
data, as the example of that data. This first choice is free, because labels are only joined from
there on: if loss i ends with label i, no gradient of it reaches a place with another label.

No value of a tensor decides an id, but for an index that is the same in every forward. So what is
found is true of other values too: of a hinge that is inactive, of a weight that is zero.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from l2rw_ext.layers.torch_functions import tensors_in
from l2rw_ext.tracing.dispatch import DispatchMode

from .call import Call
from .ids import MIXED, NONE, counted, full, join, mixed, over, prefer, squash, unowned
from .rules import rule_of
from .storages import Pair, Storage, geometry, key, plain

_NOT_THE_USERS = (
    os.path.join(os.path.dirname(torch.__file__), ""),
    os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), ""),
)
"""The folders of torch and of this package, whose lines a note does not name."""

_CHECKS = ("_linalg_check_errors", "_assert_async", "_assert_tensor_metadata")
"""Operations that read values to raise an error, and decide nothing else by them."""

_SEEN_BY_GEOMETRY = ("detach", "alias", "as_strided")
"""Views whose ids are found by storage and geometry, with no rule."""


PICKING = frozenset(
    (
        "slice",
        "select",
        "narrow",
        "split",
        "split_with_sizes",
        "unbind",
        "chunk",
        "unfold",
        "diagonal",
    )
)
"""Views that take some places along a dimension."""


class ExampleMap(DispatchMode):
    """A mode for one forward and its losses; :class:`~.exits.Exits` belongs to it.

    Args:
        count: the number of examples of the forward; n + m if it is that of two batches.
        permanent: names and tensors of the parameters and buffers.
        by_row: whether tensors made without data that have ``count`` rows may be the examples': a
            first hidden state of zeros, a query expanded to the batch. Labels that they get are
            proposals, which the losses prove or refute.

    Example:
        >>> layer, x = torch.nn.Linear(3, 1), torch.randn(4, 3)
        >>> example_map = ExampleMap(4, layer.named_parameters())
        >>> example_map.enter(x)
        >>> with example_map:
        ...     out = layer(x)
        ...     mixed = out - out.mean(0)
        >>> example_map.labels(out).flatten().tolist()
        [0, 1, 2, 3]
        >>> bool((example_map.labels(mixed) == MIXED).all())
        True
    """

    supports_higher_order_operators = True

    def __init__(
        self, count: int, permanent: Iterable[tuple[str, Tensor]], *, by_row: bool = False
    ) -> None:
        super().__init__()
        self.count = count
        self.notes: dict[str, dict[str, str]] = {}
        """What was met, by kind: for each operation the line of the user's code, "file:line".

        The kinds: "mixes" (labels met), "mixes values", "chooses" (an index may choose other
        examples in the next forward, and labels follow it), "may choose" (the same before the first
        label), "reads" (the program reads values of the data), "unseen" (values or gradients leave
        torch), "unknown" (no rule), "strays" (tensors that neither the batch nor the members show),
        "gaps" (some rows that meet a parameter have no label), "places" (examples are picked by
        their place in the batch).
        """
        self.failures: dict[str, str] = {}
        """Errors of rules, by operation; these operations count as unknown."""
        self.checks_values = False
        """Whether the function that runs reads values only to check them."""
        # The tensors are kept alive, so that no other storage gets such a key.
        self._permanent = {key(x): x for _, x in permanent if plain(x)}
        self._by_row = by_row
        self._storages: dict[int, Storage] = {}
        self._within: set[int] | None = None
        self._resting = False

    def enter(
        self, x: Tensor, *, dimension: int | None = None, first: int = 0, size: int | None = None
    ) -> None:
        """Take x for data of the examples ``first``, ..., ``first + size - 1``.

        ``size`` is the number of all examples if it is None. ``dimension`` counts the examples; if
        it is None, this is the first dimension of that size. Without one, the tensor is a stray:
        the same for all examples, unless it decides which example's rows are read.
        """
        size = self.count if size is None else size
        if not plain(x) or not x.numel():
            return
        with self.aside():
            d = _first_of_size(x, size) if dimension is None else dimension % x.dim()
            if d < x.dim():
                ids = counted(x.dim(), d, first, size)
                self._storage(x, sound=False).set(x, (ids, ids))

    @contextlib.contextmanager
    def use(self, *inputs: Tensor | None) -> Iterator[None]:
        """Around a custom autograd Function of this package, which uses trained parameters.

        The dispatcher shows its inside without grad. It is followed as if autograd recorded it,
        with a trained parameter in every operation, so that first labels start here. Whoever weighs
        the gradients of the rows of its output must find a label at each of them: one that is NONE
        says that nobody follows this gradient.

        Args:
            inputs: the tensors that the Function sends gradients to.
        """
        with self.aside():
            given = {key(x) for x in inputs if x is not None and x.requires_grad and plain(x)}
        outer, self._within = self._within, given
        try:
            yield
        finally:
            self._within = outer

    def values(self, x: Tensor) -> Tensor:
        """The example that each element of x is computed from: int32 ids, size 1 where alike."""
        with self.aside():
            return self._pair(x)[0]

    def labels(self, x: Tensor) -> Tensor:
        """The example whose loss may have a gradient at each element, as :meth:`values`."""
        with self.aside():
            return self._pair(x)[1]

    def owned(self, x: Tensor) -> bool:
        """Whether some element of x belongs to an example, or may."""
        with self.aside():
            return not all(map(unowned, self._pair(x)))

    def graded(self, x: Tensor) -> Tensor:
        """The labels that a gradient of x follows.

        These are none without grad, and the values where autograd did not see what was done.
        """
        with self.aside():
            return self._graded(x)

    def note(self, kind: str, name: str) -> None:
        """Remember the first line of the user's code where something happened."""
        if name not in self.notes.setdefault(kind, {}):
            frames = (frame for frame, _ in traceback.walk_stack(None))
            users = (f for f in frames if not f.f_code.co_filename.startswith(_NOT_THE_USERS))
            at = next(users, None)
            place = "" if at is None else f"{os.path.basename(at.f_code.co_filename)}:{at.f_lineno}"
            self.notes[kind][name] = place

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunction():
            out = func(*args, **(kwargs or {}))
            if not self._resting:
                if not isinstance(func, torch._ops.OpOverload):
                    self._opaque(func, tensors_in(out))
                elif func._opname not in _SEEN_BY_GEOMETRY:
                    self._follow(Call(func, args, kwargs or {}, tensors_in(out), self._known))
                elif func._opname == "as_strided" and self._within is None:
                    kept = [*zip(out.shape, out.stride(), strict=True)]
                    unlike = _unlike(self.values(args[0]))
                    if any((args[0].shape[d], args[0].stride(d)) not in kept for d in unlike):
                        self.note("places", "as_strided")
        return out

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A context for work on ids, which the map itself and function modes must not see."""
        outer, self._resting = self._resting, True
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self._resting = outer

    # ---- what is known of a tensor

    def _found(self, x: Tensor) -> Storage | None:
        return self._storages.get(key(x)) if plain(x) else None

    def _storage(self, x: Tensor, *, sound: bool = True) -> Storage:
        at = key(x)
        if at not in self._storages:
            self._storages[at] = Storage(x, sound=sound)
        return self._storages[at]

    def _pair(self, x: Tensor) -> Pair:
        if not plain(x):
            self.note("strays", "nested" if x.is_nested else f"{type(x).__name__} {x.layout}")
            return full(x.dim(), MIXED), full(x.dim(), MIXED)
        stray = self._found(x) is None and key(x) not in self._permanent
        if stray and not (x.requires_grad and x.is_leaf):
            # It is for all examples, or nobody knows whose it is.
            self.note("strays", f"a tensor of shape {tuple(x.shape)}")
            self._storage(x, sound=False).views[geometry(x)] = full(x.dim()), full(x.dim(), MIXED)
        found = self._found(x) if x.numel() else None
        return (full(x.dim()), full(x.dim())) if found is None else found.get(x)

    def _graded(self, x: Tensor) -> Tensor:
        if not x.requires_grad and not (self._within and plain(x) and key(x) in self._within):
            return full(x.dim())
        found = self._found(x)
        return self._pair(x)[1 if found is None or found.sound else 0]

    def _known(self, x: Tensor) -> bool:
        found = self._found(x)
        return found is not None and found.known

    # ---- an operation

    def _opaque(self, func: Any, outs: list[Tensor]) -> None:
        """An operator that takes functions, as ``torch.cond`` does: its results may be anyone's."""
        self.note("unknown", str(func))
        self._anyones(outs)

    def _anyones(self, outs: list[Tensor]) -> None:
        for x in filter(plain, outs):
            self._storage(x, sound=False).set(x, (full(x.dim(), MIXED), full(x.dim(), MIXED)))

    def _follow(self, c: Call) -> None:
        if c.name == "lift_fresh" and self._found(c.outs[0]) is None:
            self._storage(c.outs[0])  # numbers of the program, which may be others the next time
        pairs = [self._pair(x) for x in c.tensors]
        if "empty" in c.name:  # whoever fills it may do so unseen
            self._anyones(c.outs)
        elif torch.Tag.inplace_view in c.func.tags:
            if c.name == "set_" and any(map(self.owned, c.tensors)):
                self.note("unseen", c.name)  # the graph stays that of the old elements
        elif all(unowned(ids) for pair in pairs for ids in pair):
            self._without_data(c)
        elif c.outs or c.writes:
            self._with_data(c, pairs)
        elif not self.checks_values and c.name not in _CHECKS:
            self.note("reads", c.name)

    def _without_data(self, c: Call) -> None:
        # Numbers may change from step to step, but for whole ones that count or place: a tensor of
        # places is known if it is made of such alone.
        fixed = torch.Tag.nondeterministic_seeded not in c.func.tags
        fixed = fixed and all(map(self._known, c.tensors))
        fixed = fixed and not any(x.is_floating_point() for x in (*c.tensors, *c.outs))
        for x in c.writes:
            self._storage(x).known = False
        for x in [] if c.writes else filter(plain, c.outs):
            if self._found(x) is None:
                self._storage(x).known = fixed
            d = _first_of_size(x, self.count)
            for_all = c.tensors and c.name not in ("expand", "repeat", "new_zeros")
            for_all = for_all or c.name == "arange"  # which counts positions rather than examples
            if self._by_row and d < x.dim() and not for_all:
                ids = counted(x.dim(), d, 0, self.count)
                storage = self._storage(x)
                storage.sound = bool(c.tensors)
                storage.views[geometry(x)] = full(x.dim()), ids

    def _with_data(self, c: Call, pairs: list[Pair]) -> None:
        if _shaped_by_values(c):
            self.note("reads", c.name)
        if self._within is None and c.tensors and self._takes_places(c, pairs[0][0]):
            self.note("places", c.name)
        self._meets_constants(c, pairs)
        in_use = self._within is not None
        recorded = in_use or (torch.is_grad_enabled() and any(x.requires_grad for x in c.tensors))
        meets = in_use or (recorded and any(map(self._is_root, c.tensors)))
        values = self._ids(c.read(lambda x: self._pair(x)[0], join))
        if any(map(mixed, values)) and not any(mixed(v) for v, _ in pairs):
            self.note("mixes values", c.name)
        if all(v is label for v, label in pairs) and not any(map(mixed, values)):
            labels = values
        else:
            labels = self._labels(c, values, recorded=recorded, meets=meets)
        partly = meets and not in_use and not all(map(unowned, labels))
        if partly and bool((labels[0] < 0).any()):
            self.note("gaps", c.name)
        if self._within is not None:  # from its first label on, an element leads gradients on
            given = {key(x) for x in c.tensors if plain(x)}
            made = {key(x) for x in c.outs if plain(x)} - given
            self._within |= made | {key(x) for x in c.writes if plain(x)}
        fate = {id(x): pair for x, *pair in zip(c.outs or c.writes, values, labels, strict=True)}
        for x in c.writes:
            missing = [over(ids[0], None, x.dim()) for ids in (values, labels)]
            self._write(x, *fate.pop(id(x), missing), recorded=recorded)
        for x in c.outs:
            if id(x) in fate and x.numel() and plain(x):
                value, label = fate[id(x)]
                storage = self._storage(x, sound=recorded)
                storage.views.setdefault(geometry(x), (value, label))

    def _meets_constants(self, c: Call, pairs: list[Pair]) -> None:
        """Data meets tensors that are made without; a subclass may look at them."""

    def _takes_places(self, c: Call, ids: Tensor) -> bool:
        """Whether elements of a tensor with these ids are picked by their place in the batch."""
        x = c.tensors[0]
        unlike = _unlike(squash(ids))
        if c.name in ("tril", "triu"):
            return any(d >= x.dim() - 2 for d in unlike)
        if c.name not in PICKING:
            return False
        picked = range(x.dim()) if c["dim"] is None else [c["dim"] % max(x.dim(), 1)]
        changed = any(out.shape != x.shape for out in c.outs)
        return changed and any(d in picked for d in unlike)

    def _is_root(self, x: Tensor) -> bool:
        """Whether x is a trained parameter, or computed from such alone."""
        return x.requires_grad and unowned(self._pair(x)[0]) and unowned(self._graded(x))

    def _labels(
        self, c: Call, values: list[Tensor], *, recorded: bool, meets: bool
    ) -> list[Tensor]:
        """Labels of the results: joined where a gradient follows them, else the first choice."""
        labels = self._ids(c.read(lambda x: self._pair(x)[1], prefer))
        if c.chose:
            self.note("may choose", c.name)
        if not recorded or c.func.is_view:  # a view is the same elements
            return labels
        graded = self._ids(c.read(self._graded, join, today=True))
        if c.chose:
            self.note("chooses", c.name)
        if any(map(mixed, graded)) and not any(mixed(self._graded(x)) for x in c.tensors):
            self.note("mixes", c.name)
        first = [
            prefer(label, value) if meets else torch.where(label == MIXED, NONE, label)
            for label, value in zip(labels, values, strict=True)
        ]
        return [torch.where(g == NONE, f, g) for g, f in zip(graded, first, strict=True)]

    def _ids(self, c: Call) -> list[Tensor]:
        """What the rule says of the results; if there is none, all elements are joined."""
        found = rule_of(c.func)
        if found is not None and c.outs:
            try:
                ids = found(c)
                ids = ids if isinstance(ids, list) else [ids] * len(c.outs)
                return [_fitted(i, x) for i, x in zip(ids, c.outs, strict=True)]
            except Exception as error:
                self.failures[c.name] = repr(error)
        whole = c.all(full(0), *(over(c.of(x), None, 0) for x in c.tensors))
        if mixed(whole):
            self.note("unknown", c.name)
        return [whole.reshape((1,) * x.dim()) for x in c.outs or c.writes]

    def _write(self, x: Tensor, values: Tensor, labels: Tensor, *, recorded: bool) -> None:
        found = self._storage(x)
        if found.sound:  # another alias may still have its old graph
            labels = join(found.get(x)[1], labels if recorded else values)
        elif recorded:
            found.becomes_sound(keep=x.requires_grad)
        else:
            labels = prefer(labels, found.get(x)[1])
        found.set(x, (values, labels))
        found.known = False


def _unlike(ids: Tensor) -> list[int]:
    """Dimensions along which ids differ."""
    return [d for d, size in enumerate(ids.shape) if size > 1]


def _shaped_by_values(c: Call) -> bool:
    """Whether the shape of the result shows values to the program."""
    if torch.Tag.dynamic_output_shape not in c.func.tags:
        return False
    if c.name == "index":
        return any(_is_mask(i) for i in c["indices"])
    return c.name != "_ctc_loss"  # whose second result the program does not get


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _first_of_size(x: Tensor, size: int) -> int:
    """The first dimension of that size; x.dim() if there is none."""
    return [*x.shape, size].index(size)


def _fitted(ids: Tensor, x: Tensor) -> Tensor:
    """The ids with the dimensions of x."""
    ids = ids.reshape((1,) * (x.dim() - ids.dim()) + ids.shape)
    if x.numel() and not all(s in (1, k) for s, k in zip(ids.shape, x.shape, strict=True)):
        raise ValueError(f"ids of shape {tuple(ids.shape)} for a tensor of {tuple(x.shape)}")
    return ids
