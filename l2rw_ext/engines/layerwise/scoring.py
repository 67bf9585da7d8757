"""From reports of the backward to scores, and from weights to gradients."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext import ops
from l2rw_ext.distributed.exchange import CLEAN_LOSS, Exchange
from l2rw_ext.engines.base import Give, Scored
from l2rw_ext.engines.explanation import Explanation
from l2rw_ext.engines.plan import Plan, UsePlan
from l2rw_ext.errors import NotCompilableError, NotExactError
from l2rw_ext.layers.base import Factors, Roots, RowMap, Use
from l2rw_ext.layers.costs import FEW_POSITIONS
from l2rw_ext.ops.arithmetic import accumulation_dtype
from l2rw_ext.task.isolation import BelowAutograd
from l2rw_ext.task.task import Combination, Direction, Task
from l2rw_ext.tracing.graph import sources
from l2rw_ext.tracing.shards import whole

from .derived import Leaves
from .norms import Norms
from .probe import Probe

_LARGEST_NUMBER_WAITING = 2
"""Uses that wait for the other ranks with tensors that would be freed if they did not."""

Totals = dict[int, tuple[Tensor, Tensor]]
"""Sums over uses: the root and the sum, by id of the root."""


class StalePlanError(Exception):
    """The step fits no plan that is known, so one must be made."""


class OverflowedError(Exception):
    """Gradients overflowed under the loss scale before a plan was made."""

    def __init__(self, scoring: Scoring) -> None:
        super().__init__()
        self.scoring = scoring


def in_groups(g: Tensor) -> bool:
    """Whether layers in factored form wait for the others, to be scored in one call.

    On CUDA one launch for all fills the device, which a single layer would not. The tensors that
    wait are kept for the weighted gradient anyway.
    """
    return g.device.type != "cpu"


def _whole_direction(use: Use, z: Tensor, g: Tensor) -> Roots:
    """A use's part of the direction, if all its rows belong to the clean batch."""
    rows = math.prod(g.shape[: use.layer.leading(use, g)])
    z, g = use.layer.prepare(use, z, g, RowMap.of_all(rows))
    return use.layer.direction(use, z, g)


def _add_roots(totals: Totals, use: Use, values: Roots) -> None:
    """Add a use's (weight, bias) values to the totals of its roots, by id."""
    for root, value in zip(use.roots, values, strict=True):
        if root is not None and value is not None:
            if value.shape != root.shape:
                value = value.reshape(root.shape)
            held = totals.get(id(root))
            totals[id(root)] = (root, value if held is None else held[1] + value)


@dataclass
class _Kept:
    """The tensors of a use that are kept between the score pass and the weighted gradient.

    These are z and g of the training examples, or the per-example gradients formed from them.
    """

    use: Use
    z: Tensor | None = None
    g: Tensor | None = None
    examples: Roots | None = None


@dataclass
class _Second:
    """What a second backward forms, whose gradients contain the weights already."""

    ones: Tensor
    """One for each example of positive weight, else zero, shape (n,)."""
    totals: Totals
    give: Give | None
    """Takes gradients of parameters, a use's part of them at a time."""


