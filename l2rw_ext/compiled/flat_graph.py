"""A step as one flat graph of operations, traced while the step runs as it always does.

The graph has no Python of the model, of autograd or of the engine, and writes to none of its
inputs, which are all the tensors that the step reads.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from l2rw_ext import devices
from l2rw_ext.errors import NotCompilableError
from l2rw_ext.task.isolation import Snapshot, preserved
from l2rw_ext.task.task import Task
from l2rw_ext.tracing.fast_path import StepMode
from l2rw_ext.tracing.members import Members
from l2rw_ext.tracing.writes import BeforeWrites, storage_of

from .draws import Draws
from .symbolic import Symbolic

_aten = torch.ops.aten
_LITERALS = (_aten.lift_fresh.default, _aten.lift_fresh_copy.default)

Outputs = Sequence[Tensor]

one_at_a_time = threading.RLock()
"""A trace sets a flag of the process and replaces methods of ``nn.Module``, and puts back what it
found. So does Dynamo, which takes the replacements of a trace away while it follows a function."""


class FlatGraph:
    """The graph of a step.

    Args:
        step: (task, snapshot) -> the tensors that the step returns.
        task: the step.
        inputs: all tensors that the step reads, each once.
        names: how errors name the inputs.
        updates: whether the new values of what the forward writes to follow the outputs.
        symbolic: stand-ins for the inputs, if the graph is to serve batches of other sizes.

    Raises:
        NotCompilableError: the step cannot be traced.
    """

    def __init__(
        self,
        step: Callable[[Task, Snapshot], Outputs],
        task: Task,
        inputs: Sequence[Tensor],
        names: Sequence[str],
        *,
        updates: bool,
        symbolic: Symbolic | None = None,
    ) -> None:
        given = task
        if symbolic is not None:
            inputs = symbolic.inputs
        self.updated: list[int] = []
        """Which inputs the forward writes to."""
        copied: list[int] = []
        written: list[int] = []

        def body(*_: Tensor) -> list[Tensor]:
            on = contextlib.nullcontext(given) if symbolic is None else symbolic.step()
            with on as task, _copies(task.members, inputs) as copies:
                copied.extend(copies)
                of_copy = {id(x): k for k, x in copies.items()}
                parts = dict(task.members.parts)
                known = copy.copy(task.members.written)
                members = Members.of(
                    parts[""], parts.get("loss_fn"), parts.get("clean_loss_fn"), known
                )
                with (
                    BeforeWrites(_refusals(inputs, names)),
                    Draws(task.members.devices()) as draws,
                    _InSight(task.stand_ins),
                    preserved(members, always=False) as snapshot,
                ):
                    outputs = list(step(replace(task, members=members), snapshot))
                    draws.check()
                    for name, x in snapshot.state.written():
                        if id(x) not in of_copy:
                            raise NotCompilableError(f"the forward writes to {name!r}")
                        written.append(of_copy[id(x)])
                        if updates:
                            self.updated.append(of_copy[id(x)])
                            outputs.append(x)
                    assigned = snapshot.state.assigned()
                    if assigned is not None:
                        raise NotCompilableError(
                            f"the forward assigns {assigned!r}; write to a buffer in place instead"
                        )
                return outputs

        with devices.traced():
            self.module = _traced(body, inputs)
        graph = self.module.graph
        _check_operations(graph)
        placeholders = graph.find_nodes(op="placeholder")
        self.read = [_is_read(node) for node in placeholders]
        """Which inputs some operation reads."""
        clones = graph.find_nodes(op="call_function", target=_aten.clone.default)
        for k, clone in zip(copied, clones, strict=False):
            assert clone.args[0] is placeholders[k]
            if k not in written:
                clone.replace_all_uses_with(placeholders[k])
        for target in (_aten.detach.default, _aten.alias.default):
            for node in graph.find_nodes(op="call_function", target=target):
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        graph.eliminate_dead_code()
        _check_constants(graph, self.module)  # those that are read
        self.module.recompile()

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of all tensors in the graph."""
        values = (node.meta.get("val") for node in self.module.graph.nodes)
        return {x.dtype for x in pytree.tree_leaves(list(values)) if isinstance(x, Tensor)}

    @property
    def operations(self) -> int:
        """How many operations there are."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)


def _traced(body: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    # What the user has compiled runs as Python here.
    nested = torch._dynamo.config.patch(error_on_nested_fx_trace=False)
    # For the shapes of all nodes. Without it make_fx makes a mode for each of them, which records
    # its caller's stack: most of the time of a trace.
    context = None
    if detect_fake_mode(inputs) is None:
        context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    try:
        with one_at_a_time, nested, tracing(context):
            return make_fx(body, tracing_mode="real")(*inputs)
    except RuntimeError as error:
        if "get value out of a tracing tensor" not in str(error):
            raise
        raise NotCompilableError(
            "the forward takes a number out of a tensor, as item() and int() do, and may decide by "
            "it; compute with the tensor"
        ) from error


def _check_operations(graph: torch.fx.Graph) -> None:
    """Raise if the shape of an operation's output depends on values.

    Raises:
        NotCompilableError: names the operation.
    """
    for node in graph.nodes:
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            continue
        if node.target is not _aten.index.Tensor or any(map(_is_mask, node.args[1])):
            raise NotCompilableError(
                f"the shape of what {node.target.name()} gives depends on values; use "
                "torch.where or a product with a mask"
            )


def _is_mask(node: torch.fx.Node | None) -> bool:
    """Whether an index selects by the values of a mask."""
    return node is not None and node.meta["val"].dtype in (torch.bool, torch.uint8)


class _InSight(StepMode):
    """Refuses calls that take values out of torch's sight, which would be constants in a graph.

    Args:
        stand_ins: by id, what takes the place of tensors that the forward has from elsewhere.
    """

    _CALLS = ("numpy", "__array__", "tolist", "__dlpack__")

    def __init__(self, stand_ins: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in self._CALLS:
            raise NotCompilableError(f"the forward takes values out of a tensor by {name}()")
        found = self._stand_ins
        if found and name != "__get__":  # what asks a tensor for its shape means that tensor
            args, kwargs = pytree.tree_map(lambda x: found.get(id(x), x), (args, kwargs))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _copies(members: Members, inputs: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
    """In the body, copies take the place of buffers and of tensors that are attributes.

    Yields the copies by the number of the input.

    Raises:
        NotCompilableError: two of them share memory.
    """
    numbers = {id(x): k for k, x in enumerate(inputs)}
    copies: dict[int, Tensor] = {}
    storages: dict[int | None, str] = {}

    def copy_of(name: str, x: Tensor) -> Tensor | None:
        k = numbers.get(id(x))
        if k is None or isinstance(x, nn.Parameter):
            return None
        if k not in copies:
            storage = storage_of(x)
            if storage in storages:
                raise NotCompilableError(f"{name!r} and {storages[storage]!r} share memory")
            storages[storage] = name
            copies[k] = x.clone()
        return copies[k]

    with members.exchanged(copy_of):
        yield copies


def _refusals(
    inputs: Sequence[Tensor], names: Sequence[str]
) -> dict[int, list[Callable[[], None]]]:
    """By storage, what refuses a write to an input."""

    def refusing(name: str) -> Callable[[], None]:
        def refuse() -> None:
            raise NotCompilableError(f"the forward writes to {name}")

        return refuse

    found = ((storage_of(x), name) for x, name in zip(inputs, names, strict=True))
    return {storage: [refusing(name)] for storage, name in found if storage is not None}


def _check_constants(graph: torch.fx.Graph, module: nn.Module) -> None:
    """Raise if something entered the graph that is neither an input nor a number in Python's code.

    Raises:
        NotCompilableError: it is a tensor, whose shape is named, or a generator.
    """
    for node in graph.find_nodes(op="get_attr"):
        if isinstance(getattr(module, str(node.target)), torch.Generator):
            raise NotCompilableError(
                "the forward draws random numbers from a generator of its own; leave generator= out"
            )
        if any(user.target not in _LITERALS for user in node.users):
            shape = tuple(getattr(module, str(node.target)).shape)
            raise NotCompilableError(
                f"the step reads a tensor of shape {shape} that is no parameter, buffer or "
                "attribute, and that Dynamo does not show; register it as a buffer, or give it "
                "with the batch"
            )


def _is_read(node: torch.fx.Node) -> bool:
    """Whether an operation reads an input, or more than one its copy."""
    return any(user.target is not _aten.clone.default or len(user.users) > 0 for user in node.users)
