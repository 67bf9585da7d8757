"""Which graph serves a step: what torch.compile's guards say of the two forwards.

Python cannot see which attributes, closures and globals a forward reads, so that a key of our own
would freeze the value of one. Dynamo can: it follows the forwards, and comes back if anything they
read is another, apart from the values of tensors. Those it hands over at each step, wherever the
forwards found them.
"""

from __future__ import annotations

import contextlib
import functools
import re
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext.data.batch import forward, tensors
from l2rw_ext.errors import NotCompilableError
from l2rw_ext.task.cached_weights import without_cached_weights
from l2rw_ext.task.task import Task

from .flat_graph import one_at_a_time

_EXACT: dict[str, Any] = {
    "skip_nnmodule_hook_guards": False,
    "skip_no_tensor_aliasing_guards_on_parameters": False,
    "skip_tensor_guards_with_matching_dict_tags": False,
    "assume_dunder_attributes_remain_unchanged": False,
}
"""Dynamo's settings for guards that also see hooks that are added, parameters that are tied or
frozen, and code of functions that is exchanged."""


class SwitchedOffError(NotCompilableError):
    """Dynamo does not follow the forwards now, but may at another step."""


class _StopError(Exception):
    """Ends the forwards where their graph would run, before Python's objects are changed."""


def _forwards(
    model: nn.Module, loss_fn: Any, clean_loss_fn: Any, weighing: Any, batch: Any, clean: Any
) -> tuple[Any, ...]:
    """The losses of a step, and what a user's weighing does with as many scores, if there is one.

    Raises:
        SwitchedOffError: Dynamo does not follow this function, so that it would run.
    """
    if not torch.compiler.is_dynamo_compiling():
        raise SwitchedOffError("torch.compile is switched off, or a step of another thread runs")
    found = [loss_fn(forward(model, batch[0]), batch[1])]
    if clean is not None:
        found.append(clean_loss_fn(forward(model, clean[0]), clean[1]))
    if weighing is not None:
        losses = found[0][0] if isinstance(found[0], tuple) else found[0]
        found.append(weighing(losses.detach().flatten()))
    return tuple(found)


@dataclass(eq=False)
class Guarded:
    """What holds while one set of guards does."""

    names: list[str]
    """How the forwards reach each tensor that they read."""
    used: list[bool]
    """Whether an operation of the forwards reads it."""
    kinds: dict[Any, Any] = field(default_factory=dict)
    """For the user of this module: what is known of each kind of work on such batches."""


