"""Walks over autograd's graph: what the losses reach, and what a tensor is derived from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext.errors import NotExactError
from l2rw_ext.layers.base import Use

from .interception import Interception


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
            raise ValueError(_foreign(leaf))


def _foreign(parameter: Tensor) -> str:
    return (
        f"the losses depend on a parameter of shape {tuple(parameter.shape)} that belongs neither "
        "to the model nor to a loss function that is a torch.nn.Module, so that it would get no "
        "gradient; register it in one of them, or freeze it with requires_grad_(False)"
    )


def check_graph(
    interception: Interception, losses: Iterable[Tensor]
) -> tuple[list[set[int]], list[str]]:
    """What the losses reach.

    Returns:
        the indices of the uses that the first loss reaches, then the first two losses, and so on;
        and the names of all nodes in the order of the walk, which tell two graphs apart.

    Raises:
        NotExactError: a parameter is reachable past the intercepted uses, or a custom autograd
            Function may hide parameters.
        ValueError: see :func:`check_parameters`.
    """
    reached: set[int] = set()
    after_each: list[set[int]] = []
    names: list[str] = []
    seen: set[Any] = set()
    hides = ""
    for loss in losses:
        for node in nodes_from(loss, seen):
            names.append(node.name())
            leaf = leaf_of(node)
            if isinstance(leaf, nn.Parameter):
                if id(leaf) not in interception.names:
                    raise ValueError(_foreign(leaf))
                raise NotExactError(_uncovered(interception, leaf))
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                use = getattr(node, "use", None)
                if isinstance(use, Use):
                    reached.add(use.index)
                    _check_roots(interception, use)
                elif interception.without_grad is not None:
                    hides = type(node).__name__
        after_each.append(set(reached))
    if hides:
        raise NotExactError(
            f"parameter {interception.without_grad!r} is used without grad and the custom autograd "
            f"function {hides} may hide that use"
        )
    return after_each, names


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


def sources(root: Tensor) -> frozenset[int]:
    """The ids of the parameters that a root is computed from; for a parameter, only its id."""
    if root.grad_fn is None:
        return frozenset((id(root),))
    leaves = (leaf_of(node) for node in nodes_from(root, set()))
    return frozenset(id(leaf) for leaf in leaves if leaf is not None)
