"""Models some of which runs where the dispatcher, or autograd, does not see all of it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .table import Case, D, N, Of, T, body, case, ce, head, images, rows, sequences


@case("checkpoint, not reentrant", "certain")
def _() -> Case:
    return (
        Of(
            lambda m, x: m.f(checkpoint(lambda x: torch.tanh(m.a(x)), x, use_reentrant=False)),
            **body(),
        ),
        ce,
        rows(),
    )


@case("vmap inside the model", "certain")
def _() -> Case:
    return (
        Of(
            lambda m, x: m.f(torch.vmap(lambda r: torch.tanh(m.a.weight @ r) * r.sum())(x)),
            **body(),
        ),
        ce,
        rows(),
    )


@case("two inputs by name, a mask for all", "certain")
def _() -> Case:
    def f(m, x, mask):
        return m.f((torch.tanh(m.a(x)) * mask.unsqueeze(-1)).mean(1))

    x, y = sequences()
    return Of(f, **body()), ce, ((x, torch.ones(T)), y)


@case("a write through .data into another's rows", "mixed")
def _() -> Case:
    def f(m, x):
        h = m.a(x)
        h.data.copy_(h.data.roll(1, 0))
        return m.f(torch.tanh(h.clone()))

    return Of(f, **body()), ce, rows()


class Centre(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g / g.norm()


class Hidden(torch.autograd.Function):
    """Into memory that no operation of torch fills, as a kernel of one's own does."""

    @staticmethod
    def forward(ctx, x):
        out = torch.zeros_like(x)
        out.numpy()[:] = x.detach().numpy() - x.detach().numpy().mean(0)
        return out

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


@case("custom Function that mixes", "mixed")
def _() -> Case:
    return Of(lambda m, x: m.f(Centre.apply(m.a(x))), **body()), ce, rows()


@case("custom Function that mixes in backward alone", "today", apart=True)
def _() -> Case:
    return Of(lambda m, x: m.f(Reverse.apply(m.a(x))), **body()), ce, rows()


@case("custom Function through numpy", "today")
def _() -> Case:
    return Of(lambda m, x: m.f(Hidden.apply(m.a(x))), **body()), ce, rows()


@case("hook that mixes gradients", "today")
def _() -> Case:
    def f(m, x):
        h = m.a(x)
        h.register_hook(lambda g: g - g.mean(0))
        return m.f(torch.tanh(h))

    return Of(f, **body()), ce, rows()


@case("values through numpy, into an index", "today", False)
def _() -> Case:
    def f(m, x):
        h = torch.tanh(m.a(x))
        return m.f(h[torch.from_numpy(x[:, 0].numpy() * 0).long() + torch.arange(len(x))])

    return Of(f, **body()), ce, rows()


@case("inputs that the batch does not show", "unsure", True)
def _() -> Case:
    x, y = rows()
    return Of(lambda m, i: m.f(torch.tanh(m.a(x))), **body()), ce, (torch.zeros(N), y)


@case("a table in a buffer, read by an index that is data", "certain")
def _() -> Case:
    return (
        Of(lambda m, i: m.f(torch.tanh(m.a(m.table[i]))), table=torch.randn(20, D), **body()),
        ce,
        (torch.arange(N), rows()[1]),
    )


@case("constants that are no buffers: a mask, class weights", "certain")
def _() -> Case:
    mask, weight = torch.ones(D).bernoulli_(), torch.rand(4)
    return (
        Of(lambda m, x: m.f(m.a(x) * mask), **body()),
        lambda o, y: F.cross_entropy(o, y, weight, reduction="none"),
        rows(),
    )


@case("positions in a tensor that is no buffer", "unsure", True)
def _() -> Case:
    position = torch.arange(T)
    return (
        Of(lambda m, x: m.f((m.a(x) + m.e(position)).mean(1)), e=nn.Embedding(T, D), **body()),
        ce,
        sequences(),
    )


@case("scripted module", "certain")
def _() -> Case:
    return (
        torch.jit.script(nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 4))),
        ce,
        rows(),
    )


@case("scripted module that mixes", "mixed")
def _() -> Case:
    return (
        torch.jit.trace(Of(lambda m, x: m.f(m.a(x) - m.a(x).mean(0)), **body()), rows()[0]),
        ce,
        rows(),
    )


@case("compiled module", "certain")
def _() -> Case:
    return (
        torch.compile(
            nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 4)), backend="aot_eager"
        ),
        ce,
        rows(),
    )


@case("compiled module that mixes", "mixed")
def _() -> Case:
    return (
        torch.compile(Of(lambda m, x: m.f(m.a(x) - m.a(x).mean(0)), **body()), backend="aot_eager"),
        ce,
        rows(),
    )


@case("autocast to bfloat16", "certain")
def _() -> Case:
    def f(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.f(torch.tanh(m.a(x))).float()

    return Of(f, **body()), ce, rows()


@case("channels last, in place", "certain")
def _() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8).eval(),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(288, 4),
    )
    x, y = images()
    return (
        model.to(memory_format=torch.channels_last),
        ce,
        (x.to(memory_format=torch.channels_last), y),
    )


@case("padding encoder, eval, no grad in it (nested tensors)", "today", False)
def _() -> Case:
    def f(m, x, mask):
        with torch.no_grad():
            h = m.e(x, src_key_padding_mask=mask)
        return m.f(h[:, 0])

    x, y = sequences()
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)
    mask = torch.arange(T) >= torch.randint(1, T, (N, 1))
    return Of(f, e=nn.TransformerEncoder(layer, 2).eval(), f=head()), ce, ((x, mask), y)


@case("encoder, eval, no grad in it (fast path)", "certain")
def _() -> Case:
    def f(m, x):
        with torch.no_grad():
            h = m.e(x)
        return m.f(h[:, 0])

    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)
    return Of(f, e=nn.TransformerEncoder(layer, 2).eval(), f=head()), ce, sequences()


@case("gradient within the forward, to the inputs", "certain")
def _() -> Case:
    def f(m, x):
        x = x.clone().requires_grad_()
        return m.f(torch.autograd.grad(torch.tanh(m.a(x)).sum(), x, create_graph=True)[0])

    return Of(f, **body()), ce, rows()


@case("gradient within the forward, to parameters", "mixed")
def _() -> Case:
    def f(m, x):
        (g,) = torch.autograd.grad(torch.tanh(m.a(x)).sum(), m.a.weight, create_graph=True)
        return m.f(F.linear(x, m.a.weight - g))

    return Of(f, **body()), ce, rows()


@case("checkpoint, reentrant", "today", apart=True)
def _() -> Case:
    def f(m, x):
        return m.f(checkpoint(lambda x: torch.tanh(m.b(x)), m.a(x), use_reentrant=True))

    return Of(f, b=nn.Linear(D, D), **body()), ce, rows()
