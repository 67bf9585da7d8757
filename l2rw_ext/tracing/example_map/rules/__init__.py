"""How operations carry ids on; importing this package registers the rules."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..call import RULES, Rule
from . import elementwise, indexing, layers, products, views

__all__ = ["elementwise", "indexing", "layers", "products", "rule_of", "views"]


@functools.cache
def rule_of(func: Any) -> Rule | None:
    """The rule of an operation, by its name.

    Without one, any view is done to the ids, and torch's tags say what is a reduction or pointwise.
    """
    name, tags = func._opname, torch.Tag
    found = RULES.get(name) or (None if name.startswith("__") else RULES.get(name.rstrip("_")))
    if found is not None:
        return found
    if tags.view_copy in func.tags:
        return RULES.get(name.removesuffix("_copy"), views.view)
    if func.is_view:
        return views.view
    if tags.reduction in func.tags:
        return elementwise.reduced
    if name.endswith("_") and not name.startswith("_"):
        func = getattr(getattr(torch.ops.aten, name[:-1], None), func._overloadname, func)
    return elementwise.pointwise if tags.pointwise in func.tags else None
