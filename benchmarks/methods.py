"""The methods that are compared: plain steps, this package, and the ways it replaces.

A method is prepared once with a case of its own (model and data) and then called once for each
step. A step leaves ``p.grad`` as a training step would and returns its scores and weights.
Gradients are cleared outside of the timing, for all methods alike, and no optimiser runs.

Algorithm 1 is timed as printed, with its second forward. Where a peer can share that forward it
does. The math attention kernel is used only by peers for which the fused one has no second
derivative or no forward mode.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from l2rw_ext.compiled.capture import REHEARSALS
from l2rw_ext.reference import weights_from_scores

from .cases import Case
from .timing import capture


class Outcome(NamedTuple):
    """What a step reports; None for a plain step."""

    scores: Tensor | None
    weights: Tensor | None
    engine: str | None = None


Step = Callable[[], Outcome]
YARDSTICK = "plain_union"
CAPTURED_YARDSTICK = "plain_union_captured"
_STEPS_TO_CAPTURE = 2 + REHEARSALS


@dataclass(frozen=True)
class Method:
    """A way to make one training step.

    ``kind`` is ``plain`` (no weights), ``exact`` (held to the oracle) or ``approximate`` (its error
    is reported). ``requires`` names the module that must be installed; without ``default`` the
    method runs where it is asked for. Ratios are over the method ``yardstick``.
    """

    name: str
    label: str
    kind: str
    prepare: Callable[[Case], Step]
    requires: str | None = None
    default: bool = True
    yardstick: str = YARDSTICK

    @property
    def available(self) -> bool:
        """Whether the module that the method needs is installed."""
        return self.requires is None or importlib.util.find_spec(self.requires) is not None


def _attention(case: Case) -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH) if case.spec.attention else nullcontext()


def _backward(loss: Tensor) -> None:
    torch.autograd.backward([loss])


def _set_gradients(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g if p.grad is None else p.grad + g


def plain(case: Case) -> Step:
    """Mean loss of the training batch."""
    x, y = case.train

    def step() -> Outcome:
        _backward(case.loss(case.model(x), y).mean())
        return Outcome(None, None)

    return step


def plain_union(case: Case) -> Step:
    """Mean loss of both batches as one: the yardstick."""
    x = torch.cat([case.train[0], case.clean[0]])
    y = torch.cat([case.train[1], case.clean[1]])

    def step() -> Outcome:
        _backward(case.loss(case.model(x), y).mean())
        return Outcome(None, None)

    return step


def l2rw(case: Case, **options: Any) -> Step:
    """This package, engine chosen by itself."""
    from l2rw_ext import Reweighter

    reweighter = Reweighter(case.model, case.loss, **options)

    def step() -> Outcome:
        result = reweighter.backward(case.train, case.clean)
        return Outcome(result.scores, result.weights, result.engine)

    return step


def l2rw_kept(case: Case) -> Step:
    """This package, keeping tensors of each layer also where the model checkpoints."""
    return l2rw(case, low_memory=False)


def l2rw_captured(case: Case) -> Step:
    """This package, its steps replayed from a CUDA graph."""
    step = l2rw(case, cuda_graph=True)
    for _ in range(_STEPS_TO_CAPTURE):
        step()
    return step


def _clean_direction(case: Case, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    x_clean, y_clean = case.clean
    objective = case.loss(case.model(x_clean), y_clean).mean()
    return torch.autograd.grad(objective, parameters)


def _weighted_step(case: Case, scores: Tensor) -> Outcome:
    """The second forward and backward of Algorithm 1, lines 11-12."""
    x, y = case.train
    weights = weights_from_scores(scores)
    _backward((case.loss(case.model(x), y) * weights).sum())
    return Outcome(scores, weights)


def double_backward(case: Case) -> Step:
    """Algorithm 1: look-ahead step, backward on backward, second forward and backward."""
    named = dict(case.model.named_parameters())
    parameters = list(named.values())
    x, y = case.train
    x_clean, y_clean = case.clean

    def step() -> Outcome:
        with _attention(case):
            losses = case.loss(case.model(x), y)
            epsilon = torch.zeros_like(losses, requires_grad=True)
            gradients = torch.autograd.grad((epsilon * losses).sum(), parameters, create_graph=True)
            stepped = {name: p - g for (name, p), g in zip(named.items(), gradients, strict=True)}
            objective = case.loss(functional_call(case.model, stepped, (x_clean,)), y_clean).mean()
            (gradient,) = torch.autograd.grad(objective, epsilon)
        return _weighted_step(case, -gradient)

    return step


def forward_mode(case: Case) -> Step:
    """Scores as J v by ``torch.func.jvp``; its forward also serves the weighted backward."""
    named = dict(case.model.named_parameters())
    parameters = list(named.values())
    x, y = case.train

    def losses(values: dict[str, Tensor]) -> Tensor:
        # The transform does not let BatchNorm write to the model's own statistics.
        buffers = {name: b.clone() for name, b in case.model.named_buffers()}
        return case.loss(functional_call(case.model, {**values, **buffers}, (x,)), y)

    def step() -> Outcome:
        direction = dict(zip(named, _clean_direction(case, parameters), strict=True))
        with _attention(case):
            both: Any = jvp(losses, (named,), (direction,))
        primal, tangent = both
        scores = tangent.detach()
        weights = weights_from_scores(scores)
        _backward((primal * weights).sum())
        return Outcome(scores, weights)

    return step


def finite_difference(case: Case) -> Step:
    """Scores from two forwards at θ ± h v, h = 0.01 / |v|, then a weighted forward and backward."""
    named = dict(case.model.named_parameters())
    parameters = list(named.values())
    x, y = case.train

    def losses_at(direction: tuple[Tensor, ...], h: Tensor) -> Tensor:
        moved = {name: p + h * v for (name, p), v in zip(named.items(), direction, strict=True)}
        return case.loss(functional_call(case.model, moved, (x,)), y)

    def step() -> Outcome:
        direction = _clean_direction(case, parameters)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(direction)))
            h = 0.01 / norm
            scores = (losses_at(direction, h) - losses_at(direction, -h)) / (2 * h)
        return _weighted_step(case, scores)

    return step


def higher(case: Case) -> Step:
    """Algorithm 1 on the functional copy that ``higher`` makes."""
    library = importlib.import_module("higher")

    x, y = case.train
    x_clean, y_clean = case.clean
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1.0)

    def step() -> Outcome:
        with (
            _attention(case),
            library.innerloop_ctx(case.model, optimizer) as (model, inner),
        ):
            losses = case.loss(model(x), y)
            epsilon = torch.zeros_like(losses, requires_grad=True)
            inner.step((epsilon * losses).sum())
            objective = case.loss(model(x_clean), y_clean).mean()
            (gradient,) = torch.autograd.grad(objective, epsilon)
        return _weighted_step(case, -gradient)

    return step


def torchopt(case: Case) -> Step:
    """Algorithm 1 with TorchOpt's differentiable SGD."""
    library = importlib.import_module("torchopt")

    x, y = case.train
    x_clean, y_clean = case.clean

    def step() -> Outcome:
        inner = library.MetaSGD(case.model, lr=1.0)
        state = library.extract_state_dict(case.model, by="reference")
        with _attention(case):
            losses = case.loss(case.model(x), y)
            epsilon = torch.zeros_like(losses, requires_grad=True)
            inner.step((epsilon * losses).sum())
            objective = case.loss(case.model(x_clean), y_clean).mean()
            (gradient,) = torch.autograd.grad(objective, epsilon)
        library.recover_state_dict(case.model, state)
        return _weighted_step(case, -gradient)

    return step


