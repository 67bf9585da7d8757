"""What an LSTM, a GRU and a plain RNN do after their input projection, forward and back in time.

The gates of step t are a_t = pre_t + W h_{t-1} + b, with pre the projected inputs. The walk back is
split: factors that need no gradient are formed for all steps at once, which leaves one matrix
product and few elementwise operations for each step. The orders of gates are torch's: i, f, g, o
and r, z, n.

What the steps compute is written to one tensor for all of them. In a trace it is joined in the end
instead, because a compiler without writes would copy the whole tensor for each step's part.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from l2rw_ext import devices

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


class _Joined:
    """Results of operations that make one tensor, side by side along a dimension.

    Args:
        memory: what the operations write to, unless they are traced.
        dim: the dimension.
        reverse: whether the last part comes first.
    """

    def __init__(self, memory: Tensor, dim: int = 0, *, reverse: bool = False) -> None:
        self._memory = memory
        self._dim = dim
        self._order = -1 if reverse else 1
        self._places = memory.unbind(dim)[:: self._order]
        self._parts: list[Tensor] = []

    def add(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """The next part, which is what a function returns."""
        given = {} if devices.tracing() else {"out": self._places[len(self._parts)]}
        self._parts.append(function(*args, **given))
        return self._parts[-1]

    def keep(self, x: Tensor) -> Tensor:
        """Take x for the next part, in the dtype of the others."""
        part = self._places[len(self._parts)]
        self._parts.append(x.to(part.dtype) if devices.tracing() else part.copy_(x))
        return self._parts[-1]

    def made_of(self, *pieces: Tensor) -> Tensor:
        """Take pieces along the last dimension for the next part, in whose memory they lie."""
        whole = torch.cat(pieces, -1) if devices.tracing() else self._places[len(self._parts)]
        self._parts.append(whole)
        return whole

    def tensor(self) -> Tensor:
        """The parts as one tensor, once there are all."""
        if devices.tracing():
            return torch.stack(self._parts[:: self._order], self._dim)
        return self._memory


def _beginning(pre: Tensor, state: Tensor, reverse: bool) -> tuple[_Joined, Tensor]:
    """The states at all times, and the initial one as the first of them."""
    states = _Joined(pre.new_empty(pre.shape[0] + 1, *state.shape), reverse=reverse)
    return states, states.keep(state)


def before(hidden: Tensor, reverse: bool) -> Tensor:
    """h_{t-1}, or h_{t+1} for ``reverse``, at every t, (T, N, H)."""
    return hidden[1:] if reverse else hidden[:-1]


def after(hidden: Tensor, reverse: bool) -> Tensor:
    """h_t at every t, (T, N, H)."""
    return hidden[:-1] if reverse else hidden[1:]


def _following(g: Tensor, reverse: bool) -> Sequence[Tensor]:
    """What is added to the gradient that each step of the walk back sends to the next one."""
    return *_walk(g, not reverse)[1:], g.new_zeros(())


def _through_sigmoid(g: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of a, given that of y = sigmoid(a), in one pass: g y (1 - y)."""
    backward = torch.ops.aten.sigmoid_backward
    through: Tensor = backward(g, y) if out is None else backward(g, y, grad_input=out)
    return through


