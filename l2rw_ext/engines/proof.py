"""An engine proves its numbers against plain autograd, at least once for each kind of step.

The model runs as its user would run it, without any mode or interception. Plain autograd then forms
<∇ Σ r_i f_i, v> and ∇ Σ r_i f_i for one draw of r, of which a few numbers are kept. The engine's
scores, and its weighted gradient for the weights r, have to agree with them. That shows what nobody
thought of: a derivative of torch that disagrees with its backward, a fast path that a function mode
switches off, a rule that is wrong for one option.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from l2rw_ext import devices
from l2rw_ext.data.batch import describe, tensors
from l2rw_ext.errors import NotExactError
from l2rw_ext.ops.arithmetic import accumulation_dtype
from l2rw_ext.task.isolation import Generators, HostGenerators, Snapshot
from l2rw_ext.task.task import Direction, Task, clean_direction, direction_of
from l2rw_ext.tracing.graph import nodes_from
from l2rw_ext.tracing.shards import whole

from .base import Scored

Key = tuple[Any, ...]


class Tolerance(NamedTuple):
    """The largest errors that rounding explains, by the coarsest dtype of the forward.

    ``own`` is relative to what is compared: the largest loss, Σ |∇_p| |v_p| over the parameters p,
    the norm of one parameter's gradient. ``shared`` is relative to the norm of the whole gradient,
    for a parameter whose gradient is nothing but rounding errors, such as a bias before a batch
    norm.
    """

    own: float
    shared: float


_TOLERANCES = {torch.float64: Tolerance(1e-9, 1e-12), torch.float32: Tolerance(1e-3, 1e-5)}
NARROW = Tolerance(5e-2, 3e-2)
"""For float16 and bfloat16."""

Plain: TypeAlias = tuple[Tensor, Direction | Tensor, Any]
"""Training losses of a plain forward, the direction or the clean losses, and outputs."""

_ROUNDING = 64
"""Rounding errors, in machine epsilons of the outputs' gradient, that a small loss may have."""

_SUMS = 2
"""Random sums that are kept of each gradient."""

_FEW = 16
"""How many sizes are each proved at once, and how often an incomplete proof is repeated."""

_LARGEST_NUMBER_OF_RECORDS = 64


