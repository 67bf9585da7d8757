"""Weighted gradients of parameters that are sharded (FSDP2)."""

from __future__ import annotations

from torch import Tensor

from l2rw_ext.engines.base import GraphScored, Scored
from l2rw_ext.task.task import Task
from l2rw_ext.tracing.shards import Shards

from .gradients import Gradients


def sharded_gradients(task: Task, shards: Shards, scored: Scored, weights: Tensor) -> Gradients:
    """Σ w_i ∇f_i over the examples of all processes, as FSDP shards it, by the sharded parameter.

    All processes call this together, also those whose weights are all zero. Of the gradients before
    they are sharded, those of one of FSDP's groups are in memory at a time.

    Args:
        task: the step.
        shards: its sharded parameters.
        scored: this process's scores.
        weights: of this process's examples, shape (n,).
    """
    if isinstance(scored, GraphScored):  # the backward of a plain step
        seeds = task.scaled(weights.to(scored.losses.dtype))
        reduced = shards.gradients(scored.attached, task.parameters, seeds, retain=False)
    else:
        groups = shards.groups
        parts = scored.gradients_of(groups, weights, give=shards.give)
        for group, gradients in zip(groups, parts, strict=True):
            shards.give(gradients)
            del gradients
            shards.reduce(group)
        reduced = shards.take()
    return [(shards.shard_of(p), reduced[id(p)]) for p in task.parameters if id(p) in reduced]
