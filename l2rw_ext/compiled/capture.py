"""Steps that are captured in a CUDA graph and replayed, one graph for each kind of step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from l2rw_ext.engines.plan import Plan
from l2rw_ext.engines.proof import due
from l2rw_ext.errors import NotCapturableError
from l2rw_ext.step.accumulation import filled_if
from l2rw_ext.step.weighing import Computed
from l2rw_ext.task.isolation import Generators, Snapshot, preserved
from l2rw_ext.task.task import Task

from .recording import Recorder, Recording
from .watch import Watch

Key = tuple[Any, ...]

REHEARSALS = 2
"""Watched steps between the first plan and the capture."""

_LARGEST_NUMBER_OF_KINDS = 16
_LARGEST_NUMBER_OF_CHANGES = 8
"""Of one kind of step, whose parameters or buffers may be exchanged now and then."""

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")
"""Modules whose forward prepares, in Python, what hooks on the gradient then do."""


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
        """A step, run as it is, watched, captured or replayed, by how many there were of its kind.

        ``options`` are those of the reweighter that a graph depends on. After an error the model,
        its buffers, its gradients and torch's generators are as before.

        Raises:
            NotCapturableError: it cannot be captured.
        """
        device = self._device(task)
        batches = _Batches.of(task)
        batches.check(device)
        key = _key(task, batches, options)
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) == _LARGEST_NUMBER_OF_KINDS:
                raise NotCapturableError(
                    f"this would be the {len(self._kinds) + 1}th kind of step, by shapes, modes "
                    "and what requires grad, and each has a graph of its own",
                    "pad the batches to fewer shapes, or ",
                )
            kind = self._kinds[key] = _Kind(batches, self._recorders[device])
        return kind.step(task, batches, compute)

    def line(self, task: Task, options: Key) -> str:
        """What a step on these batches would do, for ``explain()``."""
        kind = self._kinds.get(_key(task, _Batches.of(task), options))
        return f"cuda_graph=True: {'the first step runs as it is' if kind is None else kind.says()}"

    def _device(self, task: Task) -> torch.device:
        """The one device of the parameters.

        Raises:
            NotCapturableError: it is none that has graphs, or there are several.
        """
        devices = sorted(task.members.devices(), key=str)
        (device, *others) = devices
        if others or not self._takes(device):
            named = " and ".join(map(str, devices))
            raise NotCapturableError(
                f"the parameters are on {named}", "move the model to one CUDA device, or "
            )
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

    def __init__(self, batches: _Batches, recorder: Recorder) -> None:
        self._recorder = recorder
        self._own = batches.copied()
        self._task: Task | None = None
        """Of the last step in Python: what the key names by identity stays alive."""
        self._addresses: Key = ()
        self._engine: str | None = None
        self._plan: Plan | None = None
        self._rehearsed: Watch | None = None
        self._rehearsals = 0
        self._steps = 0
        self._again = False
        """Whether a step is to be watched although there is a graph."""
        self._recording: Recording[Computed] | None = None
        self._memory: list[Any] = []
        self._changes = 0
        self._refused: tuple[str, str] | None = None

    def step(self, task: Task, batches: _Batches, compute: Compute) -> Computed:
        """See :meth:`Captures.step`."""
        if self._refused is not None:
            raise NotCapturableError(*self._refused)
        addresses = _addresses(task)
        if addresses != self._addresses:
            # What was captured works on memory that may be another's by now.
            self._changes += self._engine is not None
            self._forget()
            _check_model(task)
            self._addresses = addresses
        if self._changes > _LARGEST_NUMBER_OF_CHANGES:
            raise NotCapturableError(
                f"parameters, buffers or plans of this kind of step changed {self._changes} times",
                "change them in place, or ",
            )
        self._recorder.join()
        self._own.load(batches)
        self._again = self._again or (self._recording is not None and due(self._steps))
        probes = self._plan is not None and due(self._steps)
        self._steps += 1
        if self._recording is not None and not (probes or self._again):
            return self._replayed(self._recording)
        task = self._task = self._own.in_place_of(task)
        if probes or self._engine is None:
            return self._unwatched(task, compute)
        if self._again or self._rehearsals < REHEARSALS:
            return self._rehearse(task, compute)
        return self._replayed(self._capture(task, compute))

    def says(self) -> str:
        """What the next step does."""
        if self._refused is not None:
            return self._refused[0]
        if self._recording is not None:
            return "steps on these batches are replayed from a graph"
        if self._engine is None:
            return "the next step on these batches runs as it is"
        return "steps on these batches are about to be captured"

    def _forget(self) -> None:
        self._engine, self._plan = None, None
        self._rehearsed, self._rehearsals, self._again = None, 0, False
        self._recording, self._memory = None, []

    def _unwatched(self, task: Task, compute: Compute) -> Computed:
        """A step that makes or checks the engine's plan, for which it waits."""
        with preserved(task.members, always=False) as snapshot:
            computed = compute(task, snapshot, None)
            _check_assigned(snapshot)
        found, before = computed.plan, self._plan
        if computed.step.engine != self._engine or found != before:
            self._changes += self._recording is not None
            self._forget()
        self._engine, self._plan = computed.step.engine, computed.plan
        return _finished(computed)

    def _rehearse(self, task: Task, compute: Compute) -> Computed:
        """A step that is run and watched."""

        def run() -> tuple[Computed, Watch]:
            computed, watch = self._watched(task, compute, recorded=False)
            return _finished(computed), watch

        computed, self._rehearsed = self._recorder.warm_up(run)
        self._rehearsals += 1
        self._again = False
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
            preserved(members, always=False, captured=recorded) as snapshot,
        ):
            computed = compute(replace(task, captured=True), snapshot, self._engine)
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
        named: dict[str, Any] = dict(zip(_tensors_of(computed.step), found, strict=True))
        return replace(computed, step=replace(computed.step, **named), gradients=gradients)


