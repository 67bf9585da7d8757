"""Steps that are captured in a CUDA graph and replayed, one graph for each kind of step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .engines.base import Task
from .plan import Plan
from .preserve import Generators, Snapshot, preserved
from .recording import Recorder, Recording
from .watch import NotCapturableError, Watch
from .weighing import Gradients, Weighed, infinite_if

Key = tuple[Any, ...]

REHEARSALS = 2
"""Watched steps between the first plan and the capture."""

_LARGEST_NUMBER_OF_KINDS = 16
_LARGEST_NUMBER_OF_CHANGES = 8
"""Of one kind of step, whose parameters or buffers may be exchanged now and then."""

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")
"""Modules whose forward prepares, in Python, what hooks on the gradient then do."""


@dataclass
class Computed:
    """What one step computed, not yet delivered to ``p.grad``."""

    engine: str
    plan: Plan | None
    weighed: Weighed
    gradients: Gradients


Compute = Callable[[Task, Snapshot, str | None], Computed]
"""A step, by the engine of the given name if there is one."""


class Captures:
    """The graphs of one reweighter.

    A copy of it, or one from a pickle, has none: graphs belong to the model they were made with.
    """

    recorder: Callable[[torch.device], Recorder] = Recorder

    def __init__(self) -> None:
        self._kinds: dict[Key, _Kind] = {}
        self._recorders: dict[torch.device, Recorder] = {}

    def __reduce__(self) -> tuple[type[Captures], tuple[()]]:
        return (type(self), ())

    def step(self, task: Task, options: Key, compute: Compute) -> Computed:
        """A step: run as ever, watched, captured or replayed, by how many there were of its kind.

        ``options`` are those of the reweighter that a graph depends on. After an error the model,
        its buffers, its gradients and torch's generators are as before.

        Raises:
            NotCapturableError: it cannot be captured.
        """
        device = self._device(task)
        leaves = pytree.tree_leaves(_trees(task))
        _check_leaves(leaves, device)
        key = _key(task, leaves, options)
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) == _LARGEST_NUMBER_OF_KINDS:
                raise NotCapturableError(
                    f"this would be the {len(self._kinds) + 1}th kind of step, by shapes, modes "
                    "and what requires grad, and each has a graph of its own",
                    "pad the batches to fewer shapes, or ",
                )
            kind = self._kinds[key] = _Kind(task, self._recorders[device])
        return kind.step(task, compute)

    def line(self, task: Task, options: Key) -> str:
        """What a step on these batches would do, for ``explain()``."""
        kind = self._kinds.get(_key(task, pytree.tree_leaves(_trees(task)), options))
        return f"cuda_graph=True: {'the first step runs as it is' if kind is None else kind.says()}"

    def _device(self, task: Task) -> torch.device:
        """The one device of the parameters.

        Raises:
            NotCapturableError: it is none that has graphs, or there are several, or the model does
                in Python what a replay would leave out.
        """
        devices = sorted(task.members.devices(), key=str)
        (device, *others) = devices
        if others or not self._takes(device):
            named = " and ".join(map(str, devices))
            raise NotCapturableError(
                f"the parameters are on {named}", "move the model to one CUDA device, or "
            )
        for module in task.model.modules():
            if type(module).__name__ in _WRAPPERS:
                raise NotCapturableError(f"{type(module).__name__} works in Python in each step")
        for name, p in task.members.parameters:
            if type(p.data) is not Tensor:
                raise NotCapturableError(f"{name!r} is a {type(p.data).__name__}")
        return device

    def _takes(self, device: torch.device) -> bool:
        if device not in self._recorders:
            recorder = self.recorder(device)
            if not recorder.takes(device):
                return False
            self._recorders[device] = recorder
        return True


class _Kind:
    """Steps of one kind: the tensors that their batches are copied to, and their graph."""

    def __init__(self, task: Task, recorder: Recorder) -> None:
        self._recorder = recorder
        self._task = _static(task)
        """Of the last step that Python saw, on tensors of our own."""
        self._addresses: Key = ()
        self._engine: str | None = None
        self._plan: Plan | None = None
        self._rehearsed: Watch | None = None
        self._rehearsals = 0
        self._recording: Recording[Computed] | None = None
        self._memory: list[Any] = []
        self._changes = 0
        self._refused: tuple[str, str] | None = None

    def step(self, task: Task, compute: Compute) -> Computed:
        """See :meth:`Captures.step`."""
        if self._refused is not None:
            raise NotCapturableError(*self._refused)
        addresses = _addresses(task)
        if addresses != self._addresses:
            # What was captured works on memory that may be another's by now.
            self._forget()
            self._addresses = addresses
        if self._changes > _LARGEST_NUMBER_OF_CHANGES:
            raise NotCapturableError(
                f"parameters, buffers or plans of this kind of step changed {self._changes} times",
                "change them in place, or ",
            )
        self._recorder.join()
        _load(self._task, task)
        if self._plan is not None and self._plan.due():
            return self._unwatched(task, compute)
        if self._recording is not None:
            if self._plan is not None:
                self._plan.steps += 1
            return self._replayed(self._recording)
        if self._engine is None or (self._plan is not None and not self._plan.settled):
            return self._unwatched(task, compute)
        if self._rehearsals < REHEARSALS:
            return self._rehearse(task, compute)
        return self._replayed(self._capture(task, compute))

    def says(self) -> str:
        """What the next step does."""
        if self._refused is not None:
            return self._refused[0]
        if self._recording is not None:
            return "steps on these batches are replayed from a graph"
        if self._engine is None or (self._plan is not None and not self._plan.settled):
            return "steps on these batches run as they are until there is a lasting plan"
        return "steps on these batches are about to be captured"

    def _forget(self) -> None:
        self._changes += self._engine is not None
        self._engine, self._plan = None, None
        self._rehearsed, self._rehearsals = None, 0
        self._recording, self._memory = None, []

    def _follow(self, task: Task) -> Task:
        """The step of the user on tensors of our own, with its model as it is now."""
        own = self._task
        self._task = replace(
            task,
            inputs=own.inputs,
            targets=own.targets,
            clean_inputs=own.clean_inputs,
            clean_targets=own.clean_targets,
            loss_scale=own.loss_scale,
        )
        return self._task

    def _unwatched(self, task: Task, compute: Compute) -> Computed:
        """A step that makes or checks the engine's plan, for which it waits."""
        with preserved(task.members, always=False) as snapshot:
            computed = compute(self._follow(task), snapshot, None)
            _check_assigned(snapshot)
        found, before = computed.plan, self._plan
        same = computed.engine == self._engine and (
            found is before
            or (
                found is not None
                and before is not None
                and replace(found, steps=0) == replace(before, steps=0)
            )
        )
        if not same:
            self._forget()
        self._engine, self._plan = computed.engine, computed.plan
        return _finished(computed)

    def _rehearse(self, task: Task, compute: Compute) -> Computed:
        """A step that is run and watched."""

        def run() -> tuple[Computed, Watch]:
            computed, watch = self._watched(task, compute, recorded=False)
            return _finished(computed), watch

        computed, self._rehearsed = self._recorder.warm_up(run)
        self._rehearsals += 1
        self._plan = computed.plan
        self._recorder.share(_outputs(computed))
        return computed

    def _capture(self, task: Task, compute: Compute) -> Recording[Computed]:
        def run() -> Computed:
            computed, watch = self._watched(task, compute, recorded=True)
            # Replays read and write it wherever it is, whoever else has let it go.
            self._memory = list(watch.given.values())
            return _finished(computed)

        generators = Generators(set())  # of the host, which Python may have drawn from
        try:
            self._recording = self._recorder.record(run)
        except BaseException as error:
            generators.restore()
            if isinstance(error, NotCapturableError):
                self._refused = error.why
                raise
            if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
                raise
            line = str(error).partition("\n")[0]
            refused = NotCapturableError(f"the capture failed ({line})")
            self._refused = refused.why
            raise refused from error
        self._plan = self._recording.result.plan
        return self._recording

    def _watched(self, task: Task, compute: Compute, *, recorded: bool) -> tuple[Computed, Watch]:
        """The step as it is captured."""
        members = task.members
        (device,) = members.devices()
        with (
            Watch(device) as watch,
            preserved(members, always=False, recorded=recorded) as snapshot,
        ):
            computed = compute(replace(self._follow(task), recorded=True), snapshot, self._engine)
            watch.check()
            if self._rehearsed is not None:
                watch.check_same(self._rehearsed)
            _check_assigned(snapshot)
        return computed, watch

    def _replayed(self, recording: Recording[Computed]) -> Computed:
        """Copies of what a replay computes, which the next one leaves alone."""
        computed = recording.replay()
        found = _copies(_outputs(computed))
        gradients = [(p, found.pop(0)) for p, _ in computed.gradients]
        step = computed.weighed.step
        named: dict[str, Any] = dict(zip(_tensors_of(step), found, strict=True))
        step = replace(step, **named)
        weighed = replace(computed.weighed, step=step, excluded=step._excluded)
        return Computed(computed.engine, computed.plan, weighed, gradients)


