"""Backends of torch.compile: by name, custom ones, wrong ones, and what they cannot do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends import registry

from l2rw_ext import Reweighter
from support.models import CLASSES, cross_entropy, mlp, model_of, normed, vectors
from support.pairs import Pair, compiled, eagerly, graphs


@pytest.fixture
def register() -> Iterator[Callable[..., str]]:
    """Registers a backend for one test."""
    names: list[str] = []

    def add(backend: Callable[..., Any]) -> str:
        names.append(f"l2rw_test_{len(names)}")
        registry.register_backend(backend, name=names[-1])
        return names[-1]

    yield add
    for name in names:
        registry._BACKENDS.pop(name, None)
        registry._COMPILER_FNS.pop(name, None)


class Attention(nn.Module):
    """One block over the positions of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


def sequences(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, 8), torch.randint(CLASSES, (n,))


@pytest.mark.parametrize("make", [mlp, normed], ids=["plain", "batch norm"])
def test_aot_eager(make: Callable[[], nn.Module]) -> None:
    with compiled():
        Pair(make(), compile="aot_eager").steps(5)


def test_inductor_and_batch_statistics() -> None:
    with compiled():
        Pair(normed(), compile="inductor", compile_options={"mode": "default"}).steps(6)


def test_inductor_and_attention() -> None:
    """With dropout before and behind a LayerNorm, of which inductor itself reads one too early."""
    with compiled():
        pair = Pair(
            Attention().train(), compile=True, compile_options={"options": {}}, tolerance=1e-4
        )
        pair.steps(5, sequences)


