"""Comparing steps with the oracle, and models with what they were.

Errors are vector measures: an elementwise bound hides a bias that all elements share.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext import Reweighter, Step, reference
from l2rw_ext.data.batch import forward
from l2rw_ext.reference import relative_error
from l2rw_ext.task.state import State
from l2rw_ext.tracing.members import Members
from support.models import Drawn, cross_entropy

EXACT = 1e-12
"""Relative L2 error of float64 scores, weights and gradients."""


def cosine(found: Tensor, exact: Tensor) -> float:
    """The cosine of the angle between two vectors; 1 for two zeros."""
    found, exact = found.double().flatten(), exact.double().flatten()
    norms = float(found.norm() * exact.norm())
    if norms == 0:
        return 1.0 if float(found.norm()) == float(exact.norm()) else 0.0
    return float(found @ exact) / norms


def signed_bias(found: Tensor, exact: Tensor) -> float:
    """Mean error relative to the mean size of the elements: what does not average out."""
    size = float(exact.double().abs().mean())
    error = float((found.double() - exact.double()).mean())
    return error / size if size else error


@dataclass
class Truth:
    """What the oracle says of a step, in float64."""

    scores: Tensor
    weights: Tensor
    gradients: dict[str, Tensor | None]
    """By name; those of a loss that is a module too."""
    clean_loss: Tensor
    """The mean clean loss, shape ()."""


def as_double(tree: Any) -> Any:
    """Floating tensors of a nest in float64."""
    return torch.utils._pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )


def truth(
    model: nn.Module,
    loss_fn: Any,
    batch: Any,
    clean: Any,
    *,
    clean_loss_fn: Any = None,
    copied: bool = True,
) -> Truth:
    """Scores by the loop of single gradients, weights by Eq. 8-9, and the weighted gradient.

    On float64 copies of the model and of losses that are modules, so that they keep their state;
    ``copied=False`` for a loss function that holds the model's own parameters.
    """
    (found,) = truth_of_ranks(
        model, loss_fn, [batch], [clean], clean_loss_fn=clean_loss_fn, copied=copied
    )
    return found


def truth_of_ranks(
    model: nn.Module,
    loss_fn: Any,
    batches: Sequence[Any],
    cleans: Sequence[Any],
    *,
    clean_loss_fn: Any = None,
    copied: bool = True,
) -> list[Truth]:
    """:func:`truth` of one step on the union of all ranks' batches, as each rank sees it.

    That is the scores and weights of its own examples, and the gradient and clean loss of all. A
    rank's batches have a forward each, so that BatchNorm takes its statistics from them alone; its
    clean batch may be None. An example whose score is not finite is left out.
    """

    def duplicates() -> tuple[Any, ...]:
        given = (model, loss_fn, clean_loss_fn)
        if not copied:
            return given
        held = copy.deepcopy([x if isinstance(x, nn.Module) else None for x in given])
        return tuple(x if d is None else d.double() for x, d in zip(given, held, strict=True))

    sizes: list[int] = []
    clean_losses: list[Tensor] = []
    directions: list[dict[str, Tensor]] = []
    for clean in (as_double(c) for c in cleans if c is not None):
        own, loss, clean_loss = duplicates()
        before = State(Members.of(own, loss, clean_loss), whole=True)
        directions.append(reference.clean_direction(own, loss, clean, clean_loss_fn=clean_loss))
        before.restore()
        with torch.random.fork_rng(devices=[]):
            losses = (clean_loss or loss)(forward(own, clean[0]), clean[1]).detach()
        before.restore()
        sizes.append(losses.numel())
        clean_losses.append(losses.mean())
    direction = {name: _mean([v[name] for v in directions], sizes) for name in directions[0]}

    batches = [as_double(b) for b in batches]
    scores: list[Tensor] = []
    for batch in batches:
        own, loss, clean_loss = duplicates()
        scores.append(reference.scores_along(direction, own, loss, batch, clean_loss_fn=clean_loss))
    joined = torch.cat(scores)
    weights = reference.weights_from_scores(joined.where(joined.isfinite(), 0))

    gradients: dict[str, Tensor | None] = {}
    parts = weights.split([u.numel() for u in scores])
    for batch, w in zip(batches, parts, strict=True):
        own, loss, _ = duplicates()
        for name, g in reference.weighted_gradient(own, loss, batch, w).items():
            gradients[name] = _sum(gradients.get(name), g)
    mean = _mean(clean_losses, sizes)
    return [Truth(u, w, gradients, mean) for u, w in zip(scores, parts, strict=True)]


def _mean(values: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Σ m_r v_r / Σ m_r."""
    if len(values) == 1:
        return values[0]
    return torch.stack([m * v for m, v in zip(sizes, values, strict=True)]).sum(0) / sum(sizes)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def gradients_of(model: nn.Module, loss_fn: Any = None) -> dict[str, Tensor | None]:
    """The accumulated gradients of the trainable parameters, by name."""
    return {name: p.grad for name, p in reference.trainable(model, loss_fn).items()}


