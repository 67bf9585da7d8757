"""What an example map says of the losses of its forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from l2rw_ext.tracing.graph import nodes_from

from .ids import NONE, counted
from .map import ExampleMap


@dataclass(frozen=True)
class Verdict:
    """Whether each loss keeps to its own example."""

    kind: Literal["certain", "today", "mixed", "unsure"]
    """*certain*: no gradient of a loss reaches the rows of another example, at these or any other
    values. *today*: so it is for what indices choose today, unless a custom Function, a hook or
    unseen code mixes. *mixed*: it may reach them. *unsure*: it may, or there was an operation
    without a rule, or an index chose rows before the first layer."""
    apart: bool
    """Whether no loss is computed from the data of another example, at these or any other values,
    so that two batches may be merged; the size of the batch may still enter."""
    together: str
    """Why they are not apart."""
    reason: str
    """A sentence that names the operation and the line of the user's code."""
    notes: dict[str, dict[str, str]]
    """As :attr:`ExampleMap.notes`, with the kind "functions": custom autograd Functions."""

    @property
    def certain(self) -> bool:
        """Whether the kind is *certain*."""
        return self.kind == "certain"


_TODAY = {
    "chooses": "an index that may change decides which examples {} reads or writes",
    "reads": "the program reads values of the data by {}, and may decide by them",
    "unseen": "{} takes values or gradients out of torch's sight",
    "functions": "the custom autograd function {} may do anything in its backward",
    "gaps": "{} uses a parameter on rows that belong to no example",
}
"""Kinds of notes with which a verdict holds for this forward only."""

_UNSURE = {
    "unknown": "no rule says which examples {} brings together",
    "chooses": _TODAY["chooses"],
    "reads": _TODAY["reads"],
    "may choose": "before the first layer, an index decides which examples {} reads or writes",
    "strays": "{} is in no batch, parameter or buffer, and may belong to examples",
}
"""Kinds of notes with which mixed ids need not mean that examples mix."""


def judge(
    example_map: ExampleMap,
    losses: Sequence[Tensor],
    *,
    ours: Callable[[Any], bool] = lambda node: False,
) -> Verdict:
    """What the map says of consecutive parts of the losses.

    Args:
        example_map: of the forward.
        losses: one tensor (k,) or more; loss i of the first has example i, and the next part goes
            on where one ends, as those of the merged batch [train; clean] do.
        ours: whether a node of autograd's graph, of a custom Function, sends each gradient to its
            own example only.
    """
    found = _custom_functions(losses, ours)
    notes = {k: v for k, v in (example_map.notes | {"functions": found}).items() if v}
    each = sum(x.numel() for x in losses) == example_map.count and all(x.dim() == 1 for x in losses)
    labelled = apart = each
    first = 0
    with example_map.aside():
        for x in losses if each else ():
            ids = counted(1, 0, first, x.numel())
            own = not x.requires_grad or bool((example_map.graded(x) == ids).all())
            labelled = labelled and own
            values = example_map.values(x)
            apart = apart and bool(((values == ids) | (values == NONE)).all())
            first += x.numel()
    today, unsure = _reason(notes, _TODAY), _reason(notes, _UNSURE)
    # What a backward does changes no loss.
    in_forward = {kind: text for kind, text in _TODAY.items() if kind != "functions"}
    apart = apart and _reason(notes, in_forward) is None
    together = "an example's output depends on the rest of its batch"
    what = _reason(notes, {"mixes values": "{}"} | _TODAY | _UNSURE)
    if what is not None:
        together += f": {what}"
    if labelled:
        why = today or "each loss keeps to the rows of its example"
        return Verdict("today" if today else "certain", apart, together, why, notes)
    if unsure is not None:
        return Verdict("unsure", apart, together, unsure, notes)
    mixes = "there is not one loss for each example"
    if each:
        mixes = _reason(notes, {"mixes": "{} mixes examples"}) or (
            "the losses do not come in the order of the examples"
        )
    return Verdict("mixed", apart, together, mixes, notes)


def _reason(notes: dict[str, dict[str, str]], kinds: dict[str, str]) -> str | None:
    """A sentence on the first note of these kinds."""
    for kind, sentence in kinds.items():
        for name, place in notes.get(kind, {}).items():
            return sentence.format(f"{name} ({place})" if place else name)
    return None


def _custom_functions(losses: Sequence[Tensor], ours: Callable[[Any], bool]) -> dict[str, str]:
    """Names of the custom Functions that gradients of the losses pass."""
    seen: set[Any] = set()
    return {
        type(node).__name__.removesuffix("Backward"): ""
        for x in losses
        for node in nodes_from(x, seen)
        if isinstance(node, torch.autograd.function.BackwardCFunction) and not ours(node)
    }
