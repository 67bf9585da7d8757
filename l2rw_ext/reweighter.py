"""Reweighter, the class that users hold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from .compiled.backends import Backend
from .compiled.steps import Found, Steps
from .compiled.works import as_direction, direction_of_clean_batch, whole_step
from .data.batch import LossFn, check_same_kind, in_order_of, unpack
from .data.batch_size import BatchSize, given_sizes
from .data.example_record import ExampleRecord, check_index
from .direction.options import DirectionOptions
from .engines.base import Engine, Scored
from .engines.double_backward import DoubleBackward
from .engines.explanation import Explanation
from .engines.forward.engine import Forward
from .engines.layerwise.engine import Layerwise
from .engines.plain import judged
from .engines.remembered import Remembered
from .errors import NotExactError, warn
from .step.accumulation import Accumulation, accumulate_grad, filled_if
from .step.sharded import sharded_gradients
from .step.weighing import Computed, Degenerate, Gradients, Step, waits, weigh
from .task.isolation import Generators, Snapshot, preserved
from .task.task import Direction, Task, clean_direction
from .tracing.members import Members
from .tracing.writes import Written

EngineName = Literal["auto", "layerwise", "forward", "double_backward"]
Reuse = Literal["direction", "scores"]
LowMemory = Literal[False, True, "auto"]

T = TypeVar("T")

Only = Remembered | str | None
"""The one engine that a step may use, or its name; None for what the reweighter was made with."""


class Reweighter:
    """Weighs each training example by how well its gradient agrees with the clean batch's (Eq. 12).

    One call of :meth:`backward` takes the place of ``loss.backward()``: it scores the examples,
    normalises the scores to weights (Eq. 8-9) and accumulates d(Σ w_i f_i)/dθ into ``p.grad``. The
    model is not modified, and any optimiser follows.

    Scaling: Σ w_i = 1, so Σ w_i f_i is comparable to a *mean* loss and learning rates carry over.
    Whether a loss over a sequence sums or averages its positions changes the scores, as it changes
    the gradients. The clean loss is the mean over the clean batch.

    Args:
        model: any ``nn.Module``.
        loss_fn: (outputs, targets) -> unreduced losses, shape (n,). The trainable parameters of a
            loss that is an ``nn.Module`` belong to scores and gradients, and are named
            ``loss_fn.NAME``; a trainable parameter that is held by neither is an error.
        engine: ``"auto"`` takes the first engine that is exact for the model: ``"layerwise"``
            (about the price of a plain step), else ``"forward"`` (two more forwards), else
            ``"double_backward"`` with one warning. A forced engine that would be wrong is an error.
        clean_loss_fn: losses of the clean batch; default ``loss_fn``.
        on_degenerate: what to do when no score is positive, which is common at high imbalance:
            ``"zero"`` accumulates zeros, ``"uniform"`` falls back to equal weights, ``"skip"``
            leaves ``p.grad`` untouched.
        check_finite: on CUDA, wait for the device and raise at once if the clean loss is not
            finite, or if a loss or gradient is not finite whose example the engine cannot leave
            out. Without it such a step accumulates zeros and raises when its result is read. On the
            CPU the check is free and always made.
        low_memory: keep no tensors of a layer between scores and weighted gradient, and run a
            second backward instead, so that checkpoints still save memory. ``"auto"`` does so where
            a layer runs inside of ``torch.utils.checkpoint``. Numbers are the same up to rounding;
            engines other than ``"layerwise"`` keep no such tensors anyway.
        every: the clean batch is used only on every ``every``-th step; the steps in between use
            what it gave then (see ``reuse``), and ``clean`` may be left out of them.
        reuse: what the steps in between use. ``"direction"``: scores along the last direction,
            which was the clean gradient at older parameters. ``"scores"``: the last score of each
            example, by the ``index`` given to :meth:`backward`, at the price of a plain step; a
            batch with an example never scored is scored along the last direction.
        direction_decay: β of an exponential average of directions, v ← β v + (1-β) v_t: less noise
            from small clean batches, at the price of older parameters.
        layers: names of parameters or modules (or patterns such as ``"*.bias"``; ``"loss_fn"`` is
            the loss that is a module); scores are then the inner products over these parameters.
            The weighted gradient has all parameters.
        l2: the gradient of a penalty, l2 times θ, of all matrices and kernels is added to the clean
            gradient, as in the authors' published code, whose clean loss has their weight decay.
            The training losses have none.
        preconditioner: the optimizer that follows, a ``torch.optim.SGD``, ``Adam`` or ``AdamW``;
            Algorithm 1 then looks ahead along its step instead of one of plain gradient descent.
            Under Adam the inner product is <∇f_i, P v>, P = 1 / (sqrt(v̂) + eps); under SGD with
            momentum the clean gradient is taken at the point where momentum leads.
        compile: turn the whole step into one graph and give it to a backend of ``torch.compile``:
            ``True`` for ``"inductor"``, or the name of a backend; ``"eager"`` runs the graph as it
            is, which saves Python's time and needs no compiler. The first two steps of a kind run
            eagerly; then the step is traced and compiled, and compared with an eager step. A step
            that cannot be one graph runs eagerly, and a warning says why: see "Compiled steps" on
            the page of options.
        compile_options: ``mode``, ``dynamic``, ``options`` and ``fullgraph`` of ``torch.compile``;
            with ``dynamic=True`` a graph serves batches of other sizes where that is possible
            (``len(x)`` and ``int(x.shape[1])`` fix a size, ``x.shape[1]`` does not), and with
            ``fullgraph=True`` a step that cannot be one graph is an error.

    With none of the options from ``every`` to ``preconditioner``, and without
    ``on_degenerate="uniform"``, the weights are the paper's.

    Raises:
        TypeError, ValueError: an argument is not of the kind above, or parameters are sharded.

    Source: Ren, Zeng, Yang, Urtasun, *Learning to Reweight Examples for Robust Deep Learning*,
    ICML 2018, Algorithm 1.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> import l2rw_ext as l2rw
        >>> model = torch.nn.Linear(4, 3)
        >>> loss_fn = lambda out, y: F.cross_entropy(out, y, reduction="none")
        >>> reweighter = l2rw.Reweighter(model, loss_fn)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> step = reweighter.backward((x, y), (x[:2].clone(), y[:2]))
        >>> step.weights.shape, step.engine
        (torch.Size([8]), 'layerwise')
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        *,
        engine: EngineName = "auto",
        clean_loss_fn: LossFn | None = None,
        on_degenerate: Degenerate = "zero",
        check_finite: bool = False,
        low_memory: LowMemory = "auto",
        every: int = 1,
        reuse: Reuse = "direction",
        direction_decay: float = 0.0,
        layers: Sequence[str] | None = None,
        l2: float = 0.0,
        preconditioner: torch.optim.Optimizer | None = None,
        compile: bool | str = False,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, fn in (("loss_fn", loss_fn), ("clean_loss_fn", clean_loss_fn)):
            if not callable(fn) and not (name == "clean_loss_fn" and fn is None):
                raise TypeError(f"{name} must be callable, got {type(fn).__name__}")
        for name, value, allowed in (
            ("engine", engine, EngineName),
            ("on_degenerate", on_degenerate, Degenerate),
            ("reuse", reuse, Reuse),
            ("low_memory", low_memory, LowMemory),
        ):
            if value not in get_args(allowed):
                listed = ", ".join(map(repr, get_args(allowed)))
                raise ValueError(f"{name} must be one of {listed}, got {value!r}")
        if compile is False and compile_options is not None:
            raise ValueError("compile_options are given, but compile is off")
        self.model = model
        self.loss_fn = loss_fn
        self.clean_loss_fn = clean_loss_fn
        self.on_degenerate = on_degenerate
        self.check_finite = check_finite
        self.engine = engine
        self.low_memory = low_memory
        self.reuse = reuse
        self._written = Written()
        members = self._members()
        if members.shards is not None and compile is not False:
            raise TypeError("compile: a step on parameters that fully_shard shards is no graph")
        self.record = ExampleRecord()
        """Scores from the steps with an ``index``: see :class:`~l2rw_ext.ExampleRecord`."""
        self._direction_options = DirectionOptions(
            members,
            every=every,
            direction_decay=direction_decay,
            layers=layers,
            l2=l2,
            preconditioner=preconditioner,
        )
        self._engines: list[Engine] = [Layerwise(), Forward(), DoubleBackward()]
        backend = None if compile is False else Backend(compile, compile_options)
        self._compiled = None if backend is None else Steps(backend)
        self._accumulation: Accumulation | None = None
        self._warned: set[str] = set()

    def backward(
        self,
        batch: Any,
        clean: Any = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        index: Tensor | Sequence[int] | None = None,
        batch_size: int | tuple[int, int] | None = None,
    ) -> Step:
        """Score, weigh, and accumulate d(Σ w_i f_i)/dθ into ``p.grad``, like ``Tensor.backward``.

        Args:
            batch: (inputs, targets) of n training examples. ``inputs`` is a tuple or list
                (``model(*inputs)``), a mapping (``model(**inputs)``), or any other object
                (``model(inputs)``): a tensor, a packed sequence, a dataclass. Wrap a tuple, list or
                mapping that is one argument: ``(inputs,)``. n is the length of the losses.
            clean: (inputs, targets) of m clean examples, with the same arguments. May be None where
                :attr:`needs_clean` is False.
            grad_scaler: gradients are scaled by it, as those of ``grad_scaler.scale(loss)`` are;
                weights and scores do not depend on the scale. If gradients overflow, ``inf`` is
                left in ``p.grad``, so that ``grad_scaler.step`` skips the step.
            index: the examples' numbers in the training set, shape (n,), from 0; their scores are
                kept in :attr:`record`.
            batch_size: n, or (n, m), where the targets do not show it: none of their tensors has n
                rows, and none of their lists n entries.

        Returns:
            A :class:`~l2rw_ext.Step`.

        Raises:
            ValueError, TypeError: an argument, or what ``loss_fn`` returns, is not as documented;
                the clean loss is not finite; a training loss is not finite and the engine cannot
                leave its example out.
            NotExactError: a forced engine, or each engine, would give wrong numbers for this model,
                or fails where plain training does not. (An error that plain training raises as well
                comes out as it is.)
            RuntimeError: with ``fullgraph=True``, the step is not one graph; the message says why.
                Or the forward has begun to write to a tensor that no earlier step wrote to.

        After an error the model, the losses, gradients and torch's default generators are as
        before, unless the error comes from a hook while gradients are accumulated. The page
        "In a training loop" says what belongs to that.
        """
        numbers = check_index(index)
        task = self._task(batch, clean, batch_size, numbers, grad_scaler)
        if numbers is None and self.reuse == "scores" and self._direction_options.every > 1:
            raise ValueError("index must be given: reuse='scores' remembers scores by it")
        remembered = self._remembered(task, numbers)
        if self._compiled is None:
            with preserved(task.members, always=False) as snapshot:
                direction = None if remembered else self._direction(task, snapshot)
                computed = self._compute(task, snapshot, direction, remembered)
        else:
            computed = self._by_graph(self._compiled.find(task), task, remembered)
        step = computed.step
        if self._accumulation is not None:
            self._accumulation.add(computed)
        else:
            self._direction_options.advance()
            accumulate_grad(computed.gradients)
        if numbers is not None and step.engine != Remembered.name:
            self.record.add(numbers, step.scores)
        return step

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[Accumulation]:
        """Normalise once over the micro-batches of the :meth:`backward` calls inside.

        The sum of the unnormalised weighted gradients is divided once by the sum of the rectified
        scores and added to ``p.grad`` when the context ends. This is exactly the step on the union
        of the micro-batches, and it costs one more buffer of the size of the parameters. The clean
        batch of the first call gives the direction for all; the others may leave it out. The
        weights in the steps that ``backward`` returns are normalised over one micro-batch; the
        weights over all micro-batches are ``accumulation.weights`` afterwards.

        After an error inside, nothing is accumulated.

        Raises:
            RuntimeError: the context is entered twice.

        Example:
            >>> import torch
            >>> from torch.nn import functional as F
            >>> import l2rw_ext as l2rw
            >>> model = torch.nn.Linear(4, 3)
            >>> reweighter = l2rw.Reweighter(
            ...     model, lambda out, y: F.cross_entropy(out, y, reduction="none")
            ... )
            >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
            >>> with reweighter.accumulate() as accumulation:
            ...     for part in (slice(0, 4), slice(4, 8)):
            ...         _ = reweighter.backward((x[part], y[part]), (x[:2].clone(), y[:2]))
            >>> [w.shape for w in accumulation.weights]
            [torch.Size([4]), torch.Size([4])]
        """
        if self._accumulation is not None:
            raise RuntimeError("accumulate() is entered twice; its contexts cannot be nested")
        self._accumulation = accumulation = Accumulation()
        try:
            yield accumulation
            gradients = accumulation.finish()
        finally:
            self._accumulation = None
        if gradients:
            self._direction_options.advance()
            if self.on_degenerate != "skip" or not accumulation.empty:
                accumulate_grad(gradients)

    @property
    def needs_clean(self) -> bool:
        """Whether the next :meth:`backward` needs a clean batch; see ``every``."""
        if self._accumulation is not None and self._accumulation.direction is not None:
            return False
        return not self._direction_options.active or self._direction_options.due(self._members())

    def weights(
        self, batch: Any, clean: Any = None, batch_size: int | tuple[int, int] | None = None
    ) -> Tensor:
        """Return only the weights of Eq. 9, shape (n,); nothing of the model or torch changes.

        Arguments and errors are those of :meth:`backward`. With ``on_degenerate="skip"`` the
        weights of a degenerate step are zeros.
        """
        task = self._task(batch, clean, batch_size)
        with self._dry():
            if self._compiled is not None:
                return self._by_graph(self._compiled.find(task), task, None, dry=True).step.weights
            with preserved(task.members, always=True) as snapshot:
                direction = self._direction(task, snapshot)
                return self._compute(task, snapshot, direction, dry=True).step.weights

    def explain(
        self,
        batch: Any,
        clean: Any = None,
        index: Tensor | Sequence[int] | None = None,
        batch_size: int | tuple[int, int] | None = None,
    ) -> Explanation:
        """Explain which engine would run and why, and the form, cost and memory of each layer.

        Arguments and errors are those of :meth:`backward`. Nothing of the model, no gradient and no
        generator changes. Without an ``index``, the answer is for a step that computes its scores.
        Print the result, or take it as plain data from its ``as_dict()``.
        """
        numbers = check_index(index)
        task = self._task(batch, clean, batch_size, numbers)
        remembered = self._remembered(task, numbers)
        lines = self._direction_options.lines()
        if self._compiled is not None:
            lines.append(self._compiled.find(task).line)
        forced = self.engine != "auto" and remembered is None
        reasons = [f"asked for by engine={self.engine!r}"] if forced else []
        with self._dry(), preserved(task.members, always=True) as snapshot:
            direction = None if remembered else self._direction(task, snapshot)
            explanation, refusals = self._first_exact(
                task, snapshot, lambda _, scored: scored.explain(), direction, remembered
            )
        reasons += [f"{name} is not exact: {reason}" for name, reason in refusals.items()]
        reason = "; ".join(reasons) or explanation.reason
        return dataclasses.replace(explanation, reason=reason, options=tuple(lines))

    def state_dict(self) -> dict[str, Any]:
        """The memory of ``every``, ``direction_decay`` and ``index``, for a checkpoint."""
        return {
            "direction": self._direction_options.state_dict(self._members()),
            "record": self.record.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            ValueError, KeyError: the state is not of this model or not of a reweighter.
        """
        direction, record = state["direction"], state["record"]
        self._direction_options.load_state_dict(direction, self._members())
        self.record.load_state_dict(record)

    def _members(self) -> Members:
        """The members of the model and of losses that are modules, as they are now."""
        return Members.of(self.model, self.loss_fn, self.clean_loss_fn, self._written)

    def _task(
        self,
        batch: Any,
        clean: Any,
        batch_size: Any,
        index: Tensor | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> Task:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("scores need gradients: leave torch.inference_mode for this call")
        if not torch.is_grad_enabled():
            raise RuntimeError("scores need gradients: leave torch.no_grad for this call")
        n, m = given_sizes(batch_size)
        inputs, targets = unpack(batch, "training batch")
        size = BatchSize("training batch", inputs, targets, n, index)
        clean_inputs = clean_targets = clean_size = None
        if clean is not None or self.needs_clean:
            clean_inputs, clean_targets = unpack(clean, "clean batch")
            clean_inputs = in_order_of(inputs, clean_inputs)
            check_same_kind(inputs, clean_inputs)
            clean_size = BatchSize("clean batch", clean_inputs, clean_targets, m)
        members = self._members()
        parameters = members.trainable
        if not parameters:
            raise ValueError("model has no parameter that requires grad: there is nothing to score")
        for p in parameters:
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(
                    "model has uninitialised lazy parameters; run one forward before the first step"
                )
        return Task(
            self.model,
            members,
            self.loss_fn,
            self.clean_loss_fn or self.loss_fn,
            inputs,
            targets,
            clean_inputs,
            clean_targets,
            size,
            clean_size,
            parameters,
            _loss_scale(grad_scaler, parameters[0].device),
            self.low_memory,
        )

    def _compute(
        self,
        task: Task,
        snapshot: Snapshot,
        direction: Direction | None,
        only: Only = None,
        *,
        dry: bool = False,
    ) -> Computed:
        """Scores, weights and, unless ``dry``, the weighted gradient."""

        def work(engine: Engine, scored: Scored) -> Computed:
            computed = weigh(task, scored, engine.name, self.on_degenerate, self.check_finite)
            if dry or (computed.skip and self._accumulation is None):
                return computed
            form: Callable[[], Gradients]
            shards = task.members.shards
            if shards is None:
                form = functools.partial(scored.weighted_gradients, computed.for_gradient)
            else:
                form = functools.partial(
                    sharded_gradients, task, shards, scored, computed.for_gradient
                )
            gradients = judged(form, engine.name, task, snapshot, given=True)
            contaminated = computed.step._contaminated
            if not waits(scored.clean_loss, self.on_degenerate, self.check_finite):
                gradients = filled_if(contaminated, gradients, 0)
            if self._accumulation is None:  # so that a gradient scaler skips its step
                gradients = filled_if(computed.overflow, gradients, float("inf"))
            computed.gradients = gradients
            return computed

        computed, refusals = self._first_exact(task, snapshot, work, direction, only)
        snapshot.restore_trained()
        self._warn(refusals)
        return computed

    def _by_graph(
        self, found: Found, task: Task, remembered: Remembered | None, *, dry: bool = False
    ) -> Computed:
        """:meth:`_compute` and the direction before it, by their graphs if they have some."""

        def of_clean_batch(task: Task, snapshot: Snapshot) -> Direction:
            return as_direction(found.run(direction_of_clean_batch(task, snapshot)))

        def compute(task: Task, snapshot: Snapshot, engine: str | None) -> Computed:
            own = None if direction is None else direction.of(task)
            return self._compute(task, snapshot, own, remembered or engine, dry=dry)

        generators = Generators(task.members.devices())
        direction = None
        given: list[Tensor] = []
        kind: Any = None
        accumulating = self._accumulation is not None
        try:
            if remembered is not None:
                given, kind = [remembered.scores, remembered.clean_loss], remembered.name
            elif accumulating or self._direction_options.active:
                with preserved(task.members, always=False) as snapshot:
                    direction = self._direction(task, snapshot, of_clean_batch)
                assert direction is not None
                values = [direction.values.get(id(p)) for p in task.parameters]
                given = [*(v for v in values if v is not None), direction.clean_loss]
                kind = tuple([None if v is None else v.dtype for v in values])
            computed = found.run(
                whole_step(
                    task,
                    compute,
                    given,
                    (self.engine, kind, accumulating),
                    (task.clean_inputs, task.clean_targets) if given else (),
                    self.on_degenerate,
                    self.check_finite,
                    dry=dry,
                )
            )
        except BaseException:
            generators.restore()
            raise
        if dry:
            generators.restore()
        if computed.skip and not accumulating:
            computed.gradients.clear()
        return computed

    @contextlib.contextmanager
    def _dry(self) -> Iterator[None]:
        """Let the body compute directions without changing those that are held."""
        accumulation = self._accumulation
        direction = None if accumulation is None else accumulation.direction
        with self._direction_options.dry():
            try:
                yield
            finally:
                if accumulation is not None:
                    accumulation.direction = direction

    def _direction(
        self,
        task: Task,
        snapshot: Snapshot,
        of_clean_batch: Callable[[Task, Snapshot], Direction] = clean_direction,
    ) -> Direction | None:
        """The direction to score along; None for the clean batch's own."""
        accumulation = self._accumulation
        if accumulation is not None and accumulation.direction is not None:
            return accumulation.direction
        if self._direction_options.active:
            direction = self._direction_options.direction(
                task, functools.partial(of_clean_batch, task, snapshot)
            )
        elif accumulation is not None or task.members.shards is not None:
            direction = of_clean_batch(task, snapshot)
        else:
            return None
        if accumulation is not None:
            accumulation.direction = direction
        return direction

    def _remembered(self, task: Task, index: Tensor | None) -> Remembered | None:
        """The engine that reuses scores, if it is allowed and knows the whole batch."""
        if index is None or self.reuse == "direction" or self._direction_options.due(task.members):
            return None
        if not self.record.knows(index):
            return None
        scores = self.record.scores
        return Remembered(scores[index.to(scores.device)], self._direction_options.clean_loss)

    def _first_exact(
        self,
        task: Task,
        snapshot: Snapshot,
        work: Callable[[Engine, Scored], T],
        direction: Direction | None,
        only: Only = None,
    ) -> tuple[T, dict[str, str]]:
        """What ``work`` makes of the first exact scores, and why engines before are not exact."""
        if isinstance(only, Remembered):
            return work(only, only.score(task, snapshot)), {}
        given = direction is not None
        if given:
            snapshot.mark_generators()

        def attempt(engine: Engine) -> T:
            if task.members.shards is not None and not isinstance(engine, Layerwise):
                raise NotExactError("parameters are sharded, which this engine does not support")
            score = functools.partial(engine.score, task, snapshot, direction)
            return work(engine, judged(score, engine.name, task, snapshot, given=given))

        *candidates, last = (e for e in self._engines if (only or self.engine) in ("auto", e.name))
        refusals: dict[str, str] = {}  # not the errors, whose frames hold the graph
        for engine in candidates:
            try:
                return attempt(engine), refusals
            except NotExactError as error:
                refusals[engine.name] = str(error)
                engine.refuse(task, direction, str(error))
            snapshot.restore()
        try:
            return attempt(last), refusals
        except NotExactError as error:
            if not refusals:
                raise
            reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items())
            raise NotExactError(
                f"no engine is exact for this model: {reasons}; {last.name}: {error}"
            ) from error

    def _warn(self, refusals: dict[str, str]) -> None:
        """Say once for each reason that the last engine has done the step."""
        reasons = [reason.rstrip(".") for reason in refusals.values()]
        if len(reasons) < len(self._engines) - 1 or reasons[-1] in self._warned:
            return
        self._warned.add(reasons[-1])
        warn(
            f"{'; '.join(reasons)}. Using the {self._engines[-1].name} engine, which is exact and "
            "about three times slower"
        )


def _loss_scale(grad_scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    if grad_scaler is None:
        return None
    if not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(
            f"grad_scaler must be a torch.amp.GradScaler, got {type(grad_scaler).__name__}"
        )
    if not grad_scaler.is_enabled():
        return None
    scale: Tensor = grad_scaler.scale(torch.ones((), device=device))
    return scale
