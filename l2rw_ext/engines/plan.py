"""The plan of a layer-wise step: which form each use takes, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from l2rw_ext.layers.base import RowMap, Use
from l2rw_ext.layers.costs import Cost, Size


@dataclass
class UsePlan:
    """The part of a plan that concerns one use."""

    name: str
    signature: tuple[Any, ...]
    rows: RowMap | None
    """Which rows belong to which example; None if a gradient of zero did not show it."""
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
    """What a first step has found out about a model on batches of given shapes."""

    merged: bool
    certain: bool
    """Whether the row maps hold at every later step.

    That is so if each gradient fits one row map only, no value of the data decides what is
    computed, and no trained factor is zero.
    """
    why_separate: str = ""
    sizes: tuple[int, ...] = ()
    """The numbers of losses; batches of the same shapes may hold other numbers of examples."""
    uses: list[UsePlan] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    """Names of the torch functions called, in order; another list of calls needs a new plan."""
    data_dependent: str | None = None
    """The operation through which values of the data may decide what is computed."""
    steps: int = 0

    @property
    def final(self) -> bool:
        """True if later steps reuse this plan, or if none ever can."""
        return self.certain or self.data_dependent is not None

    def due(self) -> bool:
        """Whether this step checks the row maps again."""
        return due(self.steps)


def due(step: int) -> bool:
    """Whether a step checks again what an earlier step has found: at steps 16, 256, 4096, ..."""
    return step >= 16 and step & (step - 1) == 0 and (step.bit_length() - 1) % 4 == 0


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
