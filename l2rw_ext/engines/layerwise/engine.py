"""Eq. 12 layer by layer: one first-order backward, no second pass for the weighted gradient."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from l2rw_ext import devices
from l2rw_ext.data.batch import (
    cloned,
    describe,
    merge,
    share_memory,
    tensors,
)
from l2rw_ext.distributed.exchange import Exchange
from l2rw_ext.distributed.group import Processes
from l2rw_ext.engines.base import Engine, Scored
from l2rw_ext.engines.plan import Plan, UsePlan, between_ranks, choose_form
from l2rw_ext.engines.proof import Plain, Proofs, Record, plain_training
from l2rw_ext.errors import NotCompilableError, NotExactError, NotYetCompilableError
from l2rw_ext.layers.base import RowMap, Use
from l2rw_ext.layers.costs import Size
from l2rw_ext.layers.torch_functions import inside
from l2rw_ext.task.isolation import Snapshot
from l2rw_ext.task.task import (
    Combination,
    Direction,
    Task,
    check_clean_loss,
    clean_direction,
    require_grad,
)
from l2rw_ext.tracing.coverage import check_graph
from l2rw_ext.tracing.example_map import ExampleMap, Exits, Verdict, judge
from l2rw_ext.tracing.graph import sources
from l2rw_ext.tracing.interception import Interception
from l2rw_ext.tracing.members import Members
from l2rw_ext.tracing.shards import passes_on

from .derived import Leaves
from .merging import NotMergeableError, check_mergeable, merged_losses
from .probe import Probe, seeds
from .rows import labelled, rows_of
from .scoring import OverflowedError, Scoring, StalePlanError

Key = tuple[Any, ...]

_AGREED = (StalePlanError, NotExactError, OverflowedError)
"""What each process raises if one does."""
_LARGEST_NUMBER_OF_PLANS = 32
"""Of one kind of step, whose model may call other functions in each forward."""
_LARGEST_NUMBER_OF_KINDS = 256
"""Kinds of steps that are remembered; graphs and sentences come with ever new shapes."""
_LARGEST_NUMBER_OF_WRITES = 4
"""Merged forwards of a kind that write to the model, before batches are not merged any more."""
_LARGEST_NUMBER_OF_REHEARSALS = 4
"""Attempts of a rank to make a plan for merged steps of a kind."""
_LARGEST_NUMBER_OF_FAILURES = 4
"""Merged steps of several ranks in a row that were broken off, before there are no more."""


@dataclass
class _Kind:
    """What the engine remembers of a kind of step.

    There are three sorts of kinds. A step whose clean batch gives the direction has a kind for each
    pair of batches, and one whose direction is given has a kind for each training batch. Both run
    the same pass over the training batch if they do not merge. The plans of that pass belong to a
    third kind, which is found by ``alone`` and ``by_row``: there is one for each length of the
    training batch, not for each pair of lengths.
    """

    alone: Key
    """The part of the key that does not depend on the clean batch."""
    plans: OrderedDict[Key, Plan] = field(default_factory=OrderedDict)
    """The plans of a merged step, or of a pass over the training batch, by the forward's form."""
    by_row: bool = False
    """Whether tensors made without data are data if they have a row for each example."""
    separate: str | None = None
    """Why batches of this kind are never merged, if that is known."""
    refused: str | None = None
    """Why the engine is not exact, if it is not."""
    proof: Record | None = None
    """How such steps were compared with plain autograd; kinds of other sizes share it."""
    written: int = 0
    """How many merged forwards of this kind have written to the model."""
    stale: bool = False
    """Whether a merged step with other ranks failed on this one, for want of a plan perhaps."""
    rehearsals: int = 0
    """How often a plan for merged steps with other ranks was looked for and not found."""

    def add(self, form: Key, plan: Plan) -> None:
        """Remember a plan, and forget the oldest if there are many."""
        self.plans[form] = plan
        if len(self.plans) > _LARGEST_NUMBER_OF_PLANS:
            self.plans.popitem(last=False)

    def alike(self, calls: Key) -> Plan | None:
        """The plan of a forward with symbols for sizes, for which autograd may make more nodes."""
        today = _numbers(calls)
        found = [plan for form, plan in self.plans.items() if form[0] == today]
        return found[0] if len(found) == 1 else None

    @property
    def merges(self) -> bool:
        """Whether a merged step of this kind can be expected to follow a plan, without a proof."""
        apart = self.separate is not None or self.refused is not None
        certain = any(plan.certain for plan in self.plans.values())
        settled = self.proof is not None and self.proof.settled
        return certain and settled and not (apart or self.stale)