def _take(parameters: list[nn.Parameter], attribute: str) -> list[Tensor]:
    """Remove the single gradients that a library left on the parameters, and the summed ones."""
    samples = []
    for p in parameters:
        samples.append(getattr(p, attribute))
        setattr(p, attribute, None)
        p.grad = None
    return samples


def _combine(
    parameters: list[nn.Parameter], samples: list[Tensor], direction: tuple[Tensor, ...]
) -> Outcome:
    """Scores and weighted gradient from stored single gradients, without a second backward."""
    parts = [g.flatten(1) @ v.flatten() for g, v in zip(samples, direction, strict=True)]
    scores = torch.stack(parts).sum(0)
    weights = weights_from_scores(scores)
    gradients = [
        (weights @ g.flatten(1)).view_as(p) for p, g in zip(parameters, samples, strict=True)
    ]
    _set_gradients(parameters, gradients)
    return Outcome(scores, weights)


def opacus(case: Case) -> Step:
    """Single gradients by Opacus hooks, contracted with v and with the weights."""
    library = importlib.import_module("opacus")
    parameters = list(case.model.parameters())
    wrapped = library.GradSampleModule(case.model, loss_reduction="sum")
    x, y = case.train

    def step() -> Outcome:
        wrapped.disable_hooks()
        direction = _clean_direction(case, parameters)
        wrapped.enable_hooks()
        _backward(case.loss(wrapped(x), y).sum())
        return _combine(parameters, _take(parameters, "grad_sample"), direction)

    return step