class Scoring(Scored):
    """Scores of the training examples, summed use by use while the backward runs.

    It is the sink of one forward. It takes no report before :meth:`start`, and none of uses that
    the losses do not reach: a backward that the model itself runs, in its forward or in a hook,
    produces constants.

    Args:
        task: the step.
        leaves: the trainable parameters.
        direction: v, if a pass over the clean batch went before; None if the rows of a use hold n
            training and then m clean examples. A combination of several gives scores along each.
        exchange: adds the clean batches of other ranks to the direction; None if there are none.
    """

    def __init__(
        self,
        task: Task,
        leaves: Leaves,
        direction: Direction | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self.probe: Probe | None = None
        self._expected: set[int] = set()
        """Indices of the uses that the step's backward is to pass through."""
        self._reported: set[int] = set()
        self._task = task
        self._n = 0
        self.low_memory = False
        """Whether to keep no z and g, because a second backward will follow."""
        self._leaves = leaves
        self._combination: Combination | None = None
        self._directions: Sequence[Mapping[int, Tensor]] | None = None
        values = None if direction is None else direction.values
        if isinstance(values, Combination):
            self._combination, self._directions = values, values.parts
        elif values is not None:
            self._directions = [values]
        self._over = None if direction is None else direction.over
        self._norms: Norms | None = None
        self._sums: list[Tensor] = []
        """The scores so far, of each direction."""
        self._exchange = exchange
        self._waiting: deque[tuple[Use, UsePlan, Tensor, Tensor]] = deque()
        """Training rows of uses whose direction is on its way between ranks."""
        self._pushed: dict[int, list[Tensor | None]] = {}
        """Each direction by id of the root."""
        self._left: Counter[int] = Counter()
        """How many uses have not asked for it yet, by id of the root."""
        self._kept: list[_Kept] = []
        self._groups: dict[tuple[torch.dtype, torch.device], list[Factors]] = {}
        self.reached: list[Use] = []
        self._trained: list[Use] = []
        self._planned: dict[int, UsePlan] = {}
        self._postponed: list[tuple[Use, UsePlan, Tensor, Tensor]] = []
        """Reports of uses whose direction is the sum over several uses."""
        self._second: _Second | None = None
        """While a second backward forms the weighted gradient."""
        self.again: Callable[[Tensor, bool], None] | None = None
        """Runs the backward of the training losses again, with other seeds, and keeps the graph if
        told to; for ``low_memory``."""
        self.scores = torch.empty(0)
        self.losses = torch.empty(0)
        self.clean_loss = torch.empty(0)

    def start(
        self, losses: Tensor, clean_loss: Tensor, reached: list[Use], trained: list[Use]
    ) -> None:
        """Take the losses, the uses that any loss reaches, and those that training losses reach."""
        self._n = losses.numel()
        self.losses = losses.detach()
        self.clean_loss = clean_loss.detach()
        dtype = accumulation_dtype(losses.dtype)
        count = 1 if self._directions is None else len(self._directions)
        self._sums = [torch.zeros(self._n, dtype=dtype, device=losses.device) for _ in range(count)]
        self.reached = reached
        self._trained = trained
        self._expected = {use.index for use in reached}
        if self._over is not None:
            self._norms = Norms(self._over, self._leaves, trained, self._sums[0])

    def follow(self, plan: Plan) -> None:
        """Follow a plan: from now on reports are processed as they come."""
        self.plan = plan
        if self._directions is not None:
            self._push(self.reached, self._directions)
        self._planned = {
            use.index: planned for use, planned in zip(self.reached, plan.uses, strict=True)
        }
        if self._exchange is not None:
            first = plan.messages[0]
            share = self.clean_loss.to(first.device, first.dtype) * self._task.m
            self._exchange.send(CLEAN_LOSS, [share / self._exchange.m])

    def backward_of(self, use: Use) -> AbstractContextManager[None]:
        """See :class:`~l2rw_ext.layers.base.Sink`."""
        if torch.is_grad_enabled():
            raise NotExactError(
                f"{use.operation} was differentiated with create_graph=True inside the step"
            )
        return BelowAutograd()

    def report(self, use: Use, z: Tensor, g: Tensor) -> None:
        """See :class:`~l2rw_ext.layers.base.Sink`."""
        if use.index not in self._expected:
            return
        if self.probe is not None:
            self.probe.report(use, g)
            return
        if use.index in self._reported:
            raise NotExactError(
                f"{use.operation} on {use.shape} was differentiated more than once in the backward"
            )
        self._reported.add(use.index)
        planned = self._planned[use.index]
        if planned.joint and self._directions is None and self._second is None:
            self._postponed.append((use, planned, z, g))
            return
        if self._second is not None:
            self._add_second(self._second, use, self._rows(use, planned, z, g))
            return
        # First, because all processes gather it, and not all need have rows.
        directions = None if self._directions is None else self._directions_of(use)
        rows = self._rows(use, planned, z, g)
        if rows is not None:
            self._score(use, planned, *rows, directions)

    def finish(self) -> None:
        """Score what waited for the end of the backward.

        Raises:
            NotExactError: the backward did not pass through all uses.
        """
        for use in self.reached:
            if use.index not in self._reported:
                raise NotExactError(
                    f"the backward did not pass through {use.operation} on {use.shape}, which the "
                    "losses reach"
                )
        with BelowAutograd():
            while self._waiting:
                self._score_first()
            while self._groups:
                _, layers = self._groups.popitem()
                self._sums[0] += ops.factored_correlations(*zip(*layers, strict=True))
        if self._postponed:
            self._score_jointly()
        self._pushed.clear()
        if self._exchange is not None:
            (clean_loss,) = self._exchange.take(CLEAN_LOSS)
            self.clean_loss = clean_loss.to(self.clean_loss)
        found = [self._task.unscaled(u) for u in self._sums]
        if self._directions is None:
            found = [self._task.unscaled(u) for u in found]
        self.scores = found[0] if self._combination is None else torch.stack(found, 1)
        self._inner_products = self.scores
        if self._norms is not None:
            self.norms = self._task.unscaled(self._norms.finish())
            self.scores = _divided(self.scores, self.norms)

    def overflow(self) -> None:
        """Set all scores to NaN: the loss scale was too large for the gradients."""
        self.scores = self._inner_products = torch.full_like(self._sums[0], float("nan"))

    @property
    def products(self) -> Tensor:
        """See :class:`~l2rw_ext.engines.base.Scored`."""
        if self._combination is None:
            return self._inner_products
        products: Tensor = self._inner_products @ self._combination.factors.to(self.scores)
        return products

    def explain(self) -> Explanation:
        """See :class:`~l2rw_ext.engines.base.Scored`."""
        assert self.plan is not None
        explanation = Explanation.layerwise(self._task, self.plan, low_memory=self.low_memory)
        return replace(explanation, proof=self.proof)

    def _push(self, uses: list[Use], directions: Sequence[Mapping[int, Tensor]]) -> None:
        for root in (root for use in uses for root in use.roots if root is not None):
            if id(root) not in self._pushed:
                pushed = [self._leaves.push_forward(root, values) for values in directions]
                self._pushed[id(root)] = pushed
            self._left[id(root)] += 1

    def _directions_of(self, use: Use) -> list[Roots]:
        none = [None] * len(self._sums)
        weights, biases = (none if root is None else self._taken(id(root)) for root in use.roots)
        return list(zip(weights, biases, strict=True))

    def _taken(self, key: int) -> list[Tensor | None]:
        """Each direction of a root, for one of its uses.

        A sharded one is gathered for the first of them and kept until the last: other processes may
        have more of them or fewer, as in a loop over time.
        """
        found = [None if v is None else whole(v) for v in self._pushed.pop(key)]
        self._left[key] -= 1
        if self._left[key]:
            self._pushed[key] = found
        return found

    def _rows(
        self, use: Use, planned: UsePlan, z: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """The layer's z and g, examples first; None if g is zero or empty."""
        rows, task = planned.rows, self._task
        if task.concrete is not None:
            if rows is None:
                raise NotCompilableError(f"the output of {use.operation} was empty")
            size = {"merged": task.n + task.m, "train": task.n, "clean": task.m}[use.part]
            rows = rows.resized(math.prod(g.shape[: use.layer.leading(use, g)]), size)
        return None if rows is None else use.layer.prepare(use, z, g, rows)

    def _score(
        self, use: Use, planned: UsePlan, z: Tensor, g: Tensor, directions: list[Roots] | None
    ) -> None:
        """Score a use whose direction is known beforehand, or depends on no other use."""
        if directions is not None:
            self._correlate(use, planned.form, z, g, directions)
            return
        parts = (self._n, z.shape[0] - self._n)
        z, z_clean = torch.unsafe_split_with_sizes(z, parts)
        g, g_clean = torch.unsafe_split_with_sizes(g, parts)
        if self._exchange is None:
            self._score_by(use, planned.form, z, g, z_clean, g_clean)
            return
        (message,) = planned.messages
        sent: Roots = (z_clean, g_clean)
        if not message.gathered:
            sent = use.layer.direction(use, z_clean, g_clean)
        self._exchange.send(message.key, [x for x in sent if x is not None])
        self._waiting.append((use, planned, z, g))
        while self._waiting and self._exchange.arrived(
            self._waiting[0][1].messages[0].key, due=self._too_many_wait()
        ):
            self._score_first()

    def _too_many_wait(self) -> bool:
        """Whether more memory waits for the other ranks than a step may take."""
        freed = (
            self.low_memory or (planned.form == "per example" and not use.layer.reduces)
            for use, planned, *_ in self._waiting
        )
        return sum(freed) > _LARGEST_NUMBER_WAITING

    def _score_first(self) -> None:
        """Score the use that has waited longest, with what the ranks have exchanged."""
        use, planned, z, g = self._waiting.popleft()
        (message,) = planned.messages
        assert self._exchange is not None
        found = self._exchange.take(message.key)
        if message.gathered:
            self._score_by(use, planned.form, z, g, *found)
            return
        parts = iter(found)
        weight, bias = (None if root is None else next(parts) for root in use.roots)
        self._correlate(use, planned.form, z, g, [(weight, bias)])

    def _score_by(
        self, use: Use, form: str, z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor
    ) -> None:
        """Score a use by the rows of all clean examples."""
        if form == "factored":
            factors = use.layer.factors(use, z, g, z_clean, g_clean)
            if in_groups(g) and not self.low_memory:  # which keeps no tensors
                self._groups.setdefault((g.dtype, g.device), []).append(factors)
            else:
                self._sums[0] += ops.factored_correlation(*factors)
            self._keep(_Kept(use, z, g))
        else:
            self._correlate(use, form, z, g, [use.layer.direction(use, z_clean, g_clean)])

    def _correlate(
        self, use: Use, form: str, z: Tensor, g: Tensor, directions: Sequence[Roots]
    ) -> None:
        reaching = {k: v for k, v in enumerate(directions) if any(part is not None for part in v)}
        if form == "per example" and not use.layer.reduces:
            first, *others = reaching.values() or [None]
            examples, u = use.layer.example_gradients(use, z, g, first)
            self._keep(_Kept(use, examples=examples))
            if self._norms is not None:
                self._norms.add(use, examples)
            found = [u, *(_along(v, examples) for v in others if v is not None)]
        else:
            self._keep(_Kept(use, z, g))
            if self._norms is not None:
                self._norms.add(use, use.layer.single_gradients(use, z, g))
            found = [use.layer.correlation(use, z, g, v) for v in reaching.values()]
        for k, u in zip(reaching, found, strict=False):  # u is zero along no direction
            self._sums[k] += u.to(self._sums[k].dtype)

    def _keep(self, kept: _Kept) -> None:
        if not self.low_memory:
            self._kept.append(kept)

    def _score_jointly(self) -> None:
        """Score uses that share parameters, after summing their direction over all of them."""
        n = self._n
        totals: Totals = {}
        reports: list[tuple[Use, str, Tensor, Tensor]] = []
        training: list[tuple[Use, str, Tensor, Tensor]] = []
        postponed, self._postponed = self._postponed, []
        with BelowAutograd():
            for use, planned, z, g in postponed:
                if use.part == "clean":
                    _add_roots(totals, use, _whole_direction(use, z, g))
                    continue
                rows = self._rows(use, planned, z, g)
                if rows is not None:
                    reports.append((use, planned.form, *rows))
            for use, form, z, g in self._side_by_side(reports):
                training.append((use, form, z[:n], g[:n]))
                if use.part == "merged":
                    _add_roots(totals, use, use.layer.direction(use, z[n:], g[n:]))
        directions = self._leaves.pull_back(totals.values())
        if self._exchange is not None:
            directions = self._added_up(directions)
        self._push([use for use, *_ in training], [directions])
        with BelowAutograd():
            for use, form, z, g in training:
                self._correlate(use, form, z, g, self._directions_of(use))

    def _added_up(self, directions: dict[int, Tensor]) -> dict[int, Tensor]:
        """The directions of parameters, by id, summed over the ranks."""
        assert self._exchange is not None
        assert self.plan is not None
        sent = [message.key for message in self.plan.messages if message.key[0] == "parameter"]
        parameters = [self._leaves.parameters[place] for _, place in sent]
        for key, p in zip(sent, parameters, strict=True):
            own = directions.get(id(p))
            self._exchange.send(key, [torch.zeros_like(p) if own is None else own])
        return {id(p): self._exchange.take(key)[0] for key, p in zip(sent, parameters, strict=True)}

    def _side_by_side(
        self, reports: list[tuple[Use, str, Tensor, Tensor]]
    ) -> Iterator[tuple[Use, str, Tensor, Tensor]]:
        """Join uses of the same operands with few rows each, as of a cell in a loop."""
        trained = {use.index for use in self._trained}
        groups: dict[Any, list[tuple[Use, str, Tensor, Tensor]]] = {}
        for report in reports:
            use, form, z, g = report
            key: Any = use.index
            if use.layer.rows_add_up and g.shape[1] <= FEW_POSITIONS:
                operands = (use.layer, use.options, *map(id, use.roots))
                features = (z.shape[2:], g.shape[2:], g.dtype)
                key = (operands, use.part, form, use.index in trained, features)
            groups.setdefault(key, []).append(report)
        for group in groups.values():
            use, form, z, g = group[0]
            if len(group) > 1:
                z, g = torch.cat([r[2] for r in group], 1), torch.cat([r[3] for r in group], 1)
            yield use, form, z, g

    def weighted_gradients(
        self, weights: Tensor | None, *, keep: bool = False
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """See :class:`~l2rw_ext.engines.base.Scored`; frees what was kept as it goes."""
        (gradients,) = self.gradients_of([self._leaves.parameters], weights, keep=keep)
        return gradients

    def gradients_of(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        weights: Tensor | None,
        *,
        keep: bool = False,
        give: Give | None = None,
    ) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
        """See :class:`~l2rw_ext.engines.base.Scored`."""
        place = {id(p): k for k, group in enumerate(groups) for p in group}
        roots = {id(root): root for use in self._trained for root in use.roots if root is not None}
        totals: Totals = {}
        kept: list[list[_Kept]] = [[] for _ in groups]
        if weights is not None and self.again is not None:
            totals = self._second_backward(self.again, weights, give, keep=keep)
            if give is not None:
                roots = {key: root for key, root in roots.items() if root not in self._leaves}
        places = {key: sorted({place[s] for s in sources(root)}) for key, root in roots.items()}
        if weights is not None:
            trained = {use.index for use in self._trained}
            for item in self._kept:
                if item.use.index in trained:
                    first = min(places[id(root)][0] for root in item.use.roots if root is not None)
                    kept[first].append(item)
        if not keep:
            self._kept.clear()
            self.again = None
        for k, group in enumerate(groups):
            with BelowAutograd():
                while kept[k]:
                    item = kept[k].pop()
                    assert weights is not None
                    _add_roots(totals, item.use, _weighted(item, weights))
            present = [key for key, found in places.items() if k in found]
            for key in present:
                if key not in totals:
                    totals[key] = (roots[key], torch.zeros_like(roots[key]))
            gradients = self._leaves.pull_back([totals[key] for key in present], group)
            for key in present:
                if places[key][-1] == k:
                    del totals[key]
            yield [(p, gradients[id(p)].to(p.dtype)) for p in group if id(p) in gradients]

    def _second_backward(
        self,
        again: Callable[[Tensor, bool], None],
        weights: Tensor,
        give: Give | None,
        *,
        keep: bool,
    ) -> Totals:
        """Σ w_i ∇f_i if nothing was kept, from a second backward of Σ w_i f_i."""
        totals: Totals = {}
        self._second = _Second((weights != 0).to(weights.dtype), totals, give)
        self._expected = {use.index for use in self._trained}
        self._reported.clear()
        again(self._task.scaled(weights.to(self.losses.dtype)), keep)
        self._second = None
        return totals

    def _add_second(self, second: _Second, use: Use, rows: tuple[Tensor, Tensor] | None) -> None:
        """Take the part of the weighted gradient that a use of the second backward has."""
        if rows is not None:
            kept = _Kept(use, rows[0][: self._n], rows[1][: self._n])
            _add_roots(second.totals, use, _weighted(kept, second.ones))
        if second.give is None:
            return
        for root in use.roots:
            if isinstance(root, nn.Parameter) and root in self._leaves:
                _, g = second.totals.pop(id(root), (root, None))
                second.give([(root, torch.zeros_like(root) if g is None else g.to(root.dtype))])


def _along(direction: Roots, examples: Roots) -> Tensor:
    """<direction, G_i> of gradients of single examples, shape (n,)."""
    products = [
        G.flatten(1).to(V.dtype) @ V.flatten()
        for V, G in zip(direction, examples, strict=True)
        if V is not None and G is not None
    ]
    return torch.stack(products).sum(0)


def _divided(products: Tensor, norms: Tensor) -> Tensor:
    """Inner products (n, ...) over norms (n,): zero for a gradient of zero, NaN for no number."""
    norms = norms.view(-1, *[1] * (products.dim() - 1))
    return torch.where((norms > 0) & norms.isfinite(), products / norms, 0 * norms)


def _weighted(kept: _Kept, weights: Tensor) -> Roots:
    if kept.examples is not None:
        weight, bias = kept.examples
        return (
            None if weight is None else ops.weighted_sum(weight, _for(weight, weights)),
            None if bias is None else ops.weighted_sum(bias, _for(bias, weights)),
        )
    assert kept.z is not None
    assert kept.g is not None
    weights = _for(kept.g, weights)
    return kept.use.layer.weighted_gradient(kept.use, kept.z, kept.g, weights)


def _for(kept: Tensor, weights: Tensor) -> Tensor:
    """The weights in the dtype of sums of ``kept``; losses may have another dtype."""
    return weights.to(accumulation_dtype(kept.dtype))
