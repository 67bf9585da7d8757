"""The methods that are compared: plain steps, this package, and the ways it replaces.

A method is prepared once with a case of its own (model and data) and then called once for each
step. A step leaves ``p.grad`` as a training step would and returns its scores and weights.
Gradients are cleared outside of the timing, for all methods alike, and no optimiser runs.

A compiled method is one graph (``fullgraph=True``), or it fails with the reason: a step that went
back to eager execution would be timed under a wrong name.

Algorithm 1 is timed as printed, with its second forward. Where a peer can share that forward it
does. The math attention kernel is used only by peers for which the fused one has no second
derivative or no forward mode.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from l2rw_ext.reference import weights_from_scores

from .cases import Batch, Case
from .timing import capture


class Outcome(NamedTuple):
    """What a step reports; None for a plain step."""

    scores: Tensor | None
    weights: Tensor | None
    engine: str | None = None


Step = Callable[[], Outcome]
Values = dict[str, Tensor]
Wrapper = Callable[[Callable[..., Any]], Any]
YARDSTICK = "plain_union"
COMPILED = "plain_union_compiled"
ON_TRAINING_BATCH = {YARDSTICK: "plain", COMPILED: "plain_compiled"}
"""The plain step on the n training examples alone, by the one on the union that runs as it does."""
CAPTURED = "plain_union_captured"
REDUCED_OVERHEAD = "plain_union_reduce_overhead"
FIRST_STEPS = 5
"""Calls that can cost more than all later ones: a plan, its proof, tracing and compiling, and what
``mode="reduce-overhead"`` runs before it replays."""


@dataclass(frozen=True)
class Method:
    """A way to make one training step.

    ``kind`` is ``plain`` (no weights, on the training batch alone), ``union`` (a plain step on both
    batches as one; times are over the fastest of a run), ``exact`` (held to the oracle) or
    ``approximate`` (its error is reported). ``requires`` names the module that must be installed;
    without ``default`` the method runs where it is asked for. ``counterpart`` is the plain step on
    the union that runs in the same way, eagerly or compiled or from a CUDA graph: memory is
    compared with its.
    """

    name: str
    label: str
    kind: str
    prepare: Callable[[Case], Step]
    requires: str | None = None
    default: bool = True
    counterpart: str = YARDSTICK

    @property
    def compiled(self) -> bool:
        """Whether its first steps compile or capture."""
        return self.counterpart != YARDSTICK

    @property
    def on_training_batch(self) -> str | None:
        """The plain step on the training batch alone that runs in the same way, if there is one."""
        return ON_TRAINING_BATCH.get(self.counterpart)

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


def one_graph(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function compiled by ``torch.compile`` as one graph for its arguments' shapes."""
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, **options)
    return compiled


def _mean_loss(case: Case, batch: Batch, wrapped: Wrapper | None) -> Step:
    x, y = batch

    def objective(x: Tensor, y: Tensor) -> Tensor:
        return case.loss(case.model(x), y).mean()

    run = wrapped(objective) if wrapped else objective

    def step() -> Outcome:
        _backward(run(x, y))
        return Outcome(None, None)

    return step


def plain(case: Case, wrapped: Wrapper | None = None) -> Step:
    """Mean loss of the training batch; ``wrapped`` compiles model and loss."""
    return _mean_loss(case, case.train, wrapped)


def plain_union(case: Case, wrapped: Wrapper | None = None) -> Step:
    """Mean loss of both batches as one: the yardstick; ``wrapped`` compiles model and loss."""
    return _mean_loss(case, case.union, wrapped)


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


def l2rw_compiled(compile: bool | str, **options: Any) -> Callable[[Case], Step]:
    """This package, its step as one graph for a backend of ``torch.compile``."""
    return partial(l2rw, compile=compile, compile_options={"fullgraph": True, **options})


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
    named = case.parameters
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


def _losses(case: Case, values: Values, batch: Batch) -> Tensor:
    # The transforms do not let BatchNorm write to the model's own statistics.
    buffers = {name: b.clone() for name, b in case.model.named_buffers()}
    x, y = batch
    return case.loss(functional_call(case.model, {**values, **buffers}, (x,)), y)