def backpack(case: Case) -> Step:
    """Single gradients by BackPACK, contracted with v and with the weights."""
    library = importlib.import_module("backpack")
    batch_grad = importlib.import_module("backpack.extensions").BatchGrad
    if case.spec.tokens:
        raise NotImplementedError("no extended loss for several tokens an example")
    parameters = list(case.model.parameters())
    model = library.extend(case.model)
    criterion = library.extend(nn.CrossEntropyLoss(reduction="sum"))
    x, y = case.train

    def step() -> Outcome:
        with library.disable():
            direction = _clean_direction(case, parameters)
        with library.backpack(batch_grad()):
            _backward(criterion(model(x), y))
        return _combine(parameters, _take(parameters, "grad_batch"), direction)

    return step


def captured(prepare: Callable[[Case], Step]) -> Callable[[Case], Step]:
    """The step of another method, captured once in a CUDA graph and replayed."""

    def prepare_captured(case: Case) -> Step:
        if not case.train[0].is_cuda:
            raise NotImplementedError("a CUDA graph needs a CUDA device")
        step = prepare(case)
        parameters = list(case.model.parameters())

        def from_no_gradient() -> Outcome:
            # The graph then writes gradients instead of adding to what is there.
            for p in parameters:
                p.grad = None
            return step()

        graph = capture(from_no_gradient)
        gradients = [p.grad for p in parameters]

        def replay() -> Outcome:
            outcome = graph.replay()
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            return outcome

        return replay

    return prepare_captured


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("plain", "plain, n", "plain", plain),
        Method("plain_union", "plain, union", "plain", plain_union),
        Method("l2rw_ext", "l2rw_ext", "exact", l2rw),
        Method("l2rw_ext_kept", "l2rw_ext, low_memory=False", "exact", l2rw_kept, default=False),
        Method("double_backward", "double backward", "exact", double_backward),
        Method("jvp", "torch.func.jvp", "exact", forward_mode),
        Method("finite_difference", "finite differences", "approximate", finite_difference),
        Method("higher", "higher", "exact", higher, requires="higher"),
        Method("torchopt", "TorchOpt", "exact", torchopt, requires="torchopt"),
        Method("opacus", "Opacus", "exact", opacus, requires="opacus"),
        Method("backpack", "BackPACK", "exact", backpack, requires="backpack"),
        Method(
            CAPTURED_YARDSTICK,
            "plain, union, CUDA graph",
            "plain",
            captured(plain_union),
            default=False,
            yardstick=CAPTURED_YARDSTICK,
        ),
        Method(
            "l2rw_ext_captured",
            "l2rw_ext, CUDA graph",
            "exact",
            l2rw_captured,
            default=False,
            yardstick=CAPTURED_YARDSTICK,
        ),
    )
}


def chosen(names: list[str] | None) -> list[Method]:
    """The methods of these names, or those that run when none is asked for."""
    return [
        method for method in METHODS.values() if (method.name in names if names else method.default)
    ]
