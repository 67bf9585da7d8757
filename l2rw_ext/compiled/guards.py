"""Which graph serves a step: what torch.compile's guards say of the two forwards.

Python cannot see which attributes, closures and globals a forward reads, so that a key of our own
would freeze the value of one. Dynamo can: it follows the forwards, and comes back if anything they
read is another, apart from the values of tensors. Those it hands over at each step, wherever the
forwards found them.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext.data.batch import forward, tensors
from l2rw_ext.errors import NotCompilableError
from l2rw_ext.task.task import Task


def _forwards(
    model: nn.Module, loss_fn: Any, clean_loss_fn: Any, batch: Any, clean: Any
) -> tuple[Any, ...]:
    """The losses of a step; without a clean batch only those of training."""
    losses = loss_fn(forward(model, batch[0]), batch[1])
    if clean is None:
        return (losses,)
    return losses, clean_loss_fn(forward(model, clean[0]), clean[1])


@dataclass
class Guarded:
    """What holds while one set of guards does."""

    names: list[str]
    """How the forwards reach each tensor that they read."""
    used: list[bool]
    """Whether an operation of the forwards reads it."""
    refusal: str | None
    """Why no graph can serve such steps, if that is known."""
    kinds: dict[Any, Any] = field(default_factory=dict)
    """For the user of this module: what is known of each kind of work on such batches."""


class Guards:
    """Finds what holds for a step, and the tensors that its forwards read.

    The forwards do not run: what they compute is the business of the graph.
    """

    def __init__(self) -> None:
        # Guards lie with a function's code, of which torch allows so many.
        code = _forwards.__code__.replace()
        own = types.FunctionType(code, _forwards.__globals__, "forwards")
        self._forwards = torch.compile(own, backend=self._backend, fullgraph=True, dynamic=False)
        self._found: tuple[Guarded, list[Tensor]] | None = None

    def find(self, task: Task) -> tuple[Guarded, list[Tensor]]:
        """What holds for the forwards of a step, and the tensors that they read, each once.

        Raises:
            NotCompilableError: Dynamo cannot follow the forwards, or there are too many kinds.
        """
        clean = None if task.clean_size is None else (task.clean_inputs, task.clean_targets)
        batch = (task.inputs, task.targets)
        recurrent = any(isinstance(module, nn.RNNBase) for _, module in task.members.modules)
        rnn = torch._dynamo.config.patch(allow_rnn=True) if recurrent else contextlib.nullcontext()
        with rnn:
            try:
                self._forwards(task.model, task.loss_fn, task.clean_loss_fn, batch, clean)
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                limit = torch._dynamo.config.recompile_limit
                raise NotCompilableError(
                    f"there are {limit} graphs, for other shapes, modes or numbers, and no more "
                    "are made (torch._dynamo.config.recompile_limit); pad batches to fewer "
                    "lengths, and keep numbers that change in buffers"
                ) from error
            except Exception as error:
                raise NotCompilableError(sentence(error)) from error
        assert self._found is not None
        found, self._found = self._found, None
        return found

    def _backend(
        self, graph: torch.fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., tuple[Tensor, ...]]:
        placeholders = graph.graph.find_nodes(op="placeholder")
        names = [_source(node) for node in placeholders]
        refusal = None
        for name, x in zip(names, example_inputs, strict=True):
            if type(x) not in (Tensor, nn.Parameter):
                refusal = f"the forward reads {name}, a {type(x).__name__}, anew at each step"
        (output,) = graph.graph.find_nodes(op="output")
        count = len(output.args[0])
        if count > 2:
            refusal = "the forward keeps a tensor in an attribute or a container"
        found = Guarded(names, [bool(node.users) for node in placeholders], refusal)

        def call(*given: Tensor) -> tuple[Tensor, ...]:
            self._found = found, list(given)
            return (torch.empty(0, device="cpu"),) * count

        return call


def unread(
    found: Guarded, given: Sequence[Tensor], read: Sequence[bool], ignored: Any
) -> str | None:
    """The name of a tensor that the forwards read, but a trace of the step does not.

    A forward that reads its values in another way would have them as constants in the graph.

    Args:
        found: of the forwards.
        given: the tensors that the forwards read, and perhaps others.
        read: which of them the trace reads.
        ignored: tensors that the step has no need of.
    """
    ids = {id(x) for x in tensors(ignored)}
    for name, x, used, traced in zip(found.names, given, found.used, read, strict=False):
        if used and not traced and id(x) not in ids:
            return name
    return None


def _source(node: torch.fx.Node) -> str:
    """How the forward reaches a tensor, as Dynamo writes it."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", node.name)
    return str(name() if callable(name) else name)


def sentence(error: BaseException) -> str:
    """What an error says, in one sentence; Dynamo explains itself in a later line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if line.startswith("Explanation: ")] or lines
    return lines[0].removeprefix("Explanation: ").rstrip(".") if lines else type(error).__name__
