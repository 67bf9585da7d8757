"""What a step must leave as it found it: buffers and random number generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Buffers:
    """A copy of buffers that can be put back.

    Both forwards of a step start from the same buffers, and afterwards the buffers are those of one
    plain training forward; after an error they are those before the step.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._live = list(buffers)
        self._saved = [b.detach().clone() for b in self._live]

    @classmethod
    def of(cls, model: nn.Module) -> Buffers:
        """A copy of all buffers of the model."""
        return cls(list(model.buffers()))

    def changed(self) -> list[Tensor]:
        """The buffers whose values differ from the copy.

        Values, not version counters: batch norm's kernels write running statistics without
        counting a version.
        """
        return [
            live
            for live, saved in zip(self._live, self._saved, strict=True)
            if not torch.equal(live, saved)
        ]

    def restore(self) -> None:
        """Put the copy back.

        Through ``.data``, so that a backward that saved a buffer does not take it for modified: the
        values it saw are the ones that are put back, or the operation saved its own copy.
        """
        for live, saved in zip(self._live, self._saved, strict=True):
            live.data.copy_(saved)


class Generators:
    """The state of torch's default generators, to be put back after an error or a dry run."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def unchanged(self) -> bool:
        """Whether nothing was drawn since."""
        return torch.equal(torch.get_rng_state(), self._cpu) and all(
            torch.equal(torch.cuda.get_rng_state(d), s) for d, s in self._cuda.items()
        )

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class Snapshot:
    """Buffers and generators as they were before a step."""

    def __init__(self, model: nn.Module) -> None:
        self.buffers = Buffers.of(model)
        self.generators = Generators({p.device for p in model.parameters()})

    def restore(self) -> None:
        """Put both back."""
        self.buffers.restore()
        self.generators.restore()


@contextlib.contextmanager
def preserved(model: nn.Module, *, always: bool) -> Iterator[Snapshot]:
    """Leave buffers and generators as they were if the body raises, or ``always``."""
    snapshot = Snapshot(model)
    try:
        yield snapshot
    except BaseException:
        snapshot.restore()
        raise
    if always:
        snapshot.restore()
