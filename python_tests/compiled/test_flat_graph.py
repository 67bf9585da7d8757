"""The graph of a step: what it takes in, writes to and gives out, and what it may not hold."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from l2rw_ext.compiled.flat_graph import FlatGraph
from l2rw_ext.errors import NotCompilableError
from l2rw_ext.reweighter import Reweighter
from l2rw_ext.task.isolation import Snapshot
from l2rw_ext.task.task import Task
from support.models import CLASSES, cross_entropy, mlp, vectors
from support.oracle import unchanged
from support.pairs import Pair, compiled, eagerly, graphs

UNKNOWN = torch.ones(5, dtype=torch.float64)


class Model(nn.Module):
    """A buffer that is read and one that is written to, and a function for the rest."""

    def __init__(self, act: Callable[[Any, Tensor], Tensor] = lambda _, x: x) -> None:
        super().__init__()
        self.head = nn.Linear(5, CLASSES)
        self.register_buffer("read", torch.full((5,), 2.0))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.head(self.act(self, x * self.read))


def flat(model: nn.Module, batch: Any, *, updates: bool = True) -> tuple[FlatGraph, list[Tensor]]:
    """The graph of the sum of the training losses and the gradient of each parameter."""
    task = Reweighter(model, cross_entropy)._task(batch, (batch[0][:4], batch[1][:4]), None)
    named = [*model.named_parameters(), *model.named_buffers()]
    inputs = [*batch, *(x for _, x in named)]

    def step(task: Task, _: Snapshot) -> list[Tensor]:
        loss = task.forward_train().sum()
        return [loss.detach(), *torch.autograd.grad(loss, task.parameters)]

    names = ["inputs", "targets", *(name for name, _ in named)]
    with torch.enable_grad():
        return FlatGraph(step, task, inputs, names, updates=updates), inputs


def expected(model: nn.Module, batch: Any) -> list[Tensor]:
    """The same by autograd."""
    loss = cross_entropy(model(batch[0]), batch[1]).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("updates", [True, False])
def test_it_computes_from_its_inputs_and_writes_to_none(updates: bool) -> None:
    model, batch = Model().double(), vectors(6)
    with unchanged(model):
        graph, inputs = flat(model, batch, updates=updates)
    for _ in range(2):
        inputs[:2] = vectors(6)
        with torch.no_grad():
            inputs[2].mul_(1.5)
        with unchanged(model):
            found = graph.module(*inputs)
        assert graph.updated == ([5] if updates else [])
        if updates:
            assert int(found.pop()) == int(model.calls) + 1
        for x, y in zip(found, expected(model, (inputs[0], inputs[1])), strict=True):
            assert torch.allclose(x, y)
    assert all(graph.read[:5])


def test_only_what_is_written_is_copied() -> None:
    graph, _ = flat(Model().double(), vectors(6))
    clones = graph.module.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    assert len(clones) == 1
    assert graph.operations < 30
    assert torch.float64 in graph.dtypes


def test_one_mode_holds_the_shapes_of_all_nodes() -> None:
    """Making one takes longer than tracing an operation."""
    graph, _ = flat(Model().double(), vectors(6))
    values = pytree.tree_leaves([node.meta.get("val") for node in graph.module.graph.nodes])
    modes = {x.fake_mode for x in values if isinstance(x, FakeTensor)}
    assert len(modes) == 1


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "its input": (lambda _, x: x.mul_(1) and x, "Boolean value"),
    "a parameter": (lambda m, x: x + m.head.weight.data.mul_(2).sum(), "writes to head.weight"),
    "a number": (lambda _, x: x * x.detach().sum().item(), "takes a number out"),
    "an array": (lambda _, x: x * float(x.detach().numpy().sum()), r"numpy\(\)"),
    "a list": (lambda _, x: x * sum(x.detach()[0].tolist()), r"tolist\(\)"),
    "a generator": (
        lambda _, x: x * torch.rand(5, generator=torch.Generator().manual_seed(0)),
        "a generator of its own",
    ),
    "as many as there are": (lambda _, x: x * x[x > 0].mean(), "depends on values"),
    "an unknown tensor": (lambda _, x: x * UNKNOWN, r"shape \(5,\)"),
    "an assignment": (lambda m, x: (setattr(m, "kept", 3), x)[1], "assigns 'kept'"),
    "a buffer assigned": (lambda m, x: (setattr(m, "read", m.read * 2), x)[1], "assigns 'read'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_may_not_hold(name: str) -> None:
    act, match = REFUSED[name]
    model = Model(act).double()
    batch = vectors(6)
    with unchanged(model), pytest.raises((NotCompilableError, RuntimeError), match=match):
        flat(model, batch)


def test_numbers_in_python_code_are_literals() -> None:
    model, batch = (
        Model(lambda _, x: x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).double(),
        vectors(6),
    )
    graph, inputs = flat(model, batch)
    inputs[:2] = vectors(6)
    found = graph.module(*inputs)[:-1]
    for x, y in zip(found, expected(model, (inputs[0], inputs[1])), strict=True):
        assert torch.allclose(x, y)


def test_buffers_that_share_memory() -> None:
    model = Model().double()
    model.other = nn.Buffer(model.read[:3])
    with pytest.raises(NotCompilableError, match="'other' and 'read' share memory"):
        flat(model, vectors(6))


def test_one_buffer_under_two_names() -> None:
    model = Model(lambda m, x: x * m.again).double()
    model.again = model.read
    with compiled():
        Pair(model).steps(7)


def test_a_mask_that_selects_is_not_an_index() -> None:
    """Rows by their numbers have one shape for all values."""
    order = torch.arange(5).flip(0)
    with compiled():
        model = Model(lambda m, x: x[:, m.order]).double()
        model.order = nn.Buffer(order)
        Pair(model).steps(7)
    with eagerly("index"):
        Pair(Model(lambda _, x: x * x[x > 0].mean()).double()).steps(7)


def test_traces_in_threads_leave_torch_as_it_was() -> None:
    errors: list[BaseException] = []
    models = [mlp() for _ in range(4)]  # here, because a trace sees that another thread draws

    def work(model: nn.Module) -> None:
        try:
            flat(model, batch)
        except BaseException as error:
            errors.append(error)

    batch = vectors(6)
    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not torch.fx._symbolic_trace.is_fx_symbolic_tracing()
    with graphs() as made:
        Pair(mlp()).steps(3)
    assert len(made) == 1
