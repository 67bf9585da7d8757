"""When a step runs eagerly, and when its graph does.

The first step of a kind runs eagerly: it makes the engine's plan and its proof. At the second, the
step is traced and compiled, and its graph is held against the eager step; so it is again at steps
16, 256, 4096, ... What cannot be a graph runs eagerly, and a warning says why.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from l2rw_ext.data.batch import describe
from l2rw_ext.devices import without_autocast
from l2rw_ext.engines.proof import due, tolerance_of
from l2rw_ext.errors import NotCompilableError, warn
from l2rw_ext.task.isolation import BelowAutograd, Generators, Snapshot
from l2rw_ext.task.task import Task

from .backends import Backend
from .flat_graph import FlatGraph
from .guards import Guarded, Guards, sentence, unread
from .wrappers import announce_backward, inside

R = TypeVar("R")

Named = list[tuple[str, Tensor | None]]

_LARGEST_NUMBER_OF_REFUSALS = 8
"""Kinds of batches whose forwards Dynamo cannot follow, before none is tried any more."""

_GRADIENT = "its gradient"

_LARGEST_NUMBER_OF_CHANGES = 8
"""How often a kind of step may change its engine, before it is not compiled any more."""


@dataclass
class Work(Generic[R]):
    """Something that a step does, eagerly or by its graph."""

    key: Hashable
    """What the graph depends on, besides what the forwards read."""
    given: Sequence[Tensor]
    """Tensors that it reads, besides those that the forwards read."""
    eager: Callable[[], R]
    """Does it as ever."""
    engine: Callable[[R], str]
    """Which engine did it."""
    traced: Callable[[Task, Snapshot, str], R]
    """Does it by that engine, to be traced."""
    tensors: Callable[[R], Named]
    """The tensors of a result, and what errors call them."""
    parameters: Callable[[R], list[nn.Parameter]]
    """The parameters of which a result speaks."""
    about: Callable[[R], Any]
    """What else there is to a result."""
    rebuilt: Callable[[Any, list[nn.Parameter], list[Any]], R]
    """A result of what is about it, of present parameters and of present tensors or None."""
    unread: Any
    """The part of the batches that it does not read."""
    updates: bool
    """Whether buffers are as after the forward when it is done; else nothing changes."""


class Steps:
    """The compiled steps of one reweighter.

    A copy of it, or one from a pickle, has no graph: graphs belong to the model they were made of.

    Args:
        backend: to compile with.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._guards = Guards()
        self._refusals: dict[Hashable, str] = {}
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.backend,))

    def find(self, task: Task) -> Found:
        """What is known of such steps."""
        reason = self._refusals.get(_key(task)) if self._refusals else None
        if reason is None and len(self._refusals) < _LARGEST_NUMBER_OF_REFUSALS:
            try:
                _check_devices(task)
                bare = replace(task, model=inside(task.model))
                return Found(self, task, bare, *self._guards.find(bare))
            except NotCompilableError as error:
                reason = str(error)
        if reason is None:
            reason = next(reversed(self._refusals.values()))
        return Found(self, task, task, None, [], reason)

    def check(self, reason: str) -> None:
        """Raise instead of running eagerly, if that was asked for."""
        if self.backend.fullgraph:
            raise NotCompilableError(
                f"compile={self.backend.name!r}, fullgraph=True: the step is not one graph: "
                f"{reason}"
            )

    def refuse(self, task: Task, reason: str) -> None:
        """Remember, and say once, that such steps run eagerly."""
        self._refusals[_key(task)] = reason
        self.say(reason)

    def say(self, reason: str) -> None:
        """Say once why steps run eagerly."""
        if reason not in self._said:
            self._said.add(reason)
            warn(f"compile={self.backend.name!r}: the step runs eagerly, for {reason}")


@dataclass
class Found:
    """What is known of a step, and the tensors that its forwards read."""

    _steps: Steps
    _task: Task
    _bare: Task
    """The step on the model without a wrapper."""
    _guarded: Guarded | None
    _inputs: list[Tensor]
    _reason: str | None = None

    def run(self, work: Work[R]) -> R:
        """Do some work of the step, eagerly or by its graph.

        Raises:
            NotCompilableError: it cannot be a graph, and ``fullgraph=True`` was asked for.
        """
        if self._guarded is None:
            reason = str(self._reason)
            self._steps.check(reason)
            result = work.eager()
            self._steps.refuse(self._task, reason)
            return result
        kind = self._guarded.kinds.get(work.key)
        if kind is None:
            kind = self._guarded.kinds[work.key] = _Kind(self._steps, self._guarded)
        found: R = kind.run(work, self._task, self._bare, self._inputs)
        return found

    @property
    def line(self) -> str:
        """What happens to such steps, for ``explain()``."""
        if self._guarded is None:
            said = [f"the step runs eagerly, for {self._reason}"]
        else:
            kinds = self._guarded.kinds.items()
            said = [f"{key[0]} {kind.says}" for key, kind in kinds]
        found = "; ".join(said) or "the first step runs eagerly"
        return f"compile={self._steps.backend.name!r}: {found}"


