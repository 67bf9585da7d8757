"""n is the number of losses: batches that do not show it, and losses that must not pass."""

from __future__ import annotations

import gc
import weakref
from collections import UserDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2rw_ext import Reweighter
from l2rw_ext.data.batch_size import BatchSize
from l2rw_ext.engines.layerwise import engine as layerwise
from support.models import (
    CLASSES,
    ENGINE_OPTIONS,
    cross_entropy,
    mlp,
    model_of,
    token_loss,
    vectors,
)
from support.oracle import assert_exact_steps, assert_matches, truth, unchanged

Batch = tuple[Any, Any]


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _classes(n: int) -> Tensor:
    return torch.randint(CLASSES, (n,))


def _graphs(rows: list[int]) -> Batch:
    """All graphs in one tensor, and the graph of each row."""
    x, graph = _numbers(sum(rows), 4), torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    return (x, graph), _classes(len(rows))


def _pool() -> nn.Module:
    def forward(s: Any, x: Tensor, graph: Tensor) -> Tensor:
        h = torch.tanh(s.a(x))
        return s.b(h.new_zeros(int(graph.max()) + 1, 5).index_add(0, graph, h))

    return model_of(forward, a=nn.Linear(4, 5), b=nn.Linear(5, CLASSES))


def _graphs_by_matrix(rows: list[int]) -> Batch:
    """The graph of each row as a matrix, which no index gives away."""
    (x, graph), y = _graphs(rows)
    return (F.one_hot(graph, len(rows)).T.double().contiguous(), x), y


def _pool_by_matrix() -> nn.Module:
    return model_of(
        lambda s, p, x: s.b(p @ torch.tanh(s.a(x))), a=nn.Linear(4, 5), b=nn.Linear(5, CLASSES)
    )


def _detection(boxes: list[int]) -> Batch:
    return _numbers(len(boxes), 3, 8, 8), [{"boxes": _numbers(k, 4)} for k in boxes]


def _detector() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 4))


def _box_loss(outputs: Tensor, targets: Any) -> Tensor:
    return torch.stack(
        [(o - t["boxes"]).square().sum() for o, t in zip(outputs, targets, strict=True)]
    )


def _speech(lengths: list[int], *, frames_first: bool = False) -> Batch:
    """Targets of all sequences in one tensor, as torch's loss takes them."""
    x = _numbers(9, len(lengths), 5) if frames_first else _numbers(len(lengths), 9, 5)
    return x, (torch.randint(1, 6, (sum(lengths),)), torch.tensor(lengths))


def _frames(*, frames_first: bool = False) -> nn.Module:
    return model_of(
        lambda s, x: s.a(x if frames_first else x.transpose(0, 1)).log_softmax(-1),
        a=nn.Linear(5, 6),
    )


def _ctc(outputs: Tensor, targets: Any) -> Tensor:
    n = outputs.shape[1]
    return F.ctc_loss(outputs, targets[0], torch.full((n,), 9), targets[1], reduction="none")