def _check_assigned(snapshot: Snapshot) -> None:
    """Raise if a forward gave a name another tensor, which a replay would not read."""
    name = snapshot.state.assigned()
    if name is not None:
        raise NotCapturableError(
            f"the forward assigns another tensor to {name!r}",
            "write to it in place, or ",
        )


def _finished(computed: Computed) -> Computed:
    """With all that a step does to its gradients."""
    gradients = filled_if(computed.overflow, computed.gradients, float("inf"))
    return replace(computed, gradients=gradients, overflow=None)


def _tensors_of(step: Any) -> dict[str, Tensor]:
    return {name: x for name, x in vars(step).items() if isinstance(x, Tensor)}


def _outputs(computed: Computed) -> list[Tensor]:
    """All that a step hands out: gradients, then the tensors of its result."""
    return [g for _, g in computed.gradients] + list(_tensors_of(computed.step).values())


def _copy(into: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors, with one launch for many of a floating dtype."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(into, sources, strict=True):
        if not target.is_floating_point():
            target.copy_(source, non_blocking=True)
            continue
        targets, values = groups.setdefault(target.dtype, ([], []))
        targets.append(target)
        values.append(source)
    for targets, values in groups.values():
        torch._foreach_copy_(targets, values, non_blocking=True)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    found = [torch.empty_like(x) for x in tensors]
    _copy(found, tensors)
    return found


@dataclass(frozen=True)
class _Batches:
    """All that a step is given and that is another at the next, flattened."""

    leaves: list[Any]
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, task: Task) -> _Batches:
        """Both batches and the loss scale."""
        given = (task.inputs, task.targets, task.clean_inputs, task.clean_targets, task.loss_scale)
        return cls(*pytree.tree_flatten(given))

    def check(self, device: torch.device) -> None:
        """Raise if there is something that cannot be copied to where a graph reads it.

        Raises:
            NotCapturableError: names it.
        """
        for x in self.leaves:
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
                    f"the batches hold a {type(x).__name__}",
                    "give tensors, numbers and strings, or ",
                )

    def copied(self) -> _Batches:
        """Tensors of our own, as many; what is one tensor in two places stays so."""
        own: dict[int, Tensor] = {}
        leaves = [
            own.setdefault(id(x), torch.empty_like(x)) if isinstance(x, Tensor) else x
            for x in self.leaves
        ]
        return _Batches(leaves, self.structure)

    def load(self, batches: _Batches) -> None:
        """Copy the values of others here."""
        pairs = {
            id(own): (own, x)
            for own, x in zip(self.leaves, batches.leaves, strict=True)
            if isinstance(own, Tensor)
        }
        _copy([own for own, _ in pairs.values()], [x for _, x in pairs.values()])

    def in_place_of(self, task: Task) -> Task:
        """The step on these."""
        inputs, targets, clean_inputs, clean_targets, loss_scale = pytree.tree_unflatten(
            self.leaves, self.structure
        )
        return replace(
            task,
            inputs=inputs,
            targets=targets,
            clean_inputs=clean_inputs,
            clean_targets=clean_targets,
            loss_scale=loss_scale,
        )


def _check_model(task: Task) -> None:
    """Raise for a model that does in Python what a replay would leave out.

    Raises:
        NotCapturableError: names the part.
    """
    for _, module in task.members.modules:
        if type(module).__name__ in _WRAPPERS:
            raise NotCapturableError(f"{type(module).__name__} works in Python in each step")
    for name, p in task.members.parameters:
        if type(p.data) is not Tensor:
            raise NotCapturableError(f"{name!r} is a {type(p.data).__name__}")


def _key(task: Task, batches: _Batches, options: Key) -> Key:
    """What tells one kind of step from another."""
    places: dict[int, int] = {}
    described: list[Key] = []
    for x in batches.leaves:
        if isinstance(x, Tensor):
            place = places.setdefault(id(x), len(places))
            described.append((x.shape, x.dtype, x.stride(), place))
        else:
            described.append((type(x), repr(x)))
    return (
        tuple(described),
        str(batches.structure),
        (task.n, task.m),
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