def forward_mode(case: Case) -> Step:
    """Scores as J v by ``torch.func.jvp``; its forward also serves the weighted backward."""
    named = case.parameters
    parameters = list(named.values())

    def step() -> Outcome:
        direction = dict(zip(named, _clean_direction(case, parameters), strict=True))
        with _attention(case):
            both: Any = jvp(lambda at: _losses(case, at, case.train), (named,), (direction,))
        primal, tangent = both
        scores = tangent.detach()
        weights = weights_from_scores(scores)
        _backward((primal * weights).sum())
        return Outcome(scores, weights)

    return step


def _one_function(case: Case, compute: Callable[..., tuple[Tensor, Tensor, Values]]) -> Step:
    """A step that is one compiled function of parameters and batches, with gradients by name."""
    parameters = case.parameters
    values = {name: p.detach() for name, p in parameters.items()}
    run = one_graph(compute)

    def step() -> Outcome:
        with _attention(case):
            scores, weights, gradients = run(values, case.train, case.clean)
        _set_gradients(list(parameters.values()), [gradients[name] for name in parameters])
        return Outcome(scores, weights)

    return step


def jvp_compiled(case: Case) -> Step:
    """:func:`forward_mode` as one compiled function."""

    def compute(values: Values, batch: Batch, clean: Batch) -> tuple[Tensor, Tensor, Values]:
        direction = grad(lambda at: _losses(case, at, clean).mean())(values)

        def both(at: Values) -> Any:
            return jvp(lambda q: _losses(case, q, batch), (at,), (direction,))

        pulled: Any = vjp(both, values, has_aux=True)
        _, pull_back, scores = pulled
        weights = weights_from_scores(scores)
        (gradients,) = pull_back(weights)
        return scores, weights, gradients

    return _one_function(case, compute)


def double_backward_compiled(case: Case) -> Step:
    """:func:`double_backward` as one compiled function."""

    def compute(values: Values, batch: Batch, clean: Batch) -> tuple[Tensor, Tensor, Values]:
        def objective(epsilon: Tensor) -> Tensor:
            moved = grad(lambda at: (epsilon * _losses(case, at, batch)).sum())(values)
            stepped = {name: p - moved[name] for name, p in values.items()}
            return _losses(case, stepped, clean).mean()

        targets = batch[1]
        scores = -grad(objective)(torch.zeros(targets.size(0), device=targets.device))
        weights = weights_from_scores(scores)
        gradients = grad(lambda at: (weights * _losses(case, at, batch)).sum())(values)
        return scores, weights, gradients

    return _one_function(case, compute)


def finite_difference(case: Case) -> Step:
    """Scores from two forwards at θ ± h v, h = 0.01 / |v|, then a weighted forward and backward."""
    named = case.parameters
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
    parameters = list(case.parameters.values())
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
    parameters = list(case.parameters.values())
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


def dattri(case: Case) -> Step:
    """Scores by dattri's Grad-Dot without its random projection: single gradients by vmap."""
    task_type = importlib.import_module("dattri.task").AttributionTask
    attributor_type = importlib.import_module("dattri.algorithm.tracin").TracInAttributor

    def loss(values: Values, example: Batch) -> Tensor:
        x, y = example
        return case.loss(functional_call(case.model, values, (x[None],)), y[None]).sum()

    # The checkpoint is the model as it is, in train mode.
    task = task_type(loss, case.model, None, checkpoints_load_func=lambda model, _: model)
    device = str(case.train[0].device)
    attributor = attributor_type(task, torch.ones(1), normalized_grad=False, device=device)
    attributor.projector_kwargs = None
    train, clean = (DataLoader(TensorDataset(*b), len(b[1])) for b in (case.train, case.clean))

    def step() -> Outcome:
        with _attention(case), redirect_stderr(io.StringIO()):  # its progress bars
            scores = attributor.attribute(train, clean).mean(1).to(device)
        return _weighted_step(case, scores)

    return step


