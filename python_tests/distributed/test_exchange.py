"""Merged steps in which ranks exchange the direction layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from l2rw_ext import Explanation, Reweighter, reference
from l2rw_ext.distributed.group import Processes
from l2rw_ext.engines.base import Scored
from l2rw_ext.engines.layerwise.engine import Layerwise
from l2rw_ext.engines.layerwise.scoring import Scoring
from l2rw_ext.errors import RankError
from l2rw_ext.reference import relative_error
from l2rw_ext.task.isolation import preserved
from support.models import CLASSES, cross_entropy, mlp, model_of, vectors
from support.oracle import EXACT, flat, truth_of_ranks
from support.processes import Pool
from support.ranks import MODELS, SIZES, ScaledCrossEntropy

LEARNED = 2
"""Steps of a kind after which its plans are known: it is met once, then rehearsed."""


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

    scores: Tensor
    clean_loss: Tensor
    gradients: dict[str, Tensor]
    """This rank's part."""
    explanation: Explanation
    messages: list[tuple[str, int]]
    """Name and bytes of each collective on tensors of the group."""


class _Rank:
    """A model, its engine and the other ranks."""

    def __init__(self, group: dist.ProcessGroup, model: str, **options: Any) -> None:
        torch.manual_seed(1)
        self.model = OWN[model][0]().double()
        loss = options.pop("loss", None)
        self.loss: Any = cross_entropy if loss is None else loss()
        self.reweighter = Reweighter(self.model, self.loss, **options)
        self.engine = Layerwise()
        self.processes = Processes(group)

    def score(self, batch: Any, clean: Any) -> _Told | None:
        """What the merged step says; None if the ranks do not make one."""
        task = self.reweighter._task(batch, clean, None)
        messages = []
        with preserved(task.members, always=True) as snapshot:
            with mock.patch.multiple(dist, **_counted(messages)):
                scored = self.engine.score_with_others(task, snapshot, self.processes)
            if scored is None:
                return None
            messages = messages[:]
            gradients = scored.weighted_gradients(self._weights(scored))
        names = {id(p): name for name, p in reference.trainable(self.model, self.loss).items()}
        return _Told(
            scored.scores,
            scored.clean_loss,
            {names[id(p)]: g.detach() for p, g in gradients},
            scored.explain(),
            messages,
        )

    def _weights(self, scored: Scored) -> Tensor:
        """The weights of this rank's examples among those of all."""
        all_scores: list[Any] = [None] * self.processes.size
        dist.all_gather_object(all_scores, scored.scores, group=self.processes.group)
        weights = reference.weights_from_scores(torch.cat(all_scores).double())
        return weights.split([s.numel() for s in all_scores])[self.processes.rank]


def _counted(messages: list[tuple[str, int]]) -> dict[str, Any]:
    """The collectives of a backward, which say what they are given."""
    reduce, gather = dist.all_reduce, dist.all_gather_into_tensor

    def all_reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        messages.append(("reduced", x.numel() * x.itemsize))
        return reduce(x, *args, **kwargs)

    def all_gather_into_tensor(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("async_op"):
            messages.append(("gathered", x.numel() * x.itemsize))
        return gather(out, x, *args, **kwargs)

    return {"all_reduce": all_reduce, "all_gather_into_tensor": all_gather_into_tensor}


def _steps(
    group: dist.ProcessGroup, model: str, steps: Sequence[Any], options: dict[str, Any]
) -> list[_Told | None]:
    rank = _Rank(group, model, **options)
    return [rank.score(*own[dist.get_rank(group)]) for own in steps]


def _batches(model: str, sizes: Sequence[tuple[int, int]], steps: int) -> list[Any]:
    torch.manual_seed(0)
    make = OWN[model][1]
    return [[(make(n), make(m)) for n, m in sizes] for _ in range(steps)]


def _assert_exact(
    pool: Pool,
    model: str,
    sizes: Sequence[tuple[int, int]],
    tolerance: float = EXACT,
    **options: Any,
) -> list[_Told]:
    """The third step is the oracle's on the union of all batches; returns what ranks say of it."""
    steps = _batches(model, sizes, LEARNED + 1)
    found = pool.run(_steps, model, steps, options, ranks=len(sizes))
    for told in found:
        assert told[:LEARNED] == [None] * LEARNED
    torch.manual_seed(1)
    inner, loss = OWN[model][0]().double(), options.get("loss")
    loss = cross_entropy if loss is None else loss()
    batches, cleans = zip(*steps[-1], strict=True)
    expected = truth_of_ranks(inner, loss, batches, cleans)
    last = [told[-1] for told in found]
    for told, t in zip(last, expected, strict=True):
        assert relative_error(told.scores, t.scores) <= tolerance
        assert relative_error(told.clean_loss, t.clean_loss) <= tolerance
        exact = {name: g for name, g in t.gradients.items() if g is not None}
        total = [
            sum(own.gradients[name] for own in last if name in own.gradients) for name in exact
        ]
        assert relative_error(flat(total), flat(exact.values())) <= tolerance
    return last


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("model", [name for name in OWN if name not in ("batch norm", "branches")])
def test_scores_are_those_of_the_union(
    pool: Pool, model: str, ranks: int, low_memory: bool
) -> None:
    _assert_exact(pool, model, SIZES["uneven"][:ranks], low_memory=low_memory)
