"""Models whose losses keep to their examples."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from .table import Case, D, N, Of, T, body, case, ce, head, images, rows, sequences, tokens, words


@case("MLP", "certain")
def _() -> Case:
    return (
        nn.Sequential(nn.Linear(D, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 4)),
        ce,
        rows(),
    )


@case("LeNet", "certain")
def _() -> Case:
    return (
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 4)
        ),
        ce,
        images(),
    )


class Block(nn.Module):
    def __init__(self, norm, channels=8):
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, padding="same"),
        )
        self.m, self.n = norm(channels), norm(channels)

    def forward(self, x):
        return F.relu_(self.n(self.b(F.relu(self.m(self.a(x))))) + x)


def resnet(norm):
    blocks = [Block(norm) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head())


@case("ResNet, GroupNorm", "certain")
def _() -> Case:
    return resnet(lambda c: nn.GroupNorm(2, c)), ce, images()


@case("ResNet, BatchNorm, eval", "certain")
def _() -> Case:
    return resnet(nn.BatchNorm2d).eval(), ce, images()


@case("ConvNeXt-like block, layer scale, InstanceNorm", "certain")
def _() -> Case:
    def f(m, x):
        h = m.c(x)
        u = m.up(m.n(m.d(h).permute(0, 2, 3, 1))).relu()
        return m.f((h + m.i(m.down(u).permute(0, 3, 1, 2)) * m.g).mean((2, 3)))

    parts = {
        "c": nn.Conv2d(3, D, 2, 2),
        "d": nn.Conv2d(D, D, 3, padding=1, groups=D),
        "n": nn.LayerNorm(D),
    }
    parts |= {
        "up": nn.Linear(D, 16),
        "down": nn.Linear(16, D),
        "i": nn.InstanceNorm2d(D, affine=True),
        "f": head(),
    }
    return Of(f, g=nn.Parameter(torch.zeros(D, 1, 1)), **parts), ce, images()


@case("U-Net-like: ConvTranspose, cat, upsample", "certain")
def _() -> Case:
    def f(m, x):
        a = m.c(x).relu()
        b = m.t(F.avg_pool2d(a, 2)).relu()
        return m.o(F.interpolate(torch.cat([a, b], 1), scale_factor=2, mode="bilinear")).mean(
            (2, 3)
        )

    parts = {
        "c": nn.Conv2d(3, D, 3, padding=1),
        "t": nn.ConvTranspose2d(D, D, 2, 2),
        "o": nn.Conv2d(2 * D, 4, 1),
    }
    return Of(f, **parts), ce, images()


def encoder(batch_first, **options):
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=batch_first, **options)

    def f(m, x):
        h = m.e(x if batch_first else x.transpose(0, 1))
        return m.f(h.mean(1 if batch_first else 0))

    return Of(f, e=layer, f=head()), ce, sequences()


@case("TransformerEncoderLayer, batch first", "certain")
def _() -> Case:
    return encoder(True)


@case("TransformerEncoderLayer, positions first", "certain")
def _() -> Case:
    return encoder(False)


@case("TransformerEncoderLayer, eval", "certain")
def _() -> Case:
    model, *rest = encoder(True)
    return model.eval(), *rest


@case("TransformerEncoderLayer, frozen, eval (fast path)", "certain")
def _() -> Case:
    model, *rest = encoder(True)
    model.eval().e.requires_grad_(False)
    return model, *rest


@case("MultiheadAttention, positions first, with weights, padding mask", "certain")
def _() -> Case:
    def f(m, x, mask):
        h = x.transpose(0, 1)
        return m.f(m.a(h, h, h, key_padding_mask=mask)[0].mean(0))

    x, y = sequences()
    mask = torch.arange(T) >= torch.randint(1, T, (N, 1))
    return Of(f, a=nn.MultiheadAttention(D, 2), f=head()), ce, ((x, mask), y)


def gpt(x, m):
    t = x.shape[1]
    h = m.drop(m.wte(x) + m.wpe(torch.arange(t)))
    q, k, v = (p.view(*x.shape, 2, D // 2).transpose(1, 2) for p in m.qkv(m.n(h)).chunk(3, -1))
    h = h + m.o(
        F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(h.shape)
    )
    return F.linear(h + m.down(F.gelu(m.up(m.n2(h)))), m.wte.weight)


@case("GPT, tied embedding", "certain")
def _() -> Case:
    parts = {
        "wte": nn.Embedding(20, D),
        "wpe": nn.Embedding(T, D),
        "n": nn.LayerNorm(D),
        "n2": nn.LayerNorm(D),
    }
    parts |= {
        "qkv": nn.Linear(D, 3 * D),
        "o": nn.Linear(D, D),
        "up": nn.Linear(D, 32),
        "down": nn.Linear(32, D),
    }
    x, _ = words()
    return Of(lambda m, x: gpt(x, m), drop=nn.Dropout(0.1), **parts), tokens, (x, x.roll(1, 1))


@case("GPT, as many positions as examples", "certain")
def _() -> Case:
    parts = {
        "wte": nn.Embedding(20, D),
        "wpe": nn.Embedding(N, D),
        "n": nn.LayerNorm(D),
        "n2": nn.LayerNorm(D),
    }
    parts |= {
        "qkv": nn.Linear(D, 3 * D),
        "o": nn.Linear(D, D),
        "up": nn.Linear(D, 32),
        "down": nn.Linear(32, D),
    }
    x, _ = words(t=N)
    return Of(lambda m, x: gpt(x, m), drop=nn.Dropout(0.1), **parts), tokens, (x, x.roll(1, 1))


@case("RoPE by complex numbers, RMSNorm, SwiGLU", "certain")
def _() -> Case:
    def f(m, x):
        h = m.n(m.a(x))
        turned = torch.view_as_complex(h.view(*h.shape[:2], -1, 2)) * torch.polar(
            torch.ones(T, D // 2), m.angle
        )
        h = torch.view_as_real(turned).flatten(2)
        w = (h @ h.transpose(1, 2)).masked_fill(torch.ones(T, T).triu(1).bool(), -1e9).softmax(-1)
        u, v = m.u(w @ h).chunk(2, -1)
        return m.f((F.silu(u) * v).mean(1))

    return (
        Of(f, n=nn.RMSNorm(D), u=nn.Linear(D, 2 * D), angle=torch.randn(T, D // 2), **body()),
        ce,
        sequences(),
    )


@case("LSTM, two layers, both ways", "certain")
def _() -> Case:
    def f(m, x):
        return m.f(m.r(x)[0][:, -1])

    return (
        Of(f, r=nn.LSTM(D, 4, 2, bidirectional=True, batch_first=True), f=head()),
        ce,
        sequences(),
    )


@case("LSTM, float64, time first", "certain")
def _() -> Case:
    x, y = sequences()
    model = Of(lambda m, x: m.f(m.r(x.transpose(0, 1))[0][-1]), r=nn.LSTM(D, D), f=head())
    return model.double(), ce, (x.double(), y)


@case("GRU", "certain")
def _() -> Case:
    return (
        Of(lambda m, x: m.f(m.r(x)[1][0]), r=nn.GRU(D, D, batch_first=True), f=head()),
        ce,
        sequences(),
    )


@case("LSTMCell in a loop, states of zeros", "certain")
def _() -> Case:
    def f(m, x):
        h = c = torch.zeros(len(x), D)
        for step in x.unbind(1):
            h, c = m.r(step, (h, c))
        return m.f(h)

    return Of(f, r=nn.LSTMCell(D, D), f=head()), ce, sequences()


@case("EmbeddingBag", "certain")
def _() -> Case:
    return nn.Sequential(nn.EmbeddingBag(20, D, mode="sum"), head()), ce, words()


@case("weight_norm, spectral_norm, low-rank adapter", "certain")
def _() -> Case:
    def f(m, x):
        return m.f(m.b(torch.tanh(m.a(x))) + x @ m.u @ m.v)

    parts = body(b=parametrizations.spectral_norm(nn.Linear(D, D)))
    parts["a"] = parametrizations.weight_norm(parts["a"])
    return (
        Of(f, u=nn.Parameter(torch.randn(D, 2)), v=nn.Parameter(torch.zeros(2, D)), **parts),
        ce,
        rows(),
    )


@case("ViT, class token", "certain")
def _() -> Case:
    def f(m, x):
        p = m.p(x).flatten(2).transpose(1, 2)
        h = torch.cat([m.cls.expand(len(x), -1, -1), p], 1) + m.pos
        return m.f(m.e(h)[:, 0])

    parts = {
        "p": nn.Conv2d(3, D, 4, 4),
        "e": nn.TransformerEncoderLayer(D, 2, 16, batch_first=True),
        "f": head(),
    }
    tokens_ = {"cls": nn.Parameter(torch.zeros(1, 1, D)), "pos": nn.Parameter(torch.zeros(1, 5, D))}
    return Of(f, **parts, **tokens_), ce, images()


@case("DETR-like queries that meet data late", "certain")
def _() -> Case:
    def f(m, x):
        q = m.a(m.q.expand(len(x), -1, -1))
        return m.f(m.c(q, x, x)[0].mean(1))

    parts = body(
        c=nn.MultiheadAttention(D, 2, batch_first=True), q=nn.Parameter(torch.randn(1, 3, D))
    )
    return Of(f, **parts), ce, sequences()


@case("Swin: shifted windows, bias by table[index]", "certain")
def _() -> Case:
    def f(m, x):
        x = m.p(x).permute(0, 2, 3, 1)
        n = len(x)
        h = torch.roll(m.n(x), (-1, -1), (1, 2))
        h = h.view(n, 2, 2, 2, 2, D).transpose(2, 3).reshape(n * 4, 4, D)
        q, k, v = m.qkv(h).view(n * 4, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        a = q @ k.transpose(-1, -2) / 2 + m.tab[m.idx.view(-1)].view(4, 4, 2).permute(
            2, 0, 1
        ).unsqueeze(0)
        a = (a.view(n, 4, 2, 4, 4) + m.mask[:, None][None]).view(n * 4, 2, 4, 4)
        h = m.o((a.softmax(-1) @ v).transpose(1, 2).reshape(n * 4, 4, D))
        h = torch.roll(h.view(n, 2, 2, 2, 2, D).transpose(2, 3).reshape(n, 4, 4, D), (1, 1), (1, 2))
        return m.f((x + m.g * h).mean((1, 2)))

    parts = {
        "p": nn.Conv2d(3, D, 1),
        "n": nn.LayerNorm(D),
        "qkv": nn.Linear(D, 24),
        "o": nn.Linear(D, D),
        "f": head(),
    }
    parts |= {"tab": nn.Parameter(torch.randn(9, 2)), "g": nn.Parameter(torch.zeros(D))}
    parts |= {"idx": torch.randint(9, (4, 4)), "mask": torch.zeros(4, 4, 4)}
    return Of(f, **parts), ce, images(size=4)


@case("packed reshape (N*T) and back", "certain")
def _() -> Case:
    def f(m, x):
        return m.f(torch.tanh(m.a(x.reshape(-1, D))).view(*x.shape).mean(1))

    return Of(f, **body()), ce, sequences()


@case("packed reshape (T*N), time first", "certain")
def _() -> Case:
    def f(m, x):
        n, t, d = x.shape
        return m.f(torch.tanh(m.a(x.transpose(0, 1).reshape(t * n, d))).view(t, n, d).sum(0))

    return Of(f, **body()), ce, sequences()


@case("dynamic filters: groups = batch in one convolution", "certain")
def _() -> Case:
    def f(m, x):
        n = len(x)
        w = m.a(x[:, :, 0, :].reshape(n, -1)).view(n * 4, 3, 1, 1)
        return F.conv2d(x.reshape(1, n * 3, *x.shape[2:]), w, groups=n).view(n, 4, -1).mean(2)

    return Of(f, a=nn.Linear(24, 12)), ce, images()


@case("slice writes into zeros and empty", "certain")
def _() -> Case:
    def f(m, x):
        out = torch.zeros(len(x), T, D)
        other = x.new_empty(len(x), T, D)
        for t in range(T):
            out[:, t] = torch.tanh(m.a(x[:, t]))
            other[:, t].copy_(out[:, t] * 2)
        other[:, 1:] += out[:, :-1]
        return m.f((out + other).mean(1))

    return Of(f, **body()), ce, sequences()


@case("one row after the other, stacked", "certain")
def _() -> Case:
    return (
        Of(lambda m, x: m.f(torch.stack([torch.tanh(m.a(row)) for row in x])), **body()),
        ce,
        rows(),
    )


@case("one row after the other, written into the rows of a buffer", "certain")
def _() -> Case:
    def f(m, x):
        out = torch.zeros(len(x), D)
        for i, row in enumerate(x):
            out[i] = torch.tanh(m.a(row))
        return m.f(out)

    return Of(f, **body()), ce, rows()


@case("one-hot scatter, label smoothing, max-margin", "certain")
def _() -> Case:
    def loss(o, y):
        hot = torch.zeros_like(o).scatter_(1, y.unsqueeze(1), 1.0)
        rival = o.masked_fill(hot.bool(), -1e9).amax(1)
        return (
            F.relu(1 + rival - o.gather(1, y.unsqueeze(1)).squeeze(1))
            + ce(o, y)
            + (F.one_hot(y, 4) * o).sum(1)
        )

    return nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, 4)), loss, rows()


@case("CTC loss", "certain")
def _() -> Case:
    def loss(o, y):
        lengths = torch.full((len(y),), 8)
        return F.ctc_loss(
            o.log_softmax(-1).transpose(0, 1), y, lengths, lengths // 4, reduction="none"
        )

    model = Of(lambda m, x: m.f(torch.tanh(m.a(x))), **body())
    return model, loss, (torch.randn(N, 8, D), torch.randint(1, 4, (N, 2)))


@case("spatial transformer: affine_grid, grid_sample", "certain")
def _() -> Case:
    def f(m, x):
        grid = F.affine_grid(m.t(x.flatten(1)).view(-1, 2, 3), x.shape, align_corners=False)
        return m.f(F.grid_sample(m.c(x), grid, align_corners=False).mean((2, 3)))

    return (
        Of(
            f,
            t=nn.Linear(192, 6),
            c=nn.Conv2d(3, D, 3, padding=1, padding_mode="reflect"),
            f=head(),
        ),
        ce,
        images(),
    )


@case("Fourier layer", "certain")
def _() -> Case:
    def f(m, x):
        h = torch.fft.rfft(m.a(x), dim=1)
        return m.f(torch.fft.irfft(torch.einsum("btd,de->bte", h, m.w), n=T, dim=1).mean(1))

    return Of(f, w=nn.Parameter(torch.randn(D, D, dtype=torch.cfloat)), **body()), ce, sequences()


@case("einsum, bilinear, cdist to prototypes", "certain")
def _() -> Case:
    def f(m, x):
        h = torch.einsum("nd,de,ne->ne", x, m.w, torch.tanh(m.a(x)))
        return -torch.cdist(m.b(h, x), m.p)

    w, p = nn.Parameter(torch.randn(D, D)), nn.Parameter(torch.randn(4, D))
    return Of(f, w=w, p=p, b=nn.Bilinear(D, D, D), **body()), ce, rows()
