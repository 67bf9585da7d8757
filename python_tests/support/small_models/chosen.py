"""Models in which an index chooses what is read or written."""

from __future__ import annotations

import torch
from torch import nn

from .table import Case, D, N, Of, T, body, case, ce, head, rows, sequences


@case("LSTM, packed by lengths that are data", "unsure", False)
def _() -> Case:
    def f(m, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return m.f(m.r(packed)[1][0][0])

    x, y = sequences()
    return (
        Of(f, r=nn.LSTM(D, D, batch_first=True), f=head()),
        ce,
        ((x, torch.randint(1, T, (N,))), y),
    )


@case("EmbeddingBag, offsets that are data", "unsure", False)
def _() -> Case:
    def f(m, x, offsets):
        return m.f(m.e(x, offsets))

    offsets = torch.tensor([0, 2, 3, 7, 8, 9])
    return (
        Of(f, e=nn.EmbeddingBag(20, D), f=head()),
        ce,
        ((torch.randint(20, (12,)), offsets), torch.randint(4, (N,))),
    )


@case("pooling at a position that is data: x[arange, lengths]", "certain")
def _() -> Case:
    def f(m, x, lengths):
        return m.f(torch.tanh(m.a(x))[torch.arange(len(x)), lengths])

    x, y = sequences()
    return Of(f, **body()), ce, ((x, torch.randint(T, (N,))), y)


@case("gather and topk within an example", "certain")
def _() -> Case:
    def f(m, x):
        h = torch.tanh(m.a(x))
        best = h.sum(-1).topk(2, 1).indices
        return m.f(h.gather(1, best.unsqueeze(-1).expand(-1, -1, D)).mean(1) + h.cumsum(1).amax(1))

    return Of(f, **body()), ce, sequences()


@case("rows taken by an index that is data, and put back", "unsure", False)
def _() -> Case:
    def f(m, x, key):
        order = key.argsort()
        return m.f(torch.tanh(m.a(x[order]))[order.argsort()] * 1)

    x, y = rows()
    return Of(f, **body()), ce, ((x, torch.rand(N)), y)


@case("index by data that is sorted today", "today", False)
def _() -> Case:
    def f(m, x, key):
        return m.f(torch.tanh(m.a(x))[key.argsort()])

    x, y = rows()
    return Of(f, **body()), ce, ((x, torch.arange(N) * 1.0), y)


@case("index by a random permutation that is the identity today", "today", False)
def _() -> Case:
    def f(m, x):
        h = torch.tanh(m.a(x))
        order = (
            torch.rand(len(x)).argsort()
            if m.later
            else torch.arange(len(x)) + torch.zeros(len(x)).bernoulli_(0.0).long()
        )
        return m.f(h[order])

    return Of(f, later=nn.ModuleList(), **body()), ce, rows()


@case("index by a buffer that is the identity today", "today", False)
def _() -> Case:
    return (
        Of(lambda m, x: m.f(torch.tanh(m.a(x))[m.order]), order=torch.arange(N), **body()),
        ce,
        rows(),
    )


@case("mixup of inputs by a random permutation", "certain", False)
def _() -> Case:
    def f(m, x):
        return m.f(torch.tanh(m.a(0.9 * x + 0.1 * x[torch.randperm(len(x))])))

    return Of(f, **body()), ce, rows()


@case("mixture of experts, routed by index", "unsure", False)
def _() -> Case:
    def f(m, x):
        z = x.reshape(-1, D)
        weights, choice = m.r(z).softmax(-1).topk(2, -1)
        out = torch.zeros_like(z)
        for k, expert in enumerate(m.experts):
            t, slot = torch.where(choice == k)
            out.index_add_(0, t, expert(z[t]) * weights[t, slot, None])
        return m.f((z + out).view(x.shape).mean(1))

    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(D, 16), nn.SiLU(), nn.Linear(16, D)) for _ in range(3)
    )
    return Of(f, r=nn.Linear(D, 3), experts=experts, **body()), ce, sequences()


@case("mixture of experts, routed by index, after a layer", "today", False)
def _() -> Case:
    def f(m, x):
        z = torch.tanh(m.a(x)).reshape(-1, D)
        choice = m.r(z).argmax(-1)
        out = torch.zeros_like(z)
        for k, expert in enumerate(m.experts):
            t = (choice == k).nonzero().squeeze(1)
            out[t] = expert(z[t])
        return m.f((z + out).view(x.shape).mean(1))

    return (
        Of(
            f, r=nn.Linear(D, 3), experts=nn.ModuleList(nn.Linear(D, D) for _ in range(3)), **body()
        ),
        ce,
        sequences(),
    )


@case("mixture of experts, load balance over the batch", "mixed")
def _() -> Case:
    def f(m, x):
        p = m.r(x).softmax(-1)
        return m.f((p.unsqueeze(-1) * torch.stack([e(x) for e in m.experts], 1)).sum(1)), p

    experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
    return (
        Of(f, r=nn.Linear(D, 3), experts=experts, **body()),
        lambda o, y: ce(o[0], y) + o[1].mean(0).pow(2).sum(),
        rows(),
    )


@case("mixture of experts, dense", "certain")
def _() -> Case:
    def f(m, x):
        p = m.r(x).softmax(-1)
        return m.f((p.unsqueeze(-1) * torch.stack([e(x) for e in m.experts], 1)).sum(1))

    return (
        Of(
            f, r=nn.Linear(D, 3), experts=nn.ModuleList(nn.Linear(D, D) for _ in range(3)), **body()
        ),
        ce,
        rows(),
    )
