"""Options that change the direction v: each is off by default, and none is part of the paper."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from l2rw_ext.errors import NotExactError
from l2rw_ext.ops.arithmetic import accumulation_dtype
from l2rw_ext.task.task import Direction, Task, norm_of
from l2rw_ext.tracing.members import Members

from .look_ahead import Preconditioner

Normalize = Literal["example"]


@dataclass(frozen=True)
class _Held:
    """A direction that is kept between steps.

    It is stored by parameter, not by id, so that it is copied with the model, and a parameter that
    replaces another one has no part in it.
    """

    values: dict[nn.Parameter, Tensor | None]
    """The direction of each parameter that it was formed for; None if it is zero."""
    clean_loss: Tensor

    def fits(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether it has an entry, of the right shape, for each of these parameters."""
        return all(
            p in self.values and ((v := self.values[p]) is None or v.shape == p.shape)
            for p in parameters
        )

    def finite(self) -> bool:
        """Whether all numbers are finite; on CUDA this waits for the device."""
        return all(bool(v.isfinite().all()) for v in self.values.values() if v is not None)


class DirectionOptions:
    """From the clean batch's direction to the one along which scores are taken.

    The options act in this order: v at θ, or at the look-ahead point of an SGD ``preconditioner``;
    plus ``l2`` θ; averaged with ``direction_decay``; held for ``every`` steps; times the
    preconditioner; zero outside of ``layers``; of length one with ``normalize``. The arguments are
    those of :class:`~l2rw_ext.Reweighter`.
    """

    def __init__(
        self,
        members: Members,
        *,
        every: int,
        direction_decay: float,
        layers: Sequence[str] | None,
        l2: float,
        preconditioner: torch.optim.Optimizer | None,
        normalize: Normalize | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of at least 1, got {every!r}")
        if not 0 <= direction_decay < 1:
            raise ValueError(f"direction_decay must be in [0, 1), got {direction_decay!r}")
        if not 0 <= l2 < float("inf"):
            raise ValueError(f"l2 must be a finite number of at least 0, got {l2!r}")
        self.every = every
        self._decay = direction_decay
        self._l2 = l2
        self._preconditioner = None if preconditioner is None else Preconditioner(preconditioner)
        self._normalize = normalize
        self._layers = None if layers is None else _names(layers)
        if self._layers is not None:
            self._chosen(members)
        self._steps = 0
        self._held: _Held | None = None
        self._next: _Held | None = None

    @property
    def active(self) -> bool:
        """Whether scores are taken along a direction other than the clean batch's gradient."""
        return bool(
            self.remembers
            or self._l2
            or self._preconditioner is not None
            or self._layers is not None
            or self._normalize is not None
        )

    @property
    def remembers(self) -> bool:
        """Whether a step's direction depends on those of earlier steps."""
        return self.every > 1 or self._decay > 0

    def due(self, members: Members) -> bool:
        """Whether this step needs a clean batch; parameters new to the direction need one too."""
        if self._held is None or self._steps % self.every == 0:
            return True
        return not self._held.fits(members.trainable)

    @property
    def clean_loss(self) -> Tensor:
        """The mean clean loss when a clean batch was last seen."""
        assert self._held is not None
        return self._held.clean_loss

    def direction(self, task: Task, of_clean_batch: Callable[[], Direction]) -> Direction:
        """The direction of this step; :meth:`advance` makes it the one that is held.

        ``of_clean_batch`` computes v at the present parameters.
        """
        if self.due(task.members):
            self._next = self._averaged(task, self._changed(task, of_clean_batch))
        else:
            self._next = self._held
        assert self._next is not None
        return self._applied(task, self._next)

    def advance(self) -> None:
        """Count a completed step, and hold its direction.

        A step whose direction overflowed under a loss scale does not count: if it were held or
        averaged, it would contaminate the steps to come.
        """
        found, self._next = self._next, None
        if found is not None and self.remembers:
            if found is not self._held and not found.finite():
                return
            self._held = found
        self._steps += 1

    @contextlib.contextmanager
    def dry(self) -> Iterator[None]:
        """Do not hold a direction that is found in the body."""
        before = self._next
        try:
            yield
        finally:
            self._next = before

    def lines(self) -> list[str]:
        """What the options do, one sentence each, for ``explain()``."""
        lines = []
        if self._preconditioner is not None:
            lines.append(self._preconditioner.describe())
        if self._l2:
            lines.append(f"l2={self._l2}: the clean loss has a penalty l2/2 |θ|² on matrices")
        if self._decay:
            lines.append(f"direction_decay={self._decay}: v is an exponential average")
        if self.every > 1:
            lines.append(f"every={self.every}: what the clean batch says is kept for that long")
        if self._layers is not None:
            lines.append(f"layers={self._layers}: scores are sums over these parameters alone")
        if self._normalize is not None:
            lines.append(
                f"normalize={self._normalize!r}: scores are cosines, <∇f_i, v> / (|∇f_i| |v|)"
            )
        return lines

    def state_dict(self, members: Members) -> dict[str, Any]:
        """Steps done and the direction that is held, by parameter name."""
        held = None
        if self._held is not None:
            values = self._held.values
            held = {
                "values": {
                    name: None if (v := values[p]) is None else v.clone()
                    for name, p in members.parameters
                    if p in values
                },
                "clean_loss": self._held.clean_loss.clone(),
            }
        return {"steps": self._steps, "direction": held}

    def load_state_dict(self, state: dict[str, Any], members: Members) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: the state has a direction for parameters that the model does not have.
        """
        saved = state["direction"]
        held = None
        if saved is not None:
            parameters = dict(members.parameters)
            values = {}
            for name, v in saved["values"].items():
                p = parameters.get(name)
                if p is None or (v is not None and p.shape != v.shape):
                    of_shape = "" if v is None else f"of shape {tuple(v.shape)} "
                    raise ValueError(
                        f"state: it has a direction {of_shape}for {name!r}; "
                        "the model has no such parameter"
                    )
                values[p] = None if v is None else v.clone()
            held = _Held(values, saved["clean_loss"].clone())
        self._steps, self._held = int(state["steps"]), held

    def _changed(self, task: Task, of_clean_batch: Callable[[], Direction]) -> Direction:
        held = list(map(task.members.held, task.parameters))
        point = {} if self._preconditioner is None else self._preconditioner.point(held)
        shards = task.members.shards
        with _moved(point) if shards is None else shards.moved(point):
            direction = of_clean_batch()
        if not self._l2:
            return direction
        values = dict(direction.values)
        for p, own in zip(task.parameters, held, strict=True):
            if p.dim() > 1:
                penalty = self._l2 * point.get(own, own.detach())
                v = values.get(id(p))
                values[id(p)] = penalty if v is None else v + penalty
        return Direction(values, direction.clean_loss)

    def _averaged(self, task: Task, new: Direction) -> _Held:
        """The exponential average, in the accumulation dtype: one step adds little to it."""
        values = {p: new.values.get(id(p)) for p in task.parameters}
        before = None if self._held is None or not self._decay else self._held.values
        if before is not None:
            for p, v in values.items():
                old = before.get(p)
                if p not in before or (old is None and v is None):
                    continue
                like = v if old is None else old
                assert like is not None
                dtype = accumulation_dtype(p.dtype)
                zero = torch.zeros_like(like, dtype=dtype, device=p.device)
                kept, fresh = (zero if x is None else x.to(zero) for x in (old, v))
                values[p] = kept.lerp(fresh, 1 - self._decay)
        return _Held(values, new.clean_loss)

    def _applied(self, task: Task, held: _Held) -> Direction:
        chosen = None if self._layers is None else self._chosen(task.members)
        values = {}
        for p in task.parameters:
            v = held.values[p]
            if v is None or (chosen is not None and id(p) not in chosen):
                continue
            values[id(p)] = v.to(
                p.device, v.dtype if v.dtype == p.dtype else accumulation_dtype(p.dtype)
            )
        if self._preconditioner is not None:
            held_by = {id(p): task.members.held(p) for p in task.parameters}
            factors = self._preconditioner.diagonal(list(held_by.values()))
            values = {key: v * factors[id(held_by[key])] for key, v in values.items()}
        if self._normalize is None:
            return Direction(values, held.clean_loss)
        if task.members.shards is not None:
            raise NotExactError("normalize: norms of sharded parameters' gradients are not formed")
        norm = norm_of(values)
        norm = norm.where(norm > 0, torch.ones_like(norm))
        units = {
            key: v.to(accumulation_dtype(v.dtype)) / norm.to(v.device, accumulation_dtype(v.dtype))
            for key, v in values.items()
        }
        over = {id(p) for p in task.parameters if chosen is None or id(p) in chosen}
        return Direction(units, held.clean_loss, over=frozenset(over))

    def _chosen(self, members: Members) -> set[int]:
        """The ids of the chosen parameters; any name of a shared parameter chooses it."""
        assert self._layers is not None
        named = list(members.every_name())
        chosen: set[int] = set()
        for name in self._layers:
            found = {
                id(p)
                for path, p in named
                if path == name or path.startswith(name + ".") or fnmatch.fnmatchcase(path, name)
            }
            if not found:
                raise ValueError(f"layers: {name!r} names no parameter or module of the model")
            chosen |= found
        return chosen


def _names(layers: Sequence[str]) -> tuple[str, ...]:
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"layers must be a list of names, got {layers!r}")
    if not layers:
        raise ValueError("layers: give at least one name, or None for all parameters")
    return tuple(layers)


@contextlib.contextmanager
def _moved(point: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Give the parameters other values in the body."""
    before = {p: p.data for p in point}
    try:
        for p, value in point.items():
            p.data = value
        yield
    finally:
        for p, data in before.items():
            p.data = data
