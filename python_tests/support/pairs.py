"""A compiled reweighter beside an eager one, on copies of one model, held to each other."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2rw_ext import Reweighter, Step
from l2rw_ext.compiled.flat_graph import FlatGraph
from support.models import cross_entropy, vectors

TOLERANCE = 1e-10
"""Relative L2 error of float64 numbers that a graph and an eager step compute, after some steps of
an optimizer."""


class Generators:
    """The states of all generators that a forward may draw from."""

    def __init__(self) -> None:
        self._states = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self._states[0])
        random.setstate(self._states[1])
        np.random.set_state(self._states[2])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Generators):
            return NotImplemented
        mine, theirs = self._states, other._states
        same_numpy = all(np.array_equal(a, b) for a, b in zip(mine[2], theirs[2], strict=True))
        return torch.equal(mine[0], theirs[0]) and mine[1] == theirs[1] and same_numpy


class Pair:
    """Steps of both start from the same state, and have to be the same.

    Args:
        model: the compiled reweighter's; the eager one has a copy of it.
        loss_fn: copied with the model if it is a module.
        compile: the backend.
        compile_options: for the compiled one.
        tolerance: relative L2 error of scores, weights, losses, gradients and buffers.
        optimizer: makes one for each model, of its trainable parameters.
        precondition: whether it is the reweighters' ``preconditioner``, too.
        options: what both reweighters take besides.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any = cross_entropy,
        *,
        compile: Any = "eager",
        compile_options: dict[str, Any] | None = None,
        tolerance: float = TOLERANCE,
        optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, 0.1),
        precondition: bool = False,
        **options: Any,
    ) -> None:
        self.models = copy.deepcopy(model), model
        self.losses = copy.deepcopy(loss_fn), loss_fn
        self.tolerance = tolerance
        self.optimizers = [
            optimizer([p for p in m.parameters() if p.requires_grad]) for m in self.models
        ]
        made = []
        for k, given in enumerate(({}, {"compile": compile, "compile_options": compile_options})):
            if precondition:
                given["preconditioner"] = self.optimizers[k]
            made.append(Reweighter(self.models[k], self.losses[k], **options, **given))
        self.eager, self.compiled = made

    def step(self, batch: Any, clean: Any = None, **options: Any) -> Step:
        """One step of both, from no gradient, and one of their optimizers."""
        expected, step = self.both(Reweighter.backward, batch, clean, **options)
        self.assert_same(step, expected)
        self.descend()
        return step

    def steps(self, count: int, draw: Callable[[int], Any] = vectors, **options: Any) -> Step:
        """Several steps on new batches; returns the last."""
        for _ in range(count):
            step = self.step(draw(6), draw(4), **options)
        return step

    def both(self, act: Callable[..., Any], *given: Any, **options: Any) -> tuple[Any, Any]:
        """``act(reweighter, ...)`` of the eager and of the compiled one.

        Both draw the same numbers.
        """
        before = Generators()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = act(self.eager, *given, **options)
        after = Generators()
        before.restore()
        found = act(self.compiled, *given, **options)
        assert Generators() == after
        return expected, found

    def change(self, act: Callable[[Any], Any]) -> None:
        """Change both models."""
        for model in self.models:
            act(model)

    def descend(self) -> None:
        """A step of each optimizer, and no gradients any more."""
        for optimizer in self.optimizers:
            optimizer.step()
        for module in (*self.models, *self.losses):
            if isinstance(module, nn.Module):
                module.zero_grad()

    def assert_same(self, step: Step, expected: Step) -> None:
        """Results, gradients, parameters and buffers are the same."""
        assert step.engine == expected.engine
        for name in ("losses", "scores", "weights", "_clean_loss"):
            self._close(getattr(step, name), getattr(expected, name), name)
        for name in ("degenerate", "nonfinite"):
            assert getattr(step, name) == getattr(expected, name)
        self.assert_same_state()

    def assert_same_state(self) -> None:
        """Gradients, parameters and buffers are the same."""
        for theirs, mine in (self.models, self.losses):
            if isinstance(mine, nn.Module):
                named = zip(mine.named_parameters(), theirs.parameters(), strict=True)
                whole = _norm(q.grad for q in theirs.parameters())
                for (name, p), q in named:
                    self._close(p.grad, q.grad, f"gradient of {name}", whole)
                    self._close(p, q, name)
                for (name, x), y in zip(mine.named_buffers(), theirs.buffers(), strict=True):
                    self._close(x, y, name)

    def _close(self, x: Tensor | None, y: Tensor | None, name: str, whole: float = 0.0) -> None:
        if x is None or y is None:
            assert x is y, name
            return
        assert (x.shape, x.dtype, x.layout) == (y.shape, y.dtype, y.layout), name
        x, y = (a.detach().to_dense() if a.is_sparse else a.detach() for a in (x, y))
        finite = y.isfinite()
        assert torch.equal(finite, x.isfinite()), name
        x, y = x[finite].double(), y[finite].double()
        # A bias before a batch norm has a gradient of rounding errors only.
        allowed = self.tolerance * (float(y.norm()) + whole / 1000)
        assert float((x - y).norm()) <= allowed, name


def _norm(gradients: Iterable[Tensor | None]) -> float:
    return math.sqrt(sum(float(g.to_dense().norm()) ** 2 for g in gradients if g is not None))


@contextmanager
def graphs() -> Iterator[list[FlatGraph]]:
    """Yields the graphs that are made in the body."""
    made: list[FlatGraph] = []
    original = FlatGraph.__init__

    def init(self: FlatGraph, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        made.append(self)

    FlatGraph.__init__ = init  # type: ignore[method-assign]
    try:
        yield made
    finally:
        FlatGraph.__init__ = original  # type: ignore[method-assign]


@contextmanager
def compiled(count: int | None = 1) -> Iterator[None]:
    """In the body so many graphs are made, at least one for None, and no step runs eagerly."""
    with graphs() as made, eagerly(None):
        yield
    assert made
    assert count in (None, len(made))


@contextmanager
def eagerly(reason: str | None) -> Iterator[None]:
    """One warning in the body says that steps run eagerly, and why; none does for None.

    It is at a line of the caller's.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [w for w in caught if str(w.message).startswith("l2rw_ext: compile=")]
    texts = [str(w.message) for w in found]
    if reason is None:
        assert not texts
        return
    assert len(texts) == 1, texts
    assert reason in texts[0]
    assert "\n" not in texts[0]
    assert "l2rw_ext" not in found[0].filename.rpartition("/")[0].rpartition("/")[2]
