"""A weighing is a part of the graph, and guards follow what it reads."""

from __future__ import annotations

import pytest
from torch import Tensor

from l2rw_ext import Reweighter
from support.models import cross_entropy, mlp, vectors
from support.pairs import Pair, compiled
from support.weighings import WEIGHINGS


@pytest.mark.parametrize("name", WEIGHINGS)
def test_compiled(name: str) -> None:
    with compiled():
        Pair(mlp(), weighing=WEIGHINGS[name][0]).steps(5)


def test_a_graph_follows_what_a_weighing_reads() -> None:
    state = {"t": 0.0}

    def own(u: Tensor) -> Tensor:
        return (u > state["t"]).to(u.dtype) / 6

    model, batch, clean = mlp(), vectors(6), vectors(3)
    reweighter = Reweighter(model, cross_entropy, weighing=own, compile="eager")
    for t in (-1e9, 1e9):
        state["t"] = t
        for _ in range(4):
            model.zero_grad()
            step = reweighter.backward(batch, clean)
            assert step.weights.tolist() == pytest.approx([1 / 6 if t < 0 else 0.0] * 6)
