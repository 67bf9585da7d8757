"""Whether the uses of a forward account for every parameter that its losses reach."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext.errors import NotExactError
from l2rw_ext.layers.base import Use

from .graph import foreign, leaf_of, nodes_from, sources
from .interception import Interception
from .shards import passes_on


def check_graph(
    interception: Interception, losses: Iterable[Tensor]
) -> tuple[list[set[int]], list[int]]:
    """What the losses reach.

    Returns:
        the indices of the uses that the first loss reaches, then the first two losses, and so on;
        and the numbers of all nodes in the order of the walk, which tell two graphs apart: nodes
        are numbered as they are made in the forward.

    Raises:
        NotExactError: a parameter is reachable past the intercepted uses, or a custom autograd
            Function may hide parameters.
        ValueError: see :func:`~.graph.check_parameters`.
    """
    reached: set[int] = set()
    after_each: list[set[int]] = []
    numbers: list[int] = []
    seen: set[Any] = set()
    first = interception.first_node
    hides = ""
    for loss in losses:
        for node in nodes_from(loss, seen):
            leaf = leaf_of(node)
            numbers.append(-1 if leaf is not None else node._sequence_nr() - first)
            if isinstance(leaf, nn.Parameter):
                if id(leaf) not in interception.names:
                    raise foreign(leaf)
                raise NotExactError(_uncovered(interception, leaf))
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                use = getattr(node, "use", None)
                if isinstance(use, Use):
                    reached.add(use.index)
                    _check_roots(interception, use)
                elif interception.without_grad is not None and not passes_on(node):
                    hides = type(node).__name__
        after_each.append(set(reached))
    if hides:
        raise NotExactError(
            f"parameter {interception.without_grad!r} is used without grad and the custom autograd "
            f"function {hides} may hide that use"
        )
    return after_each, numbers


def _check_roots(interception: Interception, use: Use) -> None:
    """Raise if a derived root depends on a layer's output, which it would hide, or was written."""
    for root, version in zip(use.roots, use.versions, strict=True):
        if root is None or root.grad_fn is None:
            continue
        if id(interception.token) in sources(root):
            raise NotExactError(
                f"{interception.name_of(root)} also depends on the output of a layer, so that the "
                "gradient takes a way past that layer"
            )
        if root._version != version:
            raise NotExactError(
                f"{interception.name_of(root)} was changed in place after {use.operation} used it"
            )


def _uncovered(interception: Interception, parameter: Tensor) -> str:
    name = interception.names[id(parameter)]
    operation = interception.unruled.get(id(parameter))
    if operation is None:
        operation = next(iter(interception.unruled.values()), None)
    if operation is None:
        return (
            f"parameter {name!r} is used where no torch function is seen, as in a scripted module "
            "or a custom autograd function"
        )
    return f"parameter {name!r} goes into {operation}, which has no layer-wise rule"
