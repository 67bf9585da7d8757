"""When a step runs eagerly, and when its graph does.

The first step of a kind runs eagerly: it makes the engine's plan and its proof. So does the second,
which is then traced and compiled. The graph is held against an eager step at its first use, at the
first few sizes of batches that it serves, and at steps 16, 256, 4096, ... What cannot be a graph
runs eagerly, and a warning says why.
"""

from __future__ import annotations

import math
import time
import traceback
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from l2rw_ext.data.batch import describe
from l2rw_ext.devices import without_autocast
from l2rw_ext.engines.proof import NARROW, due, tolerance_of
from l2rw_ext.errors import NotCompilableError, NotYetCompilableError, warn
from l2rw_ext.task.isolation import BelowAutograd, Generators, HostGenerators, Snapshot, preserved
from l2rw_ext.task.task import Task

from .backends import Backend
from .flat_graph import FlatGraph
from .guards import Guarded, Guards, SwitchedOffError, sentence, unread
from .symbolic import Sizes, Symbolic, sizes

R = TypeVar("R")

Named = list[tuple[str, Tensor | None]]

_LARGEST_NUMBER_OF_REFUSALS = 8
"""Kinds of batches whose forwards Dynamo cannot follow, before none is tried any more."""

_GRADIENT = "its gradient"

_LARGEST_NUMBER_OF_TRIES = 8
"""How often a kind of step may change its engine or have no plan, before it is not compiled any
more."""

_LARGEST_NUMBER_OF_GRAPHS = 8
"""Of one kind of step, for batches of other sizes."""

_FEW_SIZES = 16
"""Sizes at which each graph is held against an eager step."""

