"""Reweighter, the class that users hold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from .compiled.backends import Backend
from .compiled.steps import Found, Steps
from .compiled.works import as_direction, direction_of_clean_batch, whole_step
from .data.batch import LossFn, check_same_kind, in_order_of, unpack
from .data.batch_size import BatchSize, Per, given_sizes
from .data.example_record import ExampleRecord, check_index
from .direction.options import DirectionOptions, Normalize
from .distributed.ddp import as_forward, check_wrappers, forget_forwards, inside, wrapper_of
from .distributed.direction import said_of, union_direction
from .distributed.group import Meeting, Membership, Processes
from .distributed.sharded import RanksAgreement, check_group, said_of_shards
from .engines.base import Engine, Scored
from .engines.double_backward import DoubleBackward
from .engines.explanation import Explanation
from .engines.forward.engine import Forward
from .engines.layerwise.engine import Layerwise
from .engines.plain import judged
from .engines.remembered import Remembered
from .errors import NotExactError, RankError, noted, warn
from .step.accumulation import Accumulation
from .step.gradients import Gradients, filled_if, node_of, over_ranks
from .step.left_over import LeftOver
from .step.sharded import sharded_gradients
from .step.union import Alike, about, united
from .step.weighing import Computed, Degenerate, Rules, Step, weigh
from .task.isolation import Generators, Snapshot, preserved
from .task.task import Combination, Direction, Task, check_clean_loss, clean_direction
from .tracing.members import Members
from .tracing.shards import group_of
from .tracing.writes import Written
from .weighing import Proportional, Weighing, name_of, own_function, rectified

EngineName = Literal["auto", "layerwise", "forward", "double_backward"]
Reuse = Literal["direction", "scores"]
LowMemory = Literal[False, True, "auto"]

_SHARED = (
    "per='position': the positions of an example share activations, so that layer-wise sums are "
    "not enough"
)
_TWO_GRAPHS = (
    "the step runs eagerly, because its weighing needs the scores of all ranks at once, before the "
    "gradient is formed"
)

T = TypeVar("T")

Only = Remembered | Scored | str | None
"""The one engine that a step may use, its name, or what the layer-wise engine has scored already;
None for what the reweighter was made with."""


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
        per: ``"position"`` weighs each position of each example, as the tokens of a text: then
            ``loss_fn`` returns losses of shape (n, ...), or (losses, mask) with a bool mask of that
            shape which says what counts. Scores and weights have that shape, one normalisation goes
            over all positions that count, and the clean loss is the mean over those of the clean
            batch. Positions share activations, so that no layer-wise sum is exact: ``"forward"``
            is the first engine.
        weighing: how scores become weights: a callable, scores (n,) -> weights (n,), as those in
            :mod:`l2rw_ext.weighing`; the default is the paper's. Yours is called under
            ``torch.no_grad``, and its weights are used as they are. It must not make the host wait.
        on_degenerate: what to do when no score is positive, which is common at high imbalance:
            ``"zero"`` accumulates zeros, ``"uniform"`` falls back to equal weights, ``"skip"``
            leaves ``p.grad`` untouched. With another ``weighing``, when all weights are zero.
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
        normalize: ``"example"`` takes the cosine in place of the inner product,
            ``u_i = <∇f_i, v> / (|∇f_i| |v|)``, over the parameters that scores use: an example with
            a large gradient counts for its direction alone. A gradient or a direction of zero has
            score 0. Only the layer-wise engine forms the norms; where it is not exact, or
            parameters are sharded, that is an error.
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
        process_group: the processes whose batches together are the batch of one step. ``"auto"``
            takes the group of a ``DistributedDataParallel`` around the model, or the ranks among
            which ``fully_shard`` shards it, and no other process for another model. With a group,
            scores, weights and gradient are those of one process on the union of all ranks'
            batches, which may differ in length; each rank gets the weights of its own examples, and
            a rank may have no clean batch (``clean=None``) if another has one. All ranks call the
            same methods, and an error of one is an error of all: see
            :class:`~l2rw_ext.RankError`. Gradients that no wrapper averages are summed over the
            ranks here. With None each process weighs its own batch, unless parameters are sharded.
        replicated_clean: all ranks are given the same clean batch, as
            :class:`~l2rw_ext.CleanBatches` of one seed gives it, so that nothing is sent for the
            direction.

    With none of ``weighing`` and the options from ``every`` to ``normalize``, and without
    ``on_degenerate="uniform"``, the weights are the paper's.

    Raises:
        TypeError, ValueError: an argument is not of the kind above; parameters are sharded
            otherwise than by ``fully_shard``; ``normalize`` is given with an engine other than
            ``"auto"`` and ``"layerwise"``.

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
        per: Per = "example",
        weighing: Weighing = rectified,
        on_degenerate: Degenerate = "zero",
        check_finite: bool = False,
        low_memory: LowMemory = "auto",
        every: int = 1,
        reuse: Reuse = "direction",
        direction_decay: float = 0.0,
        layers: Sequence[str] | None = None,
        l2: float = 0.0,
        preconditioner: torch.optim.Optimizer | None = None,
        normalize: Normalize | None = None,
        compile: bool | str = False,
        compile_options: Mapping[str, Any] | None = None,
        process_group: torch.distributed.ProcessGroup | Literal["auto"] | None = "auto",
        replicated_clean: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name, fn in (("loss_fn", loss_fn), ("clean_loss_fn", clean_loss_fn)):
            if not callable(fn) and not (name == "clean_loss_fn" and fn is None):
                raise TypeError(f"{name} must be callable, got {type(fn).__name__}")
        if not callable(weighing):
            raise TypeError(
                "weighing must be a callable from scores to weights, as those in l2rw_ext.weighing,"
                f" got {type(weighing).__name__}"
            )
        for name, value, allowed in (
            ("engine", engine, EngineName),
            ("per", per, Per),
            ("on_degenerate", on_degenerate, Degenerate),
            ("reuse", reuse, Reuse),
            ("low_memory", low_memory, LowMemory),
        ):
            if value not in get_args(allowed):
                listed = ", ".join(map(repr, get_args(allowed)))
                raise ValueError(f"{name} must be one of {listed}, got {value!r}")
        if normalize not in (None, *get_args(Normalize)):
            raise ValueError(f"normalize must be None or 'example', got {normalize!r}")
        if normalize is not None and engine not in ("auto", Layerwise.name):
            raise ValueError(f"normalize needs the layerwise engine, got engine={engine!r}")
        if per == "position":
            if engine == Layerwise.name or normalize is not None:
                needs = "normalize" if normalize is not None else f"engine={engine!r}"
                raise ValueError(f"{needs}: {_SHARED}")
            if reuse == "scores":
                raise ValueError("reuse='scores' remembers scores of examples, not of positions")
        if compile is False and compile_options is not None:
            raise ValueError("compile_options are given, but compile is off")
        self.model = model
        self.loss_fn = loss_fn
        self.clean_loss_fn = clean_loss_fn
        self.per = per
        self.weighing = weighing
        self.on_degenerate = on_degenerate
        self.check_finite = check_finite
        self.engine = engine
        self.low_memory = low_memory
        self.reuse = reuse
        self.replicated_clean = replicated_clean
        self._options = repr(
            (
                (on_degenerate, check_finite, every, reuse, replicated_clean, per),
                (direction_decay, layers, l2, preconditioner is None, normalize),
                name_of(weighing),
            )
        )
        self._membership = Membership(process_group)
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
            normalize=normalize,
        )
        self._layerwise = Layerwise()
        self._engines: list[Engine] = [self._layerwise, Forward(), DoubleBackward()]
        if per == "position":
            del self._engines[0]
        if normalize is not None:  # only the layer-wise engine knows norms
            del self._engines[1:]
        backend = None if compile is False else Backend(compile, compile_options)
        self._compiled = None if backend is None else Steps(backend)
        self._accumulation: Accumulation | None = None
        self._left_over = LeftOver()
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
            ValueError, TypeError: an argument, or what ``loss_fn`` or ``weighing`` returns, is not
                as documented; the clean loss is not finite; a training loss is not finite and the
                engine cannot leave its example out.
            NotExactError: a forced engine, or each engine, would give wrong numbers for this model,
                or fails where plain training does not. (An error that plain training raises as well
                comes out as it is.)
            RuntimeError: with ``fullgraph=True``, the step is not one graph; the message says why.
                Or the forward has begun to write to a tensor that no earlier step wrote to.
            RankError: over several processes, another rank has failed; the message says which, and
                why.

        After an error the model, the losses, gradients and torch's default generators are as
        before, unless the error comes from a hook while gradients are accumulated. The page
        "In a training loop" says what belongs to that.
        """
        processes, accumulation = self._processes(), self._accumulation
        followed: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if accumulation is not None and processes is not None:
            followed = accumulation.followed()
        with followed:
            task, numbers, remembered = self._begun(
                "backward()", processes, batch, clean, batch_size, index, grad_scaler
            )
            if accumulation is not None:
                accumulation.check_parameters(task.parameters)
            results: list[Computed] = []

            def step() -> Tensor | None:
                results.append(self._step(processes, task, numbers, remembered))
                if accumulation is not None:
                    accumulation.add(results[0])
                    accumulation.note_parameters(task.parameters)
                    return None
                self._direction_options.advance()
                return node_of(results[0].gradients)

            self._delivered(step, task.parameters)
        found = results[0].step
        if accumulation is None and results[0].index is not None:
            self.record.add(results[0].index, (found._union or found).scores)
        return found

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[Accumulation]:
        """Normalise once over the micro-batches of the :meth:`backward` calls inside.

        The sum of the unnormalised weighted gradients is divided once by the sum of the rectified
        scores, or of what another ``weighing`` makes of each score, and added to ``p.grad`` when
        the context ends. This is exactly the step on the union of the micro-batches, and it costs
        one more buffer of the size of the parameters. The clean batch of the first call gives the
        direction for all; the others may leave it out. The weights in the steps that ``backward``
        returns are normalised over one micro-batch; the weights over all micro-batches are
        ``accumulation.weights`` afterwards.

        After an error inside, nothing is accumulated.

        Raises:
            RuntimeError: the context is entered twice.
            ValueError: the ``weighing`` needs all scores at once, as ``top_k`` does.

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
        if not isinstance(self.weighing, Proportional):
            raise ValueError(
                f"accumulate(): weighing={name_of(self.weighing)} needs the scores of all "
                "micro-batches at once; those of the form h(u) / sum h(u) do not, such as "
                "l2rw_ext.weighing.proportional(h)"
            )
        processes = self._processes()
        told: list[list[float]] = []
        self._accumulation = accumulation = Accumulation(self.weighing)
        try:
            if processes is None:
                yield accumulation
            else:
                with processes.together("the end of accumulate()") as meeting:
                    yield accumulation
                    accumulation.check()
                    meeting.tell = accumulation.about()
                told = meeting.told
            gradients = accumulation.finish(processes, told)
            for numbers, scores in accumulation.recorded(processes, told):
                self.record.add(numbers, scores)
        except BaseException:
            if (wrapper := wrapper_of(self.model)) is not None:
                forget_forwards(wrapper)
            raise
        finally:
            self._accumulation = accumulation.error = None
        if not gradients:
            return
        self._direction_options.advance()
        if self.on_degenerate == "skip" and accumulation.empty:
            return

        def deliver() -> Tensor | None:
            nonlocal gradients
            if processes is not None and group_of(self.model) is None:
                gradients = self._over_ranks(processes, gradients)
            return node_of(accumulation.filled(gradients))

        self._delivered(deliver, self._members().trainable)

    @property
    def needs_clean(self) -> bool:
        """Whether the next :meth:`backward` needs a clean batch; see ``every``."""
        if self._accumulation is not None and self._accumulation.direction is not None:
            return False
        return not self._direction_options.active or self._direction_options.due(self._members())

    def weights(
        self, batch: Any, clean: Any = None, batch_size: int | tuple[int, int] | None = None
    ) -> Tensor:
        """Return only the weights, shape (n,); nothing of the model or torch changes.

        Arguments and errors are those of :meth:`backward`. With ``on_degenerate="skip"`` the
        weights of a degenerate step are zeros.
        """
        processes = self._processes()
        task, *_ = self._begun("weights()", processes, batch, clean, batch_size)
        with self._dry():
            return self._step(processes, task, None, None, dry=True).step.weights

    def scores(
        self, batch: Any, clean: Any = None, batch_size: int | tuple[int, int] | None = None
    ) -> Tensor:
        """Return only the scores of Eq. 7; nothing of the model or torch changes.

        Args:
            batch: as for :meth:`backward`.
            clean: a clean batch, as for :meth:`backward`, or a mapping from names to several of
                them. Scores along several directions cost one forward and backward of the training
                batch, in which each layer meets each direction, and one forward and backward of
                each clean batch. If the layer-wise engine is not exact for the model, or
                parameters are sharded, each direction has its own pass over the training batch.
                With ``compile`` they run eagerly. Over several processes the ranks give the same
                names in the same order, and for each of them at least one gives a batch. On CUDA
                the host waits for each clean loss.
            batch_size: as for :meth:`backward`; m is then that of each clean batch.

        Returns:
            u with α = η = 1, the inner products of the gradient of each *unreduced* loss and of the
            *mean* clean loss: shape (n,), or (n, q) for a mapping of q clean batches, in its order.
            float32 (float64 for float64 losses); not finite where a loss or gradient is not.

        Raises:
            ValueError: the mapping is empty; or the options ``every`` > 1 or ``direction_decay``
                are on, which remember a direction; the ranks give other names.
            RuntimeError: it is called inside of :meth:`accumulate`, which holds a direction.

        Otherwise the errors are those of :meth:`backward`. From Python 3.11 on, a note beneath an
        error says which clean batch it belongs to.

        Example:
            >>> import torch
            >>> from torch.nn import functional as F
            >>> import l2rw_ext as l2rw
            >>> model = torch.nn.Linear(4, 3)
            >>> reweighter = l2rw.Reweighter(
            ...     model, lambda out, y: F.cross_entropy(out, y, reduction="none")
            ... )
            >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
            >>> cleans = {"news": (x[:2].clone(), y[:2]), "mail": (x[2:4].clone(), y[2:4])}
            >>> reweighter.scores((x, y), cleans["news"]).shape
            torch.Size([8])
            >>> reweighter.scores((x, y), cleans).shape
            torch.Size([8, 2])
        """
        processes = self._processes()
        if isinstance(clean, Mapping):
            return self._scores_of_sets(processes, batch, clean, batch_size)
        return self._scores_of_sets(processes, batch, {"clean": clean}, batch_size)[..., 0]

    def _scores_of_sets(
        self, processes: Processes | None, batch: Any, sets: Mapping[Any, Any], batch_size: Any
    ) -> Tensor:
        """The scores along the direction of each clean batch, shape (n, q)."""
        with _together(processes, "scores()") as meeting:
            if not sets:
                raise ValueError("clean: the mapping is empty; give at least one clean batch")
            if self._direction_options.remembers:
                raise ValueError(
                    "clean: every > 1 and direction_decay remember a direction, so that scores "
                    "along another cannot be taken; make another Reweighter for them"
                )
            if self._accumulation is not None:
                raise RuntimeError("scores() runs outside of accumulate(), which holds a direction")
            meeting.tell = (zlib.crc32(repr(list(sets)).encode()),)
        if processes is not None and len(set(map(tuple, meeting.told))) > 1:
            processes.fail(ValueError("clean: the ranks give other names, or in another order"))
        tasks: dict[Any, Task] = {}
        for name, clean in sets.items():
            with noted(f"clean batch {name!r}"):
                tasks[name], *_ = self._begun(
                    f"scores() of {name!r}", processes, batch, clean, batch_size
                )
        task = next(iter(tasks.values()))
        with self._dry(), preserved(task.members, always=True) as snapshot:
            found = []
            for name, own in tasks.items():
                place = f"clean batch {name!r}"
                with _together(processes, place), noted(place):
                    find = functools.partial(clean_direction, own, snapshot)
                    found.append(self._changed_direction(processes, own, find))
                    check_clean_loss(found[-1].clean_loss)
            with _together(processes, "the scores"):
                return self._scores_along(task, snapshot, found)

    def _scores_along(self, task: Task, snapshot: Snapshot, directions: list[Direction]) -> Tensor:
        """The scores along given directions, shape (n, q), or (n, ..., q) of positions."""
        snapshot.mark_generators()
        wanted = self.engine in ("auto", self._layerwise.name) and self._layerwise in self._engines
        if wanted and task.members.shards is None:
            values = Combination([direction.values for direction in directions])
            all_of_them = dataclasses.replace(directions[0], values=values)
            score = functools.partial(self._layerwise.score, task, snapshot, all_of_them)
            try:
                scored = judged(score, self._layerwise.name, task, snapshot, given=True)
                return scored.scores
            except NotExactError as error:
                if self.engine != "auto" or len(self._engines) == 1:
                    raise
                self._layerwise.refuse(task, all_of_them, str(error))
            snapshot.restore()
        columns = []
        for direction in directions:
            scores, refusals = self._first_exact(
                task, snapshot, lambda _, scored: scored.scores, direction
            )
            columns.append(scores)
            self._warn(refusals)
            snapshot.restore()
        return torch.stack(columns, -1)

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
        processes = self._processes()
        task, _, remembered = self._begun("explain()", processes, batch, clean, batch_size, index)
        lines = self._direction_options.lines()
        if type(self.weighing) is not type(rectified):
            lines.append(f"weighing={name_of(self.weighing)}: takes the place of Eq. 8-9")
        if processes is not None and task.members.shards is not None:
            lines.append(said_of_shards(processes))
        elif processes is not None:
            lines.append(said_of(processes, replicated_clean=self.replicated_clean))
        if self._compiled is not None:
            apart = processes is not None and not isinstance(self.weighing, Proportional)
            lines.append(_TWO_GRAPHS if apart else self._compiled.find(task).line)
        forced = self.engine != "auto" and remembered is None
        reasons = [f"asked for by engine={self.engine!r}"] if forced else []
        if self.per == "position":
            reasons.append(_SHARED)
        with (
            contextlib.nullcontext() if processes is None else processes.together("explain()"),
            self._dry(),
            preserved(task.members, always=True) as snapshot,
        ):
            only = remembered or self._merged(processes, task, snapshot)
            direction = None if only else self._direction(processes, task, snapshot)
            explanation, refusals = self._first_exact(
                task, snapshot, lambda _, scored: scored.explain(), direction, only
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

    @property
    def _rules(self) -> Rules:
        return Rules(self.weighing, self.on_degenerate, self.check_finite)

    def _members(self) -> Members:
        """The members of the model and of losses that are modules, as they are now."""
        model = inside(self.model)
        return Members.of(model, self.loss_fn, self.clean_loss_fn, self._written)

    def _processes(self) -> Processes | None:
        """The ranks whose batches make one step; None for this one alone."""
        wrapper = wrapper_of(self.model)
        own = group_of(self.model) if wrapper is None else wrapper.process_group
        found = self._membership.processes(own)
        if found is None and own is None:
            self._warn_once(self._membership.alone())
        return found

    def _begun(
        self,
        place: str,
        processes: Processes | None,
        batch: Any,
        clean: Any,
        batch_size: Any,
        index: Any = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> tuple[Task, Tensor | None, Remembered | None]:
        """The checked arguments of a call, which all ranks make if one does, and remembered scores.

        Of the micro-batches in :meth:`accumulate`, ranks may have other numbers, so that they meet
        at the first one only, unless parameters are sharded.
        """

        def checked() -> tuple[Task, Tensor | None, Remembered | None]:
            numbers = check_index(index)
            if numbers is not None and self.per == "position":
                raise ValueError("index: scores are recorded by example, not by position")
            optional = not self.needs_clean or (processes is not None and not self.replicated_clean)
            task = self._task(batch, clean, batch_size, numbers, grad_scaler, optional=optional)
            check_wrappers(task.members, wrapper_of(self.model), processes)
            group = group_of(task.model)
            if group is not None:
                check_group(processes, group)
            shards = task.members.shards
            if shards is not None and processes is not None:
                task = dataclasses.replace(task, agreement=RanksAgreement(processes, shards))
            reuses = self.reuse == "scores" and self._direction_options.every > 1
            if place == "backward()" and numbers is None and reuses:
                raise ValueError("index must be given: reuse='scores' remembers scores by it")
            return task, numbers, self._remembered(task, numbers)

        accumulation = self._accumulation if place == "backward()" else None
        follows = accumulation is not None and accumulation.begun
        if processes is None or (follows and group_of(self.model) is None):
            return checked()
        if accumulation is not None:
            accumulation.begun = True
        with processes.together(place) as meeting:
            task, numbers, remembered = checked()
            has_clean = task.clean_size is not None
            said = f"{self._options}, {task.loss_scale is None}"
            meeting.tell = (
                self.needs_clean,
                has_clean,
                numbers is not None,
                remembered is not None,
                zlib.crc32(said.encode()),
            )
        due, clean_batches, indexed, known, options = zip(*meeting.told, strict=True)
        if len(set(due)) > 1:
            processes.fail(RankError("some ranks need a clean batch in this step, others do not"))
        if len(set(options)) > 1:
            processes.fail(ValueError("the ranks have given a Reweighter or a step other options"))
        if len(set(indexed)) > 1:
            processes.fail(ValueError("index must be given on all ranks or on none"))
        if self.needs_clean and not any(clean_batches):
            processes.fail(ValueError("clean batch: this step needs one, and no rank has any"))
        if self.needs_clean and task.agreement.shared and not all(clean_batches):
            processes.fail(
                ValueError("clean batch: parameters are sharded, so that each rank needs one")
            )
        return task, numbers, remembered if all(known) else None

    def _task(
        self,
        batch: Any,
        clean: Any,
        batch_size: Any,
        index: Tensor | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        *,
        optional: bool = False,
    ) -> Task:
        """The checked step; the clean batch is ``optional`` where it may be None."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError("scores need gradients: call this outside of torch.inference_mode")
        if not torch.is_grad_enabled():
            raise RuntimeError("scores need gradients: call this outside of torch.no_grad")
        n, m = given_sizes(batch_size)
        inputs, targets = unpack(batch, "training batch")
        size = BatchSize("training batch", inputs, targets, n, index, self.per)
        clean_inputs = clean_targets = clean_size = None
        if clean is not None or not optional:
            clean_inputs, clean_targets = unpack(clean, "clean batch")
            clean_inputs = in_order_of(inputs, clean_inputs)
            check_same_kind(inputs, clean_inputs)
            clean_size = BatchSize("clean batch", clean_inputs, clean_targets, m, per=self.per)
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
            inside(self.model),
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
            weighing=own_function(self.weighing),
        )

    def _step(
        self,
        processes: Processes | None,
        task: Task,
        index: Tensor | None,
        remembered: Remembered | None,
        *,
        dry: bool = False,
    ) -> Computed:
        """A step, with what is to be delivered unless it is ``dry`` or in :meth:`accumulate`."""
        shards = task.members.shards
        accumulates = self._accumulation is not None and not dry
        index = index if remembered is None else None  # whose scores are no new ones
        if processes is None or (accumulates and shards is None):
            computed = self._computed(processes, task, remembered, dry=dry, partial=False)
            computed.index = index
            return computed

        replicated = self.replicated_clean and self.needs_clean
        clean = (task.clean_inputs, task.clean_targets) if replicated else None
        alike = Alike(task.loss_scale, clean)

        def unite(computed: Computed, told: list[list[float]]) -> Computed:
            return united(
                processes,
                computed,
                told,
                None if accumulates else index,
                alike,
                self._rules,
                scaled=task.loss_scale is not None,
            )

        def at_once() -> Computed:
            def unite_at_once(computed: Computed) -> Computed:
                return unite(computed, processes.meet("the scores", *about(computed)))

            with processes.together("the step"):
                return self._computed(
                    processes, task, remembered, unite_at_once, dry=dry, partial=True
                )

        if shards is not None:
            computed = at_once()
            if accumulates:
                computed.index = index
            return computed
        before = Snapshot(task.members)
        try:
            if not isinstance(self.weighing, Proportional):
                computed = at_once()
                computed.factor = None
            else:
                with processes.together("the scores") as meeting:
                    computed = self._computed(processes, task, remembered, dry=dry, partial=True)
                    meeting.tell = about(computed)
                computed = unite(computed, meeting.told)
        except BaseException:
            before.undo()
            raise
        if dry or computed.skip:
            computed.gradients.clear()
        else:
            gradients = self._over_ranks(processes, computed.gradients, computed.factor)
            computed.gradients = filled_if(computed.overflow, gradients, float("inf"))
        return computed

    def _computed(
        self,
        processes: Processes | None,
        task: Task,
        remembered: Remembered | None,
        unite: Callable[[Computed], Computed] | None = None,
        *,
        dry: bool,
        partial: bool,
    ) -> Computed:
        """What this rank computes; ``partial`` if other ranks have scores that count too."""
        if self._compiled is not None and unite is None:
            found = self._compiled.find(task)
            return self._by_graph(processes, found, task, remembered, dry=dry, partial=partial)
        if self._compiled is not None:
            if self._compiled.backend.fullgraph:
                raise self._compiled.error(_TWO_GRAPHS)
            self._warn_once(f"compile={self._compiled.backend.name!r}: {_TWO_GRAPHS}")
        with preserved(task.members, always=dry) as snapshot:
            only = remembered or self._merged(processes, task, snapshot)
            direction = None if only else self._direction(processes, task, snapshot)
            return self._compute(task, snapshot, direction, only, unite, dry=dry, partial=partial)

    def _over_ranks(
        self, processes: Processes, gradients: Gradients, factor: Tensor | None = None
    ) -> Gradients:
        """What to deliver, so that each rank gets the sum over all of them."""
        averaged = None if wrapper_of(self.model) is None else inside(self.model)
        return over_ranks(processes, averaged, self._members().trainable, gradients, factor)

    def _delivered(
        self, step: Callable[[], Tensor | None], parameters: Sequence[nn.Parameter]
    ) -> None:
        """Run a step, as the forward of a wrapper if there is one, and deliver its gradients."""
        if self._accumulation is None:
            self._warn_once(self._left_over.mistake(parameters))
        wrapper = wrapper_of(self.model)
        if wrapper is None:
            node = step()
        else:
            # Inside of accumulate() the wrapper sees gradients at the end only.
            alone = contextlib.nullcontext() if self._accumulation is None else wrapper.no_sync()
            with alone:
                node = as_forward(wrapper, step)
        if node is not None:
            torch.autograd.backward(node, torch.ones_like(node))
            self._left_over.note(parameters)

    def _compute(
        self,
        task: Task,
        snapshot: Snapshot,
        direction: Direction | None,
        only: Only = None,
        unite: Callable[[Computed], Computed] | None = None,
        *,
        dry: bool,
        partial: bool,
    ) -> Computed:
        """Scores, weights and, unless ``dry``, the weighted gradient.

        If the weights of all ranks are to be known before the gradient is formed, as where
        parameters are sharded or a weighing needs all scores at once, ``unite`` finds them.
        """
        shards, rules = task.members.shards, self._rules
        if unite is not None:  # the scores of this rank alone are no argument of a weighing
            rules = dataclasses.replace(rules, weighing=rectified)

        def work(engine: Engine, scored: Scored) -> Computed:
            computed = weigh(
                scored.scores,
                scored.losses,
                scored.clean_loss,
                engine.name,
                rules,
                mask=task.size.mask,
                mixes=scored.cannot_exclude,
                scaled=task.loss_scale is not None,
                partial=partial,
            )
            computed.plan = scored.plan
            if unite is not None:
                computed = unite(computed)
            if dry or (computed.skip and self._accumulation is None):
                return computed
            form: Callable[[], Gradients]
            weights = computed.for_gradient if unite is None else computed.step.weights
            if shards is None:
                form = functools.partial(scored.weighted_gradients, weights)
            else:
                assert weights is not None
                if direction is not None and self._accumulation is None:
                    direction.drop()
                form = functools.partial(sharded_gradients, task, shards, scored, weights)
            gradients = judged(form, engine.name, task, snapshot, given=True)
            contaminated = computed.step._contaminated
            if not self._rules.waits(scored.clean_loss):
                gradients = filled_if(contaminated, gradients, 0)
            decided = unite is not None or not partial
            if self._accumulation is None and decided:  # so that a scaler skips its step
                gradients = filled_if(computed.overflow, gradients, float("inf"))
            computed.gradients = gradients
            return computed

        computed, refusals = self._first_exact(task, snapshot, work, direction, only)
        snapshot.restore_trained()
        self._warn(refusals)
        return computed

    def _by_graph(
        self,
        processes: Processes | None,
        found: Found,
        task: Task,
        remembered: Remembered | None,
        *,
        dry: bool,
        partial: bool,
    ) -> Computed:
        """:meth:`_compute` and the direction before it, by their graphs if they have some."""

        def of_clean_batch(task: Task, snapshot: Snapshot) -> Direction:
            return as_direction(found.run(direction_of_clean_batch(task, snapshot)))

        def compute(task: Task, snapshot: Snapshot, engine: str | None) -> Computed:
            own = None if direction is None else direction.of(task)
            only = remembered or engine
            return self._compute(task, snapshot, own, only, dry=dry, partial=partial)

        generators = Generators(task.members.devices())
        direction = None
        given: list[Tensor] = []
        kind: Any = None
        accumulating = self._accumulation is not None
        try:
            if remembered is not None:
                given, kind = [remembered.scores, remembered.clean_loss], remembered.name
            elif self._changes_direction(processes):
                with preserved(task.members, always=False) as snapshot:
                    direction = self._direction(processes, task, snapshot, of_clean_batch)
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
                    self._rules,
                    dry=dry,
                    partial=partial,
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

    def _changes_direction(self, processes: Processes | None) -> bool:
        """Whether steps are scored along another direction than that of their own clean batch."""
        over_ranks = processes is not None and not self.replicated_clean
        over_ranks = over_ranks or group_of(self.model) is not None
        return over_ranks or self._accumulation is not None or self._direction_options.active

    def _direction(
        self,
        processes: Processes | None,
        task: Task,
        snapshot: Snapshot,
        of_clean_batch: Callable[[Task, Snapshot], Direction] = clean_direction,
    ) -> Direction | None:
        """The direction to score along; None for the clean batch's own."""
        accumulation = self._accumulation
        if accumulation is not None and accumulation.direction is not None:
            return accumulation.direction
        if not self._changes_direction(processes):
            return None
        find = functools.partial(of_clean_batch, task, snapshot)
        direction = self._changed_direction(processes, task, find)
        if accumulation is not None:
            accumulation.direction = direction
        return direction

    def _changed_direction(
        self, processes: Processes | None, task: Task, find: Callable[[], Direction]
    ) -> Direction:
        """The direction of all ranks' clean batches, as options change it."""
        over_ranks = processes is not None and not self.replicated_clean
        if processes is not None and over_ranks and not task.agreement.shared:
            find = functools.partial(union_direction, processes, task, find)
        if self._direction_options.active:
            return self._direction_options.direction(task, find)
        return find()

    def _merged(self, processes: Processes | None, task: Task, snapshot: Snapshot) -> Scored | None:
        """Scores of a pass in which the ranks exchange their directions, if all can make one."""
        if processes is None or self.replicated_clean or self._changes_direction(None):
            return None
        if self.engine not in ("auto", self._layerwise.name) or self.per == "position":
            return None
        return self._layerwise.score_with_others(task, snapshot, processes)

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
        if isinstance(only, Scored):
            return work(self._layerwise, only), {}
        given = direction is not None
        if given:
            snapshot.mark_generators()

        def attempt(engine: Engine) -> T:
            score = functools.partial(engine.score, task, snapshot, direction)
            return work(engine, judged(score, engine.name, task, snapshot, given=given))

        *candidates, last = self._candidates(task, only or self.engine)
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

    def _candidates(self, task: Task, wanted: str) -> list[Engine]:
        """The engines to try, in order.

        Raises:
            NotExactError: the one that is wanted needs whole parameters.
        """
        found = [e for e in self._engines if wanted in ("auto", e.name)]
        if task.members.shards is None:
            return found
        found = [e for e in found if isinstance(e, Layerwise)]
        if not found:
            raise NotExactError(
                f"the {wanted} engine does not support sharded parameters; layerwise does"
                + (f". {_SHARED}" if self.per == "position" else "")
            )
        return found

    def _warn(self, refusals: dict[str, str]) -> None:
        """Say once for each reason that the last engine has done the step."""
        reasons = [reason.rstrip(".") for reason in refusals.values()]
        if reasons and len(reasons) == len(self._engines) - 1:
            self._warn_once(
                f"{'; '.join(reasons)}. Using the {self._engines[-1].name} engine, which is exact "
                "and about three times slower"
            )

    def _warn_once(self, text: str | None) -> None:
        if text is not None and text not in self._warned:
            self._warned.add(text)
            warn(text)


def _together(
    processes: Processes | None, place: str
) -> contextlib.AbstractContextManager[Meeting]:
    """A body at whose end the ranks meet, if there are others."""
    return contextlib.nullcontext(Meeting()) if processes is None else processes.together(place)


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
