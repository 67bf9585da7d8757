"""Checkpoints recompute in a graph, with the masks of their forward and not its activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from l2rw_ext.compiled.draws import Draws
from l2rw_ext.errors import NotCompilableError
from support.models import CLASSES, ENGINES, model_of, vectors
from support.pairs import Pair, compiled, graphs

REENTRANT = [False, True]


def _inner(dropout: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 6), dropout, nn.LayerNorm(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 8)
    )


def _model(forward: Callable[[Any, Tensor], Tensor], dropout: nn.Module | None = None) -> nn.Module:
    return model_of(
        lambda s, x: s.head(forward(s, torch.tanh(s.first(x)))),
        first=nn.Linear(5, 8),
        a=_inner(dropout or nn.Dropout(0.5)),
        b=_inner(nn.Dropout(0.3)),
        head=nn.Linear(8, CLASSES),
    )


@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize(
    ("engine", "low_memory"),
    [*((engine, "auto") for engine in ENGINES), ("layerwise", False), ("layerwise", True)],
)
def test_dropout_inside(engine: Any, reentrant: bool, low_memory: Any) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = checkpoint(s.a, x, use_reentrant=reentrant)
        return checkpoint(s.b, x, use_reentrant=reentrant)

    model = _model(forward)
    with compiled():
        Pair(model, engine=engine, low_memory=low_memory).steps(4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "dropout", [nn.AlphaDropout(0.3), nn.RReLU(), nn.FeatureAlphaDropout(0.3)], ids=repr
)
def test_other_random_layers_inside(engine: Any, dropout: nn.Module) -> None:
    model = _model(lambda s, x: checkpoint(s.a, x, use_reentrant=False), dropout)
    with compiled():
        Pair(model, engine=engine).steps(3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reentrant", REENTRANT)
def test_nested(engine: Any, reentrant: bool) -> None:
    def outer(s: Any, x: Tensor) -> Tensor:
        return s.b(checkpoint(s.a, torch.dropout(x, 0.2, True), use_reentrant=reentrant))

    model = _model(lambda s, x: checkpoint(outer, s, x, use_reentrant=False))
    with compiled():
        Pair(model, engine=engine).steps(3)


@pytest.mark.parametrize("engine", ["layerwise", "forward"])
def test_attention_with_dropout_inside(engine: Any) -> None:
    model = model_of(
        lambda s, x: s.head(checkpoint(s.layer, s.first(x), use_reentrant=False).mean(1)),
        first=nn.Linear(5, 8),
        layer=nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True),
        head=nn.Linear(8, CLASSES),
    )

    def sequences(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 4, 5, dtype=torch.float64), torch.randint(CLASSES, (n,))

    with compiled():
        Pair(model, engine=engine).steps(3, sequences)


def test_through_inductor() -> None:
    """Dropout draws the masks of an eager step, twice the same ones."""
    model = _model(lambda s, x: checkpoint(s.a, x, use_reentrant=False))
    with compiled():
        Pair(model, compile="inductor").steps(3)


def _drawn_twice(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> Any:
    def body(_: Tensor) -> list[Tensor]:
        with Draws(set()) as draws:
            before = torch.get_rng_state()
            x = first()
            after = torch.get_rng_state()
            torch.set_rng_state(before)
            y = second()
            torch.set_rng_state(after)
            z = first()
            draws.check()
        return [x, y, z]

    return make_fx(body)(torch.zeros(()))


DRAWS: dict[str, Callable[[], Tensor]] = {
    "rand": lambda: torch.rand(4),
    "in place": lambda: torch.zeros(4).bernoulli_(0.5).mul_(2),
    "by a tensor": lambda: torch.bernoulli(torch.full((4,), 0.5)),
    "several results": lambda: torch.native_dropout(torch.ones(4), 0.5, True)[1],
    "noise": lambda: torch.rrelu(torch.full((4,), -1.0), training=True),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_state_is_drawn_from_once(draw: Callable[[], Tensor]) -> None:
    graph = _drawn_twice(draw, draw)
    for _ in range(3):
        x, y, z = graph(torch.zeros(()))
        assert torch.equal(x, y)
        assert x.unique().numel() == 1 or not torch.equal(x, z)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: torch.rand(4), lambda: torch.rand(5)),
        (lambda: torch.rand(4), lambda: torch.randn(4)),
        (
            lambda: torch.bernoulli(torch.full((4,), 0.5)),
            lambda: torch.bernoulli(torch.full((4,), 0.4)),
        ),
        (lambda: torch.rand(4), lambda: torch.manual_seed(3) and torch.rand(4)),
        (lambda: torch.manual_seed(3) and torch.rand(4), lambda: torch.rand(4)),
    ],
)
def test_other_numbers_from_a_state_are_refused(
    first: Callable[[], Tensor], second: Callable[[], Tensor]
) -> None:
    with pytest.raises(NotCompilableError, match="sets torch's generator"):
        _drawn_twice(first, second)


def test_a_state_set_in_the_end_is_refused() -> None:
    with Draws(set()) as draws:
        torch.rand(3)
        draws.check()
        torch.manual_seed(5)
    with pytest.raises(NotCompilableError, match="sets torch's generator"):
        draws.check()


class _Live(torch.fx.Interpreter):
    """Counts the bytes that are alive while a graph runs, besides those of its inputs."""

    peak = 0

    def run_node(self, n: torch.fx.Node) -> Any:
        out = super().run_node(n)
        alive = [x for node, x in self.env.items() if node.op != "placeholder"]
        storages = {
            x.untyped_storage()._cdata: x.untyped_storage().nbytes()
            for x in pytree.tree_leaves((alive, () if n.op in ("placeholder", "output") else out))
            if isinstance(x, Tensor)
        }
        self.peak = max(self.peak, sum(storages.values()))
        return out


def test_activations_of_the_first_forward_are_freed() -> None:
    depth, width, n = 6, 32, 64

    def peak(run: Callable[[nn.Module, Tensor], Tensor]) -> int:
        def forward(s: Any, x: Tensor) -> Tensor:
            x = s.first(x)
            for block in s.blocks:
                x = run(block, x)
            return s.head(x)

        def block() -> nn.Module:
            layers = (nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4))
            return nn.Sequential(*layers)

        model = model_of(
            forward,
            first=nn.Linear(5, width),
            blocks=nn.ModuleList(block() for _ in range(depth)),
            head=nn.Linear(width, CLASSES),
        )
        with graphs() as made:
            Pair(model, engine="layerwise", low_memory="auto").steps(2, lambda m: vectors(n))
        (graph,) = made
        values = (x.meta["val"] for x in graph.module.graph.find_nodes(op="placeholder"))
        live = _Live(graph.module)
        with torch.no_grad():
            live.run(*(torch.ones(tuple(x.shape), dtype=x.dtype) for x in values))
        return live.peak

    kept = peak(lambda block, x: block(x))
    dropped = peak(lambda block, x: checkpoint(block, x, use_reentrant=False))
    assert dropped < kept / 2
