"""Eq. 12 layer by layer: one first-order backward, no second pass for the weighted gradient."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2rw_ext import devices
from l2rw_ext.data.batch import describe, merge, split
from l2rw_ext.engines.base import Engine, Scored
from l2rw_ext.engines.plan import Plan, UsePlan, choose_form
from l2rw_ext.errors import NotCapturableError, NotExactError
from l2rw_ext.layers.base import Use
from l2rw_ext.layers.broadcast import BROADCAST, FACTORS
from l2rw_ext.layers.costs import Size
from l2rw_ext.layers.torch_functions import inside
from l2rw_ext.task.checkpointing import SERVES_ONCE, serves_once
from l2rw_ext.task.isolation import Snapshot
from l2rw_ext.task.task import Direction, Task, clean_direction, require_grad
from l2rw_ext.tracing.graph import check_graph, sources
from l2rw_ext.tracing.interception import Interception
from l2rw_ext.tracing.members import Members

from .derived import Leaves
from .merging import NotMergeableError, check_mergeable
from .probe import Probe, seeds
from .scoring import OverflowedError, Scoring, StalePlanError

Key = tuple[Any, ...]

_LARGEST_NUMBER_OF_WRITES = 4
"""Merged forwards of a kind that write to the model, before batches are not merged any more."""


@dataclass
class _Kind:
    """What the engine remembers of a kind of step.

    There are three sorts of kinds. A step whose clean batch gives the direction has a kind for each
    pair of batches, and one whose direction is given has a kind for each training batch. Both run
    the same pass over the training batch if they do not merge. The plan of that pass belongs to a
    third kind, which is found by ``alone`` and ``by_row``: there is one for each length of the
    training batch, not for each pair of lengths.
    """

    alone: Key
    """The part of the key that does not depend on the clean batch."""
    plan: Plan | None = None
    """The plan of a merged step, or of a pass over the training batch."""
    by_row: bool = False
    """Whether tensors made without data are data if they have a row for each example."""
    separate: str | None = None
    """Why batches of this kind are never merged, if that is known."""
    refused: str | None = None
    """Why the engine is not exact, if it is not."""
    written: int = 0
    """How many merged forwards of this kind have written to the model."""


class Layerwise(Engine):
    """Sums per-layer products; exact if each loss depends only on its own rows.

    The engine checks this and does not assume it: see ``tracing.graph.check_graph`` and ``probe``.
    The first step on batches of given shapes stores its findings in a plan, which is checked again
    at steps 16, 256, ...
    """

    name = "layerwise"

    def __init__(self) -> None:
        self._kinds: dict[Key, _Kind] = {}

    def score(self, task: Task, snapshot: Snapshot, direction: Direction | None = None) -> Scored:
        """See :class:`~l2rw_ext.engines.base.Engine`."""
        alone = _key(task)
        pair = None if direction is not None else (task.m, describe(task.clean_inputs))
        kind = self._kinds.get((alone, pair), _Kind(alone))
        if kind.refused is not None:
            raise NotExactError(kind.refused)
        try:
            return self._attempts(task, snapshot, direction, kind)
        except OverflowedError as error:
            error.scoring.overflow()
            return error.scoring
        except NotExactError as error:
            kind.refused = str(error)
            raise
        finally:
            if kind != _Kind(alone):  # else its key, which is long, need not be kept
                self._kinds[alone, pair] = kind

    def _attempts(
        self, task: Task, snapshot: Snapshot, direction: Direction | None, kind: _Kind
    ) -> Scoring:
        try:
            try:
                return self._attempt(task, snapshot, direction, kind)
            except StalePlanError:
                return self._attempt_anew(task, snapshot, direction, kind)
        except NotExactError:
            if not kind.by_row:
                # Perhaps a tensor made without data has a row for each example.
                kind.by_row = True
                with contextlib.suppress(NotExactError):
                    return self._attempt_anew(task, snapshot, direction, kind)
            raise

    def _attempt_anew(
        self, task: Task, snapshot: Snapshot, direction: Direction | None, kind: _Kind
    ) -> Scoring:
        """Attempt a step without the plans of the last attempt."""
        snapshot.restore()
        kind.plan = None
        self._kinds.pop((kind.alone, kind.by_row), None)
        return self._attempt(task, snapshot, direction, kind)

    def _attempt(
        self, task: Task, snapshot: Snapshot, direction: Direction | None, kind: _Kind
    ) -> Scoring:
        """Score in a merged step if that is possible, else in two passes."""
        given = "the direction is given, not the clean batch's own"
        why = kind.separate if direction is None else given
        if why is None:
            permanent = not devices.readable(task.parameters[0])  # another try waits
            known_batched = kind.plan is not None
            inputs = merge(
                task.inputs, task.clean_inputs, task.n, task.m, known_batched=known_batched
            )
            if inputs is not None:
                try:
                    return self._merged(task, snapshot, inputs, kind)
                except NotMergeableError as reason:
                    snapshot.restore()
                    why = str(reason)
                    permanent = permanent or reason.permanent
            else:
                why = "the inputs of the two batches do not agree in shape"
            if permanent:
                kind.separate = why
        return self._two_passes(task, snapshot, direction, kind, why)

    def _merged(self, task: Task, snapshot: Snapshot, inputs: Any, kind: _Kind) -> Scoring:
        """One forward and one data-only backward over [train; clean]."""
        both = _Pass(task, None, task.n + task.m if kind.by_row else None)
        interception = both.interception
        losses, clean_losses = _merged_losses(task, inputs, interception)
        name = snapshot.state.changed()
        if name is not None:
            # A cache that a first forward fills is no reason not to merge the next batches.
            kind.written += 1
            permanent = kind.written == _LARGEST_NUMBER_OF_WRITES
            raise NotMergeableError(f"the forward writes to {name!r}", permanent=permanent)
        plan = kind.plan
        if plan is None or plan.due() or plan.calls != interception.calls:
            both.check_not_captured()
            precision = _precision(interception, losses)
            check_mergeable(task, snapshot, inputs, losses, clean_losses, precision)
        kind.plan = both.backward([losses, clean_losses], clean_losses.detach().mean(), plan)
        return both.scoring

    def _two_passes(
        self,
        task: Task,
        snapshot: Snapshot,
        direction: Direction | None,
        kind: _Kind,
        why: str,
    ) -> Scoring:
        """A pass of the clean batch, which gives the direction, and one of the training batch."""
        own = self._kinds.setdefault((kind.alone, kind.by_row), _Kind(kind.alone))
        if direction is None:
            direction = clean_direction(task, snapshot)
        train = _Pass(task, direction.values, task.n if kind.by_row else None)
        train.interception.part = "train"
        with train.interception:
            losses = task.forward_train()
        if train.interception.saved_tensor_hooks:
            snapshot.keep_trained()
        own.plan = train.backward([losses], direction.clean_loss, own.plan)
        own.plan.why_separate = why
        return train.scoring


class _Pass:
    """A forward whose uses report to a scoring, and the backwards over its graph.

    Args:
        task: the step.
        directions: v by id of the parameter; None if the forward is that of both batches.
        examples: see :class:`~l2rw_ext.tracing.interception.Interception`.
    """

    def __init__(
        self, task: Task, directions: dict[int, Tensor] | None, examples: int | None
    ) -> None:
        self._task = task
        self._leaves = Leaves(task.parameters)
        self.scoring = Scoring(task, self._leaves, directions)
        self.interception = Interception(task.members, self.scoring, examples)

    def backward(self, outputs: list[Tensor], clean_loss: Tensor, plan: Plan | None) -> Plan:
        """Score by a plan; if there is none, or it does not fit, make one first.

        ``outputs`` are the training losses and, if the forward is that of both batches, the clean
        losses.
        """
        task, scoring, interception = self._task, self.scoring, self.interception
        losses, *clean_losses = outputs
        after_each = check_graph(interception, outputs)
        trained, reached = (
            [use for use in interception.uses if use.index in after_each[k]] for k in (0, -1)
        )
        require_grad(losses)
        scoring.start(losses, clean_loss, reached, trained)
        seeded = [(losses, task.scaled(_finite_seed(losses)))]
        seeded += [(x, task.scaled(torch.full_like(x, 1 / task.m))) for x in clean_losses]
        signatures = [_signature(use, interception) for use in reached]
        if plan is None or not (
            plan.certain
            and interception.data_dependent is None
            and not plan.due()
            and plan.calls == interception.calls
            and [use.signature for use in plan.uses] == signatures
        ):
            plan = self._probed(seeded, signatures, 0 if plan is None else plan.steps)
        plan.steps += 1
        scoring.follow(plan)
        _run_backward(interception, seeded, retain=task.low_memory)
        scoring.finish()
        if task.low_memory:
            scoring.again = lambda seed: _run_backward(interception, [(losses, seed)], retain=False)
        return plan

    def _probed(
        self, seeded: list[tuple[Tensor, Tensor]], signatures: list[Key], steps: int
    ) -> Plan:
        """Make a plan from two more backwards over the same graph."""
        self.check_not_captured()
        _check_wrappers(self._task.members)
        scoring, interception = self.scoring, self.interception
        reached = scoring.reached
        probe = scoring.probe = Probe(narrow=interception.narrow)
        _run_backward(interception, seeded, retain=True)
        finite = probe.finite or not bool(scoring.losses.isfinite().all())
        if self._task.loss_scale is not None and not finite:
            raise OverflowedError(scoring)
        _run_backward(interception, _with_seeds(seeded, probe), retain=True)
        scoring.probe = None
        counts = Counter(
            source
            for use in reached
            for root in use.roots
            if root is not None
            for source in sources(root)
        )
        uses = [
            self._plan_use(use, signature, probe, counts)
            for use, signature in zip(reached, signatures, strict=True)
        ]
        certain = (
            probe.certain
            and interception.data_dependent is None
            and not any(_multiplies_by_zero(use) for use in reached)
            and not interception.zero_scalars()
            # A gradient that was zero may change; if values cannot be read, only a probe shows it.
            and (devices.readable(scoring.losses) or all(use.rows is not None for use in uses))
        )
        return Plan(
            merged=len(seeded) > 1,
            certain=certain,
            uses=uses,
            calls=interception.calls,
            data_dependent=interception.data_dependent,
            steps=steps,
        )

    def _plan_use(self, use: Use, signature: Key, probe: Probe, counts: Counter[int]) -> UsePlan:
        roots = [root for root in use.roots if root is not None]
        joint = use.part != "merged" or any(
            root not in self._leaves or counts[id(root)] > 1 for root in roots
        )
        rows = probe.maps.get(use.index)
        positions = 1 if rows is None else rows.positions
        size = Size(self._task.n, self._task.m, positions, positions)
        form, costs = choose_form(use, size, without=("factored",) if joint else ())
        names = ", ".join(dict.fromkeys(map(self.interception.name_of, roots)))
        return UsePlan(names, signature, rows, form, joint, costs, use.operation, use.shape)

    def check_not_captured(self) -> None:
        """Raise if the engine would have to read values of a step that is captured.

        Raises:
            NotCapturableError: it would.
        """
        if not self._task.captured:
            return
        operation = self.interception.data_dependent
        if operation is None:
            raise NotCapturableError(
                "the engine must look at this step, for the model calls other functions than "
                "before",
                "let the model do the same in each step, or ",
            )
        raise NotCapturableError(
            f"values of the data decide what the model computes ({operation}), and the engine must "
            "look at each step",
            "replace the operation, or ",
        )


def _key(task: Task) -> Key:
    """What a plan depends on, apart from the clean batch and the operations that it records."""
    return (
        task.n,
        describe(task.inputs),
        task.members.training,
        tuple(map(id, task.parameters)),
        id(task.loss_fn),
        id(task.clean_loss_fn),
        task.autocast.key,
    )


def _check_wrappers(members: Members) -> None:
    """Raise for a wrapper that searches the graph of the outputs for parameters.

    It finds none, because uses hide them, and considers all of them unused.
    """
    for _, module in members.modules:
        finds = getattr(module, "find_unused_parameters", False)
        if finds and type(module).__name__ == "DistributedDataParallel":
            raise NotExactError(
                "DistributedDataParallel cannot find unused parameters in a layer-wise step; leave "
                "find_unused_parameters off"
            )


def _multiplies_by_zero(use: Use) -> bool:
    """Whether a trained factor is zero, as that of a residual branch often is at first.

    The tensor that it multiplies has no gradient in this step, but may have one in the next.
    """
    root = use.roots[0]
    if root is None or (use.layer is BROADCAST and use.operation not in FACTORS):
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
        # A loss function that writes to its part of the outputs does so in each step.
        writes = "modified inplace" in str(error)
        raise NotMergeableError(
            f"{type(error).__name__} on the merged batch", permanent=writes
        ) from error
    return losses, clean_losses


def _precision(interception: Interception, losses: Tensor) -> float:
    """The largest machine epsilon among the dtypes of the losses and of the uses."""
    operands = [x for use in interception.uses for x in (use.weight, use.bias) if x is not None]
    return max(torch.finfo(dtype).eps for dtype in {x.dtype for x in (losses, *operands)})


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
    recomputes = interception.saved_tensor_hooks
    differentiate = inside(torch.autograd.grad) if recomputes else torch.autograd.grad
    try:
        with interception.recompute() if recomputes else contextlib.nullcontext():
            differentiate(
                [x for x, _ in outputs],
                [interception.token],
                [seed for _, seed in outputs],
                retain,
                allow_unused=True,
            )
    except (AttributeError, RuntimeError) as error:
        if serves_once(error):
            raise NotExactError(SERVES_ONCE) from error
        raise


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