class Layerwise(Engine):
    """Sums per-layer products; exact if each loss depends only on its own rows.

    The engine proves this and does not assume it. In the first step of a kind an example map
    follows the forward (see ``tracing.example_map``), and plain autograd has to agree with the
    numbers (see ``engines.proof``). What was found is stored in a plan, which later forwards follow
    if they call the same functions on the same batch shapes. Where the map leaves it to values
    which examples meet, each step is probed (see ``probe``).
    """

    name = "layerwise"

    def __init__(self) -> None:
        self._kinds: dict[Key, _Kind] = {}
        self._proofs = Proofs()
        self._failures = 0
        """How many merged steps in a row some rank has broken off, as all ranks know."""

    def score(self, task: Task, snapshot: Snapshot, direction: Direction | None = None) -> Scored:
        """See :class:`~l2rw_ext.engines.base.Engine`."""
        key = _key_of_step(task.concrete or task, direction)
        kind = self._kinds.get(key, _Kind(key[0]))
        if any(task.agreement.any(kind.refused is not None)):
            raise NotExactError(kind.refused or "it was not exact in another process")
        if devices.tracing():  # what a trace meets says nothing of steps that run eagerly
            own = replace(kind, plans=OrderedDict(kind.plans))
            return self._attempts(task, snapshot, direction, own)
        try:
            return self._attempts(task, snapshot, direction, kind)
        except OverflowedError as error:
            error.scoring.overflow()
            return error.scoring
        finally:
            if kind != _Kind(key[0]):  # else its key, which is long, need not be kept
                self._remember(key, kind)

    def score_with_others(
        self, task: Task, snapshot: Snapshot, processes: Processes
    ) -> Scored | None:
        """Score in a merged pass in which the ranks exchange the direction of their clean batches.

        All ranks call this in the same step, and get None alike if one of them cannot make such a
        step; the state is then as it was. A rank that has no plan makes one from its own batches.

        Raises:
            RankError: another rank has failed.
        """
        if self._failures >= _LARGEST_NUMBER_OF_FAILURES:
            return None
        key = _key_of_step(task, None)
        kind = self._kinds.get(key) or _Kind(key[0])
        if task.clean_size is not None and not kind.merges:
            self._rehearse(task, snapshot, key, kind)
        ready = task.clean_size is not None and kind.merges
        if not all(flag for (flag,) in processes.meet("a merged step", ready)):
            return None
        exchange = Exchange(processes)

        def score() -> Scored:
            inputs = merge(task.inputs, task.clean_inputs, task.n, task.m, known_batched=True)
            if inputs is None:
                raise NotMergeableError("the inputs of the two batches do not agree in shape")
            return self._merged(task, snapshot, inputs, kind, exchange, new=False)

        scored = exchange.run(score)
        self._failures = self._failures + 1 if scored is None else 0
        if scored is None:
            kind.stale = exchange.failed
            snapshot.restore()
        return scored

    def _rehearse(self, task: Task, snapshot: Snapshot, key: Key, kind: _Kind) -> None:
        """Score the two batches of this rank, which makes or proves a plan, and forget the scores.

        That is not worth its price for a kind of step that is met only once.
        """
        self._remember(key, kind)
        certain = [plan.certain for plan in kind.plans.values()]
        if kind.separate is not None or kind.refused is not None or (certain and not any(certain)):
            return
        kind.rehearsals = 0 if certain else kind.rehearsals + 1
        if kind.rehearsals == 1 or kind.rehearsals > 1 + _LARGEST_NUMBER_OF_REHEARSALS:
            return
        kind.stale = False
        try:
            self.score(task, snapshot)
        except NotExactError as error:
            kind.refused = str(error)
        except Exception:  # which the step has again if it is the user's
            pass
        snapshot.restore()

    def refuse(self, task: Task, direction: Direction | None, reason: str) -> None:
        """See :class:`~l2rw_ext.engines.base.Engine`."""
        key = _key_of_step(task, direction)
        kind = self._kinds.get(key) or _Kind(key[0])
        kind.refused = reason
        self._remember(key, kind)

    def _remember(self, key: Key, kind: _Kind) -> None:
        """Remember a kind, and forget the one that was not used for the longest time."""
        self._kinds.pop(key, None)
        self._kinds[key] = kind
        if len(self._kinds) > _LARGEST_NUMBER_OF_KINDS:
            del self._kinds[next(iter(self._kinds))]

    def _attempts(
        self, task: Task, snapshot: Snapshot, direction: Direction | None, kind: _Kind
    ) -> Scored:
        try:
            try:
                return self._attempt(task, snapshot, direction, kind, new=False)
            except StalePlanError:
                if devices.tracing():
                    raise NotYetCompilableError(
                        "each step calls other functions of torch than the one before, or meets "
                        "other parameters or other values"
                    ) from None
                snapshot.restore()
                return self._attempt(task, snapshot, direction, kind, new=True)
        except NotExactError:
            if any(task.agreement.any(not kind.by_row)):
                # Perhaps a tensor made without data has a row for each example.
                kind.by_row, kind.proof = True, None
                kind.plans.clear()
                snapshot.restore()
                with contextlib.suppress(NotExactError):
                    return self._attempt(task, snapshot, direction, kind, new=True)
            raise

    def _attempt(
        self,
        task: Task,
        snapshot: Snapshot,
        direction: Direction | None,
        kind: _Kind,
        *,
        new: bool,
    ) -> Scored:
        """Score in a merged step if that is possible, else in two passes.

        ``new``: whether no plan that is known fits.
        """
        given = "the direction is given, not the clean batch's own"
        why = kind.separate if direction is None else given
        if why is None:
            permanent = not devices.readable(task.parameters[0])  # another try waits
            known_batched = bool(kind.plans)
            inputs = merge(
                task.inputs, task.clean_inputs, task.n, task.m, known_batched=known_batched
            )
            if inputs is not None:
                try:
                    return self._merged(task, snapshot, inputs, kind, new=new)
                except NotMergeableError as reason:
                    if devices.tracing():
                        raise NotCompilableError(str(reason)) from reason
                    snapshot.restore()
                    why = str(reason)
                    permanent = permanent or reason.permanent
            else:
                why = "the inputs of the two batches do not agree in shape"
            if permanent and not devices.tracing():
                kind.separate = why
        return self._two_passes(task, snapshot, direction, kind, why, new=new)

    def _merged(
        self,
        task: Task,
        snapshot: Snapshot,
        inputs: Any,
        kind: _Kind,
        exchange: Exchange | None = None,
        *,
        new: bool,
    ) -> Scored:
        """One forward and one data-only backward over [train; clean]."""
        if share_memory(task.targets, task.clean_targets):
            # The map tells by its memory whose a tensor is.
            task = replace(task, clean_targets=cloned(task.clean_targets))

        def plain(task: Task) -> Plain:
            return merged_losses(task, inputs)

        def score(new: bool) -> Scoring:
            both = _Pass(task, None, kind, task.n + task.m, exchange, new=new)
            both.enter(inputs)
            both.enter(task.targets, task.n)
            both.enter(task.clean_targets, task.m, task.n)
            losses, clean_losses, _ = merged_losses(task, inputs, both.part)
            both.check([losses, clean_losses])
            name = snapshot.state.changed()
            if name is not None:
                # A cache that a first forward fills is no reason not to merge the next batches.
                kind.written += 1
                permanent = kind.written == _LARGEST_NUMBER_OF_WRITES
                raise NotMergeableError(f"the forward writes to {name!r}", permanent=permanent)
            if both.verdict is not None:
                if not both.verdict.apart:
                    raise NotMergeableError(both.verdict.together)
                if both.places is not None:
                    raise NotMergeableError("{} ({}) picks examples by place".format(*both.places))
                check_mergeable(task, snapshot, inputs)
            both.follow(clean_losses.detach().mean(), "")
            both.backward()
            return both.scoring

        return self._proved(task, snapshot, kind, "merged", plain, score, new=new)

    def _two_passes(
        self,
        task: Task,
        snapshot: Snapshot,
        direction: Direction | None,
        kind: _Kind,
        why: str,
        *,
        new: bool,
    ) -> Scored:
        """A pass of the clean batch, which gives the direction, and one of the training batch."""
        direction = clean_direction(task, snapshot) if direction is None else direction
        values = direction.values
        passes = "train"
        key: Key = (kind.alone, kind.by_row)
        if isinstance(values, Combination):  # whose proof is one of more than a single direction's
            passes = f"train along {len(values.parts)}"
            key = *key, passes
        own = self._kinds.get(key) or _Kind(kind.alone, by_row=kind.by_row)
        self._remember(key, own)

        def plain(task: Task) -> Plain:
            return plain_training(task, direction)

        def score(new: bool) -> Scoring:
            with task.agreement.forward("the forward", *_AGREED):
                train = _Pass(task, direction, own, task.n, new=new)
                train.enter(task.inputs)
                train.enter(task.targets)
                with train.part("train"):
                    losses = task.forward_train()
                if train.interception.saved_tensor_hooks:
                    snapshot.keep_trained()
                train.check([losses])
                train.follow(direction.clean_loss, why)
            with task.agreement.at("the backward", *_AGREED):
                train.check_order()
                train.backward()
            return train.scoring

        return self._proved(task, snapshot, own, passes, plain, score, new=new)

    def _proved(
        self,
        task: Task,
        snapshot: Snapshot,
        kind: _Kind,
        passes: str,
        plain: Callable[[Task], Plain],
        score: Callable[[bool], Scoring],
        *,
        new: bool,
    ) -> Scored:
        """Score by a known plan, or make a new one; both against plain autograd if that is due."""
        (new,) = task.agreement.any(new or not kind.plans)
        if new and devices.tracing():
            raise StalePlanError
        if kind.proof is None:
            kind.proof = self._proofs.of(task, passes, kind.by_row)
        size = (kind.alone, len(kind.plans)) if new else None
        return kind.proof.scored(task, snapshot, size, plain, lambda: score(new))