class Guards:
    """Finds what holds for a step, and the tensors that its forwards read.

    The forwards do not run, and change nothing.

    Args:
        dynamic: whether the same holds for batches of other sizes, where that is possible.
    """

    def __init__(self, *, dynamic: bool) -> None:
        self._dynamic = dynamic
        # Guards lie with a function's code, of which torch allows so many.
        code = _forwards.__code__.replace()
        own = types.FunctionType(code, _forwards.__globals__, "forwards")
        # Dynamo keeps a backend, and what it returns, as long as the process lives.
        backend = functools.partial(_backend, weakref.ref(self))
        self._forwards = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)
        all_found: weakref.WeakSet[Guarded] = weakref.WeakSet()
        self._all = all_found
        weakref.finalize(self, _forget, all_found)
        self._found: tuple[Guarded, list[Tensor]] | None = None
        self._settings = contextlib.ExitStack()

    def find(self, task: Task) -> tuple[Guarded, list[Tensor]]:
        """What holds for the forwards of a step, and the tensors that they read, each once.

        Raises:
            NotCompilableError: Dynamo cannot follow the forwards, or there are too many kinds.
            SwitchedOffError: Dynamo follows no function now.
        """
        if torch.nn.modules.module._has_any_global_hook():
            raise NotCompilableError(
                "there is a hook for all modules (torch.nn.modules.module.register_module_...), "
                "which Dynamo does not follow"
            )
        clean = None if task.clean_size is None else (task.clean_inputs, task.clean_targets)
        batch = (task.inputs, task.targets)
        recurrent = any(isinstance(module, nn.RNNBase) for _, module in task.members.modules)
        rnn = torch._dynamo.config.patch(allow_rnn=True) if recurrent else contextlib.nullcontext()
        marked = _marked(tensors((batch, clean))) if self._dynamic else contextlib.nullcontext()
        with one_at_a_time, rnn, marked, self._settings, without_cached_weights():
            try:
                if torch.fx._symbolic_trace.is_fx_symbolic_tracing():
                    raise SwitchedOffError("another thread traces a function")
                self._forwards(
                    task.model, task.loss_fn, task.clean_loss_fn, task.weighing, batch, clean
                )
            except _StopError:
                pass
            except torch._dynamo.exc.FailOnRecompileLimitHit as error:
                limit = torch._dynamo.config.recompile_limit
                raise NotCompilableError(
                    f"there are {limit} graphs, for other shapes, modes or numbers, and no more "
                    "are made (torch._dynamo.config.recompile_limit); pad batches to fewer "
                    "lengths, and keep numbers that change in buffers"
                ) from error
            except torch._dynamo.exc.BackendCompilerFailed as error:
                raise error.inner_exception from None
            except SwitchedOffError:
                raise
            except Exception as error:
                raise NotCompilableError(
                    f"Dynamo cannot follow the forwards: {sentence(error)}"
                ) from error
        found, self._found = self._found, None
        if found is None:
            raise NotCompilableError("the forwards have no operation of torch")
        return found

    def backend(
        self, graph: torch.fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """The forwards' graph as Dynamo calls it; see the arguments of torch.compile."""
        of_tensors = [not _is_size(node) for node in graph.graph.find_nodes(op="placeholder")]
        placeholders = list(compress(graph.graph.find_nodes(op="placeholder"), of_tensors))
        names = [_source(node) for node in placeholders]
        for name, x in zip(names, compress(example_inputs, of_tensors), strict=True):
            _check_input(name, x)
        if any(type(node.target).__module__ == "torch._dynamo.utils" for node in graph.graph.nodes):
            raise NotCompilableError("the forward computes with NumPy; compute with tensors")
        for node in graph.graph.nodes:
            if node.target is torch.seed or str(node.target) == "prims._tensor_version.default":
                raise NotCompilableError("the forward reads a seed or the version of a tensor")
        changed = _changed()
        if changed is not None:
            raise NotCompilableError(
                f"the forward changes {changed}, which a graph cannot; keep what changes in a "
                "buffer, and write to it in place"
            )
        found = Guarded([*map(_readable, names)], [bool(node.users) for node in placeholders])

        self._all.add(found)
        guards = weakref.ref(self)

        def call(*given: Tensor) -> tuple[Tensor, ...]:
            own = guards()
            if own is not None:
                own._found = found, list(compress(given, of_tensors))
            raise _StopError

        self._settings.enter_context(torch._dynamo.config.patch(_EXACT))  # until guards are made
        return call


@contextlib.contextmanager
def _marked(batch: Sequence[Tensor]) -> Iterator[None]:
    """In the body, Dynamo takes the sizes of these tensors for symbols."""
    for x in batch:
        torch._dynamo.maybe_mark_dynamic(x, list(range(x.dim())))
    try:
        yield
    finally:
        for x in batch:
            for name in ("_dynamo_weak_dynamic_indices", "_has_dynamo_dim_marking"):
                vars(x).pop(name, None)


def _is_size(node: torch.fx.Node) -> bool:
    """Whether an input of the forwards is a size of a tensor."""
    from torch._dynamo.source import TensorPropertySource

    return isinstance(getattr(node.meta.get("grapharg"), "source", None), TensorPropertySource)


def _backend(
    guards: weakref.ref[Guards], graph: torch.fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., tuple[Tensor, ...]]:
    own = guards()
    assert own is not None
    return own.backend(graph, example_inputs)


def _forget(all_found: Iterable[Guarded]) -> None:
    """Let go of the graphs of guards that are gone."""
    for found in all_found:
        found.kinds.clear()


def _changed() -> str | None:
    """What of Python's objects the forwards that Dynamo follows change, if anything.

    Whether a buffer is exchanged, or only written to, the trace says.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting

    effects = InstructionTranslator.current_tx().output.side_effects
    for variable in effects._get_modified_vars():
        if isinstance(variable.mutation_type, (AttributeMutationExisting, ValueMutationExisting)):
            name = _text(variable.source)
            if not _BUFFERS.fullmatch(name):
                stored = effects.store_attr_mutations.get(variable, {})
                changed = [a for a, value in stored.items() if not _is_now(variable, a, value)]
                if changed or not stored:
                    return _readable(f"{name}.{changed[0]}" if changed else name)
    return None


def _is_now(variable: Any, attribute: str, value: Any) -> bool:
    """Whether a module's attribute is assigned what it is, which a guard holds from now on.

    Args:
        variable: Dynamo's, for the object.
        attribute: the name.
        value: Dynamo's variable for what is assigned.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource

    module = getattr(variable, "value", None)
    if not isinstance(module, nn.Module) or not value.is_python_constant():
        return False
    now = vars(module).get(attribute)
    if not isinstance(now, (bool, int, float, str)):
        return False
    given = value.as_python_constant()
    if type(given) is not type(now) or repr(given) != repr(now):
        return False
    source = AttrSource(variable.source, attribute)
    install_guard(source.make_guard(GuardBuilder.CONSTANT_MATCH))
    return True


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


def _check_input(name: str, x: Any) -> None:
    """Raise if a forward reads something that is no tensor in one way for all steps."""
    if name.startswith(_NUMPY):
        name = _readable(name.removeprefix(_NUMPY).removesuffix(")"))
        raise NotCompilableError(
            f"the forward reads {name}, a number or an array of NumPy's; make it a tensor"
        )
    if name.startswith("random_value"):
        raise NotCompilableError("the forward draws from Python's generator; draw with torch")
    if type(x) not in (Tensor, nn.Parameter):
        raise NotCompilableError(
            f"the forward reads {_readable(name)}, a {type(x).__name__}, anew at each step"
        )


def _source(node: torch.fx.Node) -> str:
    """How the forward reaches a tensor, as Dynamo writes it."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = "" if source is None else _text(source)
    return name or node.name


def _text(source: Any) -> str:
    """How the forward reaches an object, as Dynamo writes it."""
    return str(source.name)


_EXPLAINED = "Explanation: "
_NUMPY = "___from_numpy("
_BUFFERS = re.compile(r"L\['\w+'\](\._modules\['\w+'\])*\._buffers")
_READABLE = {
    r"^L\['clean'\]\[0\]": "the clean inputs",
    r"^L\['clean'\]\[1\]": "the clean targets",
    r"^L\['batch'\]\[0\]": "the inputs",
    r"^L\['batch'\]\[1\]": "the targets",
    r"^[LG]\['(\w+)'\]": r"\1",
    r"\._(?:modules|parameters|buffers)\['(\w+)'\]": r".\1",
    r"\.__closure__\[\d+\]\.cell_contents": "'s closure",
}


def _readable(name: str) -> str:
    """The name in the user's words."""
    for pattern, text in _READABLE.items():
        name = re.sub(pattern, text, name)
    return name


def sentence(error: BaseException) -> str:
    """What an error says, in one sentence; Dynamo explains itself in a later line."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    explained = [line.removeprefix(_EXPLAINED) for line in lines if line.startswith(_EXPLAINED)]
    where = next(reversed(getattr(error, "real_stack", None) or [None]))
    place = "" if where is None else f" ({Path(where.filename).name}:{where.lineno})"
    return ": ".join([lines[0], *explained[:1]]) + place
