"""Walks over autograd's graph: what the losses reach, and what a tensor is derived from."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def nodes_from(start: Tensor, seen: set[Any]) -> Iterator[Any]:
    """The nodes of autograd's graph that lead to a tensor, but for those already seen."""
    stack = [start.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions)


def _accumulate_type() -> Any:
    leaf = torch.zeros((), requires_grad=True)
    node = leaf.view_as(leaf).grad_fn
    assert node is not None
    return type(node.next_functions[0][0])


_ACCUMULATE = _accumulate_type()


def leaf_of(node: Any) -> Tensor | None:
    """The leaf whose gradient a node accumulates; None for any other node."""
    leaf: Tensor | None = node.variable if isinstance(node, _ACCUMULATE) else None
    return leaf


def check_parameters(loss: Tensor, known: Collection[nn.Parameter]) -> None:
    """Check that a loss depends on no other parameters than those that are known.

    Other leaves that require grad are inputs, as positions that a model of forces differentiates.

    Raises:
        ValueError: it does; such a parameter would get no gradient, and no part in the scores.
    """
    ids = {id(p) for p in known}
    for node in nodes_from(loss, set()):
        leaf = leaf_of(node)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in ids:
            raise foreign(leaf)


def foreign(parameter: Tensor) -> ValueError:
    """The error for a parameter that no module of the step holds."""
    return ValueError(
        f"the losses depend on a parameter of shape {tuple(parameter.shape)} that belongs neither "
        "to the model nor to a loss function that is a torch.nn.Module, so that it would get no "
        "gradient; register it in one of them, or freeze it with requires_grad_(False)"
    )


def sources(root: Tensor) -> frozenset[int]:
    """The ids of the parameters that a root is computed from; for a parameter, only its id."""
    if root.grad_fn is None:
        return frozenset((id(root),))
    leaves = (leaf_of(node) for node in nodes_from(root, set()))
    return frozenset(id(leaf) for leaf in leaves if leaf is not None)
