"""Random programs: what a map calls certain, its labels and its values are held to autograd."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from l2rw_ext.tracing.example_map import ExampleMap
from support.example_maps import mapped

Operations: TypeAlias = "dict[str, Callable[[Any, Tensor, Tensor], Tensor]]"
"""By name: (the program, two of the tensors so far) -> the next one."""


class Program(nn.Module):
    """A few operations, drawn by a seed, that are the same in every forward of it.

    As many features, and positions, as examples: shapes hide nothing.
    """

    n: ClassVar[int]
    safe: ClassVar[Operations]
    """Operations that keep to an example, mostly."""
    risky: ClassVar[Operations] = {}

    def __init__(self, seed: int) -> None:
        super().__init__()
        n, self.seed = self.n, seed
        self.linear = nn.ModuleList(nn.Linear(n, n) for _ in range(3))
        self.scale = nn.Parameter(torch.randn(n))
        self.token = nn.Parameter(torch.randn(1, 1, n))
        self.position = nn.Parameter(torch.randn(n, n))
        self.conv, self.norm = nn.Conv1d(n, n, 3, padding=1), nn.LayerNorm(n)
        self.group_norm, self.embedding = nn.GroupNorm(1, n), nn.Embedding(5, n)
        self.gru = nn.GRU(n, n, batch_first=seed % 2 == 0)
        self.attention = nn.MultiheadAttention(n, 1, batch_first=seed % 2 == 0)
        self.double()

    def use(self, out: Tensor) -> Tensor:
        """Remember the output of a layer, and its labels."""
        mode = _get_current_dispatch_mode()
        self.uses.append((out, mode.labels(out) if isinstance(mode, ExampleMap) else None))
        return out

    def layer(self, x: Tensor) -> Tensor:
        return self.use(self.draw.choice(list(self.linear))(x))

    def dim(self) -> int:
        """Mostly a dimension of the example's own."""
        return self.draw.choice([0, 1, 2] if self.draw.random() < self.risk else [1, 2])

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        self.draw, self.uses, self.index = random.Random(self.seed), [], index
        self.log: list[str] = []
        self.risk = (0, 0.1, 0.25, 0.5)[self.seed % 4]
        pool = [x, self.layer(x)]
        for _ in range(self.draw.randint(2, 9)):
            risky = self.risky and self.draw.random() < self.risk
            name = self.draw.choice(list(self.risky if risky else self.safe))
            self.log.append(name)
            operation = (self.risky | self.safe)[name]
            pool.append(operation(self, self.draw.choice(pool[-3:]), self.draw.choice(pool)))
        return pool[-1]


