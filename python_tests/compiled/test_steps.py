"""Compiled steps are eager steps: every feature, its errors, and what a step leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from l2rw_ext import Reweighter
from support.feature_table import FEATURES
from support.models import CLASSES, ENGINES, cross_entropy, mlp, model_of, normed, vectors
from support.oracle import unchanged
from support.pairs import Pair, compiled, eagerly, graphs

ROWS = {f.name: f for f in FEATURES}


def dropped() -> nn.Module:
    """With two dropouts."""
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, CLASSES), nn.Dropout(0.1)
    ).double()


class Loss(nn.Module):
    """A loss with a parameter and a buffer that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.seen.add_(1)
        return cross_entropy(outputs * self.scale, targets)


# Engines and options.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("make", [mlp, dropped], ids=["plain", "dropout"])
def test_engines(engine: Any, make: Callable[[], nn.Module]) -> None:
    """With fresh masks at each step, those of an eager step; past the check at step 16."""
    with compiled():
        pair = Pair(make(), engine=engine)
        pair.steps(19)


@pytest.mark.parametrize("engine", ["forward", "double_backward"])
def test_buffers_advance(engine: Any) -> None:
    with compiled():
        pair = Pair(normed(), engine=engine)
        pair.steps(19)
    assert pair.models[1][1].num_batches_tracked == 19


@pytest.mark.parametrize("training", [False, True])
def test_only_buffers_that_are_written_are_outputs(training: bool) -> None:
    """Batch norm writes to its statistics in training mode alone."""
    model = normed().eval()
    model[1].train(training)
    model[0].register_buffer("read", torch.ones(8, dtype=torch.float64))
    model.append(model_of(lambda _, x: x * model[0].read.sum()))
    with graphs() as made:
        Pair(model).steps(3)
    assert len(made[0].updated) == 3 * training