_ROWS_MIX = ("auto", "forward", "double_backward")
_CTC_ONCE = ("auto", "layerwise")  # torch has only the first derivative of the loss
_BATCHES: dict[str, tuple[Callable[[], nn.Module], Any, Batch, Batch, tuple[str, ...]]] = {
    "graphs": (_pool, cross_entropy, _graphs([3, 5, 7]), _graphs([6, 9]), _ROWS_MIX),
    # As many rows as graphs, although rows are no graphs, in both batches.
    "graphs, as many rows": (
        _pool,
        cross_entropy,
        _graphs([0, 1, 2]),
        _graphs([2, 0, 1, 1]),
        _ROWS_MIX,
    ),
    "graphs by a matrix": (
        _pool_by_matrix,
        cross_entropy,
        _graphs_by_matrix([3, 5, 7]),
        _graphs_by_matrix([6, 9]),
        _ROWS_MIX,
    ),
    "graphs by a matrix, as many rows": (
        _pool_by_matrix,
        cross_entropy,
        _graphs_by_matrix([0, 2, 1]),
        _graphs_by_matrix([2, 1, 0]),
        _ROWS_MIX,
    ),
    # 3 is also the number of channels.
    "detection": (
        _detector,
        _box_loss,
        _detection([3, 1, 2, 5, 4]),
        _detection([3, 2, 1]),
        ENGINE_OPTIONS,
    ),
    "detection, no box": (
        _detector,
        _box_loss,
        _detection([0, 1, 2]),
        _detection([2, 0]),
        ENGINE_OPTIONS,
    ),
    "CTC": (_frames, _ctc, _speech([2, 3, 1, 1]), _speech([3, 2]), _CTC_ONCE),
    "CTC, as many targets as frames": (
        lambda: _frames(frames_first=True),
        _ctc,
        _speech([2, 3, 2, 2], frames_first=True),
        _speech([3, 2], frames_first=True),
        _CTC_ONCE,
    ),
}


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name, (*_, engines) in _BATCHES.items() for engine in engines],
)
def test_batches_that_do_not_show_their_size(name: str, engine: Any) -> None:
    make, loss, train, clean, _ = _BATCHES[name]
    model = make().double()
    assert_exact_steps(model, loss, train, clean, Reweighter(model, loss, engine=engine))


def test_graphs_of_one_row_each_are_followed_by_others() -> None:
    """Shapes are the same, and rows are examples in the first step alone."""

    def forward(s: Any, x: Tensor, graph: Tensor, features: Tensor) -> Tensor:
        return s.b(features.index_add(0, graph, torch.tanh(s.a(x))))

    def batch(rows: list[int]) -> Batch:
        (x, graph), y = _graphs(rows)
        return (x, graph, _numbers(len(rows), 5)), y

    model = model_of(forward, a=nn.Linear(4, 5), b=nn.Linear(5, CLASSES)).double()
    reweighter = Reweighter(model, cross_entropy)
    for train, clean in (([1, 1, 1], [1, 1]), ([0, 2, 1], [1, 1]), ([1, 1, 1], [2, 0])):
        assert_exact_steps(model, cross_entropy, batch(train), batch(clean), reweighter)


def test_rows_that_pass_for_examples_are_not_merged() -> None:
    """Targets of rows and of pairs of rows; the losses say that pairs are the examples."""

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        of_rows, of_pairs = targets
        pairs = outputs.view(-1, 2, CLASSES)
        return cross_entropy(pairs.sum(1), of_pairs) + token_loss(pairs, of_rows.view(-1, 2))

    def batch(n: int) -> Batch:
        return _numbers(2 * n, 4), (_classes(2 * n), _classes(n))

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    reweighter = Reweighter(model, loss)
    train, clean = batch(5), batch(3)
    assert_exact_steps(model, loss, train, clean, reweighter, engine="layerwise", count=3)
    explanation = reweighter.explain(train, clean)
    assert (explanation.n, explanation.m) == (5, 3)
    assert "other numbers of examples" in explanation.passes


def test_the_same_rows_hold_another_number_of_examples() -> None:
    """The plan of four examples of three rows is none of three examples of four rows."""
    model = _blocks().double()
    clean = _block_batch(2, 6)
    reweighter = Reweighter(model, cross_entropy)
    for n, rows in ((4, 3), (3, 4), (4, 3), (12, 1)):
        assert_exact_steps(model, cross_entropy, _block_batch(n, rows), clean, reweighter)


def _blocks() -> nn.Module:
    def forward(s: Any, x: Tensor, count: Tensor) -> Tensor:
        return s.b(torch.tanh(s.a(x)).view(len(count), -1, 5).sum(1))

    return model_of(forward, a=nn.Linear(4, 5), b=nn.Linear(5, CLASSES))


