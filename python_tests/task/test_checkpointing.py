"""Checkpointed models give the numbers of plain ones, with both kinds and in every engine."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from l2rw_ext import NotExactError, Reweighter
from l2rw_ext.reference import relative_error
from support.models import CLASSES, ENGINES, Tokens, cross_entropy, model_of, vectors
from support.oracle import assert_matches, flat, gradients_of, truth, unchanged

REENTRANT = [False, True]
ORIGINAL = torch_checkpoint.CheckpointFunction


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Whatever a test does, torch's own function is back in its place."""
    yield
    assert torch_checkpoint.CheckpointFunction is ORIGINAL


def _assert_exact(model: nn.Module, engine: Any, clean_size: int = 4, steps: int = 2) -> None:
    """Against the oracle on checkpoints of the other kind: it needs ``autograd.grad``."""
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(steps):
        batch, clean = vectors(6), vectors(clean_size)
        twin = copy.deepcopy(model)
        twin.reentrant = False
        expected = truth(twin, cross_entropy, batch, clean)
        model.zero_grad()
        step = reweighter.backward(batch, clean)
        assert step.engine == engine
        assert_matches(step, model, expected)


def _inner(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 6), nn.LayerNorm(6), nn.Dropout(dropout), nn.Tanh(), nn.Linear(6, 8)
    )


def _with(reentrant: bool, forward: Any, **parts: nn.Module) -> nn.Module:
    """A model with a head whose forward asks its ``reentrant`` for the kind of checkpoint."""
    model = model_of(forward, **parts, head=nn.Linear(8, CLASSES))
    model.reentrant = reentrant
    return model


