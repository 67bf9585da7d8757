"""What an LSTM, a GRU and a plain RNN do after their input projection, forward and back in time.

The gates of step t are a_t = pre_t + W h_{t-1} + b, with pre the projected inputs. The walk back is
split: factors that need no gradient are formed for all steps at once, which leaves one matrix
product and few elementwise operations for each step. The orders of gates are torch's: i, f, g, o
and r, z, n.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

States = Sequence[Tensor]

Saved = Sequence[Tensor]
"""What the walk back needs: first the hidden states."""


class Cell(abc.ABC):
    """One kind of recurrence.

    Shapes: pre (T, N, kH), states (N, H), weight (kH, H), bias (kH,). ``hidden`` holds the state
    before and after every step, (T + 1, N, H), in the order of time: for ``reverse`` it ends with
    the initial state, else it begins with it.
    """

    gates: ClassVar[int]
    """k, the number of blocks of H rows in the weights."""

    @abc.abstractmethod
    def run(
        self, pre: Tensor, states: States, weight: Tensor, bias: Tensor | None, reverse: bool
    ) -> tuple[Tensor | None, Saved]:
        """(final memory or None, what the walk back needs)."""

    @abc.abstractmethod
    def walk_back(
        self, saved: Saved, weight: Tensor, g: Tensor, g_memory: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """From the gradients of all hidden states (T, N, H) and of the final memory (N, H).

        Returns:
            gradients of pre and of W h + b, both (T, N, kH) and the same tensor where the two enter
            as a sum, and those of the initial states.
        """


def _walk(x: Tensor, reverse: bool) -> Sequence[Tensor]:
    """The steps of x in the order of the walk."""
    return x.unbind(0)[:: -1 if reverse else 1]


def _hidden(pre: Tensor, state: Tensor, reverse: bool) -> Tensor:
    hidden = pre.new_empty(pre.shape[0] + 1, *state.shape)
    hidden[-1 if reverse else 0] = state
    return hidden


def before(hidden: Tensor, reverse: bool) -> Tensor:
    """h_{t-1}, or h_{t+1} for ``reverse``, at every t, (T, N, H)."""
    return hidden[1:] if reverse else hidden[:-1]


def after(hidden: Tensor, reverse: bool) -> Tensor:
    """h_t at every t, (T, N, H)."""
    return hidden[:-1] if reverse else hidden[1:]


def _plus_bias(pre: Tensor, bias: Tensor | None) -> Tensor:
    gates = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    return gates.copy_(pre) if bias is None else torch.add(pre, bias, out=gates)


def _through_sigmoid(g: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of a, given that of y = sigmoid(a), in one pass: g y (1 - y)."""
    out = torch.empty_like(g) if out is None else out
    through: Tensor = torch.ops.aten.sigmoid_backward.grad_input(g, y, grad_input=out)
    return through