class Proof:
    """Numbers of plain autograd for one step, to which an engine's are held.

    Args:
        task: the step.
        losses: training losses of a plain forward with their graph, shape (n,) or (n, ...).
        clean: the direction v, or the clean losses of the same forward, shape (m,).
    """

    def __init__(self, task: Task, losses: Tensor, clean: Direction | Tensor) -> None:
        self._task = task
        dtype = _coarsest(losses)
        self._tolerance = tolerance_of({dtype})
        self._eps = torch.finfo(dtype).eps
        self._losses = losses.detach()
        self._r = _weights(losses)
        self._rows: list[Tensor] = []
        parameters = task.parameters
        self._norm: tuple[int, float] | None = None
        """An example, and the norm of its gradient, if scores are divided by it."""
        if isinstance(clean, Direction) and clean.over is not None:
            self._norm = _norm(task, losses, clean.over)
        if not isinstance(clean, Direction):
            clean = direction_of(task, clean, retain=True)  # the graph is that of the losses, too
        found: dict[int, Tensor] = {}

        def direction(k: int) -> Tensor | None:
            v = clean.values.get(id(parameters[k]))
            if v is None:
                return None
            task.agreement.check_order(k)
            return _real(whole(v))

        def take(k: int, g: Tensor) -> None:
            found[k] = _row(k, _real(task.unscaled(g)), direction(k))

        _each_gradient(losses, task.scaled(self._r.to(losses.dtype)), parameters, take)
        for k in range(len(parameters)):
            self._rows.append(found[k] if k in found else _row(k, None, direction(k)))
        self.complete = all(row[0] != 0 for row in found.values())
        """Whether the gradient of each parameter that the losses reach is other than zero."""
        self._noise = torch.zeros(len(self._rows), dtype=torch.float64, device="cpu")
        values = torch.stack(self._rows).sum() + self._losses.sum().double().cpu()
        self.finite = math.isfinite(values.item())
        """Whether there are numbers to compare."""

    def losses_differ(self, losses: Tensor) -> bool:
        """Whether training losses are not those of the plain forward."""
        error = (losses.detach().double() - self._losses.double()).abs().max()
        return not bool(error <= self._tolerance.own * self._losses.double().abs().max())

    def differs(self, other: Proof) -> bool:
        """Whether other forwards give other losses, scores or gradients."""
        if self.losses_differ(other._losses):
            return True
        rows, others = torch.stack(self._rows), torch.stack(other._rows)
        norms, along, products, *_ = rows.T
        own, shared = self._tolerance
        of_product = own * (norms * along).sum()
        gradients = (rows[:, 3:] - others[:, 3:]).abs().amax(1) - own * norms
        wrong = float((products - others.T[2]).abs().sum()) > float(of_product)
        return wrong or bool((gradients > shared * norms.norm()).any())

    def allow_rounding(self, outputs: Any) -> None:
        """Allow for rounding errors of the size that the gradient of the model's outputs has.

        The gradient of a loss near zero is the difference of nearly equal numbers, so that two ways
        to compute it agree no better than their rounding errors, which follow the outputs.
        """
        found = [x for x in tensors(outputs) if x.requires_grad]
        if not found:
            return
        generator = torch.Generator("cpu").manual_seed(0)
        seeds = [
            (torch.randint(0, 2, x.shape, generator=generator, device="cpu") * 2 - 1).to(x)
            for x in found
        ]
        own = [0.0] * len(self._rows)

        def take(k: int, g: Tensor) -> None:
            own[k] = float(_real(g).norm())

        _each_gradient(found, seeds, self._task.parameters, take)
        self._noise = _ROUNDING * self._eps * torch.tensor(own, dtype=torch.float64, device="cpu")

    def disagreement(self, scored: Scored) -> str | None:
        """What of the scores and the weighted gradient plain autograd says otherwise."""
        norms, along, products, *sums = torch.stack(self._rows).T
        own, shared = self._tolerance
        found = float((self._r.double() * scored.products.double()).sum())
        allowed = float(((own * norms + self._noise) * along).sum())
        off = not abs(found - float(products.sum())) <= allowed
        if any(self._task.agreement.any(off)):
            return (
                f"the sum of its scores under random weights is {found}, by plain autograd it is "
                f"{float(products.sum())}"
            )
        if self._norm is not None and scored.norms is not None:
            example, norm = self._norm
            found = float(scored.norms[example])
            if not abs(found - norm) <= own * norm + float(self._noise.norm()):
                return (
                    f"the norm of the gradient of example {example} is {found}, by plain autograd "
                    f"it is {norm}"
                )
        parameters, shards = self._task.parameters, self._task.members.shards
        numbers = {id(p): k for k, p in enumerate(parameters)}
        rows = torch.zeros_like(torch.stack(self._rows))

        def give(gradients: list[tuple[nn.Parameter, Tensor]]) -> None:
            for p, g in gradients:
                k = numbers[id(p)]
                rows[k] += _row(k, _real(self._task.unscaled(g)), None)

        groups = [parameters] if shards is None else shards.groups
        for gradients in scored.gradients_of(groups, self._r, keep=True, give=give):
            give(gradients)
        rest = shared * float(norms.norm())
        for k, p in enumerate(parameters):
            error = max(float((rows[k, 3 + j] - s[k]).abs()) for j, s in enumerate(sums))
            if not error <= own * float(norms[k]) + rest + float(self._noise[k]):
                name = next(name for name, q in self._task.members.parameters if q is p)
                return f"its gradient of parameter {name!r} is not that of plain autograd"
        return None


def _norm(task: Task, losses: Tensor, over: Collection[int]) -> tuple[int, float]:
    """The example with the largest loss, and the norm of its gradient, by plain autograd."""
    example = int(losses.detach().argmax())
    seed = torch.zeros_like(losses)
    seed[example] = 1
    squares = [0.0]

    def take(k: int, g: Tensor) -> None:
        if id(task.parameters[k]) in over:
            squares.append(float(_real(task.unscaled(g)).double().square().sum()))

    _each_gradient(losses, task.scaled(seed), task.parameters, take)
    return example, math.sqrt(sum(squares))


def _row(k: int, g: Tensor | None, v: Tensor | None) -> Tensor:
    """|g|, |v|, <g, v> and random sums of g, for the k-th parameter; zeros for what is None."""
    row = torch.zeros(3 + _SUMS, dtype=torch.float64, device="cpu")
    if v is not None:
        row[1] = v.norm()
    if g is not None:
        row[0] = g.norm()
        row[2] = row[2] if v is None else g @ v.to(g.dtype)
        generator = torch.Generator(g.device).manual_seed(k)
        for j in range(_SUMS):
            row[3 + j] = g @ torch.randn(g.shape, generator=generator, device=g.device).to(g.dtype)
    return row


def _real(x: Tensor) -> Tensor:
    """A gradient as a real vector of its accumulation dtype."""
    x = x.detach()
    x = x.to_dense() if x.is_sparse else x
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.flatten().to(accumulation_dtype(x.dtype))