def _model(reentrant: bool, dropout: float = 0.0, **options: Any) -> nn.Module:
    return _with(
        reentrant,
        lambda s, x: s.head(checkpoint(s.inner, s.first(x), use_reentrant=s.reentrant, **options)),
        first=nn.Linear(5, 8),
        inner=_inner(dropout),
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("clean_size", [4, 6])
def test_one_part(engine: Any, reentrant: bool, clean_size: int) -> None:
    _assert_exact(_model(reentrant), engine, clean_size)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("outer", REENTRANT)
@pytest.mark.parametrize("inner", REENTRANT)
def test_nested(engine: Any, outer: bool, inner: bool) -> None:
    def block(model: Any, x: Tensor) -> Tensor:
        kind = model.reentrant and inner
        return model.a(checkpoint(model.b, model.c(x), use_reentrant=kind)).tanh()

    def forward(model: Any, x: Tensor) -> Tensor:
        kind = model.reentrant and outer
        return model.head(checkpoint(block, model, model.first(x), use_reentrant=kind))

    model = _with(
        True,
        forward,
        first=nn.Linear(5, 8),
        a=nn.Linear(8, 8),
        b=_inner(),
        c=nn.Linear(8, 8),
    )
    _assert_exact(model, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reentrant", REENTRANT)
def test_sequential(engine: Any, reentrant: bool) -> None:
    model = _with(
        reentrant,
        lambda s, x: s.head(
            checkpoint_sequential(s.inner, 2, s.first(x), use_reentrant=s.reentrant)
        ),
        first=nn.Linear(5, 8),
        inner=nn.Sequential(_inner(), nn.Tanh(), _inner(), nn.Tanh()),
    )
    _assert_exact(model, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("early", [False, True])
def test_contexts_and_early_stop(engine: Any, early: bool) -> None:
    entered: list[str] = []

    class Noting(contextlib.nullcontext[None]):
        def __enter__(self) -> None:
            entered.append(self.enter_result)  # type: ignore[arg-type]

    def contexts() -> Any:
        return Noting("forward"), Noting("recomputation")  # type: ignore[arg-type]

    _assert_exact(_model(False, context_fn=contexts, early_stop=early), engine)
    assert {"forward", "recomputation"} <= set(entered)


def _selective() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default])


@contextlib.contextmanager
def _generator() -> Iterator[None]:
    yield


@pytest.mark.parametrize("contexts", [_selective, lambda: (_generator(), _generator())])
def test_contexts_that_serve_one_recomputation(contexts: Any) -> None:
    """They do not serve several backwards; the forward engine needs no recomputation."""
    model = _model(False, context_fn=contexts)
    batch, clean = vectors(6), vectors(4)
    for engine in ("layerwise", "double_backward"):
        refused = pytest.raises(NotExactError, match=f"{engine} engine fails where plain training")
        with refused, unchanged(model):
            Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)  # type: ignore[arg-type]
    plain = model_of(
        lambda s, x: s.head(s.inner(s.first(x))),
        first=model.first,
        inner=model.inner,
        head=model.head,
    )
    expected = truth(plain, cross_entropy, batch, clean)
    step = Reweighter(model, cross_entropy).backward(batch, clean)
    assert step.engine == "forward"
    assert relative_error(step.scores, expected.scores) < 1e-12


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("several", [False, True])
def test_outputs_that_are_no_tensor(engine: Any, reentrant: bool, several: bool) -> None:
    """A tuple of outputs, an argument without grad, one that is no tensor."""

    def part(model: Any, x: Tensor, mask: Tensor, power: float) -> Any:
        h = model.inner(x) * mask
        return (h, h**power) if several else h

    def forward(model: Any, x: Tensor) -> Tensor:
        h = model.first(x)
        out = checkpoint(
            lambda *a: part(model, *a), h, (x[:, :1] > 0).to(h), 2.0, use_reentrant=model.reentrant
        )
        return model.head(sum(out) if several else out)

    model = _with(reentrant, forward, first=nn.Linear(5, 8), inner=_inner())
    _assert_exact(model, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("merged", [True, False])
def test_dropout_inside(engine: Any, reentrant: bool, merged: bool) -> None:
    """The recomputation draws the masks of the forward: a checkpoint changes no number."""
    checkpointed = _model(reentrant, 0.5)
    plain = model_of(
        lambda s, x: s.head(s.inner(s.first(x))),
        first=checkpointed.first,
        inner=checkpointed.inner,
        head=checkpointed.head,
    )
    batch, clean = vectors(6), vectors(4)
    if not merged:  # batches that share an example take two passes
        clean = (torch.cat([batch[0][:1], clean[0][1:]]), clean[1])
    found = []
    for model in (checkpointed, plain):
        model.zero_grad()
        reweighter = Reweighter(model, cross_entropy, engine=engine)
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(3)
            step = reweighter.backward(batch, clean)
        found.append((step.scores, flat(gradients_of(model).values()).clone()))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-13


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(engine: Any, reentrant: bool, dtype: torch.dtype) -> None:
    checkpointed = _model(reentrant).float()
    plain = model_of(
        lambda s, x: s.head(s.inner(s.first(x))),
        first=checkpointed.first,
        inner=checkpointed.inner,
        head=checkpointed.head,
    ).float()
    batch, clean = vectors(6, dtype=torch.float32), vectors(4, dtype=torch.float32)
    scores = []
    for model in (checkpointed, plain):
        reweighter = Reweighter(model, cross_entropy, engine=engine)
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype):
                step = reweighter.backward(batch, clean)
        scores.append(step.scores)
    assert relative_error(*scores) < 1e-6


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_transformer_layer_by_layer(reentrant: bool) -> None:
    model = Tokens(6, batch_first=True, norm_first=True, padding=None, tied=True).double()
    layer = model.layer
    model.layer = model_of(
        lambda s, x: checkpoint(s.inner, x, use_reentrant=reentrant), inner=layer
    )

    def tokens(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(7, (n, 6)), torch.randint(CLASSES, (n,))

    batch, clean = tokens(5), tokens(3)
    twin = copy.deepcopy(model)
    twin.layer = twin.layer.inner
    expected = truth(twin, cross_entropy, batch, clean)
    step = Reweighter(model, cross_entropy, engine="layerwise").backward(batch, clean)
    assert relative_error(step.scores, expected.scores) < 1e-12


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        (engine, method)
        for engine in ("auto", *ENGINES)
        for method in ("backward", "weights", "explain")
        if (engine, method) != ("double_backward", "explain")  # runs no forward
    ],
)
def test_reentrant_checkpoint_without_a_gradient_to_carry(engine: Any, method: str) -> None:
    """In plain torch it trains nothing inside and warns; here it is an error."""
    model = model_of(
        lambda s, x: s.head(checkpoint(s.first, x, use_reentrant=True)),
        first=nn.Linear(5, 8),
        head=nn.Linear(8, CLASSES),
    )
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    batch, clean = vectors(6), vectors(4)
    with unchanged(model), pytest.raises(ValueError, match="use use_reentrant=False"):
        getattr(reweighter, method)(batch, clean)


