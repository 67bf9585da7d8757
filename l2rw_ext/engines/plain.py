"""Whose error it is that ends a step: that of an engine, or one that plain training raises too.

An engine intercepts calls, carries tangents or differentiates twice, and a model that plain
training accepts may not stand that. Another engine does such a step. An error that plain training
raises as well is the user's, who has to see it as it is.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from l2rw_ext import devices
from l2rw_ext.errors import NotExactError
from l2rw_ext.task.isolation import Snapshot
from l2rw_ext.task.task import Task, clean_direction, require_grad

T = TypeVar("T")


def judged(part: Callable[[], T], engine: str, task: Task, snapshot: Snapshot, *, given: bool) -> T:
    """The result of a part of an engine's step, whose errors are compared with plain training.

    After an error the same forwards and backwards run as in plain training, from the same state. A
    step that is traced is not repeated: its error is raised as it is. So is an error for want
    of memory, and one of a process that shares its forwards with others.

    Args:
        part: what the engine does.
        engine: its name.
        task: the step.
        snapshot: the state before the step.
        given: whether the direction is, so that the clean batch is not used.

    Raises:
        NotExactError: the engine raised it, or plain training does not raise what it raised.
    """
    try:
        return part()
    except (NotExactError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if devices.tracing() or task.agreement.shared:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the graph, and another is coming
        raised = error
    # Out of the handler, so that an error of the user's has no other for a context.
    snapshot.restore()
    _train(task, snapshot, given=given)
    line = str(raised).partition("\n")[0]
    raise NotExactError(
        f"the {engine} engine fails where plain training does not: {type(raised).__name__}: {line}"
    ) from raised


def _train(task: Task, snapshot: Snapshot, *, given: bool) -> None:
    """The forwards and backwards of a step, as in plain training."""
    if not given:
        clean_direction(task, snapshot)
    losses = task.forward_train()
    require_grad(losses)
    seed = task.scaled(torch.ones_like(losses))
    shards = task.members.shards
    if shards is None:
        torch.autograd.grad(losses, task.parameters, seed, allow_unused=True)
    else:
        shards.gradients(losses, task.parameters, seed, retain=False)
