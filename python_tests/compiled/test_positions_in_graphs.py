"""A step with a weight for each position is one graph, its mask included."""

from __future__ import annotations

import pytest

from l2rw_ext import weighing
from support.pairs import Pair, compiled
from support.positions import Language, masked, words


@pytest.mark.parametrize(
    "options", [{}, {"weighing": weighing.softmax(0.5)}, {"every": 2}], ids=str
)
def test_compiled(options: dict[str, object]) -> None:
    with compiled(None):
        pair = Pair(Language().double(), masked, per="position", **options)
        pair.steps(6, words)