@pytest.mark.parametrize("engine", ENGINES)
def test_reentrant_checkpoint_of_a_frozen_part(engine: Any) -> None:
    """There is nothing to train inside, with or without a gradient to carry."""

    def forward(model: Any, x: Tensor) -> Tensor:
        h = checkpoint(model.frozen, x, use_reentrant=model.reentrant)
        h = checkpoint(model.middle, model.first(h), use_reentrant=model.reentrant)
        return model.head(h)

    model = _with(
        True,
        forward,
        frozen=nn.Linear(5, 5).requires_grad_(False),
        first=nn.Linear(5, 8),
        middle=nn.Linear(8, 8).requires_grad_(False),
    )
    _assert_exact(model, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_reentrant_checkpoint_without_grad(engine: Any) -> None:
    """A target network under no_grad may be checkpointed too."""

    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = checkpoint(model.inner, x, use_reentrant=model.reentrant)
        return model.head(model.inner(x) - 0.5 * target)

    _assert_exact(_with(True, forward, inner=nn.Sequential(nn.Linear(5, 8), nn.Tanh())), engine)


class _Stop(BaseException):
    """As KeyboardInterrupt, it passes every ``except Exception``."""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("error", [_Stop, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_restored_after_an_error(engine: Any, error: type[BaseException], when: str) -> None:
    model = _model(True)

    class Raises(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if when == "forward":
                raise error
            return x.clone()

        @staticmethod
        def jvp(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise error

    model.inner.append(model_of(lambda s, x: Raises.apply(x)))
    batch, clean = vectors(6), vectors(4)
    with unchanged(model), pytest.raises(error):
        Reweighter(model, cross_entropy, engine=engine).backward(batch, clean)
    assert torch_checkpoint.CheckpointFunction is ORIGINAL


def test_steps_in_several_threads() -> None:
    """The last step that ends restores torch's function, whichever that is."""
    models = [_model(True) for _ in range(3)]
    batches = [(vectors(6), vectors(4)) for _ in models]
    expected = [
        Reweighter(copy.deepcopy(m), cross_entropy).weights(*b)
        for m, b in zip(models, batches, strict=True)
    ]
    found: list[Tensor | None] = [None] * 3

    def work(i: int) -> None:
        reweighter = Reweighter(models[i], cross_entropy)
        for _ in range(5):
            found[i] = reweighter.weights(*batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        assert a is not None
        assert torch.equal(a, b)


def test_a_checkpoint_function_of_ones_own_is_an_error_not_a_wrong_number() -> None:
    """Code that took the Function from torch, or copied it, is not reached by the replacement."""
    model = model_of(
        lambda s, x: s.head(ORIGINAL.apply(s.inner, True, s.first(x))),
        first=nn.Linear(5, 8),
        inner=_inner(),
        head=nn.Linear(8, CLASSES),
    )
    batch, clean = vectors(6), vectors(4)
    with pytest.raises(NotExactError, match="may hide that use"), unchanged(model):
        Reweighter(model, cross_entropy, engine="layerwise").backward(batch, clean)
    with pytest.raises(RuntimeError, match=r"incompatible with .grad\(\)"), unchanged(model):
        Reweighter(model, cross_entropy).backward(batch, clean)


class _Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.inner(x))


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(
    ("engine", "norm"),
    [
        ("layerwise", False),
        ("forward", False),
        ("forward", True),
        ("double_backward", False),
        ("double_backward", True),
    ],
)
def test_buffers_advance_once_though_parts_are_run_again(
    engine: Any, low_memory: bool, norm: bool
) -> None:
    inner = nn.Sequential(_Counted(), nn.BatchNorm1d(8) if norm else nn.Identity())
    model = model_of(
        lambda s, x: s.head(
            torch_checkpoint.checkpoint(s.inner, torch.tanh(s.first(x)), use_reentrant=False)
        ),
        first=nn.Linear(5, 8),
        inner=inner,
        head=nn.Linear(8, CLASSES),
    )
    reweighter = Reweighter(model, cross_entropy, engine=engine, low_memory=low_memory)
    batch, clean = vectors(6), vectors(4)
    for _ in range(2):
        expected = copy.deepcopy(model)
        with torch.no_grad():
            expected(batch[0])
        reweighter.backward(batch, clean)
        for found, exact in zip(model.buffers(), expected.buffers(), strict=True):
            assert torch.equal(found, exact)
