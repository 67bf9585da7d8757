"""An operation as a rule sees it, and the table of rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import Tensor

from l2rw_ext.layers.torch_functions import tensors_in
from l2rw_ext.tracing.writes import STATISTICS

from .ids import full, mixed, over

Rule: TypeAlias = Callable[..., Any]
"""(call) -> the ids of the operation's results: one for all, or a list.

A rule must not call an element less than it is. It may look at the values of an index only by
:meth:`Call.steady`.
"""

RULES: dict[str, Rule] = {}
"""By the operation's name."""


def rule(names: str, **options: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operations, with options of its own."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), functools.partial(function, **options)))
        return function

    return register


@functools.cache
def _signature(func: Any) -> tuple[list[str], dict[str, Any], dict[str, bool]]:
    """Names of the arguments, their defaults, and for those that are written: is it an ``out=``?"""
    arguments = func._schema.arguments
    return (
        [a.name for a in arguments],
        {a.name: a.default_value for a in arguments if a.has_default_value()},
        {a.name: a.kwarg_only for a in arguments if a.alias_info and a.alias_info.is_write},
    )


class Call:
    """An operation: its arguments by name, and the ids of tensors under one *reading* of them.

    Args:
        func: the operation of the dispatcher.
        args: positional arguments.
        kwargs: keyword arguments.
        outs: the tensors that it returned.
        known: whether a tensor holds the same in each forward.
    """

    def __init__(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outs: list[Tensor],
        known: Callable[[Tensor], bool],
    ) -> None:
        names, defaults, written = _signature(func)
        self.args = defaults | dict(zip(names, args, strict=False)) | kwargs
        self.func, self.positional, self.kwargs = func, args, kwargs
        self.name: str = func._opname
        self.outs, self._known = outs, known
        inputs = {k: v for k, v in kwargs.items() if not written.get(k)}
        self.tensors = tensors_in((args, inputs))
        self.writes = tensors_in([self[name] for name in written])
        if self["training"] and not self.writes:
            self.writes = tensors_in([self[name] for name in STATISTICS])
        self.chose = False
        """Whether an index that may be another in the next forward decided the ids."""

    def read(
        self,
        lookup: Callable[[Tensor], Tensor],
        joining: Callable[[Tensor, Tensor], Tensor],
        *,
        today: bool = False,
    ) -> Call:
        """Begin a reading: where ids come from, and how those of two tensors combine.

        ``today``: whether to follow an index to where it points in this forward.
        """
        self._lookup, self.join, self._today, self.chose = lookup, joining, today, False
        return self

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    def of(self, x: Any, rank: int = 0) -> Tensor:
        """Ids of an argument; if it is no tensor, NONE in ``rank`` dimensions."""
        if not isinstance(x, Tensor):
            return full(rank)
        assert any(x is t for t in self.tensors), "what a rule makes has lost its labels"
        return self._lookup(x)

    def first(self) -> Tensor:
        """Ids of the first tensor."""
        return self.of(self.tensors[0])

    def all(self, *ids: Tensor) -> Tensor:
        """Ids of what is computed from all of them."""
        return functools.reduce(self.join, ids)

    def leading(self, *ids: Tensor) -> list[Tensor]:
        """Ids of results whose first dimensions are those of ``ids``, combined."""
        whole = self.all(*ids)
        return [whole.reshape(whole.shape + (1,) * (x.dim() - whole.dim())) for x in self.outs]

    def steady(self, ids: Tensor, dims: Iterable[int]) -> Tensor:
        """Ids at places along ``dims`` that an index chooses.

        If all places agree, the index does not matter; else the ids are those of today or MIXED.
        """
        whole = over(ids, dims)
        if whole is ids or not mixed(whole) or mixed(ids):
            return whole
        self.chose = True
        return ids if self._today else whole

    def chosen_by(self, index: Any) -> bool:
        """Whether an index may be another in the next forward."""
        return isinstance(index, Tensor) and not self._known(index)
