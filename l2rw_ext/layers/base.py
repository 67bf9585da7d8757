"""What a layer is: one description of an operation with trained operands, for all who use it.

Interception makes a *use* of it, which reports z and g to the layer-wise engine; the forward engine
forms its tangent; :mod:`l2rw_ext.functional` perturbs it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from l2rw_ext.errors import NotCompilableError

from .costs import Cost, Size

Function: TypeAlias = Callable[..., Any]
"""A torch function."""

Roots = tuple[Tensor | None, Tensor | None]
"""The trainable operands of a use: (weight, bias); None if frozen or absent."""

Outer = tuple[Tensor, Tensor]
"""Rows a and b whose products Σ_t a_t b_tᵀ are the gradients of single examples: (n, T, i) and
(n, T, k) for a matrix (i, k). If a is (n, T), it has the index of the row that is one."""

Single: TypeAlias = Tensor | Outer
"""The gradients of single examples, formed or as products."""

Factors = tuple[Tensor, Tensor, Tensor, Tensor, bool]
"""The arguments of ``ops.factored_correlation``."""


@dataclass(slots=True)
class Call:
    """A call of a torch function, its arguments sorted by their role."""

    operation: str
    x: Tensor
    """The data: what the layer reads."""
    weight: Tensor | None
    bias: Tensor | None = None
    options: Any = None
    """Everything else that the layer needs to know of the call."""
    couples: bool = False
    """Whether the examples of a batch share statistics, so that no layer-wise sum is exact."""


class Sink(Protocol):
    """Receives the reports that uses make in their backward."""

    def backward_of(self, use: Use) -> AbstractContextManager[None]:
        """A context around the backward of a use; it refuses one that is itself differentiated."""

    def report(self, use: Use, z: Tensor, g: Tensor) -> None:
        """Take z, the layer's input, and g, the gradient of the summed losses wrt its output."""


class Use:
    """One call of a layer with a trained operand, during one forward."""

    __slots__ = (
        "bias",
        "index",
        "layer",
        "operation",
        "options",
        "output_shape",
        "part",
        "roots",
        "shape",
        "sink",
        "versions",
        "weight",
    )

    def __init__(self, layer: Layer, call: Call, roots: Roots) -> None:
        self.layer = layer
        self.operation = call.operation
        self.weight = call.weight
        self.bias = call.bias
        self.roots = roots
        self.options = call.options
        self.index = -1
        self.part = ""
        self.shape = tuple(call.x.shape)
        self.output_shape: tuple[int, ...] = ()
        self.sink: Sink | None = None
        self.versions = tuple(None if root is None else root._version for root in roots)


