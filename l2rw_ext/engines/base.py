"""The interface that all engines share."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..autocast import Autocast
from ..batch import LossFn, forward, per_example_losses
from ..members import Members
from ..preserve import Snapshot

if TYPE_CHECKING:
    from ..plan import Explanation, Plan


class NotExactError(RuntimeError):
    """An engine would give wrong numbers for this model; the message names what decided it."""


@dataclass(frozen=True)
class Task:
    """One step's work: the model, its losses and the two checked batches."""

    model: nn.Module
    members: Members
    loss_fn: LossFn
    clean_loss_fn: LossFn
    inputs: Any
    targets: Any
    clean_inputs: Any
    clean_targets: Any
    n: int
    m: int
    parameters: list[nn.Parameter]
    loss_scale: Tensor | None = None
    """What a gradient scaler multiplies losses by, shape (); gradients carry it, scores do not."""
    low_memory: bool = False
    """Keep nothing of a layer between scores and weighted gradient; run a second backward."""
    recorded: bool = False
    """The step is to be replayed, so that an engine may not look at its values."""
    autocast: Autocast = field(default_factory=Autocast)
    """Of the caller; the model and the loss functions run under it."""

    def scaled(self, seed: Tensor) -> Tensor:
        """The seed of a backward, times the loss scale."""
        return seed if self.loss_scale is None else seed * self.loss_scale.to(seed.dtype)

    def unscaled(self, value: Tensor) -> Tensor:
        """What comes out of a backward with :meth:`scaled` seeds, without the loss scale."""
        return value if self.loss_scale is None else value / self.loss_scale.to(value.dtype)

    def losses(self, outputs: Any) -> Tensor:
        """Unreduced training losses of the model's outputs, shape (n,)."""
        with self.autocast:
            return per_example_losses(self.loss_fn, outputs, self.targets, self.n, "training batch")

    def clean_losses(self, outputs: Any) -> Tensor:
        """Unreduced clean losses of the model's outputs, shape (m,)."""
        with self.autocast:
            return per_example_losses(
                self.clean_loss_fn, outputs, self.clean_targets, self.m, "clean batch"
            )

    def forward(self, inputs: Any) -> Any:
        """The model's outputs."""
        with self.autocast:
            return forward(self.model, inputs)

    def forward_train(self) -> Tensor:
        """One forward of the training batch, to its losses."""
        return self.losses(self.forward(self.inputs))

    def forward_clean(self) -> Tensor:
        """One forward of the clean batch, to its losses."""
        return self.clean_losses(self.forward(self.clean_inputs))


@dataclass(frozen=True)
class Direction:
    """v, the gradient of the mean clean loss, or what an option makes of it."""

    values: dict[int, Tensor]
    """By id of the parameter, in its shape; absent where zero. Without the loss scale."""
    clean_loss: Tensor
    """The mean clean loss, shape (), detached."""


def require_grad(losses: Tensor) -> None:
    """Raise if no trainable parameter reaches the training losses."""
    if not losses.requires_grad:
        raise ValueError("training batch: the losses do not depend on any trainable parameter")


class Scored(abc.ABC):
    """What a score pass leaves behind: scores, losses, and all that the weighted gradient needs."""

    plan: Plan | None = None
    """What the engine has learnt in earlier steps and goes by, where it has such."""
    mixes: ClassVar[bool] = False
    """Whether one backward mixes all examples, so that none can be left out of it."""
    scores: Tensor
    """u, shape (n,), accumulation dtype; not finite where an example is excluded."""
    losses: Tensor
    """Training losses, shape (n,), detached."""
    clean_loss: Tensor
    """Mean clean loss, shape (), detached."""

    @abc.abstractmethod
    def weighted_gradients(self, weights: Tensor | None) -> list[tuple[nn.Parameter, Tensor]]:
        """(p, d/dp Σ w_i f_i) for every parameter that the training losses reach.

        ``weights`` has shape (n,); None stands for weights that are all zero.
        """


class Engine(abc.ABC):
    """A way to compute Eq. 7 exactly."""

    name: str

    @abc.abstractmethod
    def score(self, task: Task, snapshot: Snapshot, direction: Direction | None = None) -> Scored:
        """Run the score pass.

        ``snapshot`` is the state before the step, to which the caller returns after an error. On
        success the buffers are those of one plain training forward. No gradient of a leaf is
        touched. Without a ``direction`` the engine gets that of the clean batch.

        Raises:
            NotExactError: the numbers would be wrong for this model.
        """

    @abc.abstractmethod
    def explain(
        self, task: Task, snapshot: Snapshot, direction: Direction | None = None
    ) -> Explanation:
        """What :meth:`score` would do and cost; the caller restores the snapshot.

        Raises:
            NotExactError: as :meth:`score`.
        """
