"""Errors and interruptions of compiled steps are those of eager ones, and change nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2rw_ext import Reweighter
from l2rw_ext.compiled import flat_graph, steps
from l2rw_ext.errors import NotCompilableError
from support.models import CLASSES, cross_entropy, mlp, model_of, normed, vectors
from support.oracle import unchanged
from support.pairs import Pair, eagerly, graphs


def _model(*first: nn.Module) -> nn.Module:
    """With dropout and batch statistics, so that there is something to put back."""
    return nn.Sequential(*first, normed(), nn.Dropout(0.3)).double()


def _raises(_: Any, x: Tensor) -> Tensor:
    if x.size(0) == 7:
        raise KeyError("seven")
    return x


def _batch(n: int, change: Callable[[Tensor, Tensor], Any] = lambda x, y: (x, y)) -> Any:
    return change(*vectors(n))


BAD: dict[str, Callable[[], tuple[Any, Any]]] = {
    "other width": lambda: (_batch(6, lambda x, y: (x[:, :4], y)), vectors(4)),
    "no such class": lambda: (_batch(6, lambda x, y: (x, y + CLASSES)), vectors(4)),
    "no such clean class": lambda: (vectors(6), _batch(4, lambda x, y: (x, y - 7))),
    "NaN in the clean batch": lambda: (vectors(6), _batch(4, lambda x, y: (x * torch.nan, y))),
    "NaN that is mixed": lambda: (_batch(6, lambda x, y: (x * torch.nan, y)), vectors(4)),
    "other lengths": lambda: (_batch(6, lambda x, y: (x, y[:5])), vectors(4)),
    "not unreduced": lambda: (_batch(6, lambda x, y: (x, y.double().view(6, 1))), vectors(4)),
    "raises": lambda: (vectors(7), vectors(4)),
    "no pair": lambda: (vectors(6)[0], vectors(4)),
    "other dtype": lambda: (vectors(6, dtype=torch.float32), vectors(4)),
}


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A square error for targets that are no classes."""
    if targets.is_floating_point():
        return (outputs - targets).square()
    return cross_entropy(outputs, targets)


def _error(reweighter: Reweighter, batch: Any, clean: Any) -> tuple[type[Exception], str]:
    try:
        reweighter.backward(batch, clean)
    except NotCompilableError:
        raise
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("no error")


@pytest.mark.parametrize(
    ("name", "fullgraph"),
    [*((name, False) for name in BAD), ("no such class", True), ("raises", True)],
)
def test_errors_of_the_user(name: str, fullgraph: bool) -> None:
    """At the first step, at the one that is traced and later; the graph still serves."""
    model = _model(model_of(_raises))
    options = {"fullgraph": fullgraph}
    with graphs() as made, eagerly(None):
        pair = Pair(model, loss, compile_options=options)
        for good in (1, 2, 0):
            batch, clean = BAD[name]()
            raised = []
            for reweighter in (pair.eager, pair.compiled):
                state = torch.get_rng_state()
                with unchanged(reweighter.model):
                    raised.append(_error(reweighter, batch, clean))
                assert torch.equal(torch.get_rng_state(), state)
            assert raised[0] == raised[1]
            if good:
                pair.steps(good)
    assert len(made) == 1


@pytest.mark.parametrize("where", ["traced", "run", "result"])
def test_interruptions(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    pair = Pair(model)
    pair.steps(1 if where == "traced" else 4)
    with monkeypatch.context() as patch:
        if where == "traced":
            original = nn.Linear.forward

            def forward(self: Any, x: Tensor) -> Tensor:
                if flat_graph.devices.tracing() and self.out_features == CLASSES:
                    raise KeyboardInterrupt
                return original(self, x)

            patch.setattr(nn.Linear, "forward", forward)
        else:

            def interrupt(*_: Any) -> Any:
                torch.rand(3)
                raise KeyboardInterrupt

            patch.setattr(steps._Graph, where, interrupt)
        batch, clean = vectors(6), vectors(4)
        with unchanged(model), pytest.raises(KeyboardInterrupt):
            pair.compiled.backward(batch, clean)
    with eagerly(None):
        pair.steps(3)


@pytest.mark.parametrize("engine", ["auto", "layerwise"])
def test_an_engine_that_is_not_exact(engine: Any) -> None:
    """A forced engine is an error as in eager steps, whatever the backend."""
    from l2rw_ext import NotExactError

    reweighter = Reweighter(normed(), cross_entropy, engine=engine, compile="eager")
    for _ in range(3):
        expected = contextlib.nullcontext() if engine == "auto" else pytest.raises(NotExactError)
        with expected:
            assert reweighter.backward(vectors(6), vectors(4)).engine == "forward"


def _decides(_: Any, x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 0 else x


def test_fullgraph_is_an_error_that_changes_nothing() -> None:
    model = _model(model_of(_decides))
    reweighter = Reweighter(
        model, cross_entropy, compile="eager", compile_options={"fullgraph": True}
    )
    batch, clean = vectors(6), vectors(4)
    for _ in range(3):
        with (
            unchanged(model),
            pytest.raises(
                RuntimeError, match=r"fullgraph=True: the step is not one graph: .*branch"
            ),
        ):
            reweighter.backward(batch, clean)


def test_explain_says_which_it_is() -> None:
    batch, clean = vectors(6), vectors(4)
    reweighter = Reweighter(mlp(), cross_entropy, compile="eager")
    found = []
    for _ in range(3):
        found.append(str(reweighter.explain(batch, clean)))
        reweighter.backward(batch, clean)
    assert "first" in found[0] or "next" in found[0]
    assert "is one graph of" in found[2]
    assert "operations, traced in" in found[2]

    model = nn.Sequential(model_of(_decides), *mlp())
    reweighter = Reweighter(model, cross_entropy, compile="eager")
    with eagerly("Data-dependent branching"):
        reweighter.backward(batch, clean)
        assert "Data-dependent branching" in str(reweighter.explain(batch, clean))
