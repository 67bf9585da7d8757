"""What a rule is, and how the rows of a layer belong to examples."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from l2rw_ext.ops.arithmetic import accumulation_dtype as accumulation_dtype

from .costs import Cost, Size

Roots = tuple[Tensor | None, Tensor | None]
"""The trainable operands of a use: (weight, bias); None if frozen or absent."""

Factors = tuple[Tensor, Tensor, Tensor, Tensor, bool]
"""The arguments of ``ops.factored_correlation``."""


class Mode(Protocol):
    """The methods of the mode that intercepts a forward, as far as handlers call them.

    :class:`l2rw_ext.tracing.interception.Interception` documents the methods.
    """

    token: Tensor
    """A scalar that requires grad: with it, autograd visits a use whose input needs no gradient."""
    below_autocast: tuple[str, torch.dtype | None] | None
    """In a handler that runs with autocast off: the device, and the dtype to compute in."""
    unruled: dict[int, str]
    """The operation without a rule that a root goes into, by id of the root."""
    data_dependent: str | None
    """The first operation through which values of the data may decide what is computed."""
    narrow: bool
    """Whether some of the forward ran in float16 under autocast, with its small range."""

    def __enter__(self) -> Any:
        """Enter the mode again: torch functions that are called inside reach their handlers."""

    def __exit__(self, *error: Any) -> None:
        """Leave the mode."""

    def is_root(self, x: Any) -> bool:
        """Whether x is a trainable parameter, or computed only from roots and constants."""

    def is_data(self, x: Any) -> bool:
        """Whether x is a tensor that may depend on the batch."""

    def is_use(self, x: Any, weight: Any, bias: Any) -> bool:
        """Whether data x meets trained operands, none of which depends on data."""

    def name_of(self, root: Tensor) -> str:
        """The parameter's name, or a description of a derived tensor."""

    def expanded_from(self, x: Tensor) -> Tensor | None:
        """The root that x repeats, unless x was written to since."""

    def for_each_example(self, out: Tensor) -> bool:
        """Whether dimension 0 has the number of examples, if the mode was told that number."""

    def follow(self, out: Any) -> None:
        """Remember a result that was computed only from roots and constants."""

    def follow_expansion(self, out: Tensor, root: Tensor) -> None:
        """Remember that ``out`` repeats ``root`` along leading or broadcast dimensions."""

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation without a rule, and follow roots and constants through it."""

    def use(
        self,
        rule: Rule,
        operation: str,
        weight: Tensor | None,
        bias: Tensor | None,
        options: Any,
        x: Tensor,
    ) -> Use | None:
        """Make a use of the given operands on data x; None if autograd should run the operation."""


class Sink(Protocol):
    """Receives the reports that uses make in their backward."""

    def backward_of(self, use: Use) -> AbstractContextManager[None]:
        """A context around the backward of a use; it refuses one that is itself differentiated."""

    def report(self, use: Use, z: Tensor, g: Tensor) -> None:
        """Take z, the layer's input, and g, the gradient of the summed losses wrt its output."""


class Use:
    """One call of an operation with a trainable parameter, during one forward."""

    __slots__ = (
        "bias",
        "index",
        "operation",
        "options",
        "output_shape",
        "part",
        "roots",
        "rule",
        "shape",
        "sink",
        "versions",
        "weight",
    )

    def __init__(
        self,
        rule: Rule,
        operation: str,
        weight: Tensor | None,
        bias: Tensor | None,
        roots: Roots,
        options: Any,
    ) -> None:
        self.rule = rule
        self.operation = operation
        self.weight = weight
        self.bias = bias
        self.roots = roots
        self.options = options
        self.index = -1
        self.part = ""
        self.shape: tuple[int, ...] = ()
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


class Rule(abc.ABC):
    """How one family of operations enters Eq. 12.

    z and g are a report as :meth:`prepare` returns it, with one row for each example. A direction
    is a pair (V, V_b) in the accumulation dtype; an entry is None for an operand that is not
    trained.
    """

    name: ClassVar[str]
    reduces: ClassVar[bool] = False
    """Whether :meth:`prepare` already returns the per-example gradients."""
    rows_add_up: ClassVar[bool] = False
    """Whether z and g are (N, T, ...), so that uses of the same operands can be joined to one."""

    def call(self, use: Use, x: Tensor) -> Tensor:
        """The result of the operation; only for rules whose uses run as :class:`UseFunction`."""
        raise AssertionError(f"{self.name} runs as a Function of its own")

    def data_gradient(self, use: Use, x: Tensor, weight: Tensor | None, g: Tensor) -> Tensor:
        """The gradient with respect to x; only for rules that have :meth:`call`."""
        raise AssertionError(f"{self.name} runs as a Function of its own")

    @abc.abstractmethod
    def prepare(self, use: Use, z: Tensor, g: Tensor, rows: RowMap) -> tuple[Tensor, Tensor]:
        """Bring a report into the rule's form, examples first.

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

    @abc.abstractmethod
    def direction(self, use: Use, z: Tensor, g: Tensor) -> Roots:
        """(V, V_b) = Σ over the rows of the clean batch."""

    @abc.abstractmethod
    def correlation(self, use: Use, z: Tensor, g: Tensor, direction: Roots) -> Tensor:
        """u_i = <direction, ∇f_i> for the examples of z and g, shape (n,)."""

    @abc.abstractmethod
    def weighted_gradient(
        self, use: Use, z: Tensor, g: Tensor, weights: Tensor, active: Tensor | None
    ) -> Roots:
        """Σ w_i ∇f_i over the ``active`` examples, those with w_i ≠ 0.

        ``active`` is None if the host does not know which examples these are; the others contribute
        nothing then either.
        """

    def factors(self, use: Use, z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor) -> Factors:
        """The factors of Eq. 12; only for rules that list the form "factored"."""
        raise AssertionError(f"{self.name} has no factored form")

    def example_gradients(
        self, use: Use, z: Tensor, g: Tensor, direction: Roots | None
    ) -> tuple[Roots, Tensor]:
        """((G, G_b), u), u = <direction, G>; only for rules that list the form "per example"."""
        raise AssertionError(f"{self.name} has no per-example form")


class UseFunction(torch.autograd.Function):
    """A use as a node of autograd's graph: only the data gradient flows, z and g are reported."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, use: Use) -> Tensor:
        """Run the operation; ``token`` requires grad, so that a first layer is in the graph too."""
        ctx.use = use
        ctx.save_for_backward(x, use.weight)
        return use.rule.call(use, x)

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
            return use.rule.data_gradient(use, x, weight, g), None, None
