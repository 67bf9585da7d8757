"""Compiled steps on batches of other sizes: one graph for many, or one for each."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from l2rw_ext import Reweighter
from l2rw_ext.compiled import steps
from l2rw_ext.errors import NotCompilableError
from l2rw_ext.layers.base import RowMap
from support.models import CLASSES, Tokens, cross_entropy, mlp, model_of, normed, vectors
from support.pairs import Pair, compiled, eagerly, graphs

DYNAMIC = {"dynamic": True}
SIZES = [
    (6, 4),
    (6, 4),
    (5, 4),
    (6, 3),
    (4, 4),
    (9, 2),
    (2, 7),
    (6, 4),
    (1, 4),
    (5, 1),
    (1, 1),
    (8, 5),
]
"""n and m of the steps of a test; at some the two are equal, at some one is 1."""


@pytest.fixture(autouse=True)
def _checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the graph's own results are those that the tests see."""
    monkeypatch.setattr(steps, "_FEW_SIZES", 1)


def said(pair: Pair, n: int = 6, m: int = 4, draw: Callable[[int], Any] = vectors) -> str:
    """What ``explain()`` says of the compiled step."""
    options = pair.compiled.explain(draw(n), draw(m)).options
    return next(line for line in options if line.startswith("compile="))


def sentences(n: int) -> tuple[Tensor, Tensor]:
    """A batch of n sentences of some length."""
    return torch.randint(1, 7, (n, random.choice((4, 5, 7, 9)))), torch.randint(CLASSES, (n,))


class Places(nn.Module):
    """Counts with the length of its input, and adds a part of a parameter and of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.place = nn.Parameter(torch.randn(12, 6))
        self.register_buffer("fixed", torch.randn(12, 6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, index: Tensor) -> Tensor:
        length = index.shape[1]
        x = self.embedding(index) + self.place[:length] + self.fixed[:length]
        return self.head(x.tanh().sum(1) / length**0.5)


def tied() -> nn.Module:
    """An encoder, with a class token and an embedding that is used twice."""
    return Tokens(9, batch_first=True, norm_first=True, padding=0, tied=True).double()


def convolution() -> nn.Module:
    """It takes images of any size."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, CLASSES),
    ).double()  # fmt: skip


def images(n: int) -> tuple[Tensor, Tensor]:
    """A batch of n images, all of one height."""
    return torch.randn(n, 2, random.choice((6, 7, 9)), 6).double(), torch.randint(CLASSES, (n,))


# One graph for many sizes.


