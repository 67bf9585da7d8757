"""One sum of weighted gradients over several micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from l2rw_ext.distributed.group import Processes
from l2rw_ext.ops.arithmetic import accumulation_dtype
from l2rw_ext.task.task import Direction
from l2rw_ext.weighing import Proportional, own_function

from .gradients import Gradients, filled_if
from .union import check_dtypes, dtypes_of
from .weighing import Computed, effective_sample_size, equal, kept, no_weights


class Accumulation:
    """Sums Σ_i h(u_i) ∇f_i over micro-batches, to be divided once by Σ_i h(u_i).

    The sum is exact: a batch that is cut into micro-batches has the weights and the gradient of the
    whole. The object also holds one direction, that of the first micro-batch's clean batch, and the
    scores.

    Args:
        weighing: of the micro-batches; the paper's h is max(u, 0).
    """

    def __init__(self, weighing: Proportional) -> None:
        self._weighing = weighing
        self.direction: Direction | None = None
        """The direction v of the first micro-batch, which all micro-batches use."""
        self.begun = False
        """Whether the first micro-batch has begun."""
        self.error: BaseException | None = None
        """What a micro-batch has raised."""
        self._totals: dict[nn.Parameter, Tensor] = {}
        self._reached: dict[nn.Parameter, None] = {}
        self._level: Tensor | None = None
        """The level of the scores relative to which gradients are summed up, if there is one."""
        self._weighed: list[Tensor] = []
        """The scores of each micro-batch as a weighing gets them."""
        self._shapes: list[torch.Size] = []
        self._factors: list[Tensor] = []
        """The sum of h of each micro-batch that has no equal weights."""
        self._overflow: Tensor | None = None
        self._invalid: Tensor | None = None
        """Whether a user's function gave numbers that are no weights, shape (); None for ours."""
        self._recorded: list[tuple[Tensor, Tensor]] = []
        self._uniform = False
        self._weights: list[Tensor] | None = None
        self._versions: list[tuple[int, int]] = []
        """The ids of the trained parameters and their versions after the last micro-batch."""
        self._union = torch.empty(0)
        """The weights of all ranks."""

    @property
    def weights(self) -> list[Tensor]:
        """Final weights, one tensor for each micro-batch; together they sum to one or are all zero.

        Raises:
            RuntimeError: the context has not ended, or ended with an error.
            ValueError: the weighing returned no weights (on CUDA, where no step waited to know).
        """
        if self._weights is None:
            raise RuntimeError("the weights are known when the accumulate() context has ended")
        if self._invalid is not None and self._invalid:
            raise no_weights(self._weighing)
        return self._weights

    @property
    def effective_sample_size(self) -> float:
        """(Σ w_i)² / Σ w_i² over the micro-batches of all ranks; this reads the weights.

        Raises:
            RuntimeError: the context has not ended, or ended with an error.
        """
        _ = self.weights
        return effective_sample_size(self._union)

    def __repr__(self) -> str:
        if self._weights is None:
            return "Accumulation(not ended)"
        n = [w.numel() for w in self._weights]
        return f"Accumulation(n={n}, effective_sample_size={self.effective_sample_size:.4g})"

    @property
    def empty(self) -> bool:
        """Whether no weight of any rank is positive, though no gradient overflowed."""
        overflowed = self._overflow is not None and bool(self._overflow)
        return not overflowed and not bool(self._union.any())

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """A context for a micro-batch whose error all ranks will raise, if it is not theirs yet."""
        self.check()
        try:
            yield
        except BaseException as error:
            self.error = error
            raise

    def note_parameters(self, parameters: Sequence[nn.Parameter]) -> None:
        """Remember at which parameters a micro-batch has been scored."""
        self._versions = [(id(p), p._version) for p in parameters]

    def check_parameters(self, parameters: Sequence[nn.Parameter]) -> None:
        """Check that nobody has changed or exchanged parameters since the last micro-batch.

        Raises:
            RuntimeError: somebody has, so that scores would be at different parameters.
        """
        if self._versions and self._versions != [(id(p), p._version) for p in parameters]:
            raise RuntimeError(
                "parameters have changed between two micro-batches of accumulate(); call "
                "optimizer.step() when the context has ended"
            )

    def check(self) -> None:
        """Raise what a micro-batch has raised, even if it was caught."""
        if self.error is not None:
            raise self.error

    @torch.no_grad()
    def add(self, computed: Computed) -> None:
        """Add the gradient of a micro-batch, whose weights sum to one or are all zero.

        A gradient of equal weights counts as long as no score of any micro-batch was positive.
        """
        if computed.index is not None:
            self._recorded.append((computed.index, computed.step.scores))
        whole = (computed.step._union or computed.step).weighed
        self._weighed.append(computed.step.weighed)
        self._shapes.append(computed.step.scores.shape)
        self._reached.update((p, None) for p, _ in computed.gradients)
        if computed.overflow is not None:
            held = self._overflow
            self._overflow = computed.overflow if held is None else held | computed.overflow
        level = self._weighing.level(whole)
        if level is not None and self._level is not None:
            level = level.maximum(self._level)
            self._rescale(self._level, level)
        self._level = level
        factor = (kept(whole) if computed.uniform else self._weighing.shares(whole, level)).sum()
        if not computed.uniform:
            self._factors.append(factor)
        if computed.uniform or self._uniform:  # for which the host has waited
            positive = any(map(bool, self._factors))
            if self._uniform and positive:
                self._totals.clear()
            self._uniform = not positive
            if computed.uniform and positive:
                return
        for p, g in computed.gradients:
            g = g.to(accumulation_dtype(g.dtype)) * factor.to(accumulation_dtype(g.dtype))
            held = self._totals.get(p)
            self._totals[p] = g if held is None else held.add_(g)
        computed.gradients.clear()

    def _rescale(self, level: Tensor, new: Tensor) -> None:
        """Take the sums relative to another level."""
        change = self._weighing.change(level, new)
        for total in self._totals.values():
            total.mul_(change.to(total.dtype))

    def about(self) -> tuple[float, ...]:
        """What other ranks have to know at the end.

        These are the number of examples, whether no score was positive and equal weights are used
        instead, the number of examples for the record, whether gradients may have overflowed, and
        the dtype of the scores.

        Raises:
            ValueError: there was no micro-batch.
        """
        if not self._weighed:
            raise ValueError(
                "accumulate(): there was no backward() inside, and each rank needs one"
            )
        recorded = sum(index.numel() for index, _ in self._recorded)
        scores = torch.cat(self._weighed)
        overflows = self._overflow is not None
        return scores.numel(), self._uniform, recorded, overflows, dtypes_of(scores)

    @torch.no_grad()
    def finish(self, processes: Processes | None, told: Sequence[Sequence[float]]) -> Gradients:
        """The weighted gradient of all micro-batches; from now on the weights are known.

        Over several processes it is this rank's part of the sum over all of them.

        Args:
            processes: all of which call this at the same time; None for this one alone.
            told: what :meth:`about` says, by rank.
        """
        if not self._weighed:
            self._weights = []
            return []
        sizes = [part.numel() for part in self._weighed]
        scores = torch.cat(self._weighed)
        uniform, overflow, first = self._uniform, self._overflow, 0
        if processes is not None:
            check_dtypes(processes, [dtype for *_, dtype in told])
            flag = scores.new_zeros(1) if overflow is None else overflow.to(scores)[None]
            n = [int(count) for count, *_ in told]
            parts = processes.gather(torch.cat([scores, flag]), [k + 1 for k in n])
            scores = torch.cat([part[:-1] for part in parts])
            overflow = None
            if any(overflows for *_, overflows, _ in told):
                overflow = torch.stack([part[-1] for part in parts]).any()
            first = sum(n[: processes.rank])
        level = self._weighing.level(scores)
        shares = self._weighing.shares(scores, level)
        if own_function(self._weighing) is not None:
            self._invalid = ~(shares.isfinite() & (shares >= 0)).all()
        if processes is not None:
            uniform = any(alike for _, alike, *_ in told) and not bool(shares.any())
        total = (kept(scores) if uniform else shares).sum()
        self._union = equal(scores) if uniform else self._weighing(scores)
        own = self._union[first : first + sum(sizes)].split(sizes)
        self._weights = [w.view(shape) for w, shape in zip(own, self._shapes, strict=True)]
        if level is not None and self._level is not None:
            self._rescale(self._level, level)
        self._overflow = overflow
        if self._uniform and not uniform:  # a score of another rank is positive
            self._totals.clear()
        total = total + (total == 0).to(total.dtype)  # Eq. 9
        return [
            (p, (self._totals[p] / total.to(self._totals[p].dtype)).to(p.dtype))
            if p in self._totals
            else (p, torch.zeros_like(p))
            for p in self._reached
        ]

    def recorded(
        self, processes: Processes | None, told: Sequence[Sequence[float]]
    ) -> list[tuple[Tensor, Tensor]]:
        """The numbers and scores of examples for the record, of all ranks as :meth:`finish`."""
        if processes is None:
            return self._recorded
        n = [int(count) for _, _, count, *_ in told]
        if not any(n):
            return []
        none = self._weighed[0].new_empty(0)
        index = torch.cat([none.to(torch.int64), *(i.to(none.device) for i, _ in self._recorded)])
        scores = torch.cat([none, *(u for _, u in self._recorded)])
        return list(zip(processes.gather(index, n), processes.gather(scores, n), strict=True))

    def filled(self, gradients: Gradients) -> Gradients:
        """The gradients as they are delivered: infinite if some overflowed, zero if no weights."""
        gradients = filled_if(self._invalid, gradients, 0)
        return filled_if(self._overflow, gradients, float("inf"))