def _block_batch(n: int, rows: int) -> Batch:
    return (_numbers(n * rows, 4), torch.zeros(n)), _classes(n)


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_LARGEST_NUMBER_OF_KINDS", 6)
    model = _blocks().double()
    reweighter = Reweighter(model, cross_entropy)
    engine = reweighter._engines[0]
    assert isinstance(engine, layerwise.Layerwise)
    often = _block_batch(3, 5), _block_batch(2, 5)
    for rows in range(1, 20):
        batch, clean = _block_batch(3, rows), _block_batch(2, rows)
        expected = truth(model, cross_entropy, batch, clean)
        model.zero_grad()
        assert_matches(reweighter.backward(batch, clean), model, expected)
        reweighter.backward(*often)
        assert len(engine._kinds) <= 6
    monkeypatch.setattr(layerwise, "ExampleMap", None)  # what is used is kept
    reweighter.backward(*often)


@pytest.mark.parametrize("engine", ENGINE_OPTIONS)
def test_losses_of_tokens_do_not_count_as_examples(engine: Any) -> None:
    model = model_of(lambda s, x: s.a(x), a=nn.Linear(5, CLASSES)).double()
    flat = lambda out, y: cross_entropy(out.flatten(0, 1), y.flatten())  # noqa: E731

    def batch(n: int) -> Batch:
        return _numbers(n, 7, 5), torch.randint(CLASSES, (n, 7))

    for part, (x, y) in (("training", batch(6)), ("clean", batch(4))):
        for targets in (y, y.flatten()):
            given = (x, targets), (x, y)
            fns = {"loss_fn": token_loss, "clean_loss_fn": flat}
            if part == "training":
                fns = {"loss_fn": flat, "clean_loss_fn": token_loss}
            else:
                given = given[::-1]
            what = "each of the" if targets is y else "no input has .* rows"
            match = rf"{part} batch: .*{what}.* got shape \(\d+,\); sum .*batch_size="
            with unchanged(model), pytest.raises(ValueError, match=match):
                Reweighter(model, **fns, engine=engine).backward(*given)


def test_losses_along_another_dimension_do_not_count_as_examples() -> None:
    """A mask has a row for each position."""
    model = model_of(lambda s, x, mask: mask @ s.a(x), a=nn.Linear(5, CLASSES)).double()
    mask = torch.ones(7, 7, dtype=torch.float64)
    wrong = lambda out, y: token_loss(out.transpose(0, 1), y.T)  # noqa: E731
    batches = [((_numbers(n, 7, 5), mask), torch.randint(CLASSES, (n, 7))) for n in (6, 4)]
    with pytest.raises(ValueError, match=r"each of the 4 examples, .* got shape \(7,\)"):
        Reweighter(model, wrong).backward(*batches)
    # Without targets, too.
    energy = lambda out, y: out.sum((0, 2))  # noqa: E731
    with pytest.raises(ValueError, match=r"got shape \(7,\)"):
        Reweighter(model, energy).backward(*[(x, None) for x, _ in batches])


def _sequences(n: int) -> Batch:
    """Packed tokens, a target for each, and where the sequences begin and end."""
    rows = [2, 4, 1, 3, 2][:n]
    ends = torch.tensor([0, *rows]).cumsum(0)
    return (_numbers(int(ends[-1]), 5), ends), _classes(int(ends[-1]))


def _by_sequence(outputs: Tensor, targets: Tensor) -> Tensor:
    losses, ends = cross_entropy(outputs[0], targets), outputs[1]
    return torch.stack([part.sum() for part in losses.tensor_split(ends[1:-1])])


def _tagger() -> nn.Module:
    return model_of(lambda s, x, ends: (s.a(x), ends), a=nn.Linear(5, CLASSES)).double()