def _through_tanh(g: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient of a, given that of y = tanh(a), in one pass: g (1 - y²)."""
    backward = torch.ops.aten.tanh_backward
    through: Tensor = backward(g, y) if out is None else backward(g, y, grad_input=out)
    return through


class LSTM(Cell):
    """c_t = f c_{t-1} + i g, h_t = o tanh(c_t)."""

    gates = 4

    def run(
        self, pre: Tensor, states: States, weight: Tensor, bias: Tensor | None, reverse: bool
    ) -> tuple[Tensor | None, Saved]:
        """See :class:`Cell`; saves the gates and the memory at all times."""
        sizes = (2 * weight.shape[1], weight.shape[1], weight.shape[1])
        pre = pre if bias is None else pre + bias
        # A step reads its part of the biased inputs before it writes there.
        gates = torch.empty_like(pre) if bias is None else pre
        i_and_f, candidates, outputs = (_Joined(x, reverse=reverse) for x in gates.split(sizes, 2))
        (hidden, h), (memory, c) = (_beginning(pre, state, reverse) for state in states)
        squashed = _Joined(torch.empty_like(pre[:, :, : sizes[1]]), reverse=reverse)
        transposed = weight.t()
        for at in _walk(pre, reverse):
            a_if, a_g, a_o = torch.addmm(at, h, transposed).split(sizes, 1)
            i, f = i_and_f.add(torch.sigmoid, a_if).chunk(2, 1)
            g = candidates.add(torch.tanh, a_g)
            o = outputs.add(torch.sigmoid, a_o)
            c = memory.add(torch.addcmul, f * c, i, g)
            h = hidden.add(torch.mul, o, squashed.add(torch.tanh, c))
        saved = hidden, i_and_f, candidates, outputs, memory, squashed
        return c.clone(), [x.tensor() for x in saved]

    def walk_back(
        self, saved: Saved, weight: Tensor, g: Tensor, g_memory: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See :class:`Cell`."""
        _, i_and_f, candidate, o, memory, squashed = saved
        assert g_memory is not None
        size = weight.shape[1]
        steps, batch = g.shape[:2]
        i, f = i_and_f.chunk(2, 2)
        # The factors of the gradient of c_t, for i, f and g, and of the gradient of h_t, for o.
        by_memory = _Joined(g.new_empty(steps, batch, 3, size), 2)
        by_memory.add(_through_sigmoid, candidate, i)
        by_memory.add(_through_sigmoid, before(memory, reverse), f)
        by_memory.add(_through_tanh, i, candidate)
        to_memory = _through_tanh(o, squashed)
        by_hidden = _through_sigmoid(squashed, o)
        whole = g.new_empty(steps, batch, 4 * size)
        parts = whole[:, :, : 3 * size].unflatten(2, (3, size)), whole[:, :, 3 * size :]
        d_gates, d_ifg, d_o = (_Joined(x, reverse=not reverse) for x in (whole, *parts))
        factors = by_memory.tensor(), to_memory, by_hidden, f
        factors_at = zip(*(_walk(x, not reverse) for x in factors), strict=True)
        at, d_memory = _walk(g, not reverse)[0], g_memory
        for (by_memory_at, to_memory_at, by_hidden_at, f_at), following in zip(
            factors_at, _following(g, reverse), strict=True
        ):
            d_memory = torch.addcmul(d_memory, at, to_memory_at)
            d_gate = d_gates.made_of(
                d_ifg.add(torch.mul, d_memory.unsqueeze(1), by_memory_at).flatten(1),
                d_o.add(torch.mul, at, by_hidden_at),
            )
            d_memory = d_memory.mul_(f_at)
            at = torch.addmm(following, d_gate, weight)
        d_pre = d_gates.tensor()
        return d_pre, d_pre, [at, d_memory]


class GRU(Cell):
    """n = tanh(pre_n + r (W_n h_{t-1} + b_n)), h_t = (1 - z) n + z h_{t-1}."""

    gates = 3

    def run(
        self, pre: Tensor, states: States, weight: Tensor, bias: Tensor | None, reverse: bool
    ) -> tuple[Tensor | None, Saved]:
        """See :class:`Cell`; saves the gates and W_n h + b_n at all times."""
        sizes = (2 * weight.shape[1], weight.shape[1])
        gates = torch.empty_like(pre).split(sizes, 2)
        r_and_z, n_all = (_Joined(x, reverse=reverse) for x in gates)
        hidden, h = _beginning(pre, states[0], reverse)
        candidates = _Joined(torch.empty_like(pre[:, :, : sizes[1]]), reverse=reverse)
        transposed = weight.t()
        for at in _walk(pre, reverse):
            product = h @ transposed if bias is None else torch.addmm(bias, h, transposed)
            a_rz, a_n = at.split(sizes, 1)
            w_rz, w_n = product.split(sizes, 1)
            r, z = r_and_z.add(torch.sigmoid, a_rz + w_rz).chunk(2, 1)
            n = n_all.add(torch.tanh, torch.addcmul(a_n, r, candidates.keep(w_n)))
            h = hidden.add(torch.lerp, n, h, z)
        return None, [x.tensor() for x in (hidden, r_and_z, n_all, candidates)]

    def walk_back(
        self, saved: Saved, weight: Tensor, g: Tensor, g_memory: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See :class:`Cell`; the gradient of W_n h + b_n is r times that of pre_n."""
        hidden, r_and_z, n, candidates = saved
        size = weight.shape[1]
        r, z = r_and_z.chunk(2, 2)
        # The factors of the gradient of h_t, for the three parts of W h + b and for pre_n.
        by_hidden = _Joined(g.new_empty(*g.shape[:2], 3, size), 2)
        by_n = _through_tanh(1 - z, n)
        by_hidden.add(_through_sigmoid, by_n * candidates, r)
        by_hidden.add(_through_sigmoid, before(hidden, reverse) - n, z)
        by_hidden.add(torch.mul, by_n, r)
        d_states = _Joined(torch.empty_like(n), reverse=not reverse)
        d_products = _Joined(g.new_empty(*g.shape[:2], 3, size), reverse=not reverse)
        d_hidden = torch.zeros_like(hidden[0])
        for g_at, by_hidden_at, z_at in zip(
            *(_walk(x, not reverse) for x in (g, by_hidden.tensor(), z)), strict=True
        ):
            at = d_states.add(torch.add, d_hidden, g_at)
            d_product = d_products.add(torch.mul, at.unsqueeze(1), by_hidden_at).flatten(1)
            d_hidden = torch.addcmul(d_product @ weight, at, z_at)
        d_product = d_products.tensor().flatten(2)
        d_pre = torch.cat((d_product[:, :, : 2 * size], d_states.tensor() * by_n), 2)
        return d_pre, d_product, [d_hidden]


class Elman(Cell):
    """h_t = tanh(a_t) or relu(a_t)."""

    gates = 1

    def __init__(self, nonlinearity: str) -> None:
        self._tanh = nonlinearity == "tanh"

    def run(
        self, pre: Tensor, states: States, weight: Tensor, bias: Tensor | None, reverse: bool
    ) -> tuple[Tensor | None, Saved]:
        """See :class:`Cell`; the walk back needs only the hidden states."""
        pre = pre if bias is None else pre + bias
        hidden, h = _beginning(pre, states[0], reverse)
        transposed = weight.t()
        for at in _walk(pre, reverse):
            a = torch.addmm(at, h, transposed)
            h = hidden.add(torch.tanh, a) if self._tanh else hidden.add(torch.clamp_min, a, 0)
        return None, (hidden.tensor(),)

    def walk_back(
        self, saved: Saved, weight: Tensor, g: Tensor, g_memory: Tensor | None, reverse: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See :class:`Cell`."""
        (hidden,) = saved
        h = after(hidden, reverse)
        slope = 1 - h.square() if self._tanh else (h > 0).to(h.dtype)
        d_gates = _Joined(torch.empty_like(h), reverse=not reverse)
        at = _walk(g, not reverse)[0]
        for slope_at, following in zip(
            _walk(slope, not reverse), _following(g, reverse), strict=True
        ):
            at = torch.addmm(following, d_gates.add(torch.mul, at, slope_at), weight)
        d_pre = d_gates.tensor()
        return d_pre, d_pre, [at]
