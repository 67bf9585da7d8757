"""What becomes of the tensors that autograd saves now."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils import checkpoint


def hooked() -> bool:
    """Whether hooks take them, those of a checkpoint or others."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def recomputed() -> bool:
    """Whether a checkpoint drops them, to compute them again in backward."""
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return top is not None and top[0].__module__ == checkpoint.__name__


def kept() -> AbstractContextManager[None]:
    """A context in which autograd saves tensors as it does outside of a checkpoint."""
    # Detached, because a node that saved its own output as it is would keep itself alive; autograd
    # gives what is unpacked its place in the graph again.
    return torch.autograd.graph.saved_tensors_hooks(_detached, lambda x: x)


def _detached(x: Tensor) -> Tensor:
    return x.detach()
