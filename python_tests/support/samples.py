"""Calls from torch's own test databases as models, and the judgement of every engine on them."""

from __future__ import annotations

import copy
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from l2rw_ext import NotExactError, Reweighter, reference
from support.models import ENGINES
from support.oracle import Truth, flat, gradients_of, truth

AGREES = 1e-8
"""Relative error of float64 numbers. Inverses and series in the databases lose digits; a derivative
that is wrong is wrong in its first ones."""

NOTHING = 1e-4
"""What is smaller is compared as if it had this norm: some calls have gradients of mere rounding,
such as a normalisation over one number."""

LARGEST = 2000
"""Elements of the tensors of a call that is tried: the oracle takes a backward for each row."""

T = TypeVar("T")


def seed(name: str) -> None:
    """Seed the generators that a database draws from, by the name of its entry."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    torch.manual_seed(number)


def spread(found: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of them at equal distances, the first and the last included."""
    step = max(1.0, (len(found) - 1) / max(1, count - 1))
    return [found[round(k * step)] for k in range(min(count, len(found)))]


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def is_small(tree: Any) -> bool:
    """Whether the tensors of a call are not empty and not too large to try."""
    sizes = [x.numel() for x in tensors(tree)]
    return all(sizes) and sum(sizes) <= LARGEST


def _floating(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.layout == torch.strided
        and (x.is_floating_point() or x.is_complex())
    )


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