def zero_grad(model: nn.Module, *losses: Any) -> None:
    """Forget the gradients of the model and of losses that are modules."""
    for module in (model, *losses):
        if isinstance(module, nn.Module):
            module.zero_grad()


def flat(gradients: Iterable[Tensor | None]) -> Tensor:
    """All gradients as one vector."""
    present = [g.double().flatten() for g in gradients if g is not None]
    return torch.cat(present) if present else torch.zeros(0, dtype=torch.float64)


def assert_matches(
    step: Step,
    model: nn.Module,
    expected: Truth,
    tolerance: float = EXACT,
    loss_fn: Any = None,
) -> None:
    """Scores, weights and ``p.grad`` are the oracle's; unreached parameters have none."""
    assert relative_error(step.scores, expected.scores) <= tolerance
    assert relative_error(step.weights, expected.weights) <= tolerance
    found = gradients_of(model, loss_fn)
    reached = {name for name, g in expected.gradients.items() if g is not None}
    assert {name for name, g in found.items() if g is not None} == reached
    assert relative_error(flat(found.values()), flat(expected.gradients.values())) <= tolerance


def assert_exact(
    model: nn.Module,
    loss_fn: Any,
    batch: Any,
    clean: Any,
    *,
    engine: str | None = None,
    reweighter: Reweighter | None = None,
    clean_loss_fn: Any = None,
    tolerance: float = EXACT,
    copied: bool = True,
) -> Step:
    """One step of the model (float64) is the oracle's, by the engine that is named."""
    expected = truth(model, loss_fn, batch, clean, clean_loss_fn=clean_loss_fn, copied=copied)
    zero_grad(model, loss_fn, clean_loss_fn)
    held = reweighter or Reweighter(model, loss_fn, clean_loss_fn=clean_loss_fn)
    step = held.backward(batch, clean)
    if engine is not None:
        assert step.engine == engine
    assert_matches(step, model, expected, tolerance, loss_fn)
    return step


