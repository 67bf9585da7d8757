"""Walks over autograd's graph: what the losses reach, and what a tensor is derived from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from l2rw_ext.errors import NotExactError
from l2rw_ext.layers.base import Use

from .interception import Interception


def check_graph(interception: Interception, losses: Iterable[Tensor]) -> list[set[int]]:
    """The indices of the uses that the first loss reaches, then the first two losses, and so on.

    Raises:
        NotExactError: a gradient accumulator is reachable past the intercepted uses, or a custom
            autograd Function may hide parameters.
    """
    reached: set[int] = set()
    after_each: list[set[int]] = []
    seen: set[Any] = set()
    hides = ""
    for loss in losses:
        stack = [loss.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if isinstance(node, _ACCUMULATE):
                variable = _leaf_of(node)
                if variable is not interception.token:
                    raise NotExactError(_uncovered(interception, variable))
                continue
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                use = getattr(node, "use", None)
                if isinstance(use, Use):
                    reached.add(use.index)
                    for root, version in zip(use.roots, use.versions, strict=True):
                        if root is not None and root.grad_fn is not None:
                            _check_derivation(interception, root)
                            if root._version != version:
                                raise NotExactError(
                                    f"{interception.name_of(root)} was changed in place after "
                                    f"{use.operation} used it"
                                )
                elif interception.without_grad is not None:
                    hides = type(node).__name__
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    stack.append(following)
        after_each.append(set(reached))
    if hides:
        raise NotExactError(
            f"parameter {interception.without_grad!r} is used without grad and the custom autograd "
            f"function {hides} may hide that use"
        )
    return after_each


def _check_derivation(interception: Interception, root: Tensor) -> None:
    """Raise if a derived root depends on the output of a layer, whose use it would hide."""
    if id(interception.token) in sources(root):
        raise NotExactError(
            f"{interception.name_of(root)} also depends on the output of a layer, so that the "
            "gradient takes a way past that layer"
        )


def _uncovered(interception: Interception, variable: Tensor) -> str:
    name = interception.names.get(id(variable))
    if name is None:
        return (
            f"a tensor of shape {tuple(variable.shape)} that is no parameter of the model requires "
            "grad"
        )
    operation = interception.unruled.get(id(variable))
    if operation is None:
        operation = next(iter(interception.unruled.values()), None)
    if operation is None:
        return (
            f"parameter {name!r} is used where no torch function is seen, as in a scripted module "
            "or a custom autograd function"
        )
    return f"parameter {name!r} goes into {operation}, which has no layer-wise rule"


def _accumulate_type() -> type:
    leaf = torch.zeros((), requires_grad=True)
    node = leaf.view_as(leaf).grad_fn
    assert node is not None
    return type(node.next_functions[0][0])


_ACCUMULATE = _accumulate_type()


def _leaf_of(accumulator: Any) -> Tensor:
    """The leaf that a node of the type ``_ACCUMULATE`` belongs to."""
    leaf: Tensor = accumulator.variable
    return leaf


def sources(root: Tensor) -> frozenset[int]:
    """The ids of the parameters that a root is computed from; for a parameter, only its id."""
    if root.grad_fn is None:
        return frozenset((id(root),))
    found: set[int] = set()
    seen = {root.grad_fn}
    stack = [root.grad_fn]
    while stack:
        node = stack.pop()
        if isinstance(node, _ACCUMULATE):
            found.add(id(_leaf_of(node)))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return frozenset(found)
