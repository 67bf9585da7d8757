"""Merged steps in which ranks exchange the direction layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from l2rw_ext import Explanation, Reweighter, Step
from l2rw_ext.engines.base import Scored
from l2rw_ext.engines.layerwise.scoring import Scoring
from l2rw_ext.errors import RankError
from l2rw_ext.reference import relative_error
from support.models import CLASSES, cross_entropy, mlp, model_of, vectors
from support.oracle import EXACT, flat, gradients_of, truth_of_ranks, zero_grad
from support.processes import Pool
from support.ranks import MODELS, SIZES, ScaledCrossEntropy

def _derived() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 8)), nn.Linear(8, CLASSES))


def _recurrent() -> nn.Module:
    return model_of(
        lambda s, x: s.head(s.lstm(x)[0].mean(1)),
        lstm=nn.LSTM(5, 6, batch_first=True, bidirectional=True),
        head=nn.Linear(12, CLASSES),
    )


def _long(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 5, dtype=torch.float64), torch.randint(CLASSES, (n,))


OWN: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    **MODELS,
    "wide": (lambda: mlp(width=200), vectors),
    "derived": (_derived, vectors),
    "recurrent": (_recurrent, _long),
}


@dataclass
class _Told:
    """What a rank says of a step."""

    step: Step
    clean_loss: Tensor
    gradients: dict[str, Tensor | None]
    explanation: Explanation | None
    """Of the merged pass, if it was one."""
    messages: list[tuple[bool, int]]
    """Whether a collective of the merged pass gathers, and the bytes that this rank hands over."""


class _Rank:
    """A model and its reweighter, which tells of the merged passes that it makes."""

    def __init__(self, group: dist.ProcessGroup, model: str, **options: Any) -> None:
        torch.manual_seed(1)
        self.model = OWN[model][0]().double()
        self.loss = options.pop("loss", lambda: cross_entropy)()
        self.reweighter = Reweighter(self.model, self.loss, process_group=group, **options)
        self.merged: list[Scored | None] = []
        self.messages: list[tuple[bool, int]] = []
        self._score = self.reweighter._layerwise.score_with_others
        self.reweighter._layerwise.score_with_others = self._watched  # type: ignore[method-assign]

    def _watched(self, *args: Any) -> Scored | None:
        self.messages.clear()
        with mock.patch.multiple(dist, **_counted(self.messages)):
            self.merged.append(self._score(*args))
        return self.merged[-1]

    def backward(self, batch: Any, clean: Any) -> _Told:
        zero_grad(self.model, self.loss)
        step = self.reweighter.backward(batch, clean)
        scored = self.merged[-1]
        return _Told(
            replace(step, _union=None),
            step.clean_loss,
            gradients_of(self.model, self.loss),
            None if scored is None else scored.explain(),
            self.messages[:],
        )


def _counted(messages: list[tuple[bool, int]]) -> dict[str, Any]:
    """The collectives of a backward, which say what they are given."""
    reduce, gather = dist.all_reduce, dist.all_gather_into_tensor

    def all_reduce(x: Tensor, **kwargs: Any) -> Any:
        messages.append((False, x.nbytes))
        return reduce(x, **kwargs)

    def all_gather_into_tensor(out: Tensor, x: Tensor, **kwargs: Any) -> Any:
        if kwargs.get("async_op"):
            messages.append((True, x.nbytes))
        return gather(out, x, **kwargs)

    return {"all_reduce": all_reduce, "all_gather_into_tensor": all_gather_into_tensor}


def _steps(
    group: dist.ProcessGroup, model: str, steps: Sequence[Any], options: dict[str, Any]
) -> list[_Told]:
    rank = _Rank(group, model, **options)
    return [rank.backward(*own[dist.get_rank(group)]) for own in steps]


def _batches(model: str, sizes: Sequence[tuple[int, int]], steps: int) -> list[Any]:
    torch.manual_seed(0)
    make = OWN[model][1]
    return [[(make(n), make(m)) for n, m in sizes] for _ in range(steps)]


def _assert_exact(
    pool: Pool, model: str, steps: Sequence[Any], tolerance: float = EXACT, **options: Any
) -> list[list[_Told]]:
    """Each step is the oracle's on the union of all batches; the first is the only one in two."""
    found = pool.run(_steps, model, steps, options, ranks=len(steps[0]))
    torch.manual_seed(1)
    inner = OWN[model][0]().double()
    loss = options.get("loss", lambda: cross_entropy)()
    for k, step in enumerate(steps):
        batches, cleans = zip(*step, strict=True)
        expected = truth_of_ranks(inner, loss, batches, cleans)
        for told, t in zip((told[k] for told in found), expected, strict=True):
            assert relative_error(told.step.scores, t.scores) <= tolerance
            assert relative_error(told.step.weights, t.weights) <= tolerance
            assert relative_error(told.clean_loss, t.clean_loss) <= tolerance
            assert relative_error(flat(told.gradients.values()), flat(t.gradients.values())) <= (
                tolerance
            )
    return found


def _merged(found: list[list[_Told]]) -> list[bool]:
    """Which steps were merged, on all ranks or on none."""
    (merged,) = {tuple(told.explanation is not None for told in rank) for rank in found}
    return list(merged)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("model", [name for name in OWN if name not in ("batch norm", "branches")])
def test_scores_are_those_of_the_union(
    pool: Pool, model: str, ranks: int, low_memory: bool
) -> None:
    steps = _batches(model, SIZES["uneven"][:ranks], 3)
    found = _assert_exact(pool, model, steps, low_memory=low_memory)
    assert _merged(found) == [False, True, True]