def assert_exact_steps(
    model: nn.Module,
    loss_fn: Any,
    batch: Any,
    clean: Any,
    reweighter: Reweighter,
    *,
    count: int = 2,
    engine: str | None = None,
    copied: bool = True,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Steps on the same batches are the oracle's: the first makes a plan, the next ones have it.

    The oracle is asked again only where a step has changed the state. ``after`` follows each step.
    """
    expected: Truth | None = None
    for _ in range(count):
        before = State(Members.of(model, loss_fn), whole=True)
        if expected is None or not copied:
            expected = truth(model, loss_fn, batch, clean, copied=copied)
        zero_grad(model, loss_fn)
        step = reweighter.backward(batch, clean)
        if engine is not None:
            assert step.engine == engine
        assert_matches(step, model, expected, loss_fn=loss_fn)
        after()
        if before.changed(values=True):
            expected = None


def assert_drawn_exact(drawn: Drawn, **options: Any) -> None:
    """Two layer-wise steps on a drawn model."""
    reweighter = Reweighter(drawn.model, drawn.loss_fn, **options)
    assert_exact_steps(
        drawn.model, drawn.loss_fn, drawn.batch, drawn.clean, reweighter, engine="layerwise"
    )


def assert_float32_errs_little(model: nn.Module, batch: Any, clean: Any, engine: Any) -> None:
    """A float32 step errs at most twice as much as double backward does, plus 1e-6."""
    expected = truth(model, cross_entropy, batch, clean)
    exact = flat(expected.gradients.values())
    errors = []
    for name in (engine, "double_backward"):
        own = copy.deepcopy(model)
        step = Reweighter(own, cross_entropy, engine=name).backward(batch, clean)
        assert step.scores.dtype == step.weights.dtype == torch.float32
        errors.append(
            (
                relative_error(step.scores, expected.scores),
                relative_error(step.weights, expected.weights),
                relative_error(flat(gradients_of(own).values()), exact),
            )
        )
    for found, allowed in zip(*errors, strict=True):
        assert found <= 2 * allowed + 1e-6


_HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
]


def _state(model: nn.Module) -> dict[str, Any]:
    """All that a failed step must leave alone, tensors as (the tensor, a copy)."""

    def keep(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        return x, None if x is None else x.detach().clone()

    return {
        "buffers": {k: keep(b) for k, b in model.named_buffers()},
        "parameters": {k: keep(p) for k, p in model.named_parameters()},
        "grads": {k: keep(p.grad) for k, p in model.named_parameters()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "training": [m.training for m in model.modules()],
        "attributes": {
            name: {k: _plainly(v) for k, v in vars(m).items() if not isinstance(v, dict)}
            for name, m in model.named_modules()
            if not isinstance(m, nn.parallel.DistributedDataParallel)  # torch's bookkeeping
        },
        "hooks": [{h: list(getattr(m, h)) for h in _HOOKS} for m in model.modules()],
        "parameter hooks": {k: list(p._backward_hooks or ()) for k, p in model.named_parameters()},
        "rng": keep(torch.get_rng_state()),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function": torch._C._is_torch_function_enabled(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "attention": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
        ),
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
    }


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    """Two copies of a model have the same parameters, buffers and attributes, to rounding."""
    for (name, a), (_, b) in zip(model.named_modules(), other.named_modules(), strict=True):
        for found, expected in (
            (a._parameters, b._parameters),
            (a._buffers, b._buffers),
            (_followed(a), _followed(b)),
        ):
            assert list(found.keys()) == list(expected.keys()), name
            for key, x in expected.items():
                y = found[key]
                if isinstance(x, Tensor):
                    assert y.dtype == x.dtype
                    assert relative_error(y, x) <= EXACT, f"{name}.{key}"
                else:
                    assert y == x, f"{name}.{key}"


def _followed(module: nn.Module) -> dict[str, Any]:
    """Attributes that a step puts back, but for objects and containers."""
    followed = (Tensor, bool, int, float, str, tuple, type(None))
    return {name: x for name, x in vars(module).items() if isinstance(x, followed)}


def _plainly(x: Any) -> Any:
    """A tensor and a copy of it; the text of plain values; the identity of any other object."""
    if isinstance(x, Tensor):
        return x, x.detach().clone()
    return repr(x) if isinstance(x, (bool, int, float, str, type(None))) else id(x)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple) and len(a) == 2 and isinstance(a[1], Tensor):
        x, before = a
        if x is None or b[0] is None or b[1] is None or before is None:
            return False
        rng = x.dtype == torch.uint8
        same_values = before.shape == b[1].shape and before.dtype == b[1].dtype
        same_bits = same_values and torch.equal(before.isnan(), b[1].isnan())
        return (
            (rng or x is b[0]) and same_bits and torch.equal(before.nan_to_num(), b[1].nan_to_num())
        )
    return bool(a == b)


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """The body changes no buffer, parameter, attribute, gradient, flag, hook, mode or generator.

    Of a loss function that is no module, nothing can be said.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    before = _state(model)
    try:
        yield
    finally:  # an error that the test expects passes through here
        after = _state(model)
        for what, value in before.items():
            assert _same(value, after[what]), f"{what} changed"