@dataclass(frozen=True)
class RowMap:
    """Row r of a layer's flattened leading dimensions belongs to example (r // inner) % size.

    Dimension 0 of a layer's input need not be the example: attention gives its projections
    (T, N, E), then (T·N, E). The number of rows is ``outer * size * inner``.
    """

    outer: int
    size: int
    inner: int
    whole: bool = False
    """Whether the whole batch is taken for one example, which is enough for a direction."""

    @classmethod
    def of_all(cls, rows: int) -> RowMap:
        """The map that takes all rows for one example."""
        return cls(1, 1, rows, True)

    def resized(self, rows: int, size: int) -> RowMap:
        """The same order for other numbers of rows and of examples, which may be symbols.

        Raises:
            NotCompilableError: it cannot be said, because the order has more than two numbers.
        """
        if self.positions == 1 and rows != size:
            raise NotCompilableError("a layer has one row for each example, or several")
        if self.outer == 1:
            return RowMap(1, size, rows // size)
        if self.inner == 1:
            return RowMap(rows // size, size, 1)
        raise NotCompilableError("the examples are in the middle of a layer's rows")

    @property
    def positions(self) -> int:
        """T, the rows of one example."""
        return self.outer * self.inner

    def arrange(self, x: Tensor, leading: int) -> Tensor:
        """(rows..., features...) -> (size, T, features...); copies only if outer, inner > 1."""
        features = x.shape[leading:]
        if self.outer == 1:
            return x.reshape(self.size, self.inner, *features)
        if self.inner == 1:
            return x.reshape(self.outer, self.size, *features).transpose(0, 1)
        split = x.reshape(self.outer, self.size, self.inner, *features)
        return split.transpose(0, 1).reshape(self.size, self.positions, *features)

    @staticmethod
    def candidates(rows: int, size: int) -> Iterator[RowMap]:
        """All maps of this form, the usual ones first: example first, then example last."""
        if size == 0 or rows % size:
            return
        positions = rows // size
        inner = [positions, 1] if positions > 1 else [1]
        inner += [d for d in range(2, positions) if positions % d == 0]
        for d in inner:
            yield RowMap(positions // d, size, d)


class Layer(abc.ABC):
    """How one family of torch functions computes, and how it enters Eq. 12.

    The first half describes the operation on tensors as the model lays them out. The second half
    is for the layer-wise engine: there z and g are a report as :meth:`prepare` returns it, with one
    row for each example. A direction is a pair (V, V_b) in the accumulation dtype; an entry is None
    for an operand that is not trained.
    """

    name: ClassVar[str]
    functions: ClassVar[tuple[Function, ...]] = ()
    """The torch functions that :meth:`bind` takes."""
    linear_in_x: ClassVar[bool] = False
    """Whether the tangent is ``term(x, V, V_b) + forward(dx, W, None)``."""
    reduces: ClassVar[bool] = False
    """Whether :meth:`prepare` already returns the per-example gradients."""
    rows_add_up: ClassVar[bool] = False
    """Whether z and g are (N, T, ...), so that uses of the same operands can be joined to one."""

    def bind(self, func: Function, /, *args: Any, **kwargs: Any) -> Call | None:
        """The call by roles; None if the layer does not cover these arguments.

        A layer with :attr:`functions` overrides this with the signature of those. It looks at the
        arguments and computes nothing.
        """
        raise AssertionError(f"{self.name} has no torch function")

    def enter(self, x: Tensor, options: Any) -> Tensor:
        """What autograd computes of x before the layer, such as a padding or x̂."""
        return x

    @abc.abstractmethod
    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, options: Any
    ) -> Tensor:
        """The output, for x as :meth:`enter` returns it."""

    def term(self, x: Tensor, V: Tensor | None, V_b: Tensor | None, options: Any) -> Tensor:
        """What the direction adds to the output: the part that is linear in V and V_b."""
        return self.forward(x, V, V_b, options)

    @abc.abstractmethod
    def term_transpose(self, g: Tensor, x: Tensor, like: Roots, options: Any) -> Roots:
        """The transpose of :meth:`term` in (V, V_b), of the shapes of ``like``, None where that is.

        It is made of differentiable operations and sums in the accumulation dtype.
        """

    @abc.abstractmethod
    def data_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None, options: Any) -> Tensor:
        """The gradient with respect to x."""

    def run(self, use: Use, x: Tensor, token: Tensor) -> Tensor:
        """The operation as a node of autograd's graph that reports z and g of the use."""
        out: Tensor = UseFunction.apply(self.enter(x, use.options), token, use)
        return out

    @abc.abstractmethod
    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """Bring a report into the layer's form, examples first.

        A map of all rows takes the whole batch for one example, which is enough for a direction.
        """

    @abc.abstractmethod
    def leading(self, use: Use, g: Tensor) -> int:
        """How many leading dimensions of g (and of z) count rows."""

    def maps(self, use: Use, g: Tensor, size: int) -> Iterator[RowMap]:
        """The row maps that g's shape allows for ``size`` examples."""
        return RowMap.candidates(math.prod(g.shape[: self.leading(use, g)]), size)

    @abc.abstractmethod
    def costs(self, use: Use, size: Size) -> dict[str, Cost]:
        """The forms this use can take and what each costs."""

    def direction(self, use: Use, z: Tensor, g: Tensor) -> Roots:
        """(V, V_b) = Σ over the rows of the clean batch."""
        return self.term_transpose(g, z, use.roots, use.options)

    @abc.abstractmethod
    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = <direction, ∇f_i> for the examples of z and g, shape (n,)."""

    @abc.abstractmethod
    def weighted_gradient(self, use: Use, z: Tensor, g: Tensor, weights: Tensor) -> Roots:
        """Σ w_i ∇f_i over the examples with w_i ≠ 0; the others are never read (0 · NaN is NaN)."""

    def factors(self, use: Use, z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor) -> Factors:
        """The factors of Eq. 12; only for layers that list the form "factored"."""
        raise AssertionError(f"{self.name} has no factored form")

    def example_gradients(
        self, use: Use, z: Tensor, g: Tensor, direction: Roots | None
    ) -> tuple[Roots, Tensor]:
        """((G, G_b), u), u = <direction, G>; only for layers that list the form "per example"."""
        raise AssertionError(f"{self.name} has no per-example form")

    def single_gradients(
        self, use: Use, z: Tensor, g: Tensor
    ) -> tuple[Single | None, Single | None]:
        """(G, G_b), whose norms are asked for; entries of operands that are not trained are moot.

        A layer without the form "per example" overrides this, and one with a cheaper way.
        """
        return (z, g) if self.reduces else self.example_gradients(use, z, g, None)[0]


class UseFunction(torch.autograd.Function):
    """A use as a node of autograd's graph: only the data gradient flows, z and g are reported."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, use: Use) -> Tensor:
        """Run the operation; ``token`` requires grad, so that a first layer is in the graph too."""
        ctx.use = use
        # As in torch, the weight may be written to where no input needs a gradient.
        ctx.save_for_backward(x, use.weight if ctx.needs_input_grad[0] else None)
        return use.layer.forward(x, use.weight, use.bias, use.options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        """Report z and g, and return the gradient of x if the layers below need it."""
        x, weight = ctx.saved_tensors
        use: Use = ctx.use
        assert use.sink is not None
        with use.sink.backward_of(use):
            use.sink.report(use, x, g)
            if not ctx.needs_input_grad[0]:
                return None, None, None
            return use.layer.data_gradient(g, x, weight, use.options), None, None
