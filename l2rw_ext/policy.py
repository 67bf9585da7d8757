"""Options that change the direction v: each is off by default, and none is the paper's."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .engines.base import Direction, Task
from .engines.direction import clean_direction
from .members import Members
from .preconditioner import Preconditioner
from .preserve import Snapshot


class Policy:
    """From the clean batch's direction to the one that scores are taken along.

    In this order: v at θ, or at the look-ahead point of an SGD ``preconditioner``; plus ``l2`` θ;
    averaged with ``direction_decay``; held for ``every`` steps; times the preconditioner; zero
    outside of ``layers``. The arguments are those of :class:`~l2rw_ext.Reweighter`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        direction_decay: float,
        layers: Sequence[str] | None,
        l2: float,
        preconditioner: torch.optim.Optimizer | None,
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
        self._layers = None if layers is None else _names(layers)
        if self._layers is not None:
            self._chosen(Members.of(model))
        self._steps = 0
        self._held: Direction | None = None
        self._next: Direction | None = None

    @property
    def active(self) -> bool:
        """Whether scores are taken along another direction than the clean batch's own."""
        return bool(
            self.every > 1
            or self._decay
            or self._l2
            or self._preconditioner is not None
            or self._layers is not None
        )

    @property
    def due(self) -> bool:
        """Whether this step needs a clean batch."""
        return self._held is None or self._steps % self.every == 0

    @property
    def clean_loss(self) -> Tensor:
        """The mean clean loss when a clean batch was last seen."""
        assert self._held is not None
        return self._held.clean_loss

    def direction(self, task: Task, snapshot: Snapshot) -> Direction:
        """The direction of this step; :meth:`advance` makes it the one that is held."""
        if self.due:
            self._next = self._averaged(self._of_clean_batch(task, snapshot))
        else:
            self._next = self._held
        assert self._next is not None
        return self._applied(task, self._next)

    def advance(self) -> None:
        """A step was completed."""
        self._steps += 1
        if self._next is not None:
            self._held, self._next = self._next, None

    @contextlib.contextmanager
    def dry(self) -> Iterator[None]:
        """A direction found in the body is not held."""
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
        return lines

    def state_dict(self, members: Members) -> dict[str, Any]:
        """Steps done and the direction that is held, by parameter name."""
        held = None
        if self._held is not None:
            values = self._held.values
            held = {
                "values": {
                    name: values[id(p)].clone() for name, p in members.parameters if id(p) in values
                },
                "clean_loss": self._held.clean_loss.clone(),
            }
        return {"steps": self._steps, "direction": held}

    def load_state_dict(self, state: dict[str, Any], members: Members) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError: the state has a direction for parameters that the model does not have.
        """
        held = state["direction"]
        direction = None
        if held is not None:
            parameters = dict(members.parameters)
            for name, value in held["values"].items():
                if name not in parameters or parameters[name].shape != value.shape:
                    raise ValueError(
                        f"state: it has a direction of shape {tuple(value.shape)} for {name!r}; "
                        "the model has no such parameter"
                    )
            direction = Direction(
                {id(parameters[k]): v.to(parameters[k].device) for k, v in held["values"].items()},
                held["clean_loss"].clone(),
            )
        self._steps, self._held = int(state["steps"]), direction

    def _of_clean_batch(self, task: Task, snapshot: Snapshot) -> Direction:
        point = {} if self._preconditioner is None else self._preconditioner.point(task.parameters)
        with _moved(point):
            direction = clean_direction(task, snapshot)
        if not self._l2:
            return direction
        values = dict(direction.values)
        for p in task.parameters:
            if p.dim() > 1:
                penalty = self._l2 * point.get(p, p.detach())
                v = values.get(id(p))
                values[id(p)] = penalty if v is None else v + penalty
        return Direction(values, direction.clean_loss)

    def _averaged(self, new: Direction) -> Direction:
        if not self._decay or self._held is None:
            return new
        old = self._held.values
        values = {}
        for key in new.values.keys() | old.keys():
            kept, fresh = old.get(key), new.values.get(key)
            if kept is None or fresh is None:
                one = kept if kept is not None else fresh
                assert one is not None
                values[key] = one * (1 - self._decay if kept is None else self._decay)
            else:
                values[key] = kept.lerp(fresh, 1 - self._decay)
        return Direction(values, new.clean_loss)

    def _applied(self, task: Task, direction: Direction) -> Direction:
        values = direction.values
        if self._layers is not None:
            chosen = self._chosen(task.members)
            values = {key: v for key, v in values.items() if key in chosen}
        if self._preconditioner is not None:
            factors = self._preconditioner.diagonal(task.parameters)
            values = {key: v * factors[key] for key, v in values.items()}
        return Direction(values, direction.clean_loss)

    def _chosen(self, members: Members) -> set[int]:
        assert self._layers is not None
        chosen: set[int] = set()
        for name in self._layers:
            found = {
                id(p)
                for path, p in members.parameters
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
    """The parameters have other values in the body."""
    before = {p: p.data for p in point}
    try:
        for p, value in point.items():
            p.data = value
        yield
    finally:
        for p, data in before.items():
            p.data = data
