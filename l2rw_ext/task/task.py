"""One step's work: a model, its losses, the two batches, and the clean batch's direction."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from l2rw_ext.data.batch import LossFn, forward
from l2rw_ext.data.batch_size import BatchSize
from l2rw_ext.devices import Autocast
from l2rw_ext.errors import noted
from l2rw_ext.ops.arithmetic import accumulation_dtype
from l2rw_ext.tracing.graph import check_parameters
from l2rw_ext.tracing.members import Members
from l2rw_ext.weighing import Weighing

from .agreement import Agreement
from .cached_weights import forget_cached_weights
from .isolation import Snapshot


@dataclass(frozen=True)
class Task:
    """One step's work: the model, its losses and the two checked batches."""

    model: nn.Module
    members: Members
    loss_fn: LossFn
    clean_loss_fn: LossFn
    inputs: Any
    targets: Any
    clean_inputs: Any
    clean_targets: Any
    size: BatchSize
    clean_size: BatchSize | None
    """None if there is no clean batch."""
    parameters: list[nn.Parameter]
    loss_scale: Tensor | None = None
    """The factor of a gradient scaler, shape (); gradients carry it, scores do not."""
    low_memory: bool | Literal["auto"] = False
    """Whether to keep no z and g of a layer, and to run a second backward instead; "auto" if the
    model checkpoints."""
    autocast: Autocast = field(default_factory=Autocast)
    """The caller's autocast, under which the model and the loss functions run."""
    weighing: Weighing | None = None
    """The user's function from scores to weights, if there is one."""
    agreement: Agreement = field(default_factory=Agreement)
    """With the processes among which parameters are sharded."""
    concrete: Task | None = None
    """If the sizes of the batches are symbols: an equal step whose sizes are numbers, which ran."""
    stand_ins: Mapping[int, Tensor] = field(default_factory=dict)
    """By id of a tensor of that step: what stands for it in this one."""

    @property
    def n(self) -> int:
        """The number of training examples: a guess until the training losses are known."""
        return self.size.number

    @property
    def m(self) -> int:
        """The number of clean examples, a guess until the clean losses are known; 0 for none."""
        return 0 if self.clean_size is None else self.clean_size.number

    @property
    def settings(self) -> tuple[Any, ...]:
        """What a forward depends on besides its batch: modes, parameters, losses, autocast."""
        return (
            self.members.training,
            tuple(map(id, self.parameters)),
            id(self.loss_fn),
            id(self.clean_loss_fn),
            self.autocast.key,
        )

    def scaled(self, seed: Tensor) -> Tensor:
        """The seed of a backward, times the loss scale."""
        return seed if self.loss_scale is None else seed * self.loss_scale.to(seed.dtype)

    def unscaled(self, value: Tensor) -> Tensor:
        """The result of a backward with :meth:`scaled` seeds, without the loss scale."""
        return value if self.loss_scale is None else value / self.loss_scale.to(value.dtype)

    def losses(self, outputs: Any) -> Tensor:
        """Unreduced training losses of the model's outputs, shape (n,) or (n, ...)."""
        with self.autocast:
            return self.size.losses(self.loss_fn, outputs, self.targets)

    def clean_losses(self, outputs: Any) -> Tensor:
        """Unreduced clean losses of the model's outputs, shape (m,)."""
        assert self.clean_size is not None
        with self.autocast:
            losses = self.clean_size.losses(self.clean_loss_fn, outputs, self.clean_targets)
            if self.clean_size.mask is None or self.clean_size.count is None:
                return losses
            # The mean over all positions is then that over those that count.
            return losses * (losses.numel() / self.clean_size.count.clamp(min=1))

    def forward(self, inputs: Any) -> Any:
        """The model's outputs."""
        forget_cached_weights()
        with self.autocast:
            return forward(self.model, inputs)

    def forward_train(self) -> Tensor:
        """The training losses from one forward of the training batch, shape (n,)."""
        with noted("forward of the training batch"):
            return self.losses(self.forward(self.inputs))

    def forward_clean(self) -> Tensor:
        """The clean losses from one forward of the clean batch, shape (m,)."""
        with noted("forward of the clean batch"):
            return self.clean_losses(self.forward(self.clean_inputs))


def require_grad(losses: Tensor) -> None:
    """Raise if no trainable parameter reaches the training losses."""
    if not losses.requires_grad:
        raise ValueError("training batch: the losses do not depend on any trainable parameter")


def check_losses(losses: Tensor, task: Task) -> None:
    """Check training losses of which an engine keeps autograd's graph.

    Raises:
        ValueError: no trainable parameter reaches them, or one does that the step does not know.
    """
    require_grad(losses)
    check_parameters(losses, task.parameters)


def check_clean_loss(value: Tensor) -> None:
    """Raise ValueError if a mean clean loss, shape (), is not finite; this reads its value."""
    if not math.isfinite(value.item()):
        raise ValueError(
            f"clean batch: the mean loss is {float(value)}; weights from it would be meaningless. "
            "No gradient was accumulated"
        )