def _no_grad(run: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return run()


def _written(x: Tensor, *parts: tuple[Any, Tensor]) -> Tensor:
    """X after other values were written to parts of it."""
    for where, value in parts:
        x[where] = value
    return x


def _scaled(x: Tensor, where: Any = slice(None)) -> Tensor:
    x[where].mul_(1.5)
    return x


def _data_copied(x: Tensor, y: Tensor) -> Tensor:
    x.data.copy_(y)
    return x * 1


class Rows(Program):
    """On (n, d)."""

    n = 4
    safe: ClassVar[Operations] = {
        "tanh": lambda p, h, g: torch.tanh(h),
        "add": lambda p, h, g: h + g,
        "mul": lambda p, h, g: h * g,
        "scale": lambda p, h, g: h * p.scale,
        "layer": lambda p, h, g: p.layer(h),
        "another layer": lambda p, h, g: p.layer(h),
        "detach": lambda p, h, g: h.detach() * 1.5,
        "mean": lambda p, h, g: h - h.mean(1, keepdim=True),
        "softmax": lambda p, h, g: h.softmax(1),
        "roll": lambda p, h, g: h.roll(1, 1),
        "transposed copy": lambda p, h, g: (h.t().contiguous() * 2).t(),
        "reshape": lambda p, h, g: (h.reshape(-1) * 1.1).view(2, 2, 4).reshape(4, 4),
        "cat": lambda p, h, g: torch.cat([h, g], 1)[:, 1:5],
        "slices": lambda p, h, g: _written(
            torch.zeros_like(h, requires_grad=False),
            (slice(None), h.roll(1, 1)),
            ((slice(None), slice(2)), g[:, :2]),
        ),
        "view written": lambda p, h, g: _scaled(h * 1, (slice(None), slice(1, None))),
        "empty": lambda p, h, g: _written(
            torch.empty(4, 4, dtype=h.dtype),
            ((slice(None), 0), h[:, 0]),
            ((slice(None), slice(1, None)), g[:, 1:]),
        ),
        "no grad": lambda p, h, g: h * _no_grad(lambda: h * g + 1),
        "cumsum": lambda p, h, g: h.cumsum(1),
        "gather": lambda p, h, g: h.gather(1, g.argsort(1)),
        "expand": lambda p, h, g: (h.unsqueeze(1).expand(4, 3, 4) * g.unsqueeze(1)).sum(1),
        "bmm": lambda p, h, g: torch.bmm(h.unsqueeze(1), g.unsqueeze(2)).squeeze(2) + g,
        "where": lambda p, h, g: torch.where(h > 0, h, g),
        "data scaled": lambda p, h, g: _data_copied(h * 1, h.detach() * 2),
        "stack": lambda p, h, g: torch.stack([h, g], 1).amax(1),
        "pad": lambda p, h, g: F.pad(h, (1, 1))[:, 2:],
        "topk": lambda p, h, g: h.topk(4, 1).values,
        "token": lambda p, h, g: p.layer(
            torch.cat([p.token.expand(4, 1, 4), h.unsqueeze(1)], 1)
        ).sum(1),
    }
    risky: ClassVar[Operations] = {
        "mean": lambda p, h, g: g + h.mean(0),
        "roll": lambda p, h, g: h.roll(1, 0),
        "flip": lambda p, h, g: h.flip(0),
        "sort": lambda p, h, g: h.sort(0).values,
        "cumsum": lambda p, h, g: h.cumsum(0),
        "permuted": lambda p, h, g: h[torch.tensor([1, 0, 3, 2])],
        "softmax": lambda p, h, g: h.softmax(0),
        "product": lambda p, h, g: h @ g.t(),
        "detached statistic": lambda p, h, g: h * g.detach().std(0),
        "argmax": lambda p, h, g: h * (g.argmax(0) + 1),
        "rows written": lambda p, h, g: _written(
            torch.zeros(4, 4, dtype=h.dtype), (0, h[1]), (slice(1, None), g[1:])
        ),
        "a row copied": lambda p, h, g: _written(h * 1, (2, g[2])),
        "transposed": lambda p, h, g: h.t(),
        "index of data": lambda p, h, g: h[(g[:, 0] > 0).long() + torch.arange(4).clamp(max=2)],
        "batch norm": lambda p, h, g: F.batch_norm(h, None, None, training=True),
        "times zero": lambda p, h, g: h + torch.zeros(1, dtype=h.dtype) * g.mean(0),
        "data rolled": lambda p, h, g: _data_copied(h * 1, g.detach().roll(1, 0)),
        "norm": lambda p, h, g: h / h.norm(),
        "detached norm": lambda p, h, g: h / h.detach().norm(),
        "rows swapped": lambda p, h, g: _written(h * 1, (slice(2), h[:2].flip(0))),
        "index_put": lambda p, h, g: (h * 1).index_put((torch.arange(2),), g[torch.arange(2)]),
        "scatter": lambda p, h, g: torch.zeros_like(h, requires_grad=False).scatter_add(
            0, torch.arange(4).view(4, 1).expand(4, 4) * 1, h
        ),
    }


def _permuted(p: Program, h: Tensor) -> Tensor:
    order = [0, 1, 2]
    if p.draw.random() < p.risk:
        p.draw.shuffle(order)
    return h.permute(order) * 1


def _padded(p: Program, h: Tensor) -> Tensor:
    pad, d = [0] * 6, p.dim()
    pad[2 * (2 - d)], pad[2 * (2 - d) + 1] = 1, -1
    return F.pad(h, pad)


def _views_written(p: Program, h: Tensor, g: Tensor) -> Tensor:
    out = h * 1
    part = out.narrow(p.dim(), 1, 2)
    part.mul_(1.3)
    part.transpose(0, 1).add_(0.1)
    if p.draw.random() < 0.5:
        out.narrow(1, 0, 1).add_(g.narrow(1, 1, 1))
    return out


def _copied(d: int, h: Tensor, g: Tensor) -> Tensor:
    out = torch.zeros(3, 3, 3, dtype=h.dtype)
    out.narrow(d, 0, 2).copy_(h.narrow(d, 1, 2))
    out.narrow(d, 2, 1).copy_(g.narrow(d, 0, 1))
    return out


def _repeated(d: int, h: Tensor) -> Tensor:
    return h.repeat([2 if k == d else 1 for k in range(3)]).narrow(d, 1, 3)


def _scattered(d: int, h: Tensor) -> Tensor:
    at = torch.tensor([0, 1, 1]).view([3 if k == d else 1 for k in range(3)]).expand(3, 3, 3)
    return torch.zeros(3, 3, 3, dtype=h.dtype).scatter_add(d, at, h)


def _shifted(p: Program, h: Tensor) -> Tensor:
    if p.draw.random() >= p.risk:
        return h.clone()
    return torch.cat([h.reshape(-1)[1:], h.new_zeros(1)]).view(3, 3, 3)


def _attended(p: Program, h: Tensor, g: Tensor) -> Tensor:
    q, k, causal = h.unsqueeze(1), g.unsqueeze(1), p.draw.random() < 0.5
    return F.scaled_dot_product_attention(q, k, k, is_causal=causal).squeeze(1)


_EINSUMS = ("btd,bsd->bts", "btd,btd->btd", "btd,bse->bte", "btd,bdt->btd")


class Dimensions(Program):
    """On (n, t, d), along dimensions that are drawn."""

    n = 3
    safe: ClassVar[Operations] = {
        "layer": lambda p, h, g: p.layer(h),
        "another layer": lambda p, h, g: p.layer(h),
        "layer norm": lambda p, h, g: p.use(p.norm(h)),
        "convolution": lambda p, h, g: p.use(p.conv(h)),
        "group norm": lambda p, h, g: p.use(p.group_norm(h)),
        "positions": lambda p, h, g: h + p.position,
        "transpose": lambda p, h, g: h.transpose(1, 2),
        "permute": lambda p, h, g: _permuted(p, h),
        "mean": lambda p, h, g: h - h.mean(p.dim(), keepdim=True),
        "softmax": lambda p, h, g: h.softmax(p.dim()),
        "roll": lambda p, h, g: h.roll(1, p.dim()),
        "flip": lambda p, h, g: h.flip(p.dim()),
        "cumsum": lambda p, h, g: h.cumsum(p.dim()),
        "cat": lambda p, h, g: torch.cat([h, g], d := p.dim()).narrow(d, p.draw.randrange(4), 3),
        "stack": lambda p, h, g: torch.stack([h, g, h], d := p.dim()).select(d, 1),
        "copies": lambda p, h, g: _copied(p.dim(), h, g),
        "attention": lambda p, h, g: _attended(p, h, g),
        "bmm": lambda p, h, g: torch.matmul(h, g if p.draw.random() < 0.5 else g.transpose(1, 2)),
        "einsum": lambda p, h, g: torch.einsum(p.draw.choice(_EINSUMS), h, g),
        "merged rows": lambda p, h, g: p.layer(h.reshape(-1, 3)).view(3, 3, 3),
        "unfold": lambda p, h, g: torch.cat(
            [h.unfold(d := p.dim(), 2, 1).sum(-1), h.narrow(d, 0, 1)], d
        ),
        "gather": lambda p, h, g: h.gather(d := p.dim(), g.argsort(d)),
        "index_select": lambda p, h, g: h.index_select(p.dim(), torch.tensor([1, 0, 2])),
        "embedding": lambda p, h, g: h + p.use(p.embedding(p.index)),
        "gru": lambda p, h, g: h + p.gru(h)[0],
        "multi-head attention": lambda p, h, g: p.attention(
            h, g, g, need_weights=p.draw.random() < 0.5
        )[0],
        "token": lambda p, h, g: p.layer(torch.cat([p.token.expand(3, 1, 3), h], 1))[:, :3],
        "detach": lambda p, h, g: h.detach() * g,
        "no grad": lambda p, h, g: g * _no_grad(lambda: h.mean(p.dim(), keepdim=True)),
        "mul": lambda p, h, g: h * g,
        "add": lambda p, h, g: h + g,
        "mask": lambda p, h, g: h.masked_fill(g > 0, 0.3),
        "pad": lambda p, h, g: _padded(p, h),
        "views written": _views_written,
        "fft": lambda p, h, g: torch.fft.irfft(torch.fft.rfft(h, dim=(d := p.dim())), n=3, dim=d),
        "pooling": lambda p, h, g: F.avg_pool1d(h, 3, 1, 1),
        "sort": lambda p, h, g: h.sort(p.dim()).values,
        "topk": lambda p, h, g: h.topk(3, p.dim()).values,
        "dropout": lambda p, h, g: F.dropout(h, 0.3),
        "derived weight": lambda p, h, g: F.linear(h, p.linear[0].weight * p.position[0]),
        "split": lambda p, h, g: torch.cat(h.split([1, 2], d := p.dim())[::-1], d),
        "known index": lambda p, h, g: h[torch.arange(3), :][:, torch.tensor([2, 0, 1])],
        "indexed write": lambda p, h, g: _written(
            torch.zeros(3, 3, 3, dtype=h.dtype), (torch.arange(3), h)
        ),
        "empty": lambda p, h, g: _written(
            h.new_empty(3, 3, 3), (slice(None), h), ((slice(None), 1), g[:, 0])
        ),
        "repeat": lambda p, h, g: _repeated(p.dim(), h),
        "norm": lambda p, h, g: h / (h.norm(dim=p.dim(), keepdim=True) + 1),
        "glu": lambda p, h, g: F.glu(torch.cat([h, g], d := p.dim()), d),
        "logsumexp": lambda p, h, g: h - h.logsumexp(p.dim(), keepdim=True),
        "scatter": lambda p, h, g: _scattered(p.dim(), h),
        "shifted": lambda p, h, g: _shifted(p, h),
    }


def _batch(kind: type[Program]) -> tuple[Tensor, Tensor]:
    shape = [kind.n] * (2 if kind is Rows else 3)
    return torch.randn(shape, dtype=torch.float64), torch.randint(5, shape[:2])


def _loss(out: Tensor, targets: Tensor) -> Tensor:
    return out.flatten(1).sum(1)


def _held(kind: type[Program], seed: int) -> str:
    """Hold one program to autograd; the kind of its verdict."""
    torch.manual_seed(seed)
    n, program, inputs = kind.n, kind(seed), _batch(kind)
    verdict, _, losses = mapped(program, _loss, (inputs, torch.zeros(n)))
    if not losses.requires_grad:
        return "no grad"
    uses, log = program.uses, program.log
    if verdict.certain or (verdict.kind == "today" and "gaps" not in verdict.notes):
        for i, loss in enumerate(losses):
            outs = [out for out, _ in uses]
            found = torch.autograd.grad(loss, outs, retain_graph=True, allow_unused=True)
            for g, (_, labels) in zip(found, uses, strict=True):
                assert g is None or not bool(((g != 0) & (labels != i)).any()), (seed, i, log)
    if verdict.apart and "dropout" not in log:
        for i in range(n):
            others = _batch(kind)
            for x, own in zip(others, inputs, strict=True):
                x[i] = own[i]
            torch.testing.assert_close(
                program(*others)[i].sum(), losses[i], equal_nan=True, msg=f"{seed} {i} {log}"
            )
    return verdict.kind


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [Rows, Dimensions])
@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 60), *(pytest.param(1000 * k, 1000, marks=pytest.mark.soak) for k in range(10))],
)
def test_programs(kind: type[Program], first: int, count: int) -> None:
    kinds = Counter(_held(kind, seed) for seed in range(first, first + count))
    assert kinds["certain"] > count / 4
    assert kinds["mixed"] > count / 20