@pytest.mark.parametrize("engine", ["auto", "forward", "double_backward"])
def test_what_the_batch_does_not_say_is_given(engine: Any) -> None:
    model, train, clean = _tagger(), _sequences(5), _sequences(3)
    expected = truth(model, _by_sequence, train, clean)
    reweighter = Reweighter(model, _by_sequence, engine=engine)
    with pytest.raises(ValueError, match=r"got shape \([35],\).*batch_size="):
        reweighter.backward(train, clean, batch_size=None)
    for batch_size, match in (
        (5, r"each of the 7 examples, .*got shape \(3,\)"),
        ((4, 3), r"training batch: .*says.* 4 examples, but.* \(5,\)"),
        ((5, 2), r"clean batch: .*says.* 2 examples, but.* \(3,\)"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=match):
            reweighter.backward(train, clean, batch_size=batch_size)
    assert_matches(reweighter.backward(train, clean, batch_size=(5, 3)), model, expected)
    assert torch.equal(
        reweighter.weights(train, clean, batch_size=(5, 3)).nonzero(), expected.weights.nonzero()
    )
    explanation = reweighter.explain(train, clean, batch_size=(5, 3))
    assert (explanation.n, explanation.m) == (5, 3)


def test_given_in_micro_batches() -> None:
    model, train, clean = _tagger(), _sequences(5), _sequences(3)
    expected = truth(model, _by_sequence, train, clean)
    (x, ends), y = train
    reweighter = Reweighter(model, _by_sequence)
    cut = int(ends[2])
    with reweighter.accumulate() as accumulation:
        reweighter.backward(((x[:cut], ends[:3]), y[:cut]), clean, batch_size=(2, 3), index=[4, 2])
        reweighter.backward(((x[cut:], ends[2:] - cut), y[cut:]), batch_size=3, index=[0, 1, 3])
    assert torch.allclose(torch.cat(accumulation.weights), expected.weights, atol=1e-12)
    for p, g in zip(model.parameters(), expected.gradients.values(), strict=True):
        assert torch.allclose(p.grad, g, atol=1e-12)
    assert reweighter.record.visits.tolist() == [1] * 5


def test_an_index_gives_the_number_of_training_examples() -> None:
    model, train, clean = _tagger(), _sequences(5), _sequences(3)
    reweighter = Reweighter(model, _by_sequence)
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"index must have .*each of the 5 train"),
    ):
        reweighter.backward(train, clean, index=range(4), batch_size=(5, 3))
    with pytest.raises(ValueError, match=r"clean batch: .*batch_size="):
        reweighter.backward(train, clean, index=range(5))
    reweighter = Reweighter(
        model, _by_sequence, clean_loss_fn=lambda out, y: cross_entropy(out[0], y)
    )
    assert reweighter.backward(train, clean, index=range(5)).scores.shape == (5,)
    assert reweighter.record.visits.tolist() == [1] * 5


@pytest.mark.parametrize(
    "wrap", [lambda y: deque([y, 2.0]), lambda y: {"a": [y]}, lambda y: UserDict(y=y), lambda y: y]
)
def test_lengths_are_found_wherever_tensors_are(wrap: Any) -> None:
    """Of the inputs, the first would say 7."""
    inputs = (_numbers(7, 7), _numbers(4, 7))
    assert BatchSize("a batch", inputs, wrap(_classes(4))).number == 4


def test_a_batch_size_keeps_no_batch() -> None:
    """An engine may keep its task."""
    x, y = vectors(6)
    size = BatchSize("a batch", x, y, index=torch.arange(6))
    alive = weakref.ref(x), weakref.ref(y)
    del x, y
    gc.collect()
    assert size.number == 6
    assert [a() for a in alive] == [None, None]


@pytest.mark.parametrize("batch_size", [0, -1, True, 2.0, "6", (6,) * 3, (6, 0), (6, None), ()])
def test_sizes_that_are_none(batch_size: Any) -> None:
    for method in ("backward", "weights", "explain"):
        with pytest.raises(ValueError, match=r"batch_size must be .* got"):
            getattr(Reweighter(mlp(), cross_entropy), method)(
                vectors(6), vectors(4), batch_size=batch_size
            )


def test_what_is_remembered_of_graphs() -> None:
    """With scores of earlier steps, by the index, n is the number of losses too."""
    model, train, clean = _pool().double(), _graphs([3, 5, 7]), _graphs([6, 9])
    reweighter = Reweighter(model, cross_entropy, every=2, reuse="scores")
    first = reweighter.backward(train, clean, index=range(3))
    second = reweighter.backward(train, index=[2, 1, 0])
    assert second.engine == "remembered"
    assert torch.equal(second.scores, first.scores.flip(0))
    reweighter.backward(train, clean, index=range(3))
    with pytest.raises(ValueError, match="each of the 3 training examples"):
        reweighter.backward(train, index=[2, 1])