OPTIONS: dict[str, dict[str, Any]] = {
    "direction_decay": {"direction_decay": 0.7},
    "layers": {"layers": ["2.*"]},
    "l2": {"l2": 0.1},
    "every": {"every": 3},
    "every and decay": {"every": 2, "direction_decay": 0.5},
    "momentum": {
        "precondition": True,
        "optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    },
    "Adam": {"precondition": True, "optimizer": lambda p: torch.optim.Adam(p, 0.01)},
    "normalize": {"normalize": "example"},
    "normalize, every": {"normalize": "example", "every": 2, "direction_decay": 0.5},
    "kept in memory": {"low_memory": False},
    "low memory": {"low_memory": True},
    "check_finite": {"check_finite": True},
    "uniform": {"on_degenerate": "uniform"},
    "skip": {"on_degenerate": "skip"},
    "other clean loss": {"clean_loss_fn": lambda o, y: cross_entropy(2 * o, y)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    with compiled(None):
        Pair(mlp(), **OPTIONS[name]).steps(9)


def test_a_clean_batch_every_so_often() -> None:
    with compiled(None):
        pair = Pair(mlp(), every=3)
        for k in range(10):
            pair.step(vectors(6), vectors(4) if k % 3 == 0 else None)


def test_scores_that_are_reused() -> None:
    with compiled(None):
        pair = Pair(mlp(), every=3, reuse="scores")
        for k in range(12):
            index = torch.arange(6) + 6 * (k % 2)
            pair.step(vectors(6), vectors(4), index=index)
    assert torch.allclose(pair.compiled.record.scores, pair.eager.record.scores)


@pytest.mark.parametrize("make", [mlp, normed], ids=["layerwise", "forward"])
@pytest.mark.parametrize("on_degenerate", ["zero", "uniform", "skip"])
def test_degenerate_steps(make: Callable[[], nn.Module], on_degenerate: Any) -> None:
    """At the comparison and between comparisons; others follow."""
    with compiled():
        pair = Pair(make(), lambda o, y: o[:, 0] * y, on_degenerate=on_degenerate)
        for k in range(8):
            x, y = vectors(6)[0], torch.ones(6, dtype=torch.float64)
            step = pair.step((x, y if k % 3 else -y), (x[:4], torch.ones_like(y[:4])))
            assert step.degenerate == (k % 3 == 0)


@pytest.mark.parametrize("on_degenerate", ["zero", "uniform", "skip"])
@pytest.mark.parametrize("signs", [(1, -1), (-1, 1), (-1, -1)])
def test_accumulated_micro_batches(on_degenerate: Any, signs: tuple[int, int]) -> None:
    with compiled(2):
        pair = Pair(mlp(), lambda o, y: o[:, 0] * y, on_degenerate=on_degenerate)
        for _ in range(4):
            parts = [vectors(6)[0] for _ in signs]
            clean = parts[0][:4], torch.ones(4, dtype=torch.float64)

            def accumulate(reweighter: Reweighter, parts: Any = parts, clean: Any = clean) -> Any:
                with reweighter.accumulate() as accumulation:
                    for sign, x in zip(signs, parts, strict=True):
                        reweighter.backward((x, torch.full((6,), float(sign)).double()), clean)
                return torch.cat(accumulation.weights)

            expected, found = pair.both(accumulate)
            assert torch.allclose(found, expected)
            pair.assert_same_state()
            pair.descend()


def test_a_loss_scale_and_an_overflow() -> None:
    """Gradients that overflow arrive as such, and the scaler skips its step."""
    model = mlp(dtype=torch.float32)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**k) for k in (10, 10)]
    with compiled():
        pair = Pair(model, tolerance=1e-4)
        for k in range(8):
            batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
            if k in (1, 4):
                for scaler in scalers:
                    scaler._scale = torch.tensor(3e38)
                batch = (batch[0] * 1e3, batch[1])
            by_reweighter = {id(pair.eager): scalers[0], id(pair.compiled): scalers[1]}
            expected, step = pair.both(
                lambda r, b=batch, c=clean, s=by_reweighter: r.backward(b, c, s[id(r)])
            )
            pair.assert_same(step, expected)
            if k in (1, 4):
                assert not all(p.grad.isfinite().all() for p in model.parameters())
            before = model[0].weight.clone()
            for scaler, optimizer in zip(scalers, pair.optimizers, strict=True):
                scaler.step(optimizer)
                scaler.update(2.0**10)
            assert torch.equal(before, model[0].weight) == (k in (1, 4))
            pair.change(lambda m: m.zero_grad())


def test_autocast_is_part_of_the_kind() -> None:
    model = mlp(dtype=torch.float32)
    with compiled(2):
        pair = Pair(model, tolerance=2e-2)
        for k in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=k % 2 == 1):
                step = pair.step(vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32))
            assert step.losses.dtype == torch.float32


@pytest.mark.parametrize("make", [mlp, dropped, normed], ids=["plain", "dropout", "batch norm"])
def test_weights_change_nothing(make: Callable[[], nn.Module]) -> None:
    pair = Pair(make())
    with compiled(2):
        for k in range(6):
            batch, clean = vectors(6), vectors(4)
            with unchanged(pair.models[1]):
                expected, found = pair.both(Reweighter.weights, batch, clean)
            assert torch.allclose(found, expected)
            if k % 2:
                pair.step(batch, clean)


# Models and losses.

CHOSEN = [
    "strided, padded, 2-D",
    "grouped, dilated, 3-D",
    "transposed, 2-D",
    "`PReLU` with a slope for each channel",
    "`EmbeddingBag`, mean",
    "`LayerNorm`, `RMSNorm`",
    "`BatchNorm` in eval mode",
    "`MultiheadAttention`",
    "`scaled_dot_product_attention`, flash kernel",
    "`spectral_norm` in train mode",
    "a parametrization of one's own",
    "low-rank parts merged into a frozen base",
    "frozen layers below, between and above",
    "a dict in, a tuple out",
    "a dataclass out",
    "a mask that both batches share",
    "`vmap` in the forward",
    "a tensor that is an attribute, written in place",
    "a buffer in the graph of the losses, written in place",
    "a loss with a weight and a buffer",
    "a module with two names, and a parameter that is zero",
    "a contrastive loss",
    "all rows of several graphs in one tensor, a target for each graph",
]
REFUSED = {
    "a packed sequence": "pack_padded_sequence",
    "`spectral_norm` by the older hook, in train mode": "the forward changes model.0.weight",
    "targets as a list of dicts": "may belong to examples",
    "sparse features": "sparse",
    "a custom activation without forward mode": "_Squash",
    "a parameter changed in place by the data": "the forward writes to model.w",
    "`Embedding` with `max_norm`, which writes to its weight": "writes to model.embedding.weight",
    "the same, written in place through `.data`": "the forward writes to model.key.weight",
    "the same, by another parameter": "Parameter()",
    "numbers, strings and tuples that the forward assigns": "the forward changes model.",
    "a tensor that is an attribute, assigned": "the forward changes model.mean",
}


