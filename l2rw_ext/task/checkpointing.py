"""Reentrant checkpoints run as non-reentrant ones during a step.

``torch.utils.checkpoint`` with ``use_reentrant=True`` hides the operations inside it from autograd
and forbids ``autograd.grad``. The non-reentrant kind computes the same numbers, and all engines can
see the operations inside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import checkpoint


class _NonReentrant:
    """Replaces ``CheckpointFunction``, by which ``checkpoint`` runs the reentrant kind."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """The outputs of the function.

        Raises:
            ValueError: the reentrant kind would have trained nothing, without a word but a warning.
        """
        if not torch.is_grad_enabled():
            return function(*args)
        out = checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
        if not any(_requires_grad(a) for a in args) and any(
            _requires_grad(x) for x in pytree.tree_leaves(out)
        ):
            raise ValueError(
                "a checkpoint with use_reentrant=True none of whose inputs requires grad does not "
                "train the parameters inside it; use use_reentrant=False"
            )
        return out


def _requires_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


SERVES_ONCE = (
    "a checkpoint whose context_fn serves one recomputation (a selective one, or contexts made of "
    "generators) cannot be differentiated several times; use engine='forward'"
)


def serves_once(error: BaseException) -> bool:
    """Whether an error of a backward, raised by torch or by contextlib, has this reason."""
    text = str(error)
    if isinstance(error, AttributeError):
        return "_GeneratorContextManager" in text
    return isinstance(error, RuntimeError) and "selective activation checkpoint" in text


def recomputed() -> bool:
    """Whether a checkpoint drops what autograd saves now, to compute it again in backward."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top is not None and top[0].__module__ == checkpoint.__name__


def kept() -> AbstractContextManager[None]:
    """A context in which autograd saves tensors as it does outside of a checkpoint."""
    # Detached, because a node that saved its own output as it is would keep itself alive; autograd
    # gives what is unpacked its place in the graph again.
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x)


@contextlib.contextmanager
def non_reentrant() -> Iterator[None]:
    """In the body, checkpoints of the whole process are non-reentrant."""
    # To mypy this name is one class; here another class replaces it on purpose.
    original = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _NonReentrant  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = original  # type: ignore[misc]