def _through_tanh(g: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of a, given that of y = tanh(a), in one pass: g (1 - y²)."""
    out = torch.empty_like(g) if out is None else out
    through: Tensor = torch.ops.aten.tanh_backward.grad_input(g, y, grad_input=out)
    return through


class LSTM(Cell):
    """c_t = f c_{t-1} + i g, h_t = o tanh(c_t)."""

    gates = 4

    def run(
        self, pre: Tensor, states: States, weight: Tensor, bias: Tensor | None, reverse: bool
    ) -> tuple[Tensor | None, Saved]:
        """See :class:`Cell`; saves the gates and the memory at all times."""
        size = weight.shape[1]
        gates = _plus_bias(pre, bias)
        hidden = _hidden(pre, states[0], reverse)
        memory = _hidden(pre, states[1], reverse)
        squashed = torch.empty_like(hidden[1:])
        i, f, g, o = (_walk(part, reverse) for part in gates.split(size, 2))
        i_and_f = _walk(gates[:, :, : 2 * size], reverse)
        gate, squash, h, c = (_walk(x, reverse) for x in (gates, squashed, hidden, memory))
        transposed = weight.t()
        for t in range(len(gates)):
            gate[t].addmm_(h[t], transposed)
            i_and_f[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            torch.mul(f[t], c[t], out=c[t + 1])
            c[t + 1].addcmul_(i[t], g[t])
            torch.tanh(c[t + 1], out=squash[t])
            torch.mul(o[t], squash[t], out=h[t + 1])
        return c[-1].clone(), (hidden, gates, memory, squashed)

    def walk_back(
        self, saved: Saved, weight: Tensor, g: Tensor, g_memory: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See :class:`Cell`."""
        _, gates, memory, squashed = saved
        assert g_memory is not None
        size = weight.shape[1]
        steps, batch = gates.shape[:2]
        i, f, candidate, o = gates.split(size, 2)
        # The factors of the gradient of c_t, for i, f and g, and of the gradient of h_t, for o.
        by_memory = gates.new_empty(steps, batch, 3, size)
        _through_sigmoid(candidate, i, out=by_memory[:, :, 0])
        _through_sigmoid(before(memory, reverse), f, out=by_memory[:, :, 1])
        _through_tanh(i, candidate, out=by_memory[:, :, 2])
        to_memory = _through_tanh(o, squashed)
        by_hidden = _through_sigmoid(squashed, o)
        d_gates = torch.empty_like(gates)
        d_ifg = _walk(d_gates[:, :, : 3 * size].unflatten(2, (3, size)), not reverse)
        d_o = _walk(d_gates[:, :, 3 * size :], not reverse)
        d_gate, by_memory_at, to_memory_at, by_hidden_at, f_at, g_at = (
            _walk(x, not reverse) for x in (d_gates, by_memory, to_memory, by_hidden, f, g)
        )
        d_memory, d_hidden = g_memory, None
        for t in range(steps):
            at = g_at[t] if d_hidden is None else d_hidden.add_(g_at[t])
            d_memory = torch.addcmul(d_memory, at, to_memory_at[t])
            torch.mul(at, by_hidden_at[t], out=d_o[t])
            torch.mul(d_memory.unsqueeze(1), by_memory_at[t], out=d_ifg[t])
            d_memory = d_memory.mul_(f_at[t])
            d_hidden = d_gate[t] @ weight
        assert d_hidden is not None
        return d_gates, d_gates, [d_hidden, d_memory]


class GRU(Cell):
    """n = tanh(pre_n + r (W_n h_{t-1} + b_n)), h_t = (1 - z) n + z h_{t-1}."""

    gates = 3

    def run(
        self, pre: Tensor, states: States, weight: Tensor, bias: Tensor | None, reverse: bool
    ) -> tuple[Tensor | None, Saved]:
        """See :class:`Cell`; saves the gates and W_n h + b_n at all times."""
        size = weight.shape[1]
        gates = _plus_bias(pre, None)
        hidden = _hidden(pre, states[0], reverse)
        candidates = torch.empty_like(hidden[1:])
        r, z, n = (_walk(part, reverse) for part in gates.split(size, 2))
        r_and_z = _walk(gates[:, :, : 2 * size], reverse)
        candidate, h = _walk(candidates, reverse), _walk(hidden, reverse)
        transposed = weight.t()
        for t in range(len(gates)):
            product = h[t] @ transposed if bias is None else torch.addmm(bias, h[t], transposed)
            r_and_z[t].add_(product[:, : 2 * size]).sigmoid_()
            candidate[t].copy_(product[:, 2 * size :])
            n[t].addcmul_(r[t], candidate[t]).tanh_()
            torch.lerp(n[t], h[t], z[t], out=h[t + 1])
        return None, (hidden, gates, candidates)

    def walk_back(
        self, saved: Saved, weight: Tensor, g: Tensor, g_memory: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See :class:`Cell`; the gradient of W_n h + b_n is r times that of pre_n."""
        hidden, gates, candidates = saved
        size = weight.shape[1]
        steps, batch = gates.shape[:2]
        r, z, n = gates.split(size, 2)
        # The factors of the gradient of h_t, for the three parts of W h + b and for pre_n.
        by_hidden = gates.new_empty(steps, batch, 3, size)
        by_n = _through_tanh(1 - z, n)
        _through_sigmoid(by_n * candidates, r, out=by_hidden[:, :, 0])
        _through_sigmoid(before(hidden, reverse) - n, z, out=by_hidden[:, :, 1])
        torch.mul(by_n, r, out=by_hidden[:, :, 2])
        d_states = torch.empty_like(hidden[1:])
        d_products = torch.empty_like(gates)
        d_parts = _walk(d_products.unflatten(2, (3, size)), not reverse)
        d_product, d_state, by_hidden_at, z_at, g_at = (
            _walk(x, not reverse) for x in (d_products, d_states, by_hidden, z, g)
        )
        d_hidden = torch.zeros_like(hidden[0])
        for t in range(steps):
            at = torch.add(d_hidden, g_at[t], out=d_state[t])
            torch.mul(at.unsqueeze(1), by_hidden_at[t], out=d_parts[t])
            d_hidden = torch.addcmul(d_product[t] @ weight, at, z_at[t])
        d_pre = torch.cat((d_products[:, :, : 2 * size], d_states * by_n), 2)
        return d_pre, d_products, [d_hidden]


class Elman(Cell):
    """h_t = tanh(a_t) or relu(a_t)."""

    gates = 1

    def __init__(self, nonlinearity: str) -> None:
        self._tanh = nonlinearity == "tanh"

    def run(
        self, pre: Tensor, states: States, weight: Tensor, bias: Tensor | None, reverse: bool
    ) -> tuple[Tensor | None, Saved]:
        """See :class:`Cell`; the walk back needs only the hidden states."""
        hidden = _hidden(pre, states[0], reverse)
        gates = _plus_bias(pre, bias)
        gate, h = _walk(gates, reverse), _walk(hidden, reverse)
        transposed = weight.t()
        squash = torch.tanh if self._tanh else torch.clamp_min
        for t in range(len(gates)):
            gate[t].addmm_(h[t], transposed)
            squash(gate[t], *(() if self._tanh else (0,)), out=h[t + 1])
        return None, (hidden,)

    def walk_back(
        self, saved: Saved, weight: Tensor, g: Tensor, g_memory: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See :class:`Cell`."""
        (hidden,) = saved
        h = after(hidden, reverse)
        slope = 1 - h.square() if self._tanh else (h > 0).to(h.dtype)
        d_gates = torch.empty_like(h)
        d_gate, slope_at, g_at = (_walk(x, not reverse) for x in (d_gates, slope, g))
        d_hidden = torch.zeros_like(hidden[0])
        for t in range(len(g)):
            torch.mul(d_hidden.add_(g_at[t]), slope_at[t], out=d_gate[t])
            d_hidden = d_gate[t] @ weight
        return d_gates, d_gates, [d_hidden]
