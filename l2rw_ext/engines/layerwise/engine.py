"""Eq. 12 layer by layer: one first-order backward, no second pass for the weighted gradient."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext import devices
from l2rw_ext.data.batch import describe, merge, split
from l2rw_ext.engines.base import Engine, Scored
from l2rw_ext.engines.explanation import Explanation
from l2rw_ext.engines.plan import Plan, UsePlan, choose_form
from l2rw_ext.errors import NotCapturableError, NotExactError
from l2rw_ext.layers.base import Use
from l2rw_ext.layers.broadcast import BROADCAST, FACTORS
from l2rw_ext.layers.costs import Size
from l2rw_ext.layers.torch_functions import inside
from l2rw_ext.task.checkpointing import SERVES_ONCE, serves_once
from l2rw_ext.task.isolation import Buffers, Snapshot
from l2rw_ext.task.task import Direction, Task, clean_direction, require_grad
from l2rw_ext.tracing.graph import check_graph, sources
from l2rw_ext.tracing.interception import Interception
from l2rw_ext.tracing.members import Members

from .derived import Leaves
from .merging import NotMergeableError, check_mergeable
from .probe import Probe, seeds
from .scoring import OverflowedError, Scoring, StalePlanError

Key = tuple[Any, ...]


class Layerwise(Engine):
    """Sums per-layer products; exact if each loss depends only on its own rows.

    The engine checks this and does not assume it: see ``tracing.graph.check_graph`` and ``probe``.
    The first step on batches of given shapes stores its findings in a plan, which is checked again
    at steps 16, 256, ...
    """

    name = "layerwise"

    def __init__(self) -> None:
        self._plans: dict[Key, Plan] = {}
        self._refused: dict[Key, str] = {}
        self._by_row: set[Key] = set()
        self._separate: dict[Key, str] = {}

    def score(self, task: Task, snapshot: Snapshot, direction: Direction | None = None) -> Scored:
        """See :class:`~l2rw_ext.engines.base.Engine`."""
        try:
            scoring, _ = self._planned(task, snapshot, direction, fresh=False)
        except OverflowedError as error:
            error.scoring.overflow()
            return error.scoring
        return scoring

    def explain(
        self, task: Task, snapshot: Snapshot, direction: Direction | None = None
    ) -> Explanation:
        """A new plan for this model and these batches."""
        _, plan = self._planned(task, snapshot, direction, fresh=True)
        return Explanation.layerwise(task, plan)

    def _planned(
        self, task: Task, snapshot: Snapshot, direction: Direction | None, *, fresh: bool
    ) -> tuple[Scoring, Plan]:
        key = _key(task, direction is not None)
        if key in self._refused:
            raise NotExactError(self._refused[key])
        try:
            try:
                return self._attempt(task, snapshot, direction, key, fresh)
            except StalePlanError:
                snapshot.restore()
                return self._attempt(task, snapshot, direction, key, True)
        except NotExactError as error:
            if key not in self._by_row:
                # Perhaps a tensor made without data has a row for each example.
                self._by_row.add(key)
                snapshot.restore()
                with contextlib.suppress(NotExactError):
                    return self._planned(task, snapshot, direction, fresh=True)
            self._refused[key] = str(error)
            raise

    def _attempt(
        self, task: Task, snapshot: Snapshot, direction: Direction | None, key: Key, fresh: bool
    ) -> tuple[Scoring, Plan]:
        if direction is not None:
            given = "the direction is given, not the clean batch's own"
            return self._two_passes(task, snapshot, direction, key, given, fresh)
        why = self._separate.get(key)
        if why is None:
            permanent = not devices.readable(task.parameters[0])  # another try waits
            known_batched = key in self._plans
            inputs = merge(
                task.inputs, task.clean_inputs, task.n, task.m, known_batched=known_batched
            )
            if inputs is not None:
                try:
                    return self._merged(task, snapshot, inputs, key, fresh)
                except NotMergeableError as reason:
                    snapshot.restore()
                    why = str(reason)
                    permanent = permanent or reason.permanent
            else:
                why = "the inputs of the two batches do not agree in shape"
            if permanent:
                self._separate[key] = why
        return self._two_passes(task, snapshot, None, key, why, fresh)

    def _merged(
        self, task: Task, snapshot: Snapshot, inputs: Any, key: Key, fresh: bool
    ) -> tuple[Scoring, Plan]:
        """One forward and one data-only backward over [train; clean]."""
        leaves = Leaves(task.parameters)
        scoring = Scoring(task, leaves)
        interception = self._interception(task.members, scoring, key, task.n + task.m)
        losses, clean_losses = _merged_losses(task, inputs, interception)
        plan = None if fresh else self._plans.get(key)
        if plan is None or plan.due() or plan.calls != interception.calls:
            _check_not_captured(task, interception)
            precision = _precision(interception, losses)
            check_mergeable(task, snapshot, inputs, losses, clean_losses, precision)
        trained, reached = _reached(interception, [losses, clean_losses])
        require_grad(losses)
        scoring.start(losses, clean_losses.detach().mean(), reached, trained)
        seeded = [
            (losses, task.scaled(_finite_seed(losses))),
            (clean_losses, task.scaled(torch.full_like(clean_losses, 1 / task.m))),
        ]
        plan = self._backward(task, interception, scoring, seeded, plan, leaves, merged=True)
        self._plans[key] = plan
        return scoring, plan

    def _two_passes(
        self,
        task: Task,
        snapshot: Snapshot,
        direction: Direction | None,
        key: Key,
        why: str,
        fresh: bool,
    ) -> tuple[Scoring, Plan]:
        """A pass of the clean batch, which gives the direction, and one of the training batch."""
        # Without the clean batch in the key there is one plan for each length, not each pair.
        own = (_key(task, True) if direction is None else key, key in self._by_row)
        if direction is None:
            direction = clean_direction(task, snapshot)
        leaves = Leaves(task.parameters)
        scoring = Scoring(task, leaves, direction.values)
        interception = self._interception(task.members, scoring, key, task.n)
        interception.part = "train"
        with interception:
            losses = task.forward_train()
        if interception.saved_tensor_hooks:
            snapshot.trained = Buffers.of(task.model)
        (reached,) = _reached(interception, [losses])
        require_grad(losses)
        scoring.start(losses, direction.clean_loss, reached, reached)
        seeded = [(losses, task.scaled(_finite_seed(losses)))]
        plan = None if fresh else self._plans.get(own)
        plan = self._backward(task, interception, scoring, seeded, plan, leaves, merged=False)
        plan.why_separate = why
        self._plans[own] = plan
        return scoring, plan

    def _interception(
        self, members: Members, sink: Scoring, key: Key, examples: int
    ) -> Interception:
        return Interception(members, sink, examples if key in self._by_row else None)

    def _backward(
        self,
        task: Task,
        interception: Interception,
        scoring: Scoring,
        seeded: list[tuple[Tensor, Tensor]],
        plan: Plan | None,
        leaves: Leaves,
        *,
        merged: bool,
    ) -> Plan:
        """Run the backward under a plan; if no plan fits, make one first."""
        reached = scoring.reached
        signatures = [_signature(use, interception) for use in reached]
        if plan is None or not (
            plan.certain
            and interception.data_dependent is None
            and not plan.due()
            and plan.calls == interception.calls
            and [use.signature for use in plan.uses] == signatures
        ):
            plan = self._probed(task, interception, scoring, seeded, plan, leaves, merged=merged)
        plan.steps += 1
        scoring.follow(plan)
        _run_backward(interception, seeded, retain=task.low_memory)
        _check_reported(scoring, reached)
        scoring.finish()
        if task.low_memory:
            losses = seeded[0][0]
            scoring.again = lambda seed: _run_backward(interception, [(losses, seed)], retain=False)
        return plan

    def _probed(
        self,
        task: Task,
        interception: Interception,
        scoring: Scoring,
        seeded: list[tuple[Tensor, Tensor]],
        before: Plan | None,
        leaves: Leaves,
        *,
        merged: bool,
    ) -> Plan:
        """Make a plan from two more backwards over the same graph."""
        _check_not_captured(task, interception)
        _check_wrappers(task.model)
        reached = scoring.reached
        probe = scoring.probe = Probe(narrow=interception.narrow)
        _run_backward(interception, seeded, retain=True)
        finite = probe.finite or not bool(scoring.losses.isfinite().all())
        if task.loss_scale is not None and not finite:
            raise OverflowedError(scoring)
        _run_backward(interception, _with_seeds(seeded, probe), retain=True)
        scoring.probe = None
        certain = probe.certain and interception.data_dependent is None
        certain = certain and not any(_multiplies_by_zero(use) for use in reached)
        certain = certain and not interception.zero_scalars()
        plan = Plan(merged, certain=certain, steps=0 if before is None else before.steps)
        plan.calls = interception.calls
        plan.data_dependent = interception.data_dependent
        counts: dict[int, int] = {}
        for use in reached:
            for root in use.roots:
                for source in () if root is None else sources(root):
                    counts[source] = counts.get(source, 0) + 1
        for use in reached:
            plan.uses.append(_plan_use(use, probe, interception, leaves, counts, task))
        if not devices.readable(scoring.losses) and any(use.rows is None for use in plan.uses):
            # A gradient that was zero may change, and only another probe shows that.
            plan.certain = False
        return plan


def _key(task: Task, given: bool) -> Key:
    """What a plan depends on, apart from the operations that it records.

    If the direction is ``given``, the key does not contain the clean batch.
    """
    return (
        task.n,
        None if given else task.m,
        describe(task.inputs),
        None if given else describe(task.clean_inputs),
        task.members.training,
        tuple(map(id, task.parameters)),
        id(task.loss_fn),
        id(task.clean_loss_fn),
        task.autocast.key,
    )


def _check_wrappers(model: nn.Module) -> None:
    """Raise for a wrapper that searches the graph of the outputs for parameters.

    It finds none, because uses hide them, and considers all of them unused.
    """
    for module in model.modules():
        finds = getattr(module, "find_unused_parameters", False)
        if finds and type(module).__name__ == "DistributedDataParallel":
            raise NotExactError(
                "DistributedDataParallel cannot find unused parameters in a layer-wise step; leave "
                "find_unused_parameters off"
            )


def _check_not_captured(task: Task, interception: Interception) -> None:
    """Raise if the engine would have to read values of a step that is captured.

    Raises:
        NotCapturableError: it would.
    """
    if not task.captured:
        return
    if interception.data_dependent is None:
        raise NotCapturableError(
            "the engine must look at this step, for the model calls other functions than before",
            "let the model do the same in each step, or ",
        )
    raise NotCapturableError(
        "values of the data decide what the model computes "
        f"({interception.data_dependent}), and the engine must look at each step",
        "replace the operation, or ",
    )


def _multiplies_by_zero(use: Use) -> bool:
    """Whether a trained factor is zero, as that of a residual branch often is at first.

    The tensor that it multiplies has no gradient in this step, but may have one in the next.
    """
    root = use.roots[0]
    if root is None or (use.rule is BROADCAST and use.operation not in FACTORS):
        return False
    return not bool(root.any())


def _signature(use: Use, interception: Interception) -> tuple[Any, ...]:
    names = interception.names
    return (
        use.operation,
        use.part,
        use.shape,
        *(None if r is None else names.get(id(r)) or (r.shape, sources(r)) for r in use.roots),
    )


def _plan_use(
    use: Use,
    probe: Probe,
    interception: Interception,
    leaves: Leaves,
    counts: dict[int, int],
    task: Task,
) -> UsePlan:
    roots = [root for root in use.roots if root is not None]
    joint = use.part != "merged" or any(r not in leaves or counts[id(r)] > 1 for r in roots)
    rows = probe.maps.get(use.index)
    positions = 1 if rows is None else rows.positions
    size = Size(task.n, task.m, positions, positions)
    form, costs = choose_form(use, size, without=("factored",) if joint else ())
    names = dict.fromkeys(interception.name_of(root) for root in roots)
    signature = _signature(use, interception)
    return UsePlan(", ".join(names), signature, rows, form, joint, costs, use.operation, use.shape)


def _merged_losses(task: Task, inputs: Any, interception: Interception) -> tuple[Tensor, Tensor]:
    """Training and clean losses of one forward.

    Raises:
        NotMergeableError: the model or a loss function cannot work on the merged batch, or the
            values of the data decide what is computed. (An error that is the model's own comes
            back from the two passes.)
    """
    interception.part = "merged"
    try:
        with interception:
            outputs = task.forward(inputs)
        if interception.data_dependent is not None:
            raise NotMergeableError(f"values of the data decide ({interception.data_dependent})")
        parts = split(outputs, task.n, task.m)
        if parts is None:
            raise NotMergeableError("an output has no dimension 0 that counts examples")
        with interception:
            interception.part = "train"
            losses = task.losses(parts[0])
            interception.part = "clean"
            clean_losses = task.clean_losses(parts[1])
    except (NotCapturableError, NotExactError, NotMergeableError):
        raise
    except Exception as error:
        raise NotMergeableError(
            f"{type(error).__name__} on the merged batch", permanent=False
        ) from error
    return losses, clean_losses


def _precision(interception: Interception, losses: Tensor) -> float:
    """The largest machine epsilon among the dtypes of the losses and of the uses."""
    operands = [x for use in interception.uses for x in (use.weight, use.bias) if x is not None]
    return max(torch.finfo(dtype).eps for dtype in {x.dtype for x in (losses, *operands)})


def _reached(interception: Interception, losses: list[Tensor]) -> list[list[Use]]:
    """For each k, the uses that the first k losses reach, in the order of their calls."""
    return [
        [use for use in interception.uses if use.index in indices]
        for indices in check_graph(interception, losses)
    ]


def _finite_seed(losses: Tensor) -> Tensor:
    """The seed of a backward: one for each finite loss, zero for the others, which are left out."""
    values = losses.detach()
    if devices.readable(values) and math.isfinite(values.sum().item()):
        return torch.ones_like(values)
    return values.isfinite().to(values.dtype)


def _run_backward(
    interception: Interception, seeded: list[tuple[Tensor, Tensor]], *, retain: bool
) -> None:
    outputs = [(x, seed) for x, seed in seeded if x.requires_grad]

    arguments = (
        [x for x, _ in outputs],
        [interception.token],
        [seed for _, seed in outputs],
        retain,
    )
    if interception.saved_tensor_hooks:
        try:
            with interception.recompute():
                inside(torch.autograd.grad)(*arguments, allow_unused=True)
        except (AttributeError, RuntimeError) as error:
            if serves_once(error):
                raise NotExactError(SERVES_ONCE) from error
            raise
    else:
        torch.autograd.grad(*arguments, allow_unused=True)


def _check_reported(scoring: Scoring, reached: list[Use]) -> None:
    for use in reached:
        if use.index not in scoring.reported:
            raise NotExactError(
                f"the backward did not pass through {use.operation} on {use.shape}, which the "
                "losses reach"
            )


def _with_seeds(seeded: list[tuple[Tensor, Tensor]], probe: Probe) -> list[tuple[Tensor, Tensor]]:
    """The seeds of the losses times one power of two for each example; the probe stores those."""
    n = seeded[0][1].numel()
    count = sum(seed.numel() for _, seed in seeded)
    r = seeds(count, seeded[0][1].device, probe.exponents())
    probe.seeds = {"merged": r, "train": r[:n], "clean": r[n:]}
    return [
        (x, seed * part.to(seed.dtype))
        for (x, seed), part in zip(seeded, (r[:n], r[n:]), strict=False)
    ]
