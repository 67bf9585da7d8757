"""Recurrent models in a graph: layers of every kind, and cells in a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from support.models import (
    CELLS,
    CLASSES,
    ENGINES,
    RECURRENT,
    cross_entropy,
    model_of,
    short_sequences,
)
from support.pairs import Pair, compiled, graphs

FLOAT32 = 1e-5
"""Relative error of float32 numbers after some steps, in which torch's LSTM is a fused kernel."""

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2, "dropout": 0.3},
    "both ways": {"bidirectional": True},
    "both ways in two layers": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


def _narrow(n: int) -> tuple[Tensor, Tensor]:
    x, y = short_sequences(n)
    return x.float(), y


def _last(s: Any, x: Tensor) -> Tensor:
    x = x if s.layer.batch_first else x.transpose(0, 1)
    out = s.layer(x)[0]
    return s.head(out[:, -1] if s.layer.batch_first else out[-1])


def _of(layer: nn.RNNBase, forward: Callable[[Any, Tensor], Tensor] = _last) -> nn.Module:
    width = (1 + layer.bidirectional) * (layer.proj_size or layer.hidden_size)
    return model_of(forward, layer=layer, head=nn.Linear(width, CLASSES))


@pytest.mark.parametrize(
    ("engine", "kind", "options"),
    [
        *(("layerwise", kind, options) for kind in RECURRENT for options in OPTIONS),
        *((engine, kind, "two layers") for engine in ENGINES[1:] for kind in RECURRENT),
    ],
)
def test_layers(engine: Any, kind: str, options: str) -> None:
    with compiled():
        Pair(_of(RECURRENT[kind](5, 6, **OPTIONS[options])), engine=engine).steps(
            3, short_sequences
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", ["plain", "both ways in two layers"])
def test_the_fused_layer(engine: Any, options: str) -> None:
    """In float32 an eager step runs torch's fused LSTM where nothing sees inside of it."""
    model = _of(nn.LSTM(5, 6, **OPTIONS[options])).float()
    with compiled():
        Pair(model, engine=engine, tolerance=FLOAT32).steps(3, _narrow)


def test_the_fused_layer_in_a_checkpoint() -> None:
    """It is unfused where it is computed again, too."""
    model = _of(
        nn.LSTM(5, 6, batch_first=True),
        lambda s, x: s.head(checkpoint(s.layer, x, use_reentrant=False)[0][:, -1]),
    ).float()
    for engine in ENGINES:
        with compiled():
            Pair(model, engine=engine, tolerance=FLOAT32).steps(3, _narrow)


@pytest.mark.parametrize("engine", ["forward", "double_backward"])
def test_projections(engine: Any) -> None:
    with compiled():
        Pair(_of(nn.LSTM(5, 6, proj_size=4)), engine=engine).steps(3, short_sequences)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", CELLS)
def test_cells_in_a_loop(engine: Any, kind: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        state = None
        for x_t in x.unbind(1):
            state = s.cell(x_t, state)
        return s.head(state[0] if isinstance(state, tuple) else state)

    model = model_of(forward, cell=CELLS[kind](5, 6), head=nn.Linear(6, CLASSES))
    with compiled():
        Pair(model, engine=engine).steps(3, short_sequences)


@pytest.mark.parametrize("kind", RECURRENT)
def test_trained_initial_states_and_final_ones(kind: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.h.expand(1, len(x), 6).contiguous()
        _, state = s.layer(x, (h, h.tanh()) if kind == "LSTM" else h)
        return s.head((state[0] * state[1] if kind == "LSTM" else state)[0])

    layer = RECURRENT[kind](5, 6, batch_first=True)
    model = model_of(forward, layer=layer, head=nn.Linear(6, CLASSES), h=torch.randn(1, 1, 6))
    with compiled():
        Pair(model).steps(3, short_sequences)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_packed_sequences(kind: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, [2] * len(x), batch_first=True)
        return s.head(s.layer(packed)[1][0].reshape(len(x), 6))

    Pair(_of(RECURRENT[kind](5, 6, batch_first=True), forward)).steps(3, short_sequences)


@pytest.mark.parametrize("kind", ["LSTM", "relu"])
def test_through_inductor(kind: str) -> None:
    model = _of(RECURRENT[kind](5, 6, batch_first=True, num_layers=2)).float()
    with compiled():
        Pair(model, compile="inductor", tolerance=FLOAT32).steps(3, _narrow)


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_graph_grows_by_the_same_for_each_step_in_time(kind: str) -> None:
    """And no operation in it writes to a part of a tensor, which a compiler would copy whole."""

    def operations(length: int) -> int:
        model = _of(RECURRENT[kind](5, 6, batch_first=True))
        batch, clean = ((torch.randn(n, length, 5).double(), short_sequences(n)[1]) for n in (6, 4))
        with graphs() as made:
            pair = Pair(model, cross_entropy)
            for _ in range(2):
                pair.step(batch, clean)
        (graph,) = made
        targets = [n.target for n in graph.module.graph.nodes if n.op == "call_function"]
        overloads = [t for t in targets if isinstance(t, torch._ops.OpOverload)]
        assert not [t for t in overloads if "out" in t._overloadname or "grad_input" in str(t)]
        return len(overloads)

    counts = [operations(length) for length in (2, 3, 4)]
    assert counts[2] - counts[1] == counts[1] - counts[0]


def _numbers_of_examples(pair: Pair, width: torch.dtype, *lengths: int) -> None:
    for n, m in ((6, 4), (6, 4), (5, 4), (6, 3), (9, 7)):
        for length in lengths:
            pair.step(
                *((torch.randn(k, length, 5).to(width), short_sequences(k)[1]) for k in (n, m))
            )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", RECURRENT)
def test_one_graph_for_all_numbers_of_examples(kind: str, options: str) -> None:
    """The layers' own lists of weights are as before when the graph is made."""
    layer = RECURRENT[kind](5, 6, **OPTIONS[options])
    lists = [list(layer._flat_weights), list(layer._flat_weight_refs)]
    pair = Pair(_of(layer), compile_options={"dynamic": True})
    with compiled(1):
        _numbers_of_examples(pair, torch.float64, 3)
    for before, after in zip(lists, (layer._flat_weights, layer._flat_weight_refs), strict=True):
        assert all(x is y for x, y in zip(before, after, strict=True))


def test_a_graph_for_each_length() -> None:
    """There are as many operations as there are steps in time."""
    pair = Pair(_of(nn.GRU(5, 6, batch_first=True)), compile_options={"dynamic": True})
    with compiled(2):
        _numbers_of_examples(pair, torch.float64, 3, 2)


@pytest.mark.parametrize("compile", ["eager", "inductor"])
def test_the_fused_layer_for_all_numbers_of_examples(compile: str) -> None:
    model = _of(nn.LSTM(5, 6, batch_first=True)).float()
    pair = Pair(model, compile=compile, compile_options={"dynamic": True}, tolerance=FLOAT32)
    with compiled(1):
        _numbers_of_examples(pair, torch.float32, 3)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_for_all_numbers_of_examples(kind: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        state: Any = (h, h) if kind == "LSTM" else h
        for x_t in x.unbind(1):
            state = s.cell(x_t, state)
        return s.head(state[0] if kind == "LSTM" else state)

    model = model_of(forward, cell=CELLS[kind](5, 6), head=nn.Linear(6, CLASSES))
    with compiled(1):
        _numbers_of_examples(Pair(model, compile_options={"dynamic": True}), torch.float64, 3)
