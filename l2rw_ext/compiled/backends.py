"""The backends of torch.compile, to which a flat graph is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from l2rw_ext.errors import NotCompilableError

Compiled = Callable[..., Sequence[Tensor]]

_ALLOWED: dict[str, type] = {"mode": str, "dynamic": bool, "options": Mapping, "fullgraph": bool}
_INDUCTOR = {
    # Random numbers as torch draws them, by which a compiled step can be held to an eager one.
    "fallback_random": True,
    # Operations stay in their order. Else what a checkpoint recomputes is computed early, and
    # activations wait for distant operations that are fused with those that free them.
    "reorder_for_locality": False,
    "cpp.max_horizontal_fusion_size": 1,
    # In torch 2.13 a result written over a part of a concatenation is lost, once the memory of the
    # whole is used again (the gradient of an nn.RNN with relu).
    "inplace_buffers": False,
    # Images stay as they lie. Convolutions of images that inductor lays out channels last round up
    # to ten times as much, and each ReLU whose sign that changes moves gradients by a thousandth.
    "layout_optimization": False,
}
"""Options of inductor's, which the caller's go before."""

_RECORDING = ("reduce-overhead", "max-autotune")
"""Modes of inductor that may replay a CUDA graph."""


class Backend:
    """A backend by its name, and its options.

    Args:
        compile: True, or the name of a backend.
        options: of ``torch.compile``: mode, dynamic, options and fullgraph.

    Raises:
        ValueError, TypeError: no such backend, mode or option.
    """

    def __init__(self, compile: Any, options: Mapping[str, Any] | None) -> None:
        from torch._dynamo.backends import registry
        from torch._dynamo.exc import InvalidBackend

        self._given = compile, options
        if options is not None and not isinstance(options, Mapping):
            raise TypeError(f"compile_options must be a dict, got {options!r}")
        options = dict(options or {})
        unknown = [name for name in options if name not in _ALLOWED]
        if unknown:
            raise ValueError(
                f"compile_options: {unknown[0]!r} is none of {', '.join(map(repr, _ALLOWED))}"
            )
        for name, value in options.items():
            if value is not None and not isinstance(value, _ALLOWED[name]):
                kind = _ALLOWED[name].__name__.lower()
                raise TypeError(f"compile_options: {name} must be a {kind}, got {value!r}")
        self.name = "inductor" if compile is True else compile
        self.dynamic = bool(options.get("dynamic"))
        self.fullgraph = bool(options.get("fullgraph"))
        self._mode: str | None = options.get("mode")
        self._options: dict[str, Any] = dict(options.get("options") or {})
        if not isinstance(self.name, str):
            raise TypeError(
                f"compile must be False, True or the name of a backend, got {compile!r}"
            )
        try:
            self._compile = registry.lookup_backend(self.name)
        except InvalidBackend:
            listed = ", ".join(map(repr, ["eager", *registry.list_backends()]))
            raise ValueError(
                f"compile={self.name!r} is no backend of torch.compile; there are {listed}"
            ) from None
        if self.name == "inductor":
            self._options = _options_of_inductor(self._mode, self._options)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), self._given)

    @property
    def reuses_memory(self) -> bool:
        """Whether results lie where those of the next step will."""
        return self.name == "cudagraphs" or self._mode in _RECORDING

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Compiled:
        """The compiled graph."""
        if self.name == "inductor":
            from torch import _inductor

            try:
                compiled: Compiled = _inductor.compile(
                    _drawn_apart(graph), list(inputs), _INDUCTOR | self._options
                )
            except Exception as error:
                if "InvalidCxxCompiler" not in f"{type(error).__name__} {error}":
                    raise
                raise NotCompilableError(
                    "inductor finds no C++ compiler; install one, or take compile='eager', which "
                    "needs none"
                ) from error
            return compiled
        given = {"mode": self._mode, "options": self._options}
        given = {name: value for name, value in given.items() if value}
        return self._compile(graph, list(inputs), **given)


@torch.library.custom_op(
    "l2rw_ext_compiled::bernoulli", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _bernoulli(like: Tensor, p: float) -> Tensor:
    """Ones with a probability, else zeros, in the shape, dtype and strides of a tensor."""
    return torch.empty_like(like).bernoulli_(p)


@_bernoulli.register_fake
def _(like: Tensor, p: float) -> Tensor:
    return torch.empty_like(like)


def _drawn_apart(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A graph in which masks are drawn by an operator.

    Inductor, in torch 2.13, draws in place, and may read the mask of a second dropout in the loop
    that makes the memory for it, before it is drawn.
    """
    graph = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
    aten = torch.ops.aten
    for node in graph.graph.nodes:
        if node.target not in (aten.bernoulli_.float, aten.bernoulli.p) or node.kwargs:
            continue
        like, p = (*node.args, 0.5)[:2]
        if node.target is aten.bernoulli.p or set(like.users) == {node}:
            with graph.graph.inserting_before(node):
                draw = graph.graph.call_function(_bernoulli._opoverload, (like, p))
            draw.meta = node.meta
            node.replace_all_uses_with(draw)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _options_of_inductor(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a mode, and those that are given.

    Raises:
        ValueError: there is no such mode or setting.
    """
    from torch._inductor import list_mode_options, list_options

    modes, known = list_mode_options(), list_options()
    if mode is not None and mode not in modes:
        listed = ", ".join(map(repr, modes))
        raise ValueError(f"compile_options: mode must be one of {listed}, got {mode!r}")
    given = {name.replace("-", "_"): value for name, value in options.items()}
    for name in given:
        if name not in known:
            raise ValueError(f"compile_options: inductor has no option {name!r}")
    return (modes[mode] if mode is not None else {}) | given