def test_a_last_smaller_batch() -> None:
    pair = Pair(mlp(), compile_options=DYNAMIC)
    with compiled(1):
        for n in (12, 12, 12, 7, 12, 12, 12, 7, 12):
            pair.step(vectors(n), vectors(5))
    assert "is one graph of" in said(pair, 11, 6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_sizes(dynamic: bool) -> None:
    """Sizes of one are known as such, so that they have graphs of their own."""
    pair = Pair(mlp(), compile_options={"dynamic": dynamic})
    with graphs() as made:
        for n, m in SIZES + SIZES:
            pair.step(vectors(n), vectors(m))
    assert (len(made) <= 4) == dynamic


@pytest.mark.parametrize(
    ("make", "draw"),
    [(Places, sentences), (tied, sentences), (convolution, images)],
    ids=["places", "encoder", "images"],
)
def test_lengths(make: Callable[[], nn.Module], draw: Callable[[int], Any]) -> None:
    """Those of the two batches are mostly not the same."""
    random.seed(0)
    pair = Pair(make().double(), compile_options=DYNAMIC)
    with graphs() as made:
        for _ in range(2):
            pair.step(draw(6), draw(4))
        for _ in range(12):
            pair.step(draw(random.randint(2, 9)), draw(random.randint(2, 5)))
    assert len(made) <= 4
    assert "each is for one size" not in said(pair, draw=draw)


def test_batch_statistics() -> None:
    """The forward engine; buffers advance."""
    pair = Pair(normed(), compile_options=DYNAMIC)
    with compiled(1):
        for n, m in ((6, 4), (6, 4), (5, 4), (5, 3), (9, 7)):
            assert pair.step(vectors(n), vectors(m)).engine == "forward"


def test_fresh_masks() -> None:
    pair = Pair(nn.Sequential(mlp(), nn.Dropout(0.4)), compile_options=DYNAMIC)
    with compiled(1):
        for n in (6, 6, 5, 7, 9, 5):
            pair.step(vectors(n), vectors(4))


@pytest.mark.parametrize(
    "options",
    [
        {"every": 2},
        {"every": 2, "reuse": "scores"},
        {"direction_decay": 0.5},
        {"layers": ["0.weight"]},
        {"l2": 0.1},
        {"precondition": True},
        {"on_degenerate": "uniform"},
        {"low_memory": True},
        {"engine": "forward"},
    ],
    ids=str,
)
def test_options(options: dict[str, Any]) -> None:
    pair = Pair(mlp(), compile_options=DYNAMIC, **options)
    more: dict[str, Any] = {}
    with compiled(None):
        for n, m in ((6, 4), (6, 4), (6, 4), (6, 4), (5, 4), (5, 3), (9, 7), (8, 4)):
            if "reuse" in options:
                more = {"index": torch.randint(6, (n,))}
            pair.step(vectors(n), vectors(m), **more)


def test_micro_batches() -> None:
    pair = Pair(mlp(), compile_options=DYNAMIC)

    def act(reweighter: Reweighter) -> None:
        with reweighter.accumulate():
            for batch in batches:
                reweighter.backward(batch, clean)

    with compiled(2):  # the direction and the step
        for sizes in ((4, 4), (4, 4), (5, 3), (6, 2)):
            batches, clean = [vectors(n) for n in sizes], vectors(4)
            pair.both(act)
            pair.assert_same_state()
            pair.descend()


def test_checkpoints() -> None:
    """They draw the masks of their forward again, of whatever size."""
    inner, outer = nn.Sequential(mlp(), nn.Dropout(0.4)), nn.Linear(CLASSES, CLASSES)
    model = model_of(
        lambda m, x: m.outer(checkpoint(m.inner, x, use_reentrant=False)), inner=inner, outer=outer
    )
    pair = Pair(model, compile_options=DYNAMIC)
    with compiled(1):
        for n in (6, 6, 5, 7, 9, 5):
            pair.step(vectors(n), vectors(4))


def test_tensors_from_elsewhere() -> None:
    """Those of a closure and of a list are inputs, whose values may change."""
    held = [torch.rand(CLASSES, dtype=torch.float64)]
    balance = torch.rand(CLASSES, dtype=torch.float64)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs * held[0], targets, weight=balance, reduction="none")

    pair = Pair(mlp(), loss_fn, compile_options=DYNAMIC)
    with compiled(1):
        for n in (6, 6, 5, 7, 9, 5):
            pair.step(vectors(n), vectors(4))
            held[0].mul_(1.1)
            balance.add_(0.1)


@pytest.mark.parametrize(("make", "draw"), [(mlp, vectors), (convolution, images)])
def test_cosines(make: Callable[[], nn.Module], draw: Callable[[int], Any]) -> None:
    random.seed(0)
    pair = Pair(make(), compile_options=DYNAMIC, normalize="example")
    with compiled(2):  # the direction and the step
        for n, m in ((6, 4), (6, 4), (5, 4), (7, 3), (9, 4)):
            pair.step(draw(n), draw(m))