@dataclass(frozen=True)
class Direction:
    """v, the gradient of the mean clean loss, possibly changed by an option."""

    values: Mapping[int, Tensor]
    """v by id of the parameter, in its shape, without the loss scale; absent if it is zero. That of
    a sharded parameter is sharded as it is."""
    clean_loss: Tensor
    """The mean clean loss, shape (), detached."""
    count: Tensor | None = None
    """Of how many losses it is the mean, shape (); None for one loss of each example."""
    over: frozenset[int] | None = None
    """If scores are divided by the norms of single gradients: of these parameters, by id."""

    def drop(self) -> None:
        """Forget v, which is not needed any more, so that its memory is free for the gradient."""
        if isinstance(self.values, dict):
            self.values.clear()

    def of(self, task: Task) -> Direction:
        """The direction in a step that may be on stand-ins."""
        found = task.stand_ins
        if not found:
            return self
        values = {id(found[key]): found[id(v)] for key, v in self.values.items()}
        over = None if self.over is None else frozenset(id(found[key]) for key in self.over)
        return Direction(values, found[id(self.clean_loss)], over=over)


class Combination(Mapping[int, Tensor]):
    """Σ_k c_k v_k of several directions, each of which has scores of its own in one step.

    The scores along it are Σ_k c_k u_k, so that what proves these proves the others. It is formed
    where a proof asks for it, parameter by parameter.

    Args:
        parts: v_k by id of the parameter.
    """

    def __init__(self, parts: Sequence[Mapping[int, Tensor]]) -> None:
        self.parts = parts

    @functools.cached_property
    def factors(self) -> Tensor:
        """c, shape (q,), float64, on the CPU.

        No direction hides another, and two that are opposite do not cancel.
        """
        norms = torch.stack([norm_of(values).cpu() for values in self.parts])
        q = len(self.parts)
        factors = 1 + torch.arange(q, dtype=norms.dtype, device=norms.device) / q
        return torch.where(norms > 0, factors / norms, torch.zeros_like(norms))

    def __getitem__(self, key: int) -> Tensor:
        found = [
            values[key] * c.to(values[key])
            for values, c in zip(self.parts, self.factors, strict=True)
            if key in values
        ]
        if not found:
            raise KeyError(key)
        return torch.stack(found).sum(0)

    def __iter__(self) -> Iterator[int]:
        return iter(dict.fromkeys(key for values in self.parts for key in values))

    def __len__(self) -> int:
        return len(list(iter(self)))


def norm_of(values: Mapping[int, Tensor]) -> Tensor:
    """|v| over all parameters, shape (), float64."""
    found = [torch.linalg.vector_norm(v, dtype=torch.float64) for v in values.values()]
    if not found:
        return torch.zeros((), dtype=torch.float64)
    norm: Tensor = torch.stack([own.to(found[0]) for own in found]).norm()
    return norm


def clean_direction(task: Task, snapshot: Snapshot) -> Direction:
    """Compute v from one forward and backward of the clean batch, and restore the state.

    If no parameter reaches the clean loss, the direction is zero.
    """
    with task.agreement.forward("the forward of the clean batch"):
        losses = task.forward_clean()
        check_parameters(losses, task.parameters)
    direction = direction_of(task, losses)
    snapshot.restore_state()
    assert task.clean_size is not None
    count, clean_loss = task.clean_size.count, direction.clean_loss
    if count is not None:  # of no losses there is no mean
        clean_loss = clean_loss.masked_fill(count == 0, math.nan)
    return replace(direction, clean_loss=clean_loss, count=count)


def direction_of(task: Task, losses: Tensor, *, retain: bool = False) -> Direction:
    """The gradient of the mean of clean losses, by plain autograd; ``retain`` keeps the graph.

    If parameters are sharded, the mean is that over all processes.
    """
    values = {}
    shards = task.members.shards
    if shards is not None:
        number, mean = task.agreement.mean(losses.detach())
        if losses.requires_grad:
            seed = task.scaled(torch.ones_like(losses) / number)
            reduced = shards.gradients(losses, task.parameters, seed, retain=retain)
            values = {
                id(p): task.unscaled(reduced[id(p)]).to(accumulation_dtype(p.dtype))
                for p in task.parameters
                if id(p) in reduced
            }
        return Direction(values, mean)
    if losses.requires_grad:
        seed = task.scaled(torch.full_like(losses, 1 / losses.numel()))
        gradients = torch.autograd.grad(losses, task.parameters, seed, retain, allow_unused=True)
        values = {
            id(p): task.unscaled(g.to_dense() if g.is_sparse else g)
            for p, g in zip(task.parameters, gradients, strict=True)
            if g is not None
        }
    return Direction(values, losses.detach().mean())
