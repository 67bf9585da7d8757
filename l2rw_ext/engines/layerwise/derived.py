"""Maps between parameters and tensors derived from them, such as a transposed or chunked weight.

With w̃ = h(θ), the direction of θ is Jᵀ of the direction of w̃ (summed over all uses), and the
direction in which w̃ moves is J of that of θ. Both maps are small, because no batch is involved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from l2rw_ext.errors import NotExactError
from l2rw_ext.tracing.graph import sources
from l2rw_ext.tracing.shards import Shards, whole


class Leaves:
    """The trainable parameters, and the maps from and to tensors derived from them.

    Args:
        parameters: as the forward sees them.
        shards: those that are sharded, which are gathered while a map reads them.
    """

    def __init__(self, parameters: list[nn.Parameter], shards: Shards | None = None) -> None:
        self.parameters = parameters
        self._shards = shards
        self._ids = {id(p) for p in parameters}

    def __contains__(self, root: Tensor) -> bool:
        return id(root) in self._ids

    def pull_back(
        self,
        totals: Collection[tuple[Tensor, Tensor]],
        parameters: Sequence[nn.Parameter] | None = None,
    ) -> dict[int, Tensor]:
        """Jᵀ: from one (root, gradient) pair for each root to gradients by id of the parameter.

        They are those of all parameters, or of some to which every root leads.
        """
        parameters = self.parameters if parameters is None else parameters
        leaves = {id(root): gradient for root, gradient in totals if root in self}
        derived = [(root, value.to(root.dtype)) for root, value in totals if root not in self]
        if derived:
            with self._gathered([root for root, _ in derived]):
                pulled = torch.autograd.grad(
                    [root for root, _ in derived],
                    parameters,
                    [gradient for _, gradient in derived],
                    retain_graph=True,
                    allow_unused=True,
                )
            for p, gradient in zip(parameters, pulled, strict=True):
                if gradient is not None:
                    held = leaves.get(id(p))
                    leaves[id(p)] = gradient if held is None else held + gradient
        return leaves

    def push_forward(self, root: Tensor, directions: Mapping[int, Tensor]) -> Tensor | None:
        """J: the direction of a root, given those of the parameters; None if it is zero.

        For a derived root this is a backward through the backward of h, which works wherever that
        backward is differentiable.

        Raises:
            NotExactError: it is not.
        """
        if root in self:
            return directions.get(id(root))
        with self._gathered([root]):
            return self._pushed(root, directions)

    def _gathered(self, roots: Sequence[Tensor]) -> AbstractContextManager[None]:
        if self._shards is None:
            return nullcontext()
        return self._shards.gathered(frozenset[int]().union(*map(sources, roots)))

    def _pushed(self, root: Tensor, directions: Mapping[int, Tensor]) -> Tensor | None:
        cotangent = torch.zeros_like(root, requires_grad=True)
        pulled = torch.autograd.grad(
            root,
            self.parameters,
            cotangent,
            create_graph=True,
            retain_graph=True,
            allow_unused=True,
        )
        pairs = []
        for p, gradient in zip(self.parameters, pulled, strict=True):
            direction = directions.get(id(p))
            if gradient is None or direction is None:
                continue
            if not gradient.requires_grad:
                raise NotExactError(
                    f"a tensor of shape {tuple(root.shape)} is derived from parameters by an "
                    "operation whose backward cannot be differentiated"
                )
            pairs.append((gradient, whole(direction).to(gradient.dtype)))
        if not pairs:
            return None
        (pushed,) = torch.autograd.grad(
            [gradient for gradient, _ in pairs],
            cotangent,
            [direction for _, direction in pairs],
            allow_unused=True,
            retain_graph=True,
        )
        return pushed
