"""The plan of a layer-wise step: which form each use takes, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from l2rw_ext.distributed.exchange import CLEAN_LOSS, Agreed, Message
from l2rw_ext.distributed.sums import dtype_of_sums
from l2rw_ext.layers.base import RowMap, Use
from l2rw_ext.layers.costs import Cost, Size
from l2rw_ext.ops.arithmetic import accumulation_dtype
from l2rw_ext.task.task import Task
from l2rw_ext.tracing.graph import sources


@dataclass
class UsePlan:
    """The part of a plan that concerns one use."""

    name: str
    rows: RowMap | None
    """Which rows belong to which example; None if the gradient of a probed step is zero."""
    form: str
    joint: bool
    """Whether its direction must exist before it is scored, so that the factored form is ruled out.

    That is so if its parameters are shared or derived, and in a step of two passes.
    """
    costs: dict[str, Cost]
    operation: str
    shape: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    """By which its part of the direction is exchanged between ranks. Uses that share a parameter
    have one message for it, which the first of them lists."""

    @property
    def sent(self) -> str:
        """How it comes from the other ranks of a merged step; "" if nothing of it is sent."""
        if self.joint:
            return "reduced at the end"
        return "".join("gathered" if x.gathered else "reduced" for x in self.messages)


@dataclass
class Plan:
    """What a first step has found out about forwards of one structure."""

    merged: bool
    certain: bool
    """Whether the row maps hold whatever the values are; else each step is probed."""
    reason: str
    """Why they hold, or what in the forward leaves it open."""
    why_separate: str = ""
    uses: list[UsePlan] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    """What the ranks exchange in a merged backward, in the order that all keep."""
    shared: tuple[Any, Plan] | None = None
    """The plan with messages that the ranks followed last, after what they had agreed on."""


def choose_form(
    use: Use, size: Size, *, without: tuple[str, ...] = ()
) -> tuple[str, dict[str, Cost]]:
    """The cheapest form that keeps no more memory than z and g take, and the costs of all forms."""
    costs = use.layer.costs(use, size)
    budget = costs["dense"].kept_bytes if "dense" in costs else float("inf")
    possible = {
        form: cost
        for form, cost in costs.items()
        if cost.kept_bytes <= budget and form not in without
    }
    return min(possible, key=lambda form: possible[form].seconds), costs


def between_ranks(plan: Plan, uses: Sequence[Use], task: Task, agreed: Agreed) -> Plan:
    """The plan of a merged step in which ranks exchange the direction.

    The messages depend on nothing but what the ranks have agreed on. They are in the order in which
    autograd reports the uses, the last of the forward first. Parameters that are shared or derived
    follow, whose direction is known at the end.

    Args:
        plan: the plan that this rank has made for its two batches.
        uses: its uses.
        task: the step.
        agreed: what the ranks have agreed on.
    """
    parameters, ranks = task.parameters, len(agreed.m)
    first = parameters[0]
    loss = Message(CLEAN_LOSS, 1, accumulation_dtype(first.dtype), first.device, ranks)
    places = {id(p): place for place, p in enumerate(parameters)}
    shared: dict[int, Message] = {}
    planned = []
    for own, use in zip(plan.uses, uses, strict=True):
        if own.joint:
            found = {places[key] for root in use.roots if root is not None for key in sources(root)}
            new = sorted(found - shared.keys())
            for place in new:
                p = parameters[place]
                key = "parameter", place
                shared[place] = Message(key, p.numel(), dtype_of_sums(p), p.device, ranks)
            planned.append(replace(own, messages=tuple(shared[place] for place in new)))
        else:
            planned.append(
                own if own.rows is None else _exchanged(own, own.rows, use, task, agreed)
            )
    alone = (x for own in reversed(planned) if not own.joint for x in own.messages)
    messages = [loss, *alone, *(shared[place] for place in sorted(shared))]
    return replace(plan, uses=planned, messages=messages)


def _exchanged(own: UsePlan, rows: RowMap, use: Use, task: Task, agreed: Agreed) -> UsePlan:
    """The plan of a use whose direction depends on no other use.

    Clean rows are gathered if they make the factored form the cheapest, by the largest number of
    examples of a rank, and are fewer bytes than the direction.
    """
    positions, m = rows.positions, sum(agreed.m)
    roots = [root for root in use.roots if root is not None]
    summed = Message(
        ("use", use.index),
        sum(root.numel() for root in roots),
        accumulation_dtype(roots[0].dtype),
        roots[0].device,
        len(agreed.m),
    )
    if agreed.alike and choose_form(use, Size(agreed.n, m, positions, positions))[0] == "factored":
        assert use.weight is not None
        numel = max(agreed.m) * positions * sum(use.weight.shape)
        gathered = replace(summed, numel=numel, dtype=use.weight.dtype, gathered=True)
        if gathered.bytes < summed.bytes:
            costs = use.layer.costs(use, Size(task.n, m, positions, positions))
            return replace(own, form="factored", costs=costs, messages=(gathered,))
    size = Size(task.n, task.m, positions, positions)
    form, costs = choose_form(use, size, without=("factored",))
    return replace(own, form=form, costs=costs, messages=(summed,))