class _Pass:
    """A forward whose uses report to a scoring, and the backwards over its graph.

    Args:
        task: the step.
        direction: v; None if the forward is that of both batches.
        kind: what is known of such forwards.
        count: the number of examples in the forward.
        exchange: adds the clean batches of other ranks; None if there are none.
        new: whether to make a plan; a step without one is made to follow a plan of the kind.
    """

    def __init__(
        self,
        task: Task,
        direction: Direction | None,
        kind: _Kind,
        count: int,
        exchange: Exchange | None = None,
        *,
        new: bool,
    ) -> None:
        self._task = task
        self._kind = kind
        self._exchange = exchange
        self._leaves = Leaves(task.parameters, task.members.shards)
        self.scoring = Scoring(task, self._leaves, direction, exchange)
        self.verdict: Verdict | None = None
        self.places: tuple[str, str] | None = None
        """An operation of the model that picks examples by their place, and its line."""
        self._map: ExampleMap | None = None
        if new:
            self._map = ExampleMap(count, task.members.permanent, by_row=kind.by_row)
        self.interception = Interception(
            task.members, self.scoring, count if kind.by_row else None, self._map
        )

    def enter(self, batch: Any, size: int | None = None, first: int = 0) -> None:
        """Tell the map, if there is one, that tensors hold the examples from ``first`` on."""
        if self._map is not None:
            for x in tensors(batch):
                self._map.enter(x, first=first, size=size)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context for a part of the forward: "merged", "train" or "clean"."""
        self.interception.part = name
        followed = contextlib.nullcontext() if self._map is None else self._map
        seen = contextlib.nullcontext() if self._map is None else Exits(self._map)
        with followed, self.interception, seen:
            yield
        if self._map is not None and name == "merged":  # a loss function gets a batch of its own
            self.places = next(iter(self._map.notes.get("places", {}).items()), None)

    def check(self, outputs: list[Tensor]) -> None:
        """Check the graph of the losses, and set the verdict of the map if there is one.

        ``outputs`` are the training losses and, if the forward is that of both batches, the clean
        losses.

        Raises:
            NotExactError: some parameter does not enter through a use.
            StalePlanError: there are not as many losses as examples were expected.
        """
        self._outputs = outputs
        self._after_each, self._nodes = check_graph(self.interception, outputs)
        if self._map is not None:
            if self._map.count != sum(x.numel() for x in outputs):
                raise StalePlanError
            self.verdict = judge(self._map, outputs, ours=_known)

    def follow(self, clean_loss: Tensor, why_separate: str) -> None:
        """Find or make the plan.

        Raises:
            StalePlanError: no plan of the kind fits the forward.
            NotExactError: the forward mixes examples.
        """
        task, scoring, interception = self._task, self.scoring, self.interception
        losses, *clean_losses = self._outputs
        trained, reached = (
            [use for use in interception.uses if use.index in self._after_each[k]] for k in (0, -1)
        )
        require_grad(losses)
        scoring.start(losses, clean_loss, reached, trained)
        signatures = (_signature(use, interception) for use in reached)
        sizes = (x.numel() for x in self._outputs)
        form = (*sizes, *interception.calls, *signatures), tuple(self._nodes)
        if self.verdict is None:
            kind = self._kind
            plan = kind.plans.get(form) if task.concrete is None else kind.alike(form[0])
            if plan is None:
                raise StalePlanError
        else:
            plan = self._planned(self.verdict, merged=bool(clean_losses))
            plan.why_separate = why_separate
            self._kind.add(form, plan)
        self._plan = plan

    def check_order(self) -> None:
        """Check that all processes will gather the same parts of the direction in the same order.

        Raises:
            NotExactError: they will not.
        """
        if self._task.agreement.shared:
            uses = reversed(self.scoring.reached)
            roots = {id(root): root for use in uses for root in use.roots if root is not None}
            names = [_name(root, self.interception) for root in roots.values()]
            self._task.agreement.check_order(zlib.crc32(repr(names).encode()))

    def backward(self) -> None:
        """Score by the plan.

        Raises:
            NotExactError: the forward mixes examples.
        """
        task, scoring, interception = self._task, self.scoring, self.interception
        losses, *clean_losses = self._outputs
        plan, m = self._plan, task.m
        if self._exchange is not None:
            plan, m = self._agreed(plan, self._exchange), self._exchange.m
        seeded = [(losses, task.scaled(_finite_seed(losses)))]
        seeded += [(x, task.scaled(torch.full_like(x, 1 / m))) for x in clean_losses]
        if any(task.agreement.any(not plan.certain)):
            plan = replace(plan, uses=self._probed(seeded, plan.reason))
        automatic = task.low_memory == "auto"
        scoring.low_memory = interception.checkpointed if automatic else bool(task.low_memory)
        scoring.follow(plan)
        _run_backward(interception, seeded, retain=scoring.low_memory)
        scoring.finish()
        if scoring.low_memory:
            scoring.again = lambda seed, keep: _run_backward(
                interception, [(losses, seed)], retain=keep
            )

    def _agreed(self, plan: Plan, exchange: Exchange) -> Plan:
        """The plan that the ranks follow together.

        Raises:
            StalePlanError: this rank's plan is not certain.
            ValueError: the clean loss is not finite.
        """
        if not plan.certain:
            raise StalePlanError
        task, reached = self._task, self.scoring.reached
        if devices.readable(self.scoring.clean_loss):
            check_clean_loss(self.scoring.clean_loss)
        structure: list[Any] = []
        for p in task.parameters:
            structure.append((self.interception.names[id(p)], p.numel(), p.dtype, p.device.type))
        for use, own in zip(reached, plan.uses, strict=True):
            dtype = None if use.weight is None else use.weight.dtype
            structure.append(
                (_operands(use, self.interception), dtype, own.joint, own.rows is None)
            )
        positions = [None if own.rows is None else own.rows.positions for own in plan.uses]
        agreed = exchange.agree(task.n, task.m, structure, positions)
        if plan.shared is None or plan.shared[0] != (agreed, structure):
            plan.shared = (agreed, structure), between_ranks(plan, reached, task, agreed)
        exchange.begin(plan.shared[1].messages)  # from now on this rank owes them, if it fails
        return plan.shared[1]

    def _planned(self, verdict: Verdict, *, merged: bool) -> Plan:
        """A plan from what the map says; its uses are left open if it is not certain."""
        _check_wrappers(self._task.members)
        if verdict.kind == "mixed":
            raise NotExactError(verdict.reason)
        rows = {}
        if verdict.certain:
            n, m = self._task.n, self._task.m
            examples = {"merged": (0, n + m), "train": (0, n), "clean": (n, m)}
            for use in self.scoring.reached:
                labels = self.interception.labels.get(use.index)
                if labels is None or not labelled(use, labels):
                    reason = f"some rows of {use.operation} on {use.shape} show no example"
                    verdict = replace(verdict, kind="unsure", reason=reason)
                    break
                rows[use.index] = rows_of(use, labels, *examples[use.part])
        uses = self._uses(rows) if verdict.certain else []
        return Plan(merged, verdict.certain, verdict.reason, uses=uses)

    def _probed(self, seeded: list[tuple[Tensor, Tensor]], reason: str) -> list[UsePlan]:
        """The plans of all uses from two more backwards over the same graph."""
        if devices.tracing():
            raise NotCompilableError(f"{reason}, and the engine must look at each step")
        scoring, interception = self.scoring, self.interception
        probe = scoring.probe = Probe(narrow=interception.narrow)
        _run_backward(interception, seeded, retain=True)
        finite = probe.finite or not bool(scoring.losses.isfinite().all())
        overflowed = self._task.loss_scale is not None and not finite
        if any(self._task.agreement.any(overflowed)):
            raise OverflowedError(scoring)
        _run_backward(interception, _with_seeds(seeded, probe), retain=True)
        if probe.mixed is not None:
            raise probe.mixed
        scoring.probe = None
        return self._uses(probe.maps)

    def _uses(self, maps: Mapping[int, RowMap | None]) -> list[UsePlan]:
        reached = self.scoring.reached
        counts = Counter(
            source
            for use in reached
            for root in use.roots
            if root is not None
            for source in sources(root)
        )
        return [self._plan_use(use, maps.get(use.index), counts) for use in reached]

    def _plan_use(self, use: Use, rows: RowMap | None, counts: Counter[int]) -> UsePlan:
        roots = [root for root in use.roots if root is not None]
        joint = use.part != "merged" or any(
            root not in self._leaves or counts[id(root)] > 1 for root in roots
        )
        positions = 1 if rows is None else rows.positions
        size = Size(self._task.n, self._task.m, positions, positions)
        form, costs = choose_form(use, size, without=("factored",) if joint else ())
        names = ", ".join(dict.fromkeys(map(self.interception.name_of, roots)))
        return UsePlan(names, rows, form, joint, costs, use.operation, use.shape)


def _known(node: Any) -> bool:
    """Whether a node of autograd's graph belongs to a use, to a recurrence, or to FSDP."""
    return hasattr(node, "use") or passes_on(node)