_ROUNDINGS = 4
"""How often, by how many units in the last place, inputs are rounded otherwise, and how many times
the largest change rounding may explain."""


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
        self._guards = Guards(dynamic=backend.dynamic)
        self._refusals: dict[Hashable, str] = {}
        self._served: set[Hashable] = set()
        self._said: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.backend,))

    def find(self, task: Task) -> Found:
        """What is known of such steps."""
        reason = self._refusals.get(_key(task)) if self._refusals else None
        many = len(self._refusals) >= _LARGEST_NUMBER_OF_REFUSALS
        if reason is None and many and _key(task) not in self._served:
            reason = next(reversed(self._refusals.values()))
        if reason is not None:
            return Found(self, task, None, [], reason)
        try:
            _check_devices(task)
            guarded, inputs = self._guards.find(task)
        except SwitchedOffError as error:
            return Found(self, task, None, [], str(error), lasting=False)
        except NotCompilableError as error:
            return Found(self, task, None, [], str(error))
        if not guarded.kinds:
            self._served.add(_key(task))
        return Found(self, task, guarded, inputs)

    def eagerly(self, work: Work[R], task: Task, reason: str) -> R:
        """Do what cannot be a graph; an error that it raises is the user's.

        Raises:
            NotCompilableError: ``fullgraph=True`` was asked for; nothing has changed.
        """
        if not self.backend.fullgraph:
            return work.eager()
        with preserved(task.members, always=True):
            work.eager()
        raise self.error(reason)

    def error(self, reason: str) -> NotCompilableError:
        """What is raised instead of running eagerly, if that was asked for."""
        return NotCompilableError(
            f"compile={self.backend.name!r}, fullgraph=True: the step is not one graph: {reason}"
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
    _guarded: Guarded | None
    _inputs: list[Tensor]
    _reason: str = ""
    lasting: bool = True
    """Whether a step that runs eagerly is one that never can be a graph."""

    def run(self, work: Work[R]) -> R:
        """Do some work of the step, eagerly or by its graph.

        Raises:
            NotCompilableError: it cannot be a graph, and ``fullgraph=True`` was asked for.
        """
        if self._guarded is None:
            if not self.lasting:
                return work.eager()
            result = self._steps.eagerly(work, self._task, self._reason)
            self._steps.refuse(self._task, self._reason)
            return result
        kind = self._guarded.kinds.get(work.key)
        if kind is None:
            kind = self._guarded.kinds[work.key] = _Kind(self._steps, self._guarded)
        found: R = kind.run(work, self._task, self._inputs)
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
        self._steps: Steps = weakref.proxy(steps)  # Dynamo may keep this alive
        self._guarded = guarded
        self._count = 0
        self._tries = 0
        self._graphs: list[_Graph[R]] = []
        self._one_size: str | None = None
        """Why each graph serves batches of one size, if not because that was asked for."""
        self._refused: str | None = None

    @property
    def says(self) -> str:
        """What the next step does."""
        if self._refused is not None:
            return f"runs eagerly, for {self._refused}"
        if not self._graphs:
            return "is traced at its next step"
        said = self._graphs[-1].says
        if len(self._graphs) > 1:
            said = f"has {len(self._graphs)} graphs for batches of other sizes; the last {said}"
        return said if self._one_size is None else f"{said}; each is for one size: {self._one_size}"

    def run(self, work: Work[R], task: Task, inputs: list[Tensor]) -> R:
        """See :meth:`Found.run`."""
        if self._refused is not None:
            return self._steps.eagerly(work, task, self._refused)
        size = sizes(task, work.given) if self._steps.backend.dynamic else ()
        graph = next((graph for graph in self._graphs if graph.serves(size)), None)
        step, self._count = self._count, self._count + 1
        if graph is None:
            return self._without_graph(work, task, inputs, first=step == 0)
        generators = Generators(task.members.devices())
        try:
            found = graph.run(work, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            generators.restore()
            reason = sentence(error)
            traceback.clear_frames(error.__traceback__)
        else:
            if graph.due(size) or due(step):
                return self._checked(work, task, inputs, graph, found, generators)
            return graph.result(work, inputs, found)
        # Out of the handler, so that an error of the user's has no other for a context.
        result = self._steps.eagerly(work, task, reason)
        self._refuse(reason)
        return result

    def _without_graph(
        self, work: Work[R], task: Task, inputs: Sequence[Tensor], *, first: bool
    ) -> R:
        """The eager step's result; if it is not the first, a graph follows its plan from now on."""
        many = len(self._graphs)
        if many == _LARGEST_NUMBER_OF_GRAPHS:
            reason = f"there are {many} graphs for other sizes; pad batches to fewer lengths"
            result = self._steps.eagerly(work, task, reason)
            self._steps.say(reason)
            return result
        before = Snapshot(task.members)
        result = work.eager()
        if first:
            return result
        try:
            self._graphs.append(self._traced(work, work.engine(result), task, inputs))
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            before.undo()
            raise
        except Exception as error:
            planned = not isinstance(error, NotYetCompilableError)
            self._tries += 1
            if planned or self._tries == _LARGEST_NUMBER_OF_TRIES:
                reason = sentence(error)
                traceback.clear_frames(error.__traceback__)
                if self._steps.backend.fullgraph:
                    before.undo()
                    raise self._steps.error(reason) from None
                self._refuse(reason)
        return result

    def _traced(
        self, work: Work[R], engine: str, task: Task, inputs: Sequence[Tensor]
    ) -> _Graph[R]:
        """A graph, for batches of other sizes, too, if that was asked for and is possible."""
        backend = self._steps.backend
        generators, others = Generators(task.members.devices()), HostGenerators()
        reason = self._one_size
        try:
            if backend.dynamic and reason is None:
                try:
                    return _Graph(work, engine, task, inputs, self._guarded, backend, symbolic=True)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    reason = sentence(error)
                    traceback.clear_frames(error.__traceback__)
            graph = _Graph(work, engine, task, inputs, self._guarded, backend, symbolic=False)
        finally:
            generators.restore()
            others.restore()
        self._one_size = reason
        return graph

    def _checked(
        self,
        work: Work[R],
        task: Task,
        inputs: Sequence[Tensor],
        graph: _Graph[R],
        found: list[Tensor],
        generators: Generators,
    ) -> R:
        """The eager step's result, to which the graph's is held."""
        generators.restore()
        before = Snapshot(task.members)
        expected = work.eager()
        if work.engine(expected) != graph.engine:
            self._graphs.remove(graph)
            self._tries += 1
            if self._tries == _LARGEST_NUMBER_OF_TRIES:
                self._refuse("such steps change their engine again and again")
            return expected
        try:
            difference = graph.difference(work, inputs, found, expected, generators)
        except BaseException:
            before.undo()
            raise
        if difference is not None:
            reason = f"{difference} by the graph differs from the eager step's"
            if self._steps.backend.fullgraph:
                before.undo()
                raise self._steps.error(reason)
            self._refuse(reason)
        return expected

    def _refuse(self, reason: str) -> None:
        self._refused = reason
        self._graphs.clear()
        self._steps.say(reason)


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
        *,
        symbolic: bool,
    ) -> None:
        self.engine = engine
        self._held: set[Sizes] = set()
        results: list[R] = []

        def step(task: Task, snapshot: Snapshot) -> list[Tensor]:
            results.append(work.traced(task, snapshot, engine))
            return [x for _, x in work.tensors(results[0]) if x is not None]

        inputs = [*inputs, *work.given]
        names = [*guarded.names, *["an option"] * len(work.given)]
        start = time.perf_counter()
        stand_ins = Symbolic(task, inputs, work.given) if symbolic else None
        flat = FlatGraph(step, task, inputs, names, updates=work.updates, symbolic=stand_ins)
        missed = unread(guarded, inputs, flat.read, work.unread)
        if missed is not None:
            raise NotCompilableError(f"the trace does not follow how the forward reads {missed}")
        self._tolerance = tolerance_of(flat.dtypes)
        traced = time.perf_counter()
        with torch.no_grad(), without_autocast():
            self._compiled = backend(flat.module, stand_ins.inputs if stand_ins else inputs)
        if stand_ins is not None:
            self.serves = stand_ins.conditions()
        else:
            own = sizes(task, work.given)
            self.serves = lambda found: not backend.dynamic or found == own
        self._copies = backend.reuses_memory
        self._updated = flat.updated
        self._inputs = names
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

    def due(self, size: Sizes) -> bool:
        """Whether this graph is to be held against an eager step of this size."""
        if size in self._held or len(self._held) == _FEW_SIZES:
            return False
        self._held.add(size)
        return True

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

    def difference(
        self,
        work: Work[R],
        inputs: Sequence[Tensor],
        found: list[Tensor],
        expected: R,
        generators: Generators,
    ) -> str | None:
        """What the graph has computed in another way than the eager step, which has just run.

        Args:
            work: of the step.
            inputs: that the graph has read, after the step.
            found: by the graph.
            expected: by the eager step.
            generators: as they were before the step.
        """
        mine = self._named(found)
        theirs = {name: x for name, x in work.tensors(expected) if x is not None}
        for name in mine.keys() - theirs.keys():  # which says that something is the case
            if bool(mine[name].any()):
                return name
        excess = self._excess(mine, theirs)
        for k, y in zip(self._updated, found[len(mine) :], strict=True):
            new = f"the new value of {self._inputs[k]!r}"
            excess |= self._excess({new: y}, {new: inputs[k]})
        name = max(excess, key=excess.__getitem__)
        if excess[name] <= 1 or excess[name] <= self._uncertainty(work, inputs, generators):
            return None
        return name

    def _named(self, found: list[Tensor]) -> dict[str, Tensor]:
        """Results of the graph, without new values of buffers."""
        names = (n for n, present in zip(self._names, self._present, strict=True) if present)
        return dict(zip(names, found, strict=False))

    def _excess(self, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
        """By how many times the tolerance results are off."""
        own, shared = self._tolerance
        gradients = [x for name, x in theirs.items() if name.startswith(_GRADIENT)]
        small = shared / own * math.hypot(*(float(x.detach().double().norm()) for x in gradients))
        return {
            name: _error(mine.get(name), x, small * name.startswith(_GRADIENT)) / own
            for name, x in theirs.items()
        }

    def _uncertainty(
        self, work: Work[R], inputs: Sequence[Tensor], generators: Generators
    ) -> float:
        """How many times the tolerance rounding explains, where the graph decides by values.

        A ReLU whose input is zero but for rounding has one gradient or another, and in a network
        of millions of them some always are. So the graph runs on other roundings of its inputs.
        What is off by more than half precision may be is never explained.
        """
        after = Generators({x.device for x in inputs})
        runs = []
        for seed in range(_ROUNDINGS + 1):
            generators.restore()
            rounded = [_rounded(x, seed) for x in inputs] if seed else inputs
            runs.append(self._named(self.run(work, rounded)))
        after.restore()
        changes = (max(self._excess(run, runs[0]).values()) for run in runs[1:])
        return min(_ROUNDINGS * max(changes), NARROW.own / self._tolerance.own)


def _rounded(x: Tensor, seed: int) -> Tensor:
    """A tensor whose elements are off by a few units in their last place."""
    if not x.is_floating_point() or x.layout != torch.strided:
        return x
    y = x.detach().clone()
    if y.stride() != x.stride():  # elements that lie at one place
        return x
    generator = torch.Generator(x.device).manual_seed(seed)
    noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return y.mul_(1 + _ROUNDINGS * torch.finfo(x.dtype).eps * (2 * noise - 1))


def _error(x: Tensor | None, y: Tensor, absolute: float = 0.0) -> float:
    """The norm of an error, relative to that of y plus a number.

    It is infinite if the tensors are not of one kind, or not finite at the same places.
    """
    if x is None or x.shape != y.shape or x.dtype != y.dtype:
        return math.inf
    x, y = (a.to_dense() if a.is_sparse else a for a in (x, y))
    finite = x.isfinite()
    if not torch.equal(finite, y.isfinite()):
        return math.inf
    x, y = (a.where(finite, torch.zeros_like(a)).double() for a in (x, y))
    error = float((x - y).norm())
    return error and error / max(float(y.norm()) + absolute, math.ulp(0.0))


def _key(task: Task) -> Hashable:
    """What tells steps that run eagerly from others, without Dynamo."""
    hooked = torch.nn.modules.module._has_any_global_hook()
    return (describe(task.inputs), describe(task.clean_inputs), task.settings, bool(hooked))


def _check_devices(task: Task) -> None:
    devices = task.members.devices()
    if len(devices) > 1:
        named = " and ".join(sorted(map(str, devices)))
        raise NotCompilableError(f"the parameters are on {named}")