@pytest.mark.parametrize(("options", "graphs"), [({}, 1), ({"l2": 0.1}, 2)])
def test_parameters_that_no_forward_reads(options: dict[str, Any], graphs: int) -> None:
    model = model_of(lambda s, x: s.inner(x), inner=mlp(), unused=torch.randn(3))
    pair = Pair(model, compile_options=DYNAMIC, **options)
    with compiled(graphs):
        for n in (6, 6, 5, 7):
            pair.step(vectors(n), vectors(4))


def test_numbers_in_python() -> None:
    """A number that the forward reads is no size, and another one needs another graph."""
    scale = {"by": 1.0, "rows": 4}
    model = model_of(
        lambda m, x: m.inner(x) * scale["by"] + x[:, : scale["rows"]].sum(1, keepdim=True),
        inner=mlp(),
    )
    pair = Pair(model, compile_options=DYNAMIC)
    with compiled(3):
        for by, rows in ((1.0, 4), (2.0, 4), (2.0, 3)):
            scale.update(by=by, rows=rows)
            for n in (6, 6, 5, 7):
                pair.step(vectors(n), vectors(4))


def test_where_batches_begin_and_how_they_lie() -> None:
    """Slices of a data set, and transposed inputs."""
    data, classes = vectors(40)
    pair = Pair(mlp(), compile_options=DYNAMIC)
    with compiled(2):
        for first, n in ((0, 6), (6, 6), (7, 6), (13, 5), (31, 9)):
            part = slice(first, first + n)
            pair.step((data[part], classes[part]), vectors(4))
        for n in (6, 5, 7):
            x, y = vectors(n)
            pair.step((x.t().contiguous().t(), y), vectors(4))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_wrong_statement_of_the_size(dynamic: bool) -> None:
    """It is an error at any step, before anything has changed."""
    pair = Pair(mlp(), compile_options={"dynamic": dynamic})
    with compiled(1):
        for _ in range(4):
            pair.step(vectors(6), vectors(4))
        for wrong in ({"index": [1, 2, 3]}, {"batch_size": 5}, {"batch_size": (6, 3)}):
            messages = []
            for reweighter in (pair.eager, pair.compiled):
                with pytest.raises(ValueError, match="examples") as error:
                    reweighter.backward(vectors(6), vectors(4), **wrong)
                messages.append(str(error.value))
            assert messages[0] == messages[1]
            assert all(p.grad is None for p in pair.models[1].parameters())
        pair.step(vectors(6), vectors(4), batch_size=(6, 4), index=list(range(6)))
        if dynamic:
            pair.step(vectors(5), vectors(3), batch_size=(5, 3), index=list(range(5)))


def test_batches_keep_no_marks() -> None:
    """What Dynamo is told of the user's tensors is taken back."""
    pair = Pair(mlp(), compile_options=DYNAMIC)
    batch, clean = vectors(6), vectors(4)
    with compiled(1):
        for _ in range(3):
            pair.step(batch, clean)
    assert not any(vars(x) for x in (*batch, *clean))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backends(backend: str) -> None:
    pair = Pair(Places().double(), compile=backend, compile_options=DYNAMIC)
    random.seed(1)
    with compiled(None):
        for n, m in ((6, 4), (6, 4), (5, 3), (9, 7), (8, 4)):
            pair.step(sentences(n), sentences(m))


# Bounds.