def test_a_custom_backend(register: Callable[..., str]) -> None:
    given: list[tuple[int, dict[str, Any]]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        placeholders = graph.graph.find_nodes(op="placeholder")
        assert len(placeholders) == len(inputs)
        assert all(isinstance(x, Tensor) for x in inputs)
        given.append((len(inputs), options))
        return graph.forward

    name = register(backend)
    with compiled():
        pair = Pair(normed(), compile=name, compile_options={"options": {"depth": 2}})
        pair.steps(6)
    assert [options for _, options in given] == [{"options": {"depth": 2}}]
    for other in (copy.deepcopy(pair.compiled), pickle.loads(pickle.dumps(pair.compiled))):
        other.backward(vectors(6), vectors(4))


def _corrupted(which: int, good: int) -> Callable[..., Any]:
    """A backend whose result of a number is wrong after so many runs."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        runs = 0

        def run(*given: Tensor) -> list[Tensor]:
            nonlocal runs
            runs += 1
            found = list(graph(*given))
            x = found[which]
            found[which] = (x + 1 if x.dtype != torch.bool else ~x) if runs > good else x
            return found

        return run

    return backend


@pytest.mark.parametrize("which", range(-3, 7))
def test_a_graph_that_is_wrong(which: int, register: Callable[..., str]) -> None:
    """In its weights, scores, losses, gradients or new values of buffers, from the beginning."""
    name = register(_corrupted(which, 0))
    with eagerly("differs from the eager step's"):
        Pair(normed(), compile=name).steps(5)


@pytest.mark.parametrize("which", [0, 5, -1])
def test_a_graph_that_becomes_wrong(which: int, register: Callable[..., str]) -> None:
    """It is found when a comparison is due, at step 16."""
    name = register(_corrupted(which, 14))
    with eagerly("differs from the eager step's"):
        Pair(normed(), compile=name).steps(20)


@pytest.mark.parametrize("wrong", [False, True])
def test_rounding_that_decides(wrong: bool, register: Callable[..., str]) -> None:
    """A ReLU at zero has one gradient or another, and a compiler rounds in its own way.

    That explains no more than other roundings of the inputs change.
    """
    eps = torch.finfo(torch.float64).eps

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*given: Tensor) -> list[Tensor]:
            found = list(graph(*(x * (1 + 9 * eps) if x.shape == (1024, 5) else x for x in given)))
            if wrong:
                found[0] = found[0] * 1.1
            return found

        return run

    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    batch, clean = vectors(1024), vectors(16)
    with torch.no_grad():  # the first example is at zero but for rounding
        first, weight = batch[0][0], model[0].weight[0]
        first *= (weight @ first).sign()
        model[0].bias[0] = -(1 + 2 * eps) * (weight @ first)
    reweighter = Reweighter(model, cross_entropy, compile=register(backend))
    with eagerly("differs from the eager step's" if wrong else None):
        for _ in range(4):
            reweighter.backward(batch, clean)


def test_a_graph_that_is_wrong_is_an_error(register: Callable[..., str]) -> None:
    from support.oracle import unchanged

    model, name = normed(), register(_corrupted(0, 0))
    reweighter = Reweighter(model, cross_entropy, compile=name, compile_options={"fullgraph": True})
    for _ in range(2):
        reweighter.backward(vectors(6), vectors(4))
    batch, clean = vectors(6), vectors(4)
    with unchanged(model), pytest.raises(RuntimeError, match=r"fullgraph=True.*differs"):
        reweighter.backward(batch, clean)


@pytest.mark.parametrize("when", ["compile", "run"])
def test_a_backend_that_fails(when: str, register: Callable[..., str]) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        torch.rand(3)
        if when == "compile":
            raise RuntimeError("no such machine\nat all")

        def run(*_: Tensor) -> Any:
            torch.rand(3)
            raise RuntimeError("no such machine\nat all")

        return run

    with eagerly("no such machine"):
        Pair(normed(), compile=register(backend)).steps(4)


def test_without_a_compiler() -> None:
    """One sentence; "eager" still works."""
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        with eagerly("no C++ compiler; install one, or take compile='eager'"):
            Pair(mlp(), compile=True).steps(4)
        with compiled():
            Pair(mlp(), compile="eager").steps(4)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown backend": ({"compile": "inducto"}, ValueError, r"compile='inducto' .*'inductor'"),
    "number": ({"compile": 3}, TypeError, "compile must be False, True or the name .* got 3"),
    "one": ({"compile": 1}, TypeError, "compile must be"),
    "function": ({"compile": lambda g, i: g}, TypeError, "compile must be"),
    "empty": ({"compile": ""}, ValueError, "compile=''"),
    "none": ({"compile": None}, TypeError, "compile must be"),
    "options alone": ({"compile_options": {}}, ValueError, "compile_options .*compile is off"),
    "unknown option": (
        {"compile": True, "compile_options": {"modes": "x"}},
        ValueError,
        "'modes' is none of 'mode', 'dynamic', 'options', 'fullgraph'",
    ),
    "unknown mode": (
        {"compile": True, "compile_options": {"mode": "fast"}},
        ValueError,
        "mode must be one of 'default'.*'fast'",
    ),
    "unknown option of inductor": (
        {"compile": True, "compile_options": {"options": {"no_such": 1}}},
        ValueError,
        "no_such",
    ),
    "fullgraph": (
        {"compile": True, "compile_options": {"fullgraph": "yes"}},
        TypeError,
        "fullgraph must be a bool, got 'yes'",
    ),
    "options that are none": (
        {"compile": True, "compile_options": "fullgraph"},
        TypeError,
        "compile_options must be",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name: str) -> None:
    options, error, match = WRONG[name]
    with pytest.raises(error, match=match) as raised:
        Reweighter(mlp(), cross_entropy, **options)
    assert "\n" not in str(raised.value)


def test_two_devices() -> None:
    model = model_of(
        lambda s, x: s.head(x), head=nn.Linear(5, CLASSES), far=nn.Linear(2, 2).to("meta")
    )
    with eagerly("the parameters are on cpu and meta"):
        reweighter = Reweighter(model, cross_entropy, compile="eager")
        for _ in range(3):
            reweighter.backward(vectors(6), vectors(4))


def test_a_backend_named_eager_compiles_nothing() -> None:
    with graphs() as made:
        Pair(mlp(), compile="eager").steps(3)
    assert made
    assert made[0].operations > 10
