"""Models that couple the examples of a batch, where a gradient passes or where none does."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .certain import resnet
from .table import Case, D, Of, body, case, ce, images, rows, sequences


@case("ResNet, BatchNorm, train", "mixed")
def _() -> Case:
    return resnet(nn.BatchNorm2d), ce, images()


@case("x - x.mean(0), in the model", "mixed")
def _() -> Case:
    def f(m, x):
        h = m.a(x)
        return m.f(torch.tanh(h - h.mean(0)))

    return Of(f, **body()), ce, rows()


@case("x - x.mean(0), on the inputs", "certain", False)
def _() -> Case:
    return Of(lambda m, x: m.f(torch.tanh(m.a(x - x.mean(0)))), **body()), ce, rows()


@case("relu(x - x.mean(0) - 100): a hinge that is inactive", "mixed")
def _() -> Case:
    def f(m, x):
        h = m.a(x)
        return m.f(h + F.relu(h - h.mean(0) - 100))

    return Of(f, **body()), ce, rows()


@case("(1,) buffer of zero times the batch mean", "mixed")
def _() -> Case:
    def f(m, x):
        h = torch.tanh(m.a(x))
        return m.f(h - m.alpha * h.mean(0))

    return Of(f, alpha=torch.zeros(1), **body()), ce, rows()


@case("h + 0 * h.roll(1, 0)", "mixed")
def _() -> Case:
    def f(m, x):
        h = m.a(x)
        return m.f(h + h.roll(1, 0) * 0)

    return Of(f, **body()), ce, rows()


@case("h.roll(1, 0): rows of other examples alone", "mixed")
def _() -> Case:
    return Of(lambda m, x: m.f(torch.tanh(m.a(x)).roll(1, 0)), **body()), ce, rows()


@case("h.roll(1, 0) where it reaches no loss", "certain")
def _() -> Case:
    def f(m, x):
        h = torch.tanh(m.a(x))
        return m.f(h), h.roll(1, 0) + h

    return Of(f, **body()), lambda o, y: ce(o[0], y), rows()


@case("triplet loss with batch-hard negatives, inactive", "mixed")
def _() -> Case:
    def loss(o, y):
        z, logits = o
        d = ((z[:, None] - z[None]).pow(2).sum(-1) + 1e-12).sqrt()
        same = y[:, None] == y[None]
        far = F.relu((d - 1e3 * ~same).amax(1) - (d + 1e3 * same).amin(1) - 100)
        return ce(logits, y) + far

    def f(m, x):
        z = torch.tanh(m.a(x))
        return z, m.f(z)

    return Of(f, **body()), loss, rows()


@case("contrastive loss, z @ z.T", "mixed")
def _() -> Case:
    def loss(z, y):
        return F.cross_entropy(z @ z.T, torch.arange(len(z)), reduction="none")

    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 4)), loss, rows()


@case("contrastive loss, keys detached", "certain", False)
def _() -> Case:
    def loss(z, y):
        return F.cross_entropy(z @ z.detach().T, torch.arange(len(z)), reduction="none")

    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 4)), loss, rows()


@case("detached batch statistic", "certain", False)
def _() -> Case:
    def f(m, x):
        h = m.a(x)
        return m.f(torch.tanh(h / h.detach().std(0)))

    return Of(f, **body()), ce, rows()


@case("statistic under no_grad", "certain", False)
def _() -> Case:
    def f(m, x):
        h = m.a(x)
        with torch.no_grad():
            scale = h.norm() + 1
        return m.f(torch.tanh(h / scale))

    return Of(f, **body()), ce, rows()


@case("argmax over the batch, without gradient", "certain", False)
def _() -> Case:
    def f(m, x):
        h = torch.tanh(m.a(x))
        return m.f(h + (h.argmax(0) == 0) * 0.1)

    return Of(f, **body()), ce, rows()


@case("cumsum over the batch", "mixed")
def _() -> Case:
    return Of(lambda m, x: m.f(m.a(x).cumsum(0)), **body()), ce, rows()


@case("sort over the batch", "mixed")
def _() -> Case:
    return Of(lambda m, x: m.f(m.a(x).sort(0).values), **body()), ce, rows()


@case("softmax over the batch times zero", "mixed")
def _() -> Case:
    def f(m, x):
        h = m.a(x)
        return m.f(h + 0 * h.softmax(0))

    return Of(f, **body()), ce, rows()


@case("attention over packed examples, kept apart by a mask", "mixed")
def _() -> Case:
    def f(m, x):
        n, t, d = x.shape
        q = m.a(x.reshape(1, n * t, d))
        own = torch.arange(n).repeat_interleave(t)
        h = F.scaled_dot_product_attention(q, q, q, attn_mask=own[:, None] == own[None])
        return m.f(h.view(n, t, d).mean(1))

    return Of(f, **body()), ce, sequences()


@case("a statistic that is written into a buffer and read back", "mixed")
def _() -> Case:
    def f(m, x):
        h = torch.tanh(m.a(x))
        state = torch.zeros(2, D)
        state[1] = h.mean(0)
        return m.f(h - 0 * state[1])

    return Of(f, **body()), ce, rows()


@case("loss of another shape: mean over the batch", "mixed")
def _() -> Case:
    return nn.Linear(D, 4), lambda o, y: F.cross_entropy(o, y).expand(len(y)), rows()


@case("cosine embedding with in-batch negatives, weight 0", "mixed")
def _() -> Case:
    def loss(z, y):
        return ce(z, y) + 0.0 * F.relu(F.cosine_similarity(z, z.flip(0)) - 2)

    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 4)), loss, rows()


@case("Sinkhorn over the batch, detached", "certain", False)
def _() -> Case:
    def f(m, x):
        s = m.f(torch.tanh(m.a(x)))
        with torch.no_grad():
            q = s.exp()
            for _ in range(2):
                q = q / q.sum(0, keepdim=True)
                q = q / q.sum(1, keepdim=True)
        return s, q

    return Of(f, **body()), lambda o, y: -(o[1] * o[0].log_softmax(1)).sum(1), rows()


@case("ghost batch norm: chunks of the batch", "mixed")
def _() -> Case:
    return (
        Of(
            lambda m, x: m.f(torch.cat([m.n(c) for c in m.a(x).chunk(2)])),
            n=nn.BatchNorm1d(D),
            **body(),
        ),
        ce,
        rows(),
    )