@pytest.mark.parametrize("name", [*CHOSEN, *REFUSED])
def test_features(name: str) -> None:
    """A step of any model is one graph, or runs eagerly and says so."""
    feature = ROWS[name]
    model, batch, clean = feature.make()
    expected = eagerly(REFUSED[name]) if name in REFUSED else compiled()
    with expected:
        pair = Pair(model, copy.deepcopy(feature.loss), tolerance=1e-9)
        for _ in range(10):
            pair.step(batch, clean)


def test_a_loss_that_is_a_module() -> None:
    with compiled():
        pair = Pair(mlp(), Loss())
        pair.steps(6)
    assert pair.losses[1].seen == pair.losses[0].seen > 0


def test_a_frozen_part_and_tied_weights() -> None:
    model = model_of(
        lambda s, x: F.linear(torch.tanh(s.body(s.embedding(x).mean(1))), s.embedding.weight),
        embedding=nn.Embedding(CLASSES, 6),
        body=nn.Linear(6, 6),
    )
    model.body.bias.requires_grad_(False)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(CLASSES, (n, 4)), torch.randint(CLASSES, (n,))

    with compiled():
        pair = Pair(model)
        pair.steps(6, draw)
    assert model.body.bias.grad is None


def test_parametrizations_with_a_cache() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, CLASSES)
    ).double()
    with compiled(), nn.utils.parametrize.cached():
        Pair(model).steps(5)


@dataclasses.dataclass
class Inputs:
    """Two tensors and a number."""

    a: Tensor
    b: Tensor
    scale: float = 2.0


torch.utils._pytree.register_dataclass(Inputs)
KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "mapping": (lambda s, a, b: s.head(a * b), lambda a, b: {"a": a, "b": b}),
    "tuple": (lambda s, a, b: s.head(a * b), lambda a, b: (a, b)),
    "dataclass": (lambda s, x: s.head(x.a * x.b * x.scale), Inputs),
    "list in a tuple": (lambda s, x: s.head(x[0] * x[1]), lambda a, b: ([a, b],)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_inputs(kind: str) -> None:
    forward, pack = KINDS[kind]

    def draw(n: int) -> Any:
        (a, y), (b, _) = vectors(n), vectors(n)
        return pack(a, b), y

    with compiled():
        Pair(model_of(forward, head=nn.Linear(5, CLASSES))).steps(5, draw)


def test_a_number_of_examples_that_is_given() -> None:
    def loss(outputs: Tensor, targets: Any) -> Tensor:
        return outputs.logsumexp(1) * targets["scale"]

    def draw(n: int) -> Any:
        return vectors(n)[0], {"scale": torch.rand(()).double()}

    with compiled():
        Pair(mlp(), loss).steps(5, draw, batch_size=(6, 4))


@pytest.mark.parametrize("how", ["whole", "method", "submodule", "loss"])
def test_what_the_user_has_compiled_becomes_part_of_the_step(how: str) -> None:
    torch.manual_seed(0)
    plain = mlp()
    model: Any = copy.deepcopy(plain)
    loss = cross_entropy
    if how == "whole":
        model = torch.compile(model, backend="aot_eager")
    elif how == "method":
        model.compile(backend="aot_eager")
    elif how == "submodule":
        model = nn.Sequential(torch.compile(model[:2], backend="aot_eager"), model[2])
    else:
        loss = torch.compile(cross_entropy, backend="aot_eager")
    eager = Reweighter(plain, cross_entropy)
    with compiled():
        reweighter = Reweighter(model, loss, compile="eager")
        for _ in range(5):
            batch, clean = vectors(6), vectors(4)
            expected, step = eager.backward(batch, clean), reweighter.backward(batch, clean)
            assert torch.allclose(step.scores, expected.scores)
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert torch.allclose(p.grad, q.grad)
    model(vectors(6)[0])


# Gradients, copies, several reweighters.


def test_hooks_on_parameters_fire_once() -> None:
    model = mlp()
    found: list[tuple[str, Tensor]] = []
    model[0].weight.register_hook(lambda g: found.append(("hook", g.clone())) or 2 * g)
    model[0].weight.register_post_accumulate_grad_hook(
        lambda p: found.append(("after", p.grad.clone()))
    )
    near = mlp()
    near.load_state_dict(model.state_dict())
    eager, reweighter = (
        Reweighter(near, cross_entropy),
        Reweighter(model, cross_entropy, compile="eager"),
    )
    with compiled():
        for _ in range(5):
            batch, clean = vectors(6), vectors(4)
            eager.backward(batch, clean)
            reweighter.backward(batch, clean)
            (first, g), (second, after) = found
            found.clear()
            assert (first, second) == ("hook", "after")
            assert torch.allclose(g, near[0].weight.grad)
            assert torch.allclose(after, 2 * near[0].weight.grad)
            for m in (model, near):
                m.zero_grad()


def test_gradients_add_up_in_the_tensor_that_is_there() -> None:
    model = mlp()
    with compiled():
        pair = Pair(model)
        for k in range(6):
            for m in pair.models:
                for p in m.parameters():
                    p.grad = torch.full_like(p, float(k))
            held = [p.grad for p in model.parameters()]
            expected, step = pair.both(Reweighter.backward, vectors(6), vectors(4))
            pair.assert_same(step, expected)
            assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))


