"""Scores and weights of hyper-validation images, which the model has never seen (Figure 3)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import UsageError
from .order import generator
from .splits import Split
from .training_methods import Statistics

Weigh = Callable[[Tensor, int], Statistics]
"""From numbers of hyper-validation images and the number of the batch to its weights and scores."""

Columns = dict[str, list[float]]


def diagnose(weigh: Weigh, split: Split, size: int, seed: int) -> dict[str, Columns]:
    """Weigh the hyper-validation images twice: in mixed batches, and one true class at a time.

    Args:
        weigh: weighs a batch.
        split: of the run.
        size: images in a batch; what is left over beside full batches is not looked at.
        seed: of the order.

    Returns:
        for ``mixed`` and ``single`` batches a value for each image: ``score``, ``weight`` times the
        size of its batch, whether it is ``flipped``, ``label``, true ``class``, number of the
        ``batch``.

    Raises:
        UsageError: there are no hyper-validation images, or the method gives no scores.
    """
    if not len(split.validation):
        raise UsageError("there are no hyper-validation images to weigh")
    order = torch.randperm(len(split.validation), generator=generator(seed, "diagnosis"))
    true = split.validation_of_true[order]
    kinds = {"mixed": [order], "single": [order[true == c] for c in true.unique()]}
    out = {}
    first = 0
    for kind, groups in kinds.items():
        parts = list(_parts(groups, size))
        out[kind] = _columns(weigh, split, parts, first)
        first += len(parts)
    return out


def _parts(groups: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Full batches of each group, or all of a group that is smaller than one; none of one image."""
    for group in groups:
        whole = max(2, min(size, len(group)))
        yield from (part for part in group.split(size) if len(part) == whole)


def _columns(weigh: Weigh, split: Split, parts: Sequence[Tensor], first: int) -> Columns:
    rows: list[Tensor] = []
    for number, index in enumerate(parts, first):
        done = weigh(index, number)
        if done.scores is None:
            raise UsageError("only methods that score their examples can be diagnosed")
        labels, true = split.validation.targets[index], split.validation_of_true[index]
        flipped, batch = split.validation_flipped[index], torch.full_like(labels, number)
        measured = (done.scores.cpu(), (done.weights * len(index)).cpu())
        rows.append(torch.stack([x.double() for x in (*measured, flipped, labels, true, batch)]))
    names = ("score", "weight", "flipped", "label", "class", "batch")
    return dict(zip(names, torch.cat(rows, 1).tolist(), strict=True))


def auroc(values: Sequence[float], flipped: Sequence[float]) -> float:
    """How often a clean image's value is above a flipped one's, ties half; NaN if either lacks."""
    clean = [v for v, wrong in zip(values, flipped, strict=True) if not wrong]
    wrong = [v for v, wrong in zip(values, flipped, strict=True) if wrong]
    if not clean or not wrong:
        return float("nan")
    u = importlib.import_module("scipy.stats").mannwhitneyu(clean, wrong).statistic
    return float(u) / (len(clean) * len(wrong))
