"""The plan of a layer-wise step: which form each use takes, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from l2rw_ext.layers.base import RowMap, Use
from l2rw_ext.layers.costs import Cost, Size


@dataclass
class UsePlan:
    """What the plan holds of one use."""

    name: str
    signature: tuple[Any, ...]
    rows: RowMap | None
    """None while no gradient has shown which rows belong to which example."""
    form: str
    joint: bool
    """Its direction is a sum with other uses, so that scores wait for the end of the backward."""
    costs: dict[str, Cost]
    operation: str
    shape: tuple[int, ...]


@dataclass
class Plan:
    """What a first step has learnt about a model on batches of given shapes."""

    merged: bool
    certain: bool
    """Whether the row map of every use with a gradient was the only one that fits, and will be at
    each step, because no value of the data decides what is computed and no trained factor is zero.
    """
    why_separate: str = ""
    uses: list[UsePlan] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    """Names of all torch functions that the forward called; others may mix examples."""
    chooses: str | None = None
    """The operation through which values of the data may decide what is computed."""
    steps: int = 0

    @property
    def final(self) -> bool:
        """True if later steps reuse this plan, or if none ever can."""
        return self.certain or self.chooses is not None

    def due(self) -> bool:
        """Whether the row maps are to be checked again."""
        return due(self.steps)


def due(step: int) -> bool:
    """Whether what an earlier step has found is checked at this one: at 16, 256, 4096, ..."""
    return step >= 16 and step & (step - 1) == 0 and (step.bit_length() - 1) % 4 == 0


def choose_form(
    use: Use, size: Size, *, without: tuple[str, ...] = ()
) -> tuple[str, dict[str, Cost]]:
    """The cheapest form whose kept tensors do not exceed those of keeping z and g."""
    costs = use.rule.costs(use, size)
    budget = costs["dense"].kept_bytes if "dense" in costs else float("inf")
    possible = {
        form: cost
        for form, cost in costs.items()
        if cost.kept_bytes <= budget and form not in without
    }
    return min(possible, key=lambda form: possible[form].seconds), costs