def counting(x: Tensor) -> float:
    """What Python makes of a size is a number."""
    return 1 + 0.1 * len(x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_past_the_bound(dynamic: bool) -> None:
    """One warning; sizes that have a graph go on with it."""
    model = model_of(lambda m, x: m.inner(x) * counting(x), inner=mlp())
    pair = Pair(model, compile_options={"dynamic": dynamic})
    with graphs() as made, eagerly("there are 8 graphs"):
        for _ in range(3):
            for n in range(2, 15):
                pair.step(vectors(n), vectors(1))
    assert len(made) == 8
    with graphs() as made, eagerly(None):
        for n in range(2, 15):
            pair.step(vectors(n), vectors(1))
    assert not made
    if dynamic:
        assert "has 8 graphs for batches of other sizes" in said(pair, 5, 1)


def test_past_the_bound_may_be_an_error() -> None:
    model = model_of(lambda m, x: m.inner(x) * counting(x), inner=mlp())
    pair = Pair(model, compile_options={"dynamic": True, "fullgraph": True})
    for n in range(2, 11):
        pair.step(vectors(n), vectors(1))
    with pytest.raises(NotCompilableError, match="there are 8 graphs"):
        pair.compiled.backward(vectors(11), vectors(1))
    pair.step(vectors(5), vectors(1))


def test_one_graph_for_each_size() -> None:
    """What cannot run on symbols still is a graph, and explain() says why it is no other's."""

    def draw(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 2, 3, 5).double(), torch.randint(CLASSES, (n,))

    def forward(s: Any, x: Tensor) -> Tensor:  # the examples are in the middle of the rows
        return s.outer(torch.tanh(s.inner(x.transpose(0, 1))).sum((0, 2)))

    model = model_of(forward, inner=nn.Linear(5, 4), outer=nn.Linear(4, CLASSES))
    pair = Pair(model, compile_options=DYNAMIC)
    with compiled(2):
        for n in (6, 6, 6, 5, 5, 6):
            pair.step(draw(n), draw(4))
    assert "has 2 graphs for batches of other sizes" in said(pair, draw=draw)
    assert "each is for one size" in said(pair, draw=draw)


def test_what_is_no_graph() -> None:
    model = model_of(lambda m, x: m.inner(x) * x.mean().exp().item(), inner=mlp())
    pair = Pair(model, compile_options=DYNAMIC)
    with eagerly("takes a number out of a tensor"):
        for n in (6, 6, 5, 7):
            pair.step(vectors(n), vectors(4))


# What is found out of the first sizes.


def test_a_graph_is_checked_at_a_new_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first few times, and not again at the same size before step 16."""
    monkeypatch.setattr(steps, "_FEW_SIZES", 3)
    checked = []

    def difference(
        self: Any, work: Any, inputs: Any, found: Any, expected: Any, generators: Any
    ) -> str | None:
        checked.append(len(expected.step.weights))
        return "its losses" if len(checked) == 4 else None

    monkeypatch.setattr(steps._Graph, "difference", difference)
    pair = Pair(mlp(), compile_options=DYNAMIC)
    with compiled(1):
        for n in (6, 6, 6, 5, 6, 5, 7, 8, 9, 6, 6, 6, 6, 6, 6, 6):
            pair.step(vectors(n), vectors(4))
    assert checked == [6, 5, 7]
    with eagerly("its losses by the graph differs from the eager step's"):
        pair.steps(2)
    assert len(checked) == 4


few, several = st.integers(1, 3), st.integers(2, 4)


@given(few, several, few, several, few)
def test_a_row_map_of_other_sizes(
    outer: int, size: int, inner: int, other: int, times: int
) -> None:
    """Row r belongs to example r // inner % size; positions may be more, if they were several."""
    rows = RowMap(outer, size, inner)
    positions = rows.positions if rows.positions == 1 else rows.positions * times
    if outer > 1 and inner > 1:
        with pytest.raises(NotCompilableError, match="in the middle"):
            rows.resized(other * positions, other)
        return
    found = rows.resized(other * positions, other)
    expected = (positions, other, 1) if outer > 1 else (1, other, positions)
    assert (found.outer, found.size, found.inner) == expected
    if rows.positions == 1:
        with pytest.raises(NotCompilableError, match="or several"):
            rows.resized(2 * other, other)


def test_a_loss_of_the_users_may_be_of_a_subclass() -> None:
    """A plain tensor is handed out all the same."""

    class Own(Tensor):
        pass

    reweighter = Reweighter(mlp(), lambda o, y: cross_entropy(o, y).as_subclass(Own))
    assert type(reweighter.backward(vectors(6), vectors(4)).losses) is Tensor