class _Kind(Generic[R]):
    """Work of one kind."""

    def __init__(self, steps: Steps, guarded: Guarded) -> None:
        self._steps = steps
        self._guarded = guarded
        self._count = 0
        self._engine = ""
        self._changes = 0
        self._graph: _Graph[R] | None = None
        self._refused: str | None = None

    @property
    def says(self) -> str:
        """What the next step does."""
        if self._refused is not None:
            return f"runs eagerly, for {self._refused}"
        return "is traced at its next step" if self._graph is None else self._graph.says

    def run(self, work: Work[R], task: Task, bare: Task, inputs: list[Tensor]) -> R:
        """See :meth:`Found.run`."""
        if self._refused is not None:
            self._steps.check(self._refused)
            return work.eager()
        count, self._count = self._count, self._count + 1
        if count == 0:
            result = work.eager()
            self._engine = work.engine(result)
            return result
        checks = self._graph is None or due(count)
        generators = Generators(task.members.devices())
        try:
            if self._graph is None:
                backend = self._steps.backend
                self._graph = _Graph(work, self._engine, bare, inputs, self._guarded, backend)
                generators.restore()
            graph = self._graph
            if work.updates:
                announce_backward(task.model)
            found = graph.run(work, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            generators.restore()
            return self._refuse(sentence(error), work)
        if not checks:
            return graph.result(work, inputs, found)
        generators.restore()
        expected = work.eager()
        if work.engine(expected) != self._engine:
            self._engine, self._graph = work.engine(expected), None
            self._changes += 1
            if self._changes == _LARGEST_NUMBER_OF_CHANGES:
                self._refused = "such steps change their engine again and again"
        difference = graph.difference(work, found, expected)
        if difference is not None and self._graph is not None:
            self._refuse(f"{difference} differs from the eager step's", work, expected)
        return expected

    def _refuse(self, reason: str, work: Work[R], result: R | None = None) -> R:
        self._steps.check(reason)
        result = work.eager() if result is None else result
        self._refused, self._graph = reason, None
        self._steps.say(reason)
        return result


class _Graph(Generic[R]):
    """Work that is traced and compiled."""

    def __init__(
        self,
        work: Work[R],
        engine: str,
        task: Task,
        inputs: Sequence[Tensor],
        guarded: Guarded,
        backend: Backend,
    ) -> None:
        results: list[R] = []

        def step(task: Task, snapshot: Snapshot) -> list[Tensor]:
            results.append(work.traced(task, snapshot, engine))
            return [x for _, x in work.tensors(results[0]) if x is not None]

        inputs = [*inputs, *work.given]
        names = [*guarded.names, *["an option"] * len(work.given)]
        start = time.perf_counter()
        flat = FlatGraph(step, task, inputs, names, updates=work.updates)
        missed = unread(guarded, inputs, flat.read, work.unread)
        if missed is not None:
            raise NotCompilableError(f"the trace does not follow how the forward reads {missed}")
        self._tolerance = tolerance_of(flat.dtypes)
        traced = time.perf_counter()
        with torch.no_grad(), without_autocast():
            self._compiled = backend(flat.module, inputs)
        self._copies = backend.reuses_memory
        self._updated = flat.updated
        named = work.tensors(results[0])
        self._present = [x is not None for _, x in named]
        self._names = [name for name, _ in named]
        numbers = {id(x): k for k, x in enumerate(inputs)}
        self._parameters = [numbers[id(p)] for p in work.parameters(results[0])]
        self._about = work.about(results[0])
        seconds = time.perf_counter() - traced
        self.says = (
            f"is one graph of {flat.operations} operations, traced in {traced - start:.1f} s and "
            f"compiled in {seconds:.1f} s"
        )

    def run(self, work: Work[R], inputs: Sequence[Tensor]) -> list[Tensor]:
        """All that the graph computes; nothing is changed yet."""
        with BelowAutograd(), without_autocast():
            found = self._compiled(*inputs, *work.given)
            return [x.clone() for x in found] if self._copies else list(found)

    def result(self, work: Work[R], inputs: Sequence[Tensor], found: list[Tensor]) -> R:
        """The result, after buffers have their new values."""
        values = iter(found)
        tensors = [next(values) if present else None for present in self._present]
        parameters: Any = [inputs[k] for k in self._parameters]
        result = work.rebuilt(self._about, parameters, tensors)
        count = sum(self._present)
        with torch.no_grad():
            for k, x in zip(self._updated, found[count:], strict=True):
                inputs[k].copy_(x)
        return result

    def difference(self, work: Work[R], found: list[Tensor], expected: R) -> str | None:
        """What of the graph's result is not that of the eager step."""
        values = iter(found)
        mine = dict(
            zip(self._names, (next(values) if p else None for p in self._present), strict=True)
        )
        theirs = {name: x for name, x in work.tensors(expected) if x is not None}
        own, shared = self._tolerance
        whole = _norm(x for name, x in theirs.items() if name.startswith(_GRADIENT))
        for name, x in theirs.items():
            y = mine.get(name)
            allowed = shared * whole if name.startswith(_GRADIENT) else 0.0
            if y is None or not _close(y, x, own, allowed):
                return name
        return None


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(x.detach().double().norm()) ** 2 for x in tensors))


def _close(x: Tensor, y: Tensor, relative: float, absolute: float) -> bool:
    """Whether two tensors agree, up to an error of this norm; not finite at the same places."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y = (a.to_dense() if a.is_sparse else a for a in (x, y))
    finite = x.isfinite()
    if not torch.equal(finite, y.isfinite()):
        return False
    x, y = (a.where(finite, torch.zeros_like(a)).double() for a in (x, y))
    return bool((x - y).norm() <= relative * y.norm() + absolute)


def _key(task: Task) -> Hashable:
    """What tells steps that run eagerly from others, without Dynamo."""
    return (describe(task.inputs), describe(task.clean_inputs), task.settings)


def _check_devices(task: Task) -> None:
    devices = task.members.devices()
    if len(devices) > 1:
        named = " and ".join(sorted(map(str, devices)))
        raise NotCompilableError(f"the parameters are on {named}")