def test_results_are_the_callers_own() -> None:
    """No later step writes to what an earlier one has handed out."""
    model = mlp()
    reweighter = Reweighter(model, cross_entropy, compile="eager")
    kept: list[tuple[Tensor, Tensor]] = []
    for _ in range(4):
        step = reweighter.backward(vectors(6), vectors(4))
        for x in (step.scores, step.weights, step.losses, *(p.grad for p in model.parameters())):
            kept.append((x, x.clone()))
        step.scores.add_(0)
        model.zero_grad()
    assert all(torch.equal(x, y) for x, y in kept)
    assert len({x.data_ptr() for x, _ in kept}) == len(kept)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(how: str) -> None:
    reweighter = Reweighter(mlp(), cross_entropy, compile="eager", direction_decay=0.5)
    for _ in range(3):
        reweighter.backward(vectors(6), vectors(4))
    other = copy.deepcopy(reweighter) if how == "deepcopy" else _pickled(reweighter)
    with compiled(None):
        for _ in range(4):
            batch, clean = vectors(6), vectors(4)
            for r in (reweighter, other):
                r.model.zero_grad()
            expected, step = reweighter.backward(batch, clean), other.backward(batch, clean)
            assert torch.allclose(step.scores, expected.scores)
            for p, q in zip(other.model.parameters(), reweighter.model.parameters(), strict=True):
                assert p is not q
                assert torch.allclose(p.grad, q.grad)


def _pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def test_two_reweighters_of_one_model() -> None:
    model = dropped()
    pair, other = Pair(model), Reweighter(model, cross_entropy, compile="eager", engine="forward")
    with compiled(2):
        for _ in range(5):
            pair.steps(1)
            other.weights(vectors(6), vectors(4))


def test_threads() -> None:
    """Each has a model; where one is followed while the other runs, steps are still right."""
    errors: list[BaseException] = []

    def work(pair: Pair, batches: list[Any]) -> None:
        try:
            for batch, clean in batches:
                step = pair.compiled.backward(batch, clean)
                expected.append((pair, batch, clean, step))
                pair.models[1].zero_grad()
        except BaseException as error:
            errors.append(error)

    expected: list[Any] = []
    methods = nn.Module.__call__, nn.Module.__getattr__
    pairs = [Pair(mlp()) for _ in range(3)]
    threads = [
        threading.Thread(target=work, args=(p, [(vectors(6), vectors(4)) for _ in range(25)]))
        for p in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert (nn.Module.__call__, nn.Module.__getattr__) == methods  # no trace has left its own
    assert len(expected) == 75
    for pair, batch, clean, step in expected:
        again = pair.eager.backward(batch, clean)
        assert torch.allclose(step.scores, again.scores)
        assert torch.allclose(step.weights, again.weights)