class Call(nn.Module):
    """``fn(*args, **kwargs)`` as a model: the first tensor is the batch, times a parameter.

    Every other tensor that requires grad is a parameter as well, and so are those of ``fn`` if it
    is a module. With ``scaled=True``, and where the first tensor has no dimension for the examples,
    that tensor is a parameter too, and the batch, of shape (n,), scales the result.
    """

    def __init__(
        self, fn: Callable[..., Any], args: Any, kwargs: Any, *, scaled: bool = False
    ) -> None:
        super().__init__()
        self.fn = fn
        leaves, self.structure = pytree.tree_flatten((args, kwargs))
        # Some samples have weights of float32, whose gradients have no more than its precision.
        self.leaves = [
            x.detach().to(torch.float64 if x.dtype == torch.float32 else x.dtype, copy=True)
            if isinstance(x, Tensor)
            else x
            for x in leaves
        ]
        self.place: int | None = None
        for k, x in enumerate(self.leaves):
            if not isinstance(x, Tensor) or x.layout != torch.strided:
                continue
            if self.place is None and not scaled and x.dim():
                self.place = k
                if _floating(x):
                    self.register_parameter("theta", nn.Parameter(torch.ones_like(x[0])))
            elif leaves[k].requires_grad:
                self.register_parameter(f"part{k}", nn.Parameter(x))
            else:
                self.register_buffer(f"part{k}", x)

    def forward(self, batch: Tensor) -> list[Tensor]:
        leaves = [getattr(self, f"part{k}", x) for k, x in enumerate(self.leaves)]
        if self.place is not None:
            theta = getattr(self, "theta", None)
            leaves[self.place] = batch if theta is None else batch * theta
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        found = [x for x in tensors(self.fn(*args, **kwargs)) if _floating(x)]
        if self.place is not None:
            return found
        return [batch[:, None] * _real(x).flatten() for x in found]

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Training and clean batch; in later pairs the second is closer to the first.

        Few batches will do for a matrix that has to be positive definite, or for a number that has
        to be above one.
        """
        x: Tensor
        if self.place is None:
            x = torch.rand(4, dtype=torch.float64) + 0.5
        else:
            x = self.leaves[self.place]
        with torch.no_grad():
            columns = sum(_real(out).numel() for out in copy.deepcopy(self)(x))
        targets = [torch.randn(len(x), columns, dtype=torch.float64) for _ in range(2)]
        for clean in (x * 0.98 if _floating(x) else x.flip(0), x.flip(0), x.clone()):
            yield (x, targets[0]), (clean, targets[1])


def projected(outputs: list[Tensor], targets: Tensor) -> Tensor:
    """Random projections of each row where the outputs have n, else of all of them, to (n,).

    Of their inverse hyperbolic sine, which keeps the relative error of large outputs.
    """
    n = len(targets)
    outputs = [_real(x) for x in outputs]
    if all(x.dim() and x.size(0) == n for x in outputs):
        rows = torch.cat([x.reshape(n, -1) for x in outputs], 1)
        return (targets[:, : rows.size(1)] * torch.asinh(rows)).sum(1)
    everything = torch.cat([x.flatten() for x in outputs])
    return targets[:, : everything.numel()] @ torch.asinh(everything).to(targets)


def assert_right_or_refused(models: Iterable[Callable[[], Call]]) -> None:
    """Every engine gives the oracle's numbers for every call or refuses it.

    ``auto`` refuses only what every engine does. Where plain torch has no finite number, or draws
    one, there is nothing to compare; a test without any comparison is skipped and says why.
    """
    wrong, refusals, right = [], {"plain torch has no finite number, or draws one"}, 0
    for k, make in enumerate(models):
        case = _case(make)
        if case is None:
            continue
        verdicts = {engine: _verdict(engine, *case) for engine in (*ENGINES, "auto")}
        exact = [engine for engine in ENGINES if verdicts[engine][0] == "right"]
        if exact and verdicts["auto"][0] == "refused":
            verdicts["auto"] = ("wrong", f"refused, but {exact[0]} is exact: {verdicts['auto'][1]}")
        wrong += [
            f"call {k}, {e}: {text}" for e, (what, text) in verdicts.items() if what == "wrong"
        ]
        refusals |= {text for what, text in verdicts.values() if what == "refused"}
        right += verdicts["auto"][0] == "right"
    assert not wrong, "\n".join(wrong)
    if not right:
        pytest.skip("; ".join(sorted(refusals)))


def _case(make: Callable[[], Call]) -> tuple[Call, Any, Any, Truth] | None:
    """A model, its batches and what the oracle says; None where plain torch cannot say it."""
    try:
        model = make()
        for batch, clean in model.batches():
            first, second = (copy.deepcopy(model)(batch[0]) for _ in range(2))
            expected = truth(model, projected, batch, clean)
            numbers = [*first, *copy.deepcopy(model)(clean[0]), expected.scores]
            numbers.append(flat(expected.gradients.values()))
            if all(x.isfinite().all() for x in numbers) and all(map(torch.equal, first, second)):
                return model, batch, clean, expected
    except Exception:  # torch's own, whatever it is
        pass
    return None


def _verdict(engine: Any, model: Call, batch: Any, clean: Any, expected: Truth) -> tuple[str, str]:
    """ "right", "wrong" or "refused", and the engine, the worst number or the error.

    Of two steps, because the second one has a plan.
    """
    model = copy.deepcopy(model)
    reweighter = Reweighter(model, projected, engine=engine)
    for _ in range(2):
        model.zero_grad()
        try:
            step = reweighter.backward(batch, clean)
        except NotExactError as error:
            return "refused", str(error)
        except Exception as error:
            refused = _is_of_torch(error, model, batch, clean)
            return "refused" if refused else "wrong", f"{type(error).__name__}: {error}"
        found = gradients_of(model)
        errors = {"scores": _error(step.scores, expected.scores)}
        errors |= {k: _error(found[k], g) for k, g in expected.gradients.items()}
        worst = max(errors, key=lambda k: errors[k])
        if not errors[worst] <= AGREES:
            return "wrong", f"{step.engine}: {worst} by {errors[worst]:.1e}"
    return "right", step.engine


def _error(found: Tensor | None, exact: Tensor | None) -> float:
    """The relative error; a gradient that is missing is zero."""
    present = found if exact is None else exact
    if present is None:
        return 0.0
    found, exact = (torch.zeros_like(present) if x is None else x for x in (found, exact))
    return float((found - exact).norm() / exact.norm().clamp_min(NOTHING))


def _is_of_torch(error: Exception, model: Call, batch: Any, clean: Any) -> bool:
    """Whether Algorithm 1 in plain torch ends in the same error, or in no number."""
    try:
        scores = reference.meta_scores(copy.deepcopy(model), projected, batch, clean)
    except Exception as plain:
        return type(plain) is type(error) and str(plain)[:80] == str(error)[:80]
    return not bool(scores.isfinite().all())
