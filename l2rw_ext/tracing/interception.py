"""Finds the parameter uses of an unmodified model.

A ``TorchFunctionMode`` over the forward sees every torch function: functional calls, tied weights
and hand-written modules alike. It tells three kinds of tensors apart by identity. *Roots* are
trainable parameters and tensors that are computed only from them and constants (a transposed
weight, a weight-normalised one, a chunk). *Constants* are buffers, frozen parameters and tensors
that are made without data. Everything else is *data*. Data that meets a root in a function of
``layers.LAYERS`` becomes a use of that layer. A function that is no layer but composed of layers
has a rewrite, which runs the composition.
"""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from l2rw_ext import devices
from l2rw_ext.errors import NotExactError
from l2rw_ext.layers import LAYERS
from l2rw_ext.layers.base import Call, Function, Layer, Roots, Use
from l2rw_ext.layers.torch_functions import for_subclasses, getters, takes, tensors_in, writes

from . import autocast
from .example_map import ExampleMap
from .fast_path import StepMode
from .members import Members
from .saved_tensors import hooked, recomputed

Rewrite: TypeAlias = Callable[..., Any]
"""(mode, function, *args, **kwargs) -> result, or NotImplemented if it does not cover the call."""

_REWRITES: dict[Function, Rewrite] = {}

_BY_PARTS: set[Function] = set()

_UNLISTED = frozenset(
    (
        torch.ops.profiler._record_function_enter_new,
        torch.ops.profiler._record_function_exit._RecordFunction,
        *getters("device"),
        *(f for name, f in vars(torch).items() if name.startswith(("sym_", "_sym_"))),
    )
)
"""Functions that say nothing of a forward's structure, and that it may call or not: with another
wrapper, on tensors without values, on sizes that are symbols."""


def rewrites(*functions: Function, by_parts: bool = False) -> Callable[[Rewrite], Rewrite]:
    """Register a rewrite of torch functions.

    It is asked if no layer takes the call. A rewrite ``by_parts`` runs the body of the function
    under the mode again, so that autocast acts on the parts.
    """

    def register(rewrite: Rewrite) -> Rewrite:
        _REWRITES.update(dict.fromkeys(functions, rewrite))
        if by_parts:
            _BY_PARTS.update(functions)
        return rewrite

    return register


