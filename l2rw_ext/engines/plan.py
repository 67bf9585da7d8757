"""The plan of a layer-wise step: which form each use takes, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field

from l2rw_ext.layers.base import RowMap, Use
from l2rw_ext.layers.costs import Cost, Size


@dataclass
class UsePlan:
    """The part of a plan that concerns one use."""

    name: str
    rows: RowMap | None
    """Which rows belong to which example; None if the gradient of a probed step is zero."""
    form: str
    joint: bool
    """Whether its direction must exist before it is scored, so that the factored form is ruled out.

    That is so if its parameters are shared or derived, and in a step of two passes.
    """
    costs: dict[str, Cost]
    operation: str
    shape: tuple[int, ...]


@dataclass
class Plan:
    """What a first step has found out about forwards of one structure."""

    merged: bool
    certain: bool
    """Whether the row maps hold whatever the values are; else each step is probed."""
    reason: str
    """Why they hold, or what in the forward leaves it open."""
    why_separate: str = ""
    uses: list[UsePlan] = field(default_factory=list)


def choose_form(
    use: Use, size: Size, *, without: tuple[str, ...] = ()
) -> tuple[str, dict[str, Cost]]:
    """The cheapest form that keeps no more memory than z and g take, and the costs of all forms."""
    costs = use.layer.costs(use, size)
    budget = costs["dense"].kept_bytes if "dense" in costs else float("inf")
    possible = {
        form: cost
        for form, cost in costs.items()
        if cost.kept_bytes <= budget and form not in without
    }
    return min(possible, key=lambda form: possible[form].seconds), costs
