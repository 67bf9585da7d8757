"""What of a step can be a graph: the whole step, its weights alone, the clean batch's direction."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from l2rw_ext.engines.plan import Plan
from l2rw_ext.step.weighing import Computed, Rules, Step, settle
from l2rw_ext.task.isolation import Snapshot, preserved
from l2rw_ext.task.task import Direction, Task, clean_direction
from l2rw_ext.weighing import own_function

from .steps import Named, Work

Compute = Callable[[Task, Snapshot, str | None], Computed]
"""A step by the engine of the given name, if there is one."""

Gradients = tuple[Tensor, Tensor | None, list[tuple[nn.Parameter, Tensor]]]
"""The mean clean loss, of how many losses it is that, and the gradient of each parameter that it
depends on."""


def whole_step(
    task: Task,
    compute: Compute,
    given: Sequence[Tensor],
    key: Hashable,
    unread: Any,
    rules: Rules,
    *,
    dry: bool,
    partial: bool,
) -> Work[Computed]:
    """Scores, weights and, unless ``dry``, weighted gradients and new values of buffers.

    Args:
        task: the step.
        compute: does it.
        given: what it reads besides the batches and the model.
        key: what the graph depends on besides the arguments here.
        unread: the part of the batches that it does not read.
        rules: how scores become weights.
        dry: whether only the weights are wanted, and nothing is to change.
        partial: whether other ranks have scores too, so that these alone decide nothing.
    """
    given, scaled = _with_scale(task, given)

    def eager() -> Computed:
        with preserved(task.members, always=dry) as snapshot:
            return compute(task, snapshot, None)

    def traced(on: Task, snapshot: Snapshot, engine: str) -> Computed:
        computed = compute(on, snapshot, engine)
        own = {id(p): q for p, q in zip(on.parameters, task.parameters, strict=True)}
        computed.gradients = [(own[id(p)], g) for p, g in computed.gradients]
        return computed

    def rebuilt(
        about: tuple[str, Plan | None], parameters: list[nn.Parameter], tensors: list[Any]
    ) -> Computed:
        engine, plan = about
        weights, scores, losses, clean_loss, *flags = tensors[: len(tensors) - len(parameters)]
        excluded, contaminated, invalid, mask, empty, overflow = flags
        gradients = tensors[len(tensors) - len(parameters) :]
        step = Step(
            weights,
            scores,
            losses,
            engine,
            clean_loss,
            excluded,
            contaminated,
            invalid,
            mask,
            empty,
            rules.weighing,
        )
        pairs = list(zip(parameters, gradients, strict=True))
        computed = Computed(step, None, overflow=overflow, gradients=pairs, plan=plan)
        if not partial:
            settle(computed, rules)
        return computed

    def tensors(computed: Computed) -> Named:
        step = computed.step
        return [
            ("its weights", step.weights),
            ("its scores", step.scores),
            ("its losses", step.losses),
            ("its clean loss", step._clean_loss),
            ("which examples it excludes", step._excluded),
            ("whether it has contaminated gradients", step._contaminated),
            ("whether its weights are invalid", step._invalid),
            ("its mask", step.mask),
            ("whether it is degenerate", step._empty),
            ("whether it overflows", computed.overflow),
            *_named("its gradient", computed.gradients, task),
        ]

    own = own_function(rules.weighing)  # which the guards follow
    return Work(
        key=(
            "the weights" if dry else "the whole step",
            rules.on_degenerate,
            rules.check_finite,
            rules.weighing if own is None else type(rules.weighing),
            task.low_memory,
            scaled,
            partial,
            _said(task),
            key,
        ),
        given=given,
        eager=eager,
        engine=lambda computed: computed.step.engine,
        traced=traced,
        tensors=tensors,
        parameters=lambda computed: [p for p, _ in computed.gradients],
        about=lambda computed: (computed.step.engine, computed.plan),
        rebuilt=rebuilt,
        unread=unread,
        updates=not dry,
    )


def direction_of_clean_batch(task: Task, snapshot: Snapshot) -> Work[Gradients]:
    """The direction v and the mean clean loss; nothing changes."""
    given, scaled = _with_scale(task, ())

    def compute(on: Task, snapshot: Snapshot) -> Gradients:
        found = clean_direction(on, snapshot)
        pairs = zip(task.parameters, on.parameters, strict=True)
        values = [(p, found.values[id(q)]) for p, q in pairs if id(q) in found.values]
        return found.clean_loss, found.count, values

    return Work(
        key=("the direction", scaled, _said(task)),
        given=given,
        eager=lambda: compute(task, snapshot),
        engine=lambda _: "",
        traced=lambda on, snapshot, _: compute(on, snapshot),
        tensors=lambda found: [
            ("its clean loss", found[0]),
            ("its number of losses", found[1]),
            *_named("its direction", found[2], task),
        ],
        parameters=lambda found: [p for p, _ in found[2]],
        about=lambda _: None,
        rebuilt=lambda _, parameters, tensors: (
            *tensors[:2],
            list(zip(parameters, tensors[2:], strict=True)),
        ),
        unread=(task.inputs, task.targets),
        updates=False,
    )


def as_direction(found: Gradients) -> Direction:
    """The direction as engines take it."""
    clean_loss, count, values = found
    return Direction({id(p): v for p, v in values}, clean_loss, count)


def _said(task: Task) -> tuple[int, int]:
    """What the caller says of the sizes, so that a step of which it is not true is no other's."""
    return task.size.excess, 0 if task.clean_size is None else task.clean_size.excess


def _with_scale(task: Task, given: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    scale = task.loss_scale
    return [*given, *([] if scale is None else [scale])], scale is not None


def _named(what: str, pairs: Sequence[tuple[nn.Parameter, Tensor | None]], task: Task) -> Named:
    names = {id(p): name for name, p in task.members.parameters}
    return [(f"{what} of {names[id(p)]!r}", x) for p, x in pairs]
