"""Carries tangents through a forward without letting autograd record them.

Where trainable parameters are used, dual tensors (θ, v) replace them. Torch's forward-mode AD or a
rule of this package carries the tangent on, next to a primal that autograd records as usual.
Autograd also records what torch computes of a tangent with operands that require grad. That record
is cut after every operation, so that the tangents of a forward live no longer than its activations
would without autograd.

Reverse mode defines the scores, so this mode follows it: what is computed without grad is constant,
and every tensor that requires grad has a tangent, unless no parameter with a direction reaches it.
A tensor that breaks this rule went past the mode, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.forward_ad import make_dual
from torch.utils.weak import WeakTensorKeyDictionary

from l2rw_ext.data.batch import plain
from l2rw_ext.errors import NotExactError
from l2rw_ext.layers import LAYERS
from l2rw_ext.layers.base import Function, Layer
from l2rw_ext.layers.torch_functions import for_subclasses, getters, takes, writes
from l2rw_ext.task.task import Direction, Task
from l2rw_ext.tracing.fast_path import StepMode
from l2rw_ext.tracing.graph import leaf_of, nodes_from
from l2rw_ext.tracing.saved_tensors import kept, recomputed
from l2rw_ext.tracing.writes import place_of

from .dual import dual, tangent_of, unpack

_VIEWS = getters("T", "mT", "H", "mH", "real", "imag")
"""The attributes that are views; no other attribute carries a tangent."""

_HOOKS = {torch.Tensor.register_hook} | getters("grad_fn")
"""How a forward can change a gradient: by a hook, or as module hooks do, by ``grad_fn``."""

_GRADIENTS = {torch.autograd.grad} | getters("grad")
"""How a forward can read the result of a backward that it runs."""


Rule: TypeAlias = Callable[..., Any]
"""(mode, function, *args, **kwargs) -> what the function returns, as dual tensors."""

_RULES: dict[Function, Rule] = {}


def carries(*functions: Function) -> Callable[[Rule], Rule]:
    """Register a rule that carries tangents through torch functions."""

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


class Tangents(StepMode):
    """Runs a forward at θ + ε v, to first order in ε.

    Must be entered within ``torch.autograd.forward_ad.dual_level``.

    Args:
        task: whose model runs under the mode.
        direction: v.
    """

    def __init__(self, task: Task, direction: Direction) -> None:
        super().__init__()
        self._names = {id(p): name for name, p in task.members.parameters}
        self._duals: dict[int, Tensor] = {}
        self._entrances: set[Any] = set()
        self._states: list[tuple[Tensor, int, Any]] = []
        self._still: Any = WeakTensorKeyDictionary()
        self.attention = False
        """Whether attention was called, whose fused kernels have no forward derivative."""
        for p in task.parameters:
            v = direction.values.get(id(p))
            if v is None:
                continue
            if p.is_complex():
                raise NotExactError(f"parameter {self._names[id(p)]!r} is complex")
            v = (v.to_dense() if v.is_sparse else v).detach().to(p.dtype)
            self._duals[id(p)] = moving = make_dual(p, v)
            self._entrances.add(moving.grad_fn)
            self._states.append((p, p._version, place_of(p)))

    def __torch_function__(
        self,
        func: Function,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if func in _HOOKS and args[0].requires_grad:
            raise NotExactError(
                "a hook on a gradient may change it, and the forward derivative cannot follow"
            )
        if func in _GRADIENTS:
            return self._gradients(func, args, kwargs or {})
        if name in ("__get__", "__set__") and func not in _VIEWS:
            return func(*args, **(kwargs or {}))
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise NotExactError(f"{name} is called inside a torch.func transform")
        tensors: list[Tensor] = []
        if not torch.is_grad_enabled():
            return self._constant(func, args, kwargs or {})
        args = _map(self._moving, args, tensors)
        kwargs = _map(self._moving, kwargs or {}, tensors)
        still = True
        for x in tensors:
            if tangent_of(x) is not None:
                still = False
            elif x.requires_grad and not x.is_leaf and x not in self._still:
                raise NotExactError(
                    f"the input of {name}, of shape {tuple(x.shape)}, came from an operation that "
                    "hides how it depends on the parameters (a custom autograd Function, a "
                    "compiled or scripted region)"
                )
        run = func if still else self._rule_of(func, kwargs)
        if run is not func:
            run = for_subclasses(run, tensors)
        if recomputed():
            # A recomputation in the weighted backward would have no tangents.
            with kept():
                out = run(*args, **kwargs)
        else:
            out = run(*args, **kwargs)
        if not tensors:
            return out
        if writes(func, kwargs):
            self._checked(name, kwargs.get("out", args[0]), still, tensors)
        return self._checked(name, out, still, tensors)

    def _rule_of(self, func: Function, kwargs: dict[str, Any]) -> Callable[..., Any]:
        """What carries the tangent through a function; the function itself if torch does."""
        rule = _RULES.get(func)
        if rule is not None:
            if not takes(rule, kwargs):
                names = ", ".join(kwargs)
                raise NotExactError(f"{func.__name__} is called with keywords ({names}) of NumPy's")
            return partial(rule, self, func)
        layer = LAYERS.get(func)
        if layer is None or not layer.linear_in_x or not takes(layer.bind, kwargs):
            return func
        return partial(_through, layer, func)

    def _gradients(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make the result of a backward inside the forward constant, or refuse it.

        The rules carry tangents past autograd, so that such a backward would not see all of them.
        """
        out = func(*args, **kwargs)
        found = out if isinstance(out, (tuple, list)) else (out,)
        if any(isinstance(x, Tensor) and x.requires_grad for x in found):
            raise NotExactError("the forward runs a backward of its own with create_graph=True")
        return _map(Tensor.detach, out, [])

    def _moving(self, x: Tensor) -> Tensor:
        return self._duals.get(id(x), x)

    def _constant(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function without grad on the primals; a written tensor keeps its tangent."""
        originals: dict[int, Tensor] = {}

        def primal(x: Tensor) -> Tensor:
            if tangent_of(x) is None:
                return x
            alias = x.detach()
            originals[id(alias)] = x
            return alias

        tensors: list[Tensor] = []
        out = func(*_map(primal, args, tensors), **_map(primal, kwargs, tensors))
        return originals.get(id(out), out)

    def _checked(self, name: str, out: Any, still: bool, given: list[Tensor]) -> Any:
        """Check that results that require grad have a tangent, and cut what autograd recorded."""
        if not isinstance(out, Tensor):
            if isinstance(out, (tuple, list)):
                checked = [self._checked(name, x, still, given) for x in out]
                if any(a is not b for a, b in zip(checked, out, strict=True)):
                    return type(out)(checked)
            return out
        if not (out.is_floating_point() or out.is_complex()):
            return out
        primal, tangent = unpack(out)
        if tangent is None:
            if out.requires_grad and not out.is_leaf:
                if not still:
                    raise NotExactError(f"{name} has no forward-mode derivative")
                self._still[out] = True
        elif not out.requires_grad:
            raise NotExactError(f"{name} has a forward-mode derivative, but none in reverse mode")
        elif tangent.requires_grad:
            if not tangent._is_view():
                tangent.detach_()
            elif all(out is not x for x in given):
                return make_dual(primal, tangent.detach())
        return out

    def parameter_of(self, dual: Tensor) -> Tensor | None:
        """The parameter that a dual tensor stands for; None for any other."""
        return next((p for p, *_ in self._states if self._duals[id(p)] is dual), None)

    def entered_by(self, out: Tensor) -> None:
        """Note that a rule gave a parameter itself to the operation that made ``out``."""
        self._entrances.add(out.grad_fn)

    def scores(self, losses: Tensor) -> Tensor:
        """The derivative of the losses along v, shape (n,), once the forward is over.

        Raises:
            NotExactError: the losses depend on a parameter past the mode, or a parameter was
                changed during the forward.
        """
        for p, version, place in self._states:
            if p._version != version or place_of(p) != place:
                raise NotExactError(
                    f"parameter {self._names[id(p)]!r} was changed during the forward"
                )
        for node in nodes_from(losses, set()):
            for following, _ in node.next_functions if node not in self._entrances else ():
                leaf = leaf_of(following)
                if leaf is not None and id(leaf) in self._duals:
                    raise NotExactError(
                        f"parameter {self._names[id(leaf)]!r} is used where no torch function "
                        "shows it (a compiled or scripted region)"
                    )
        tangent = tangent_of(losses)
        if tangent is None:
            if losses.requires_grad and not losses.is_leaf and losses not in self._still:
                raise NotExactError("the losses come from an operation without forward derivative")
            return torch.zeros_like(losses)
        return plain(tangent.detach())


def _through(layer: Layer, func: Function, /, *args: Any, **kwargs: Any) -> Any:
    """The layer and its tangent ẏ = W ẋ + V x + V_b, where no product with a zero is formed.

    The primal is recorded by autograd, and the tangent is not.
    """
    call = layer.bind(func, *args, **kwargs)
    if call is None or any(
        t is not None and t.layout != torch.strided for t in (call.x, call.weight)
    ):
        return func(*args, **kwargs)
    options = call.options
    x, dx = unpack(layer.enter(call.x, options))
    W, V = unpack(call.weight)
    b, V_b = unpack(call.bias)
    y = layer.forward(x, W, b, options)
    with torch.no_grad():
        dy = None
        if V is not None:
            dy, V_b = layer.term(x, V, V_b, options), None
        if dx is not None or V_b is not None:
            dx = torch.zeros_like(x) if dx is None else dx
            moved = layer.forward(dx, W, V_b, options)
            dy = moved if dy is None else dy.add_(moved)
    return dual(y, dy)


def _map(function: Callable[[Tensor], Tensor], tree: Any, seen: list[Tensor]) -> Any:
    """The arguments of a call with the function applied to every tensor; ``seen`` collects them."""
    if isinstance(tree, Tensor):
        x = function(tree)
        seen.append(x)
        return x
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([_map(function, x, seen) for x in tree])
    if kind is dict:
        return {key: _map(function, x, seen) for key, x in tree.items()}
    return tree