def _weights(losses: Tensor) -> Tensor:
    """Weights r in [1, 2), shape (n,): multiples of 1/64, exact in every floating dtype."""
    generator = torch.Generator("cpu").manual_seed(losses.numel())
    drawn = torch.randint(64, 128, losses.shape, generator=generator, device="cpu") / 64
    return drawn.to(losses.device, accumulation_dtype(losses.dtype))


def _each_gradient(
    outputs: Tensor | list[Tensor],
    seeds: Tensor | list[Tensor],
    parameters: Sequence[nn.Parameter],
    take: Callable[[int, Tensor], None],
) -> None:
    """Hand over each parameter's gradient by plain autograd when it is complete; keeps the graph.

    No two of them need be in memory at once.
    """
    if isinstance(outputs, Tensor) and not outputs.requires_grad:
        return

    def taken(k: int, g: Tensor | None) -> Tensor | None:
        if g is None:  # of an operation whose backward says that there is none
            return None
        take(k, g)
        return torch.zeros((), dtype=g.dtype, device=g.device).expand(g.shape)

    handles = [p.register_hook(functools.partial(taken, k)) for k, p in enumerate(parameters)]
    try:
        torch.autograd.grad(outputs, parameters, seeds, retain_graph=True, allow_unused=True)
    finally:
        for p, handle in zip(parameters, handles, strict=True):
            handle.remove()
            p._backward_hooks = None  # as they are in a step


def _coarsest(losses: Tensor) -> torch.dtype:
    """The coarsest floating dtype in the graph of the losses.

    Raises:
        RuntimeError: the backward of the graph would end the process.
    """
    dtypes = {losses.dtype}
    for node in nodes_from(losses, set()):
        if node.name() == "NativeGroupNormBackward0" and node.next_functions[0][0] is None:
            x = node._saved_input
            if x.device.type == "cpu" and not x.is_contiguous():
                # A segmentation fault of torch 2.13.
                raise RuntimeError("GroupNorm has no backward in channels_last without that of x")
        dtypes.update(data.dtype for data in node._input_metadata)
    return _coarsest_of(dtypes)


def _coarsest_of(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    real = {
        torch.empty((), dtype=t).abs().dtype for t in dtypes if t.is_floating_point or t.is_complex
    }
    return max(real, key=lambda t: torch.finfo(t).eps)


def tolerance_of(dtypes: Iterable[torch.dtype]) -> Tolerance:
    """The errors that rounding explains in computations with these dtypes."""
    return _TOLERANCES.get(_coarsest_of(dtypes), NARROW)


def due(step: int) -> bool:
    """Whether a step proves again what an earlier one has proved: steps 16, 256, 4096, ..."""
    return step >= 16 and step & (step - 1) == 0 and (step.bit_length() - 1) % 4 == 0


def plain_training(task: Task, direction: Direction) -> Plain:
    """A forward of the training batch, scored along a known direction."""
    outputs = task.forward(task.inputs)
    return task.losses(outputs), direction, outputs


def comparable(task: Task, losses: Tensor, clean: Direction | Tensor) -> Proof | None:
    """The numbers of a forward; None if plain autograd has none for its graph."""
    try:
        return Proof(task, losses, clean)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError):
        return None