def on_cuda(prepare: Callable[[Case], Step]) -> Callable[[Case], Step]:
    """A method that needs CUDA graphs; on the CPU their backends would quietly do without."""

    def prepare_on_cuda(case: Case) -> Step:
        if not case.train[0].is_cuda:
            raise NotImplementedError("a CUDA graph needs a CUDA device")
        return prepare(case)

    return prepare_on_cuda


def plain_union_captured(case: Case) -> Step:
    """The plain step on the union, captured once in a CUDA graph and replayed."""
    step = plain_union(case)
    parameters = list(case.parameters.values())

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


def _plain_union_compiled(**options: Any) -> Callable[[Case], Step]:
    return partial(plain_union, wrapped=partial(one_graph, **options))


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("plain", "plain, n", "plain", plain),
        Method(
            "plain_compiled",
            "plain, n, compiled",
            "plain",
            partial(plain, wrapped=one_graph),
            counterpart=COMPILED,
        ),
        Method(YARDSTICK, "plain, union", "union", plain_union),
        Method(
            COMPILED,
            "plain, union, compiled",
            "union",
            _plain_union_compiled(),
            counterpart=COMPILED,
        ),
        Method("l2rw_ext", "l2rw_ext", "exact", l2rw),
        Method("l2rw_ext_flat", "l2rw_ext, flat graph", "exact", l2rw_compiled("eager")),
        Method(
            "l2rw_ext_compiled",
            "l2rw_ext, compiled",
            "exact",
            l2rw_compiled(True),
            counterpart=COMPILED,
        ),
        Method("l2rw_ext_kept", "l2rw_ext, low_memory=False", "exact", l2rw_kept, default=False),
        Method("double_backward", "double backward", "exact", double_backward),
        Method(
            "double_backward_compiled",
            "double backward, compiled",
            "exact",
            double_backward_compiled,
            default=False,
            counterpart=COMPILED,
        ),
        Method("jvp", "torch.func.jvp", "exact", forward_mode),
        Method(
            "jvp_compiled",
            "torch.func.jvp, compiled",
            "exact",
            jvp_compiled,
            default=False,
            counterpart=COMPILED,
        ),
        Method("finite_difference", "finite differences", "approximate", finite_difference),
        Method("higher", "higher", "exact", higher, requires="higher"),
        Method("torchopt", "TorchOpt", "exact", torchopt, requires="torchopt"),
        Method("opacus", "Opacus", "exact", opacus, requires="opacus"),
        Method("backpack", "BackPACK", "exact", backpack, requires="backpack"),
        Method("dattri", "dattri", "exact", dattri, requires="dattri"),
        Method(
            CAPTURED,
            "plain, union, CUDA graph",
            "union",
            on_cuda(plain_union_captured),
            default=False,
            counterpart=CAPTURED,
        ),
        Method(
            REDUCED_OVERHEAD,
            "plain, union, reduce-overhead",
            "union",
            on_cuda(_plain_union_compiled(mode="reduce-overhead")),
            default=False,
            counterpart=REDUCED_OVERHEAD,
        ),
        Method(
            "l2rw_ext_cudagraphs",
            "l2rw_ext, CUDA graph",
            "exact",
            on_cuda(l2rw_compiled("cudagraphs")),
            default=False,
            counterpart=CAPTURED,
        ),
        Method(
            "l2rw_ext_reduce_overhead",
            "l2rw_ext, reduce-overhead",
            "exact",
            on_cuda(l2rw_compiled(True, mode="reduce-overhead")),
            default=False,
            counterpart=REDUCED_OVERHEAD,
        ),
    )
}


def chosen(names: list[str] | None) -> list[Method]:
    """The methods of these names, or those that run when none is asked for."""
    return [
        method for method in METHODS.values() if (method.name in names if names else method.default)
    ]


def with_plain(methods: list[Method]) -> list[Method]:
    """The methods, and the plain steps on the training batch alone that their times are over."""
    names = {name for m in methods for name in (m.name, m.on_training_batch)}
    return [method for method in METHODS.values() if method.name in names]
