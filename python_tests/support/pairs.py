"""A compiled reweighter beside an eager one, on copies of one model, held to each other."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2rw_ext import Reweighter, Step
from l2rw_ext.compiled.flat_graph import FlatGraph
from l2rw_ext.reference import relative_error
from support.models import cross_entropy, vectors

TOLERANCE = 1e-11
"""Relative L2 error of float64 numbers that one graph and an eager step compute."""


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
        return isinstance(other, Generators) and repr(self._flat()) == repr(other._flat())

    def _flat(self) -> Any:
        mine, python, numpy = self._states
        return mine.tolist(), python, numpy[1].tolist(), numpy[2:]


class Pair:
    """Steps of both from the same state; each step of the compiled one is that of the other.

    Args:
        model: the compiled reweighter's; the eager one has a copy of it.
        loss_fn: copied with the model if it is a module.
        compile: the backend.
        compile_options: for the compiled one.
        same_generators: whether both draw the same random numbers.
        tolerance: relative L2 error of scores, weights, losses, gradients and buffers.
        options: a function of a model gives what both reweighters take besides.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any = cross_entropy,
        *,
        compile: Any = "eager",
        compile_options: dict[str, Any] | None = None,
        same_generators: bool = True,
        tolerance: float = TOLERANCE,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        twin: nn.Module | None = None,
        **options: Any,
    ) -> None:
        modules = [x if isinstance(x, nn.Module) else None for x in (model, loss_fn)]
        near, near_loss = copy.deepcopy(modules)
        self.model, self.loss_fn = model, loss_fn
        self.near = twin or near
        self.near_loss = loss_fn if near_loss is None else near_loss
        self.optimizers = [self._optimizer(m, optimizer) for m in (self.model, self.near)]
        given = [dict(options), dict(options)]
        if options.get("preconditioner") is True:
            for own, optim in zip(given, self.optimizers, strict=True):
                own["preconditioner"] = optim
        self.compiled = Reweighter(
            model, loss_fn, compile=compile, compile_options=compile_options, **given[0]
        )
        self.eager = Reweighter(self.near, self.near_loss, **given[1])
        self.tolerance = tolerance
        self.same_generators = same_generators

    @staticmethod
    def _optimizer(model: nn.Module, make: Any) -> torch.optim.Optimizer:
        make = make or (lambda parameters: torch.optim.SGD(parameters, 0.1))
        return make([p for p in model.parameters() if p.requires_grad])

    def step(self, batch: Any, clean: Any = None, *, descend: bool = True, **options: Any) -> Step:
        """One step of both, from no gradient, and one of their optimizers."""
        expected, step = self.both(lambda r: r.backward(batch, clean, **options))
        self.same(step, expected)
        if descend:
            self.descend()
        return step

    def both(self, act: Callable[[Reweighter], Any]) -> tuple[Any, Any]:
        """What it gives for the eager and for the compiled reweighter, from the same generators."""
        before = Generators()
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            expected = act(self.eager)
        after = Generators()
        if self.same_generators:
            before.restore()
        found = act(self.compiled)
        if self.same_generators:
            assert Generators() == after, "generators differ"
        return expected, found

    def descend(self) -> None:
        """A step of each optimizer, and no gradients any more."""
        for optimizer in self.optimizers:
            optimizer.step()
        for module in (self.model, self.near, self.loss_fn, self.near_loss):
            if isinstance(module, nn.Module):
                module.zero_grad()

    def steps(self, count: int, draw: Callable[[int], Any] = vectors, n: int = 6) -> Step:
        """Several steps on new batches; returns the last."""
        for _ in range(count):
            step = self.step(draw(n), draw(4))
        return step

    def same(self, step: Step, expected: Step) -> None:
        """Raise unless both have the same results, gradients and buffers."""
        assert step.engine == expected.engine
        for name in ("losses", "scores", "weights", "_clean_loss", "_excluded"):
            self._close(getattr(step, name), getattr(expected, name), name)
        assert step.degenerate == expected.degenerate
        assert step.nonfinite == expected.nonfinite
        self.same_state()

    def same_state(self) -> None:
        """Raise unless gradients, parameters and buffers of both are the same."""
        for mine, other in ((self.model, self.near), (self.loss_fn, self.near_loss)):
            if not isinstance(mine, nn.Module):
                continue
            pairs = zip(mine.named_parameters(), other.parameters(), strict=True)
            for (name, p), q in pairs:
                self._close(p.grad, q.grad, f"gradient of {name}")
                self._close(p, q, name)
            for (name, x), y in zip(mine.named_buffers(), other.buffers(), strict=True):
                self._close(x, y, name)

    def _close(self, x: Tensor | None, y: Tensor | None, name: str) -> None:
        if x is None or y is None:
            if name == "_excluded":  # None where the host knows that there are none
                assert not any(bool(z.any()) for z in (x, y) if z is not None)
                return
            assert x is y, f"{name}: one is None"
            return
        assert (x.shape, x.dtype, x.layout) == (y.shape, y.dtype, y.layout), name
        x, y = (a.detach().to_dense() if a.is_sparse else a.detach() for a in (x, y))
        if not x.is_floating_point():
            assert torch.equal(x, y), name
            return
        finite = y.isfinite()
        assert torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()), name
        error = relative_error(x[finite], y[finite])
        assert error <= self.tolerance, f"{name}: {error}"


@contextmanager
def counted() -> Iterator[list[FlatGraph]]:
    """Yields the graphs that are made in the body."""
    made: list[FlatGraph] = []
    original = FlatGraph.__init__

    def __init__(self: FlatGraph, *args: Any, **options: Any) -> None:  # noqa: N807
        original(self, *args, **options)
        made.append(self)

    FlatGraph.__init__ = __init__  # type: ignore[method-assign]
    try:
        yield made
    finally:
        FlatGraph.__init__ = original  # type: ignore[method-assign]


def lines(reweighter: Reweighter) -> list[str]:
    """What happens to each kind of step that a compiled reweighter has met."""
    steps = reweighter._compiled
    assert steps is not None
    return [kind.says() for kind in steps._kinds()]