def _key_of_step(task: Task, direction: Direction | None) -> Key:
    """What a plan depends on, apart from the operations that it records; the clean batch last."""
    alone = (task.size.guess, describe(task.inputs), *task.settings)
    if direction is not None or task.clean_size is None:
        return alone, None
    return alone, (task.clean_size.guess, describe(task.clean_inputs))


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


def _signature(use: Use, interception: Interception) -> tuple[Any, ...]:
    return use.shape, *_operands(use, interception)


def _operands(use: Use, interception: Interception) -> tuple[Any, ...]:
    """What a use has in common with those of other sizes."""
    return (
        use.operation,
        use.part,
        *(None if root is None else _name(root, interception) for root in use.roots),
    )


def _name(root: Tensor, interception: Interception) -> Any:
    names = interception.names
    own = names.get(id(root))
    return own or (root.shape, tuple(sorted(str(names.get(p, p)) for p in sources(root))))


def _numbers(tree: Any) -> Any:
    """Nested tuples with the numbers for which symbols stand at present."""
    if isinstance(tree, tuple):
        return tuple(map(_numbers, tree))
    return tree.node.hint if isinstance(tree, torch.SymInt) else tree


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
    with interception.recompute() if recomputes else contextlib.nullcontext():
        differentiate(
            [x for x, _ in outputs],
            [interception.token],
            [seed for _, seed in outputs],
            retain,
            allow_unused=True,
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