@dataclass
class Record:
    """What is known of a kind of steps: whether it was proved, and when it is due again."""

    refused: str | None = None
    """How the engine disagrees with plain autograd, if it does."""
    note: str = "not compared with plain autograd yet"
    """A sentence for ``explain()``."""
    _impossible: bool = False
    _complete: bool = False
    _steps: int = 0
    _sizes: set[int] = field(default_factory=set)

    def due(self, size: Key | None) -> bool:
        """Count a step, and tell whether it is to be proved; no ``size`` says that it is known.

        Raises:
            NotExactError: the engine is known to disagree with plain autograd.
        """
        if self.refused is not None:
            raise NotExactError(self.refused)
        step, self._steps = self._steps, self._steps + 1
        if self._impossible:
            return False
        new = size is not None and len(self._sizes) < _FEW and hash(size) not in self._sizes
        if new:
            self._sizes.add(hash(size))
        return new or self._repeated(step)

    @property
    def settled(self) -> bool:
        """Whether a step of a known size would run without a proof now."""
        if self.refused is not None:
            return False
        return self._impossible or not self._repeated(self._steps)

    def _repeated(self, step: int) -> bool:
        missing = not self._complete and (step < _FEW or step & (step - 1) == 0)
        return missing or due(step)

    def scored(
        self,
        task: Task,
        snapshot: Snapshot,
        size: Key | None,
        plain: Callable[[Task], Plain],
        score: Callable[[], Scored],
    ) -> Scored:
        """The result of ``score``, proved if that is due.

        ``plain`` runs a forward without any mode and returns what :class:`Proof` takes.

        Raises:
            NotExactError: the engine disagrees with plain autograd.
        """
        with task.agreement.at("the proof", NotExactError):
            due = not devices.tracing() and self.due(size)
        (due,) = task.agreement.any(due)
        scored = self._proved(task, snapshot, plain, score) if due else score()
        scored.proof = self.note
        return scored

    def _proved(
        self,
        task: Task,
        snapshot: Snapshot,
        plain: Callable[[Task], Plain],
        score: Callable[[], Scored],
    ) -> Scored:
        """The result of ``score``, after a comparison from the present state and generators."""
        devices = task.members.devices()
        start, host = Generators(devices), HostGenerators()
        proof, impossible = None, ""
        anywhere = task.agreement.any
        try:
            with task.agreement.forward("the plain forward", _ImpossibleError), _raises():
                losses, clean, _ = plain(task)
            with _raises():
                proof = Proof(task, losses, clean)
        except _ImpossibleError as error:
            impossible = f"not compared with plain autograd, which raises: {error}"

        def restart() -> None:
            start.restore()
            host.restore()
            snapshot.restore_state()

        def repeat(task: Task) -> Plain:
            after, generators, drawn = snapshot.now(), Generators(devices), HostGenerators()
            restart()
            try:
                with task.agreement.forward("the repeated forward"):
                    return plain(task)
            finally:
                drawn.restore()
                generators.restore()
                after.restore()

        restart()
        scored = score()
        if any(anywhere(proof is None)) or proof is None:
            self._impossible, self.note = True, impossible or "not compared in another process"
            return scored
        if any(anywhere(not proof.finite)):
            return scored  # there are no numbers to compare, and the next step is due
        if any(anywhere(proof.losses_differ(scored.losses))):
            repeated, *_ = repeat(task)
            if any(anywhere(proof.losses_differ(repeated))):
                self._impossible = True
                self.note = "not comparable with plain autograd: two forwards give other losses"
                return scored
            found: str | None = "its losses are not those of the model's plain forward"
        else:
            found = proof.disagreement(scored)
            if any(anywhere(found is not None)):
                proof.allow_rounding(repeat(task)[2])
                found = proof.disagreement(scored)
        if any(anywhere(found is not None)):
            found = found or "its numbers in another process are not those"
            self.refused = f"the engine disagrees with plain autograd: {found}"
            raise NotExactError(self.refused)
        self._complete = proof.complete
        self.note = f"agrees with plain autograd, compared at step {self._steps} of this kind"
        if not proof.complete:
            self.note += ", where some parameter's gradient was zero"
        return scored


class _ImpossibleError(Exception):
    """Plain autograd has no numbers to compare with."""


@contextlib.contextmanager
def _raises() -> Iterator[None]:
    """A body of plain training, whose error may be the user's own: it comes back from the engine.

    Raises:
        _ImpossibleError: the body has raised.
    """
    try:
        yield
    except (NotExactError, torch.OutOfMemoryError):
        raise
    except (AttributeError, RuntimeError) as error:
        raise _ImpossibleError(str(error).partition("\n")[0]) from error


class Proofs:
    """The records of an engine, one for each kind of step.

    A proof is due at the first step of a kind and at its steps 16, 256, 4096, ... Kinds that differ
    in sizes alone count as one, and of them the first sixteen are each proved at once. While some
    parameter has a gradient of zero, which proves nothing of it, a proof is due at each of the
    first sixteen steps and then at powers of two.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[Key, Record] = OrderedDict()

    def of(self, task: Task, *more: Any) -> Record:
        """The record of this kind of step; ``more`` is what else the engine tells kinds by."""
        key = (
            tuple(map(_kind, pytree.tree_leaves(task.inputs))),
            *task.settings,
            *more,
        )
        record = self._records.setdefault(key, Record())
        self._records.move_to_end(key)
        if len(self._records) > _LARGEST_NUMBER_OF_RECORDS:
            self._records.popitem(last=False)
        return record

    def along(
        self,
        task: Task,
        snapshot: Snapshot,
        given: Direction | None,
        score: Callable[[Task, Snapshot, Direction, bool], Scored],
    ) -> Scored:
        """The result of an engine that knows the direction first, proved if that is due.

        ``score`` is also told whether the direction was ``given``; else it is the clean batch's.

        Raises:
            NotExactError: the engine disagrees with plain autograd.
        """
        direction = clean_direction(task, snapshot) if given is None else given
        return self.of(task).scored(
            task,
            snapshot,
            (task.n, describe(task.inputs)),
            lambda task: plain_training(task, direction),
            lambda: score(task, snapshot, direction, given is not None),
        )


def _kind(leaf: Any) -> Any:
    """What a leaf of the inputs says of the kind of a step, apart from sizes."""
    if isinstance(leaf, Tensor):
        return leaf.dim(), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, (bool, str)) else type(leaf)