class Interception(StepMode):
    """Runs the calls of layers with trained parameters as uses, and records them.

    Args:
        members: of the model whose forward runs under the mode.
        sink: what the uses report to in backward; the caller keeps it alive until then.
        examples: the number of examples. If it is given, tensors with a row for each example count
            as data although they are made without data: a first hidden state of zeros, token
            types, a parameter that is expanded to the batch.
        example_map: follows the forward, if the plan of a step is to be made.
    """

    def __init__(
        self,
        members: Members,
        sink: Any,
        examples: int | None = None,
        example_map: ExampleMap | None = None,
    ) -> None:
        super().__init__()
        self._examples = examples
        self.example_map = example_map
        self.labels: dict[int, Tensor] = {}
        """By index of the use: whose loss may have a gradient at its output, as ids of the map."""
        # On the CPU for any model: its gradient is never formed, so nothing is copied.
        self.token = torch.zeros((), requires_grad=True, device="cpu")
        self.uses: list[Use] = []
        self.calls: list[Any] = []
        """All torch functions called, in order; see :func:`_described`."""
        self.part = ""
        # Weakly, because the graph holds the uses and this mode, and what the sink collects holds
        # the graph: where no backward frees that, as in `weights()`, nothing else would.
        self.sink = weakref.proxy(sink)
        self.unruled: dict[int, str] = {}
        self.without_grad: str | None = None
        self.saved_tensor_hooks = False
        self.checkpointed = False
        """Whether some use is computed again in backward, and not kept."""
        self.narrow = False
        """Whether some of the forward ran in float16 under autocast, with its small range."""
        self.below_autocast: tuple[str, torch.dtype | None] | None = None
        """In a function that runs with autocast off: the device, and the dtype to compute in."""
        self._casts: dict[tuple[int, int, torch.dtype], Tensor] = {}
        first = (self.token * 1).grad_fn
        assert first is not None
        self.first_node = first._sequence_nr()
        """The number of the node that autograd made last before the forward."""
        self._makers = _Makers()
        self._listing = True
        self._roots: dict[int, Tensor] = {}
        self._constants: dict[int, Tensor] = {}
        self._expanded: dict[int, tuple[Tensor, int]] = {}
        self.names: dict[int, str] = {}
        for name, p in members.parameters:
            (self._roots if p.requires_grad else self._constants)[id(p)] = p
            self.names[id(p)] = name
        for _, _, buffer in members.buffers:
            if buffer is not None:
                self._constants[id(buffer)] = buffer

    def is_root(self, x: Any) -> bool:
        """Whether x is a trainable parameter, or computed only from roots and constants."""
        if id(x) in self._roots:
            return True
        if id(x) in self._constants and x.requires_grad:
            # A parameter was written into it, or a custom Function made it from one.
            self._roots[id(x)] = self._constants.pop(id(x))
            return True
        return False

    def is_data(self, x: Any) -> bool:
        """Whether x is a tensor that may depend on the batch."""
        return isinstance(x, Tensor) and id(x) not in self._roots and id(x) not in self._constants

    def is_use(self, x: Any, weight: Any, bias: Any) -> bool:
        """Whether data x meets trained operands, none of which depends on data."""
        if not self.is_data(x) or self.is_data(weight) or self.is_data(bias):
            return False
        trained = self.is_root(weight)
        return self.is_root(bias) or trained

    def root_meets_data(self, operands: Sequence[Any]) -> bool:
        """Whether there are roots as well as data among the operands."""
        root = data = False
        for a in operands:
            if isinstance(a, Tensor):
                root = root or self.is_root(a)
                data = data or self.is_data(a)
        return root and data

    def name_of(self, root: Tensor) -> str:
        """The parameter's name, or a description of a derived tensor."""
        name = self.names.get(id(root))
        return (
            name
            if name is not None
            else f"a tensor of shape {tuple(root.shape)} derived from parameters"
        )

    def expanded_from(self, x: Tensor) -> Tensor | None:
        """The root that x repeats, unless x was written to since."""
        base, version = self._expanded.get(id(x), (None, 0))
        return base if x._version == version else None

    def __torch_function__(
        self,
        func: Function,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        number = len(self.calls)
        if self._listing and func not in _UNLISTED:
            with nullcontext() if self.example_map is None else self.example_map.aside():
                self.calls.append(_described(func, args, kwargs, self._makers))
        out = NotImplemented
        if func in LAYERS or func in _REWRITES:
            if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
                out = self._under_autocast(func, args, kwargs or {})
            else:
                out = self._covered(func, args, kwargs or {})
        if out is NotImplemented:
            out = self.other(func, args, kwargs or {})
        if self._listing:
            self._makers.note(out, number)
        return out

    def _covered(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function as a use or rewritten; NotImplemented if it is neither."""
        layer = LAYERS.get(func)
        if layer is not None and takes(layer.bind, kwargs):
            call = layer.bind(func, *args, **kwargs)
            if call is not None and call.couples:
                if self.is_data(call.x) and torch.is_grad_enabled():
                    raise NotExactError(self._coupled(call))
            elif call is not None and self.is_use(call.x, call.weight, call.bias):
                out = self.use(layer, call)
                if out is not NotImplemented:
                    return out
        rewrite = _REWRITES.get(func)
        if rewrite is None or not takes(rewrite, kwargs):
            return NotImplemented
        return rewrite(self, func, *args, **kwargs)

    def _coupled(self, call: Call) -> str:
        of = "" if call.weight is None else f" (parameter {self.name_of(call.weight)!r})"
        return f"a {call.operation} couples the examples of a batch{of}"

    def _under_autocast(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As :meth:`_covered`, with autocast off, on operands as autocast would cast them."""
        for device in devices.AUTOCAST_DEVICES:
            lower = torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device) and lower == torch.float16:
                self.narrow = True
        tensors = tensors_in((args, kwargs))
        data = [x for x in tensors if self.is_data(x)]
        if (
            func in _BY_PARTS
            or not torch.is_grad_enabled()
            or not data
            or not torch.is_autocast_enabled(data[0].device.type)
            or not any(self.is_root(x) for x in tensors)
        ):
            return self._covered(func, args, kwargs)
        device = data[0].device.type
        rule = autocast.NO_CAST
        if not writes(func, kwargs):
            rule = autocast.cast_rule(func, args, kwargs, tensors, device)
        if rule.compute is not None:
            args, kwargs = (
                autocast.each(
                    lambda x: autocast.cast(x, rule.compute) if self.is_data(x) else x, tree
                )
                for tree in (args, kwargs)
            )
        before = self.below_autocast
        self.below_autocast = (device, rule.compute)
        torch.set_autocast_enabled(device, False)
        try:
            out = self._covered(func, args, kwargs)
        finally:
            torch.set_autocast_enabled(device, True)
            self.below_autocast = before
        if rule.output is None:
            return out
        return autocast.each(lambda x: autocast.cast(x, rule.output), out)

    def other(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation as it is, and follow roots and constants through it."""
        root = None
        data = False
        roots, constants = self._roots, self._constants
        for a in args:
            if isinstance(a, Tensor):
                if id(a) in roots:
                    root = a
                elif id(a) not in constants:
                    data = True
            elif isinstance(a, (tuple, list)):
                for x in a:
                    if isinstance(x, Tensor):
                        if id(x) in roots:
                            root = x
                        elif id(x) not in constants:
                            data = True
        if kwargs:
            for a in kwargs.values():
                for x in a if isinstance(a, (tuple, list)) else (a,):
                    if isinstance(x, Tensor):
                        if id(x) in roots:
                            root = x
                        elif id(x) not in constants:
                            data = True
        if self.below_autocast is None:
            out = func(*args, **kwargs)
        else:
            with autocast.enabled(self.below_autocast[0]):
                out = func(*args, **kwargs)
        if not data:
            self.follow(out)
            return out
        if root is not None and isinstance(out, (Tensor, tuple, list)):
            self.unruled.setdefault(id(root), getattr(func, "__name__", str(func)))
        target = kwargs.get("out", args[0] if args else None)
        if isinstance(target, Tensor) and not self.is_data(target) and writes(func, kwargs):
            self._becomes_data(target)
        return out

    def passed_over(self, module: nn.Module, given: list[Tensor], out: Any) -> None:
        """See :class:`~.fast_path.StepMode`."""
        if self._listing:
            self.calls.append(type(module).__name__)
        if not torch.is_grad_enabled() and self.without_grad is None:
            roots = (p for p in module.parameters() if self.is_root(p))
            self.without_grad = next(map(self.name_of, roots), None)
        if not any(map(self.is_data, given)):
            self.follow(out)

    def _becomes_data(self, written: Tensor) -> None:
        """Treat a root or constant, and all its views, as data: data was written to it."""
        storage = written.untyped_storage()._cdata
        for known in (self._roots, self._constants):
            stale = [key for key, x in known.items() if x.untyped_storage()._cdata == storage]
            for key in stale:
                del known[key]
                self._expanded.pop(key, None)

    def follow(self, out: Any) -> None:
        """Remember a result that was computed only from roots and constants."""
        if isinstance(out, Tensor):
            if not out.requires_grad and self.for_each_example(out):
                return
            (self._roots if out.requires_grad else self._constants)[id(out)] = out
        elif isinstance(out, (tuple, list)):
            for x in out:
                if isinstance(x, Tensor):
                    self.follow(x)

    def for_each_example(self, out: Tensor) -> bool:
        """Whether dimension 0 has the number of examples, if the mode was told that number."""
        return self._examples is not None and out.dim() > 0 and out.shape[0] == self._examples

    def follow_expansion(self, out: Tensor, root: Tensor) -> None:
        """Remember that ``out`` repeats ``root`` along leading or broadcast dimensions."""
        self._roots[id(out)] = out
        base = self.expanded_from(root)
        self._expanded[id(out)] = (root if base is None else base, out._version)

    def use(self, layer: Layer, call: Call) -> Any:
        """The output of a use of the layer; NotImplemented if autograd should run the operation."""
        use = self.use_of(layer, call)
        if use is None:
            return NotImplemented
        with self.following(call.x):
            out = for_subclasses(layer.run, (call.x,))(use, call.x, self.token)
        use.output_shape = tuple(out.shape)
        self.label([use], out)
        return out

    def following(self, *inputs: Tensor) -> AbstractContextManager[None]:
        """A context for the Function of a use: the map, if there is one, goes on inside."""
        return nullcontext() if self.example_map is None else self.example_map.use(*inputs)

    def label(
        self, uses: Sequence[Use], out: Any, part: Callable[[Tensor], Tensor] = lambda ids: ids
    ) -> None:
        """Take the labels of uses from a result, or from the part of it that they became."""
        if self.example_map is not None and uses and isinstance(out, Tensor):
            ids = part(self.example_map.labels(out))
            self.labels.update((use.index, ids) for use in uses)

    def use_of(self, layer: Layer, call: Call) -> Use | None:
        """A new use of the operands of a call; None if autograd should run the operation.

        That is so under ``no_grad``: in a target network, or in the forward of a custom Function.
        The graph check after the forward tells the two apart.
        """
        x, weight, bias = call.x, call.weight, call.bias
        roots: Roots = (
            weight if weight is not None and self.is_root(weight) else None,
            bias if bias is not None and self.is_root(bias) else None,
        )
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise NotExactError(f"{call.operation} is called inside a torch.func transform")
        if any(root is not None and root.is_complex() for root in roots):
            return None
        if x.layout != torch.strided or x.is_nested:
            return None
        if not torch.is_grad_enabled():
            trained = roots[0] if roots[0] is not None else roots[1]
            if trained is not None and self.without_grad is None:
                self.without_grad = self.name_of(trained)
            return None
        if self.below_autocast is not None and self.below_autocast[1] is not None:
            dtype = self.below_autocast[1]
            call.weight, call.bias = self._operand(weight, dtype), self._operand(bias, dtype)
        elif torch.is_autocast_enabled(x.device.type):
            raise NotExactError(f"no layer-wise rule covers {call.operation} under autocast")
        use = Use(layer, call, roots)
        use.sink = self.sink
        use.part = self.part
        if self._listing:
            use.index = len(self.uses)
            self.uses.append(use)
            if not self.checkpointed and hooked():
                self.saved_tensor_hooks = True
                self.checkpointed = recomputed()
        return use

    def _operand(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The parameter in ``dtype``, without gradient; it is cast once for all its uses."""
        if x is None or x.dtype == dtype:
            return x
        key = (id(x), x._version, dtype)
        found = self._casts.get(key)
        if found is None:
            found = self._casts[key] = autocast.cast(x.detach(), dtype)
        return found

    @contextmanager
    def recompute(self) -> Iterator[None]:
        """A context for the backward of checkpoints: rules run, and no use is recorded."""
        self._listing = False
        try:
            with self:
                yield
        finally:
            self._listing = True


class _Makers:
    """By which call of a forward tensors without grad were made.

    Tensors with grad are told apart by the nodes of autograd's graph.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def note(self, out: Any, number: int) -> None:
        """Remember the results of a call."""
        if isinstance(out, Tensor):
            if not out.requires_grad:
                self._made[id(out)] = weakref.ref(out), number
        elif isinstance(out, (tuple, list)):
            for x in out:
                self.note(x, number)

    def of(self, x: Tensor) -> int:
        """The number of the call; -1 for a tensor with grad, or one that no call has made."""
        alive, number = self._made.get(id(x), (None, -1))
        return number if alive is not None and alive() is x else -1


_ARITHMETIC = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "pow")
    for prefix, suffix in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
)
"""Functions to which a whole number is a number, not a dimension or a place."""


def _described(
    func: Function, args: tuple[Any, ...], kwargs: dict[str, Any] | None, makers: _Makers
) -> Any:
    """What a call tells of the structure of a forward: all but the values that it computes with.

    Two forwards of equal calls, and with equal nodes in autograd's graph, bring the same examples
    together.
    """
    name = getattr(func, "__name__", "")
    given = (*args, *kwargs.values()) if kwargs else args
    if name in _ARITHMETIC:
        # Numbers may be those of a schedule, but not where they make places of other places.
        tensors = [a for a in given if isinstance(a, Tensor)]
        places = any(a.dim() and not a.is_floating_point() for a in tensors)
        numbers = [a for a in given if places and not isinstance(a, Tensor)]
        return name, torch.is_grad_enabled(), *map(makers.of, tensors), *numbers
    return (
        name,
        torch.is_grad_enabled(),
        tuple(kwargs or ()),
        *(_structure(a, makers) for a in given),
    )


_STRUCTURAL = frozenset((int, bool, str, type(None), torch.dtype, type(Ellipsis)))


def _structure(a: Any, makers: _Makers) -> Any:
    kind = type(a)
    if kind in _STRUCTURAL:
        return a
    if kind is Tensor or isinstance(a, Tensor):
        if a.dim() == 0 and not a.is_floating_point() and not a.is_complex():
            inside = torch._C._functorch.peek_interpreter_stack() is not None
            return None if inside or not devices.readable(a) else a.item()  # perhaps a place
        return makers.of(a)
    if kind is float or kind is complex:
        return None
    if isinstance(a, slice):
        return ":", *(_structure(x, makers) for x in (a.start, a.stop, a.step))
    if isinstance(a, (tuple, list)):
        return tuple(_structure(x, makers) for x in a)
    if kind is torch.SymInt:
        return a
    return int(a) if isinstance(a, numbers.Integral) else kind