def _check_assigned(snapshot: Snapshot) -> None:
    """Raise if the step gave a buffer another tensor, which a replay would not read."""
    name = snapshot.buffers.assigned()
    if name is not None:
        raise NotCapturableError(
            f"the forward assigns another tensor to the buffer {name!r}",
            "write to the buffer in place, or ",
        )


def _finished(computed: Computed) -> Computed:
    """With all that a step does to its gradients."""
    weighed = computed.weighed
    gradients = infinite_if(weighed.overflow, computed.gradients)
    return replace(computed, gradients=gradients, weighed=replace(weighed, overflow=None))


def _tensors_of(step: Any) -> dict[str, Tensor]:
    return {name: x for name, x in vars(step).items() if isinstance(x, Tensor)}


def _outputs(computed: Computed) -> list[Tensor]:
    """All that a step hands out: gradients, then the tensors of its result."""
    return [g for _, g in computed.gradients] + list(_tensors_of(computed.weighed.step).values())


def _copy(into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors, with one launch for many of a kind."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(into, sources, strict=True):
        targets, values = groups.setdefault(target.dtype, ([], []))
        targets.append(target)
        values.append(source)
    for targets, values in groups.values():
        torch._foreach_copy_(targets, values, non_blocking=True)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    found = [torch.empty_like(x) for x in tensors]
    _copy(found, tensors)
    return found


def _trees(task: Task) -> tuple[Any, ...]:
    """All that a step is given and that is another at the next."""
    return (task.inputs, task.targets, task.clean_inputs, task.clean_targets, task.loss_scale)


def _static(task: Task) -> Task:
    """The same step on tensors of our own; what is one tensor in two places stays so."""
    own: dict[int, Tensor] = {}

    def of(x: Any) -> Any:
        return own.setdefault(id(x), torch.empty_like(x)) if isinstance(x, Tensor) else x

    inputs, targets, clean_inputs, clean_targets, loss_scale = pytree.tree_map(of, _trees(task))
    return replace(
        task,
        inputs=inputs,
        targets=targets,
        clean_inputs=clean_inputs,
        clean_targets=clean_targets,
        loss_scale=loss_scale,
    )


def _load(own: Task, task: Task) -> None:
    """Copy a batch to where the graph reads it."""
    leaves = zip(pytree.tree_leaves(_trees(own)), pytree.tree_leaves(_trees(task)), strict=True)
    pairs = {id(x): (x, y) for x, y in leaves if isinstance(x, Tensor)}
    _copy([x for x, _ in pairs.values()], [y for _, y in pairs.values()])


def _check_leaves(leaves: Iterable[Any], device: torch.device) -> None:
    """Raise if a batch holds what cannot be copied to where a graph reads it."""
    for x in leaves:
        if isinstance(x, Tensor):
            if x.device != device:
                raise NotCapturableError(
                    f"a tensor of the batches is on {x.device}", f"move it to {device}, or "
                )
            if type(x) is not Tensor or x.layout != torch.strided:
                raise NotCapturableError(
                    f"the batches hold a {type(x).__name__} of layout {x.layout}",
                    "give dense tensors, or ",
                )
        elif not (x is None or isinstance(x, (bool, int, float, str))):
            raise NotCapturableError(
                f"the batches hold a {type(x).__name__}", "give tensors, numbers and strings, or "
            )


def _key(task: Task, leaves: Sequence[Any], options: Key) -> Key:
    """What tells one kind of step from another."""
    places: dict[int, int] = {}
    described: list[Key] = []
    for x in leaves:
        if isinstance(x, Tensor):
            place = places.setdefault(id(x), len(places))
            described.append((x.shape, x.dtype, x.stride(), place))
        else:
            described.append((type(x), repr(x)))
    return (
        tuple(described),
        str(pytree.tree_structure(_trees(task))),
        tuple([(name, p.requires_grad) for name, p in task.members.parameters]),
        task.members.training,
        id(task.loss_fn),
        id(task.clean_loss_fn),
        task.low_memory,
        task.autocast.key,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        options,
    )


def _addresses(task: Task) -> Key:
    """Where the parameters and buffers are, and how they lie there."""
    tensors: list[Any] = [p for _, p in task.members.parameters]
    tensors += [buffer for *_, buffer in task.members.buffers]
    return tuple(
        [None if x is None else (id(x), x.data_ptr(), x.shape, x.stride()) for x in tensors]
    )
