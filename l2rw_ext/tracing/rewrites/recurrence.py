"""LSTM, GRU and RNN layers and cells.

The input projection of a layer over the whole sequence is one linear use, and W h + b of the
recurrence is another. Once the walk back in time has the gradients of all gates, the second use
reports z, the states before each step, and g, the gradients of the gates. So no step needs a
separate use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from l2rw_ext.layers.base import Call, Function, Use
from l2rw_ext.layers.cells import GRU, LSTM, Cell, Elman, after, before
from l2rw_ext.layers.linear import LINEAR
from l2rw_ext.tracing.interception import Interception, rewrites

from .elementwise import meet


class _Recurrence(torch.autograd.Function):
    """All steps of one layer in one direction; gradients flow to projected inputs and states."""

    @staticmethod
    def forward(
        ctx: Any,
        pre: Tensor,
        token: Tensor,
        cell: Cell,
        weight: Tensor,
        bias: Tensor | None,
        use: Use | None,
        reverse: bool,
        *states: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.cell, ctx.use, ctx.reverse = cell, use, reverse
        memory, saved = cell.run(pre, states, weight, bias, reverse)
        ctx.save_for_backward(weight, *saved)
        # A copy, so that the model may write to what it gets.
        return after(saved[0], reverse).clone(), memory

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_memory: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        cell: Cell = ctx.cell
        use: Use | None = ctx.use
        if use is None:
            d_pre, _, d_states = cell.walk_back(saved, weight, g, g_memory, ctx.reverse)
        else:
            assert use.sink is not None
            with use.sink.backward_of(use):
                d_pre, d_product, d_states = cell.walk_back(saved, weight, g, g_memory, ctx.reverse)
                use.sink.report(use, before(saved[0], ctx.reverse), d_product)
        return d_pre, None, None, None, None, None, None, *d_states


def _layer(
    mode: Interception,
    operation: str,
    cell: Cell,
    x: Tensor,  # (T, N, d)
    states: Sequence[Tensor],  # (N, H)
    parameters: Sequence[Tensor | None],  # W_ih (kH, d), W_hh (kH, H), b_ih (kH,), b_hh (kH,)
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(all hidden states (T, N, H), final memory) of one layer in one direction."""
    w_input, weight, b_input, bias = (*parameters, None, None)[:4]
    assert weight is not None
    assert w_input is not None
    with mode:
        pre = F.linear(x, w_input, b_input)
    use = None
    if mode.is_root(weight) or mode.is_root(bias):
        use = mode.use_of(LINEAR, Call(operation, x, weight, bias))
    if use is not None:
        use.shape = (*x.shape[:-1], weight.shape[1])
        assert use.weight is not None
        weight, bias = use.weight, use.bias
    weight = weight.detach().to(pre.dtype)
    bias = None if bias is None else bias.detach().to(pre.dtype)
    out: tuple[Tensor, Tensor | None]
    with mode.following(pre, *states):
        out = _Recurrence.apply(pre, mode.token, cell, weight, bias, use, reverse, *states)
    if use is not None:
        use.output_shape = tuple(out[0].shape)
        mode.label([use], out[0])
    return out


def _covers(
    mode: Interception, cell: Cell, x: Tensor, states: Sequence[Any], parameters: Sequence[Any]
) -> bool:
    """Whether data meets trained weights, in the shapes that a cell without projection has."""
    trained = any(mode.is_root(p) for p in parameters)
    if not trained or not mode.is_data(x) or x.numel() == 0:
        return False
    if any(mode.is_data(p) for p in parameters):
        return False
    size = states[0].shape[-1]
    return all(p is None or p.shape[0] == cell.gates * size for p in parameters) and all(
        state.shape == states[0].shape for state in states
    )


def _data_states(
    mode: Interception, func: Function, states: Sequence[Tensor]
) -> list[Tensor] | None:
    """Initial states as data: a trained state is a use, in the shape in which it enters."""
    met = [meet(mode, func, s, s.shape) if mode.is_root(s) else s for s in states]
    return None if any(s is None for s in met) else [s for s in met if s is not None]


_LAYERS: dict[Any, Cell] = {
    torch.lstm: LSTM(),
    torch.gru: GRU(),
    torch.rnn_tanh: Elman("tanh"),
    torch.rnn_relu: Elman("relu"),
}


def _arguments(
    input: Tensor,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Any, Sequence[Tensor], bool, int, float, bool, bool]:
    return input, hx, params, has_biases, num_layers, dropout * train, bidirectional, batch_first


@rewrites(*_LAYERS)
def _recurrent_layers(mode: Interception, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    packed = len(args) > 1 and isinstance(args[1], Tensor) and not args[1].is_floating_point()
    if packed:
        return _packed(mode, func, args)
    x, hx, parameters, has_biases, layers, dropout, bidirectional, batch_first = _arguments(
        *args, **kwargs
    )
    cell = _LAYERS[func]
    initial: Sequence[Tensor] = hx if isinstance(hx, (tuple, list)) else (hx,)
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    if not _covers(mode, cell, x, initial, parameters) or len(parameters) != (
        layers * directions * each
    ):
        return NotImplemented
    first = len(mode.uses)
    states = _data_states(mode, func, initial)
    of_states = mode.uses[first:]
    if states is None:
        return NotImplemented
    if batch_first:
        x = x.transpose(0, 1)
    final: list[tuple[Tensor, ...]] = []
    for layer in range(layers):
        if layer and dropout:
            x = F.dropout(x, dropout)
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            reverse = direction == 1
            hidden, memory = _layer(
                mode,
                func.__name__,
                cell,
                x,
                [state[index] for state in states],
                parameters[index * each : (index + 1) * each],
                reverse=reverse,
            )
            outputs.append(hidden)
            last = hidden[0 if reverse else -1]
            final.append((last,) if memory is None else (last, memory))
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    if batch_first:
        x = x.transpose(0, 1)
    result = [torch.stack(last) for last in zip(*final, strict=True)]
    mode.label(of_states, result[0])
    return x, *result


def _packed(mode: Interception, func: Function, args: tuple[Any, ...]) -> Any:
    """Refuse a packed sequence: its rows are sorted by length, which no row map describes."""
    for p in (p for a in args if isinstance(a, (tuple, list)) for p in a):
        if mode.is_root(p):
            mode.unruled.setdefault(id(p), f"{func.__name__} of a packed sequence")
    return NotImplemented


_CELLS: dict[Any, Cell] = {
    torch.lstm_cell: _LAYERS[torch.lstm],
    torch.gru_cell: _LAYERS[torch.gru],
    torch.rnn_tanh_cell: _LAYERS[torch.rnn_tanh],
    torch.rnn_relu_cell: _LAYERS[torch.rnn_relu],
}


@rewrites(*_CELLS)
def _recurrent_cell(
    mode: Interception,
    func: Function,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    cell, parameters = _CELLS[func], [w_ih, w_hh, b_ih, b_hh]
    initial: Sequence[Tensor] = hx if isinstance(hx, (tuple, list)) else (hx,)
    if input.dim() != 2 or not _covers(mode, cell, input, initial, parameters):
        return NotImplemented
    first = len(mode.uses)
    states = _data_states(mode, func, initial)
    of_states = mode.uses[first:]
    if states is None:
        return NotImplemented
    hidden, memory = _layer(
        mode, func.__name__, cell, input.unsqueeze(0), states, parameters, reverse=False
    )
    mode.label(of_states, hidden[0])
    return hidden[0] if memory is None else (hidden[0], memory)
