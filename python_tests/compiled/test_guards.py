"""What a forward reads is never frozen in a graph; what a graph cannot follow runs eagerly."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2rw_ext import Reweighter
from support.models import CLASSES, cross_entropy, mlp, normed, vectors
from support.pairs import Pair, compiled, eagerly, graphs

TAU = 1.0
LIST = [1.0]


def _default(h: Tensor, q: float = 1.0) -> Tensor:
    return h * q


def _keyword(h: Tensor, *, q: float = 1.0) -> Tensor:
    return h * q


def _code(h: Tensor) -> Tensor:
    return h * 1


class Model(nn.Module):
    """Reads what it is told to, between two layers."""

    zeta = 1.0

    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, CLASSES)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.read = read
        self.tau, self.count, self.flag, self.mode = 1.0, 2, False, "a"
        self.items, self.table = [1.0, 2.0], {"k": 1.0}
        self.config = SimpleNamespace(tau=1.0, deep={"a": [1.0]})
        self.t = torch.ones(8, dtype=torch.float64)
        self.held = [torch.ones(8, dtype=torch.float64)]
        self.array, self.number = np.ones(8), np.float64(1.0)
        self.part: nn.Module = nn.Dropout(0.5)
        self.register_buffer("buffer", torch.ones(8))
        self.register_buffer("other", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.read(self, torch.tanh(self.a(x))))


Change = Callable[[Any, int], Any]
Read = Callable[[Any, Tensor], Tensor]


def _set(name: str, make: Callable[[int], Any]) -> Change:
    return lambda m, k: setattr(m, name, make(k))


def _full(k: int) -> Tensor:
    return torch.full((8,), k + 1.0, dtype=torch.float64)


def _set_tau(_: Any, k: int) -> None:
    global TAU
    TAU = float(k)


def _set_hook(kind: str, m: Any, k: int) -> None:
    for handle in m.__dict__.setdefault("handles", []):
        handle.remove()
    m.handles.clear()
    if k % 3:
        m.handles.append(
            getattr(m.part, kind)(lambda _, given, *out: (out[0] if out else given[0]) * (k % 3))
        )


def _replace(m: Any, name: str, value: Tensor) -> None:
    getattr(m, name).weight = nn.Parameter(value)


def _tie(m: Any, k: int) -> None:
    m.second.weight = m.first.weight if k % 2 else nn.Parameter(m.first.weight.detach() * 2)


def _load(m: Any, k: int, **options: Any) -> None:
    state = {name: x * 0.9 for name, x in m.state_dict().items()}
    m.load_state_dict(state, **options)


def _freeze(m: Any, k: int) -> None:
    m.a.weight.requires_grad_(k % 2 == 0)
    m.zero_grad()


_WEIGHT = torch.linspace(-1, 1, 40, dtype=torch.float64).view(8, 5)

CHANGES: dict[str, tuple[Change, Read]] = {
    "float": (_set("tau", float), lambda s, h: h * s.tau),
    "int": (_set("count", int), lambda s, h: h * s.count),
    "int in a tensor": (_set("count", int), lambda s, h: h + torch.tensor(s.count)),
    "bool": (_set("flag", lambda k: k % 2 == 1), lambda s, h: h * 2 if s.flag else h),
    "string": (_set("mode", lambda k: "ab"[k % 2]), lambda s, h: h * 2 if s.mode == "a" else h),
    "of the class": (lambda m, k: setattr(Model, "zeta", k / 2), lambda s, h: h * s.zeta),
    "of a list": (lambda m, k: m.items.__setitem__(0, k), lambda s, h: h * s.items[0]),
    "of a dict": (lambda m, k: m.table.__setitem__("k", k), lambda s, h: h * s.table["k"]),
    "new in a dict": (
        lambda m, k: m.table.update({"new": 2.0}) if k == 2 else m.table.pop("new", None),
        lambda s, h: h * sum(s.table.values()),
    ),
    "of an object": (lambda m, k: setattr(m.config, "tau", k), lambda s, h: h * s.config.tau),
    "deep in an object": (
        lambda m, k: m.config.deep["a"].__setitem__(0, k),
        lambda s, h: h * s.config.deep["a"][0],
    ),
    "global": (_set_tau, lambda s, h: h * TAU),
    "of a global list": (lambda m, k: LIST.__setitem__(0, k), lambda s, h: h * LIST[0]),
    "default": (lambda m, k: setattr(_default, "__defaults__", (k,)), lambda s, h: _default(h)),
    "keyword": (
        lambda m, k: setattr(_keyword, "__kwdefaults__", {"q": k}),
        lambda s, h: _keyword(h),
    ),
    "code": (
        lambda m, k: setattr(_code, "__code__", [lambda h: h * 2, lambda h: h * 3][k % 2].__code__),
        lambda s, h: _code(h),
    ),
    "partial": (
        lambda m, k: setattr(m, "fn", functools.partial(_keyword, q=k)),
        lambda s, h: s.fn(h),
    ),
    "option of a layer": (lambda m, k: setattr(m.part, "p", k / 8), lambda s, h: s.part(h)),
    "mode of a layer": (lambda m, k: m.part.train(k % 2 == 0), lambda s, h: s.part(h)),
    "layer": (_set("part", lambda k: [nn.Tanh(), nn.ReLU()][k % 2]), lambda s, h: s.part(h)),
    "forward of a layer": (
        lambda m, k: setattr(m.part, "forward", [torch.tanh, torch.relu][k % 2]),
        lambda s, h: s.part(h),
    ),
    "hook": (functools.partial(_set_hook, "register_forward_hook"), lambda s, h: s.part(h)),
    "hook before": (
        functools.partial(_set_hook, "register_forward_pre_hook"),
        lambda s, h: s.part(h),
    ),
    "requires_grad": (_freeze, lambda s, h: h),
    "gradient": (
        lambda m, k: setattr(m.b.bias, "grad", torch.ones(3).double() if k % 2 else None),
        lambda s, h: h * 2 if s.b.bias.grad is None else h,
    ),
    "strides of a parameter": (
        lambda m, k: setattr(
            m.a.weight, "data", _WEIGHT.t().contiguous().t() if k % 2 else _WEIGHT
        ),
        lambda s, h: h,
    ),
    "tied": (_tie, lambda s, h: s.second(s.first(h))),
    "default dtype": (
        lambda m, k: torch.set_default_dtype([torch.float32, torch.float64][k % 2]),
        lambda s, h: h * torch.tensor(0.1).sqrt(),
    ),
    "deterministic": (
        lambda m, k: torch.use_deterministic_algorithms(k % 2 == 1),
        lambda s, h: h * (2 if torch.are_deterministic_algorithms_enabled() else 1),
    ),
    "tensor of other dtype": (
        _set("t", lambda k: _full(k).to([torch.float32, torch.int64][k % 2])),
        lambda s, h: h * s.t,
    ),
    "tensor of other shape": (
        _set("t", lambda k: _full(k)[: 8 - 7 * (k % 2)]),
        lambda s, h: h * s.t,
    ),
}


@pytest.fixture
def _settings() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    Model.zeta = 1.0


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_is_not_frozen(name: str) -> None:
    change, read = CHANGES[name]
    with compiled(1):
        pair = Pair(Model(read).double())
        for k in (1, 1, 1, 2, 1):
            pair.change(lambda m, k=k: change(m, k))
            pair.step(vectors(6), vectors(4))


EXCHANGES: dict[str, tuple[Change, Read]] = {
    "parameter": (lambda m, k: _replace(m, "a", _WEIGHT * (k + 1)), lambda s, h: h),
    "data": (lambda m, k: setattr(m.a.weight, "data", _WEIGHT * (k + 1)), lambda s, h: h),
    "buffer": (_set("buffer", _full), lambda s, h: h * s.buffer),
    "attribute": (_set("t", _full), lambda s, h: h * s.t),
    "tensor of a list": (lambda m, k: m.held.__setitem__(0, _full(k)), lambda s, h: h * s.held[0]),
    "buffer in place": (lambda m, k: m.buffer.fill_(k + 1), lambda s, h: h * s.buffer),
    "attribute in place": (lambda m, k: m.t.fill_(k + 1), lambda s, h: h * s.t),
    "tensor of a list in place": (lambda m, k: m.held[0].fill_(k), lambda s, h: h * s.held[0]),
    "load_state_dict": (_load, lambda s, h: h * s.buffer),
    "load_state_dict, assigned": (
        lambda m, k: _load(m, k, assign=True),
        lambda s, h: h * s.buffer,
    ),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_tensors_that_are_exchanged_are_inputs(name: str) -> None:
    change, read = EXCHANGES[name]
    with compiled(1):
        pair = Pair(Model(read).double())
        for k in range(8):
            if k > 2:
                pair.change(lambda m, k=k: change(m, k))
            pair.step(vectors(6), vectors(4))


def test_closures() -> None:
    tau, items, t = 1.0, [1.0], _full(0)
    scale = 1.0

    def read(_: Any, h: Tensor) -> Tensor:
        return h * tau * items[0] * t

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets) * scale

    with compiled(None):
        pair = Pair(Model(read).double(), loss)
        for k in range(12):
            if k == 3:
                tau = 2.0
            if k == 6:
                items[0] = 0.5
            if k == 9:
                scale = 3.0
            t = _full(k)
            pair.step(vectors(6), vectors(4))


@pytest.mark.parametrize("what", ["shape", "dtype", "strides", "memory", "expanded", "clean"])
def test_kinds_of_batches(what: str) -> None:
    data = torch.randn(64, 5, dtype=torch.float64)

    def draw(n: int, k: int) -> Any:
        x, y = vectors(n)
        if what == "shape":
            x, y = x[: n - k % 3], y[: n - k % 3]
        elif what == "dtype" and k % 2:
            y = y.int()
        elif what == "strides" and k % 2:
            x = x.t().contiguous().t()
        elif what == "memory":
            x = data[k : k + n]
        elif what == "expanded" and k % 2:
            x = x[:, :1].expand(n, 5)
        return x, y

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets.long())

    with compiled(None):
        pair = Pair(mlp(), loss)
        for k in range(9):
            batch = draw(6, k)
            pair.step(batch, (batch[0][:4], batch[1][:4]) if what == "clean" else draw(4, k))


def test_images_in_either_memory_format() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    with compiled(2):
        pair = Pair(model)
        for k in range(8):
            form = torch.channels_last if k % 2 else torch.contiguous_format
            batch, clean = (
                (torch.randn(n, 3, 4, 4).double().to(memory_format=form), torch.randint(3, (n,)))
                for n in (6, 4)
            )
            pair.step(batch, clean)


def _grows(s: Any, h: Tensor) -> Tensor:
    s.held.append(h.detach())
    return h * len(s.held)


def _counts(s: Any, h: Tensor) -> Tensor:
    s.count += 1
    return h * s.count


def _unread(s: Any, h: Tensor) -> Tensor:
    s.items.append(1)
    return h


def _of_object(s: Any, h: Tensor) -> Tensor:
    s.config.tau *= 1.1
    return h * s.config.tau


def _global(s: Any, h: Tensor) -> Tensor:
    LIST[0] *= 1.1
    return h


def _caches(s: Any, h: Tensor) -> Tensor:
    s.t = h.detach()
    return h * s.t


def _exchanges(s: Any, h: Tensor) -> Tensor:
    s.buffer = s.buffer * 1.1
    return h * s.buffer


def _hooked(s: Any, h: Tensor) -> Tensor:
    h.register_hook(lambda g: g * 2)
    return h


def _differentiates(s: Any, h: Tensor) -> Tensor:
    return h + torch.autograd.grad(h.square().sum(), h, create_graph=True)[0]


def _in_place(name: str) -> Read:
    def read(s: Any, h: Tensor) -> Tensor:
        functools.reduce(getattr, name.split("."), s).data.mul_(1.1)
        return h

    return read


def _own_generator(s: Any, h: Tensor) -> Tensor:
    return h * torch.rand(8, generator=s.generator)


EAGER: dict[str, tuple[Read, str]] = {
    "Python's generator": (lambda s, h: h * random.uniform(0, 1), "Python's generator"),
    "NumPy's generator": (lambda s, h: h * np.random.rand(), "data-dependent"),
    "an array of NumPy's generator": (
        lambda s, h: h * torch.from_numpy(np.random.rand(8)),
        "computes with NumPy",
    ),
    "a generator": (_own_generator, "as_proxy"),
    "an array": (lambda s, h: h * torch.from_numpy(s.array), "reads model.array"),
    "an array as a tensor": (lambda s, h: h * torch.as_tensor(s.array), "reads model.array"),
    "a number of NumPy's": (lambda s, h: h * s.number, "reads model.number"),
    "an iterator": (lambda s, h: h * next(s.iterator), "changes model.iterator"),
    "appends a tensor": (_grows, "changes model.held"),
    "appends a number": (_unread, "changes model.items"),
    "counts": (_counts, "changes model.count"),
    "changes an object": (_of_object, "SimpleNamespace"),
    "changes a global list": (_global, "LIST"),
    "assigns an attribute": (_caches, "changes model.t"),
    "assigns a buffer": (_exchanges, "assigns 'buffer'"),
    "writes to a parameter": (_in_place("first.weight"), "writes to model.first.weight"),
    "writes to a tensor of a list": (
        lambda s, h: h * s.held[0].mul_(1.1).clone(),
        "writes to model.held[0]",
    ),
    "a hook on an activation": (_hooked, "register_hook"),
    "torch.autograd.grad": (_differentiates, "torch.autograd.grad"),
    "decides": (lambda s, h: h * 2 if h.sum() > 0 else h, "Data-dependent branching"),
    "a number of a tensor": (lambda s, h: h * h.detach().sum().item(), "takes a number out of"),
    "as many as there are": (lambda s, h: h * h[h > 0].mean(), "index"),
    "their number": (lambda s, h: h * h.nonzero().size(0), "nonzero"),
    "prints": (lambda s, h: (print(end=""), h)[1], "print"),
}


@pytest.mark.parametrize("name", EAGER)
def test_what_no_graph_can_do_runs_eagerly(name: str) -> None:
    read, reason = EAGER[name]

    def prepare(model: Any) -> None:
        model.generator = torch.Generator().manual_seed(0)
        model.iterator = itertools.count(1)

    before = LIST[0]
    with eagerly(reason):
        pair = Pair(Model(read).double())
        pair.change(prepare)
        for k in range(7):
            pair.change(lambda m, k=k: m.array.fill(k))
            pair.step(vectors(6), vectors(4))
            mine, theirs = pair.models
            assert len(mine.held) == len(theirs.held)
            assert mine.items == theirs.items
            assert mine.config == theirs.config
            assert mine.count == theirs.count
            drawn = [m.generator.get_state() for m in pair.models]
            assert torch.equal(*drawn)
    LIST[0] = before


def test_an_attribute_that_is_assigned_what_it_is() -> None:
    """Until it is something else, which the assignment changes."""

    def read(s: Any, h: Tensor) -> Tensor:
        s.mode, s.count = "a", 2
        return h * s.count

    with graphs() as made, eagerly("changes model.count"):
        pair = Pair(Model(read).double())
        pair.steps(4)
        assert len(made) == 1
        for k in range(4):
            pair.change(lambda m, k=k: setattr(m, "count", 2 + k % 2))
            pair.steps(1)
            assert [m.count for m in pair.models] == [2, 2]
    assert len(made) == 1


LOSSES: dict[str, tuple[Any, Any, str]] = {
    "numpy()": (
        lambda o, y: cross_entropy(o, torch.from_numpy(y.numpy())),
        None,
        "numpy()",
    ),
    "tolist()": (lambda o, y: cross_entropy(o, torch.tensor(y.tolist())), None, "tolist()"),
    "item()": (lambda o, y: cross_entropy(o, y) * (1 + y[0].item()), None, "a number out of"),
    "int()": (lambda o, y: cross_entropy(o, y) * (1 + int(y[0])), None, "a number out of"),
    "an array": (
        lambda o, y: cross_entropy(o, torch.as_tensor(y)),
        lambda y: y.numpy(),
        "reads the targets",
    ),
    "a list": (
        lambda o, y: cross_entropy(o, torch.tensor(y)),
        lambda y: y.tolist(),
        "recompile_limit",
    ),
    "written to": (
        lambda o, y: cross_entropy(o, y.clamp_(max=1)),
        None,
        "writes to the clean targets",
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_targets_that_leave_torch(name: str) -> None:
    loss, made, reason = LOSSES[name]

    def draw(n: int) -> Any:
        x, y = vectors(n)
        return x, y if made is None else made(y)

    with eagerly(reason), torch._dynamo.config.patch(recompile_limit=2):
        Pair(mlp(), loss).steps(6, draw)


WRITES: dict[str, Read] = {
    "a buffer": lambda s, h: (s.buffer.mul_(1.1), h * s.buffer.clone())[1],
    "a buffer by the data": lambda s, h: (s.buffer.copy_(h.detach().mean(0)), h)[1],
    "a buffer by +=": lambda s, h: (_count(s), h * s.buffer.clone())[1],
    "an attribute": lambda s, h: (s.t.mul_(1.1), h * s.t.clone())[1],
    "one buffer, and reads another": lambda s, h: (s.buffer.add_(1), h * s.other)[1],
}


def _count(s: Any) -> None:
    s.buffer += 1


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_outputs(name: str) -> None:
    """After the steps in which the engine learns that batches cannot be merged."""
    with compiled(1):
        pair = Pair(Model(WRITES[name]).double())
        for _ in range(9):
            pair.step(vectors(6), vectors(4))
            assert torch.allclose(pair.models[0].t, pair.models[1].t)


def test_buffers_that_share_memory() -> None:
    def read(s: Any, h: Tensor) -> Tensor:
        s.buffer.mul_(1.1)
        return h * s.other.clone()

    with eagerly("'other' and 'buffer' share memory"):
        pair = Pair(Model(read).double())
        pair.change(lambda m: setattr(m, "other", m.buffer.view(8)))
        pair.steps(8)


def test_a_hook_for_all_modules() -> None:
    def double(module: Any, _: Any, out: Tensor) -> Tensor | None:
        return out * 2 if isinstance(module, nn.Dropout) else None

    with eagerly("a hook for all modules"):
        pair = Pair(Model(lambda s, h: s.part(h)).double())
        pair.steps(3)
        handle = nn.modules.module.register_module_forward_hook(double)
        try:
            pair.steps(3)
        finally:
            handle.remove()
        pair.steps(3)


def test_kinds_beyond_the_limit() -> None:
    """They run eagerly with one warning; the graphs that there are still serve."""
    few = torch._dynamo.config.patch(recompile_limit=3)
    with graphs() as made, few, eagerly("there are 3 graphs"):
        pair = Pair(mlp())
        for n in [*range(2, 15), 2]:
            pair.step(vectors(n), vectors(4))
        assert len(made) == 1
        for n in range(2, 5):
            pair.step(vectors(n), vectors(4))
    assert len(made) == 3


def test_where_torch_compile_is_switched_off() -> None:
    """Steps run eagerly without a word, and are graphs once it is on."""
    with graphs() as made, eagerly(None):
        pair = Pair(normed())
        with torch.compiler.set_stance("force_eager"):
            pair.steps(3)
        assert not made
        pair.steps(3)
        assert made


def test_weights_follow_what_changes() -> None:
    with compiled(None):
        pair = Pair(Model(lambda s, h: h * s.tau).double())
        for k in (1, 1, 1, 2):
            pair.change(lambda m, k=k: setattr(m, "tau", float(k)))
            expected, found = pair.both(Reweighter.weights, vectors(6), vectors(4))
            assert torch.allclose(found, expected)


def test_each_reweighter_has_its_guards() -> None:
    """As many as torch allows for one function."""
    with compiled(3), torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(3):
            reweighter = Reweighter(mlp(), cross_entropy, compile="eager")
            for _ in range(2):
                reweighter.backward(vectors(6), vectors(4))
