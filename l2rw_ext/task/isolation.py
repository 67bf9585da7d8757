"""What a step must leave as it found it: buffers and random number generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l2rw_ext.devices import without_autocast
from l2rw_ext.tracing.members import Members

from .process import for_steps


class Buffers:
    """A copy of buffers that can be put back.

    Both forwards of a step start from the same buffers, and afterwards the buffers are those of one
    plain training forward; after an error they are those before the step. A forward may write to a
    buffer or assign another tensor to its name: both are undone.
    """

    def __init__(self, slots: Sequence[tuple[nn.Module, str, Tensor | None]]) -> None:
        self._slots = [
            (module, name, live, None if live is None else live.detach().clone())
            for module, name, live in slots
        ]

    @classmethod
    def of(cls, model: nn.Module) -> Buffers:
        """A copy of all buffers of the model."""
        return cls(Members.of(model).buffers)

    def changed(self) -> bool:
        """Whether some buffer is another tensor than it was, or has other values.

        Values are compared and not version counters, because batch norm's kernels write running
        statistics without counting a version.
        """
        return self.assigned() is not None or any(
            live is not None and saved is not None and not torch.equal(live, saved)
            for _, _, live, saved in self._slots
        )

    def assigned(self) -> str | None:
        """The name of a buffer to which another tensor was assigned, if there is one."""
        return next(
            (
                name
                for module, name, live, _ in self._slots
                if module._buffers.get(name) is not live
            ),
            None,
        )

    def rebind(self) -> None:
        """Put the tensors back, with the values that they have."""
        for module, name, live, _ in self._slots:
            module._buffers[name] = live

    def restore(self) -> None:
        """Put the copy back.

        The copy goes through ``.data``, so that a backward that saved a buffer does not consider it
        modified: either the values it saw are the ones that are put back, or the operation saved a
        copy.
        """
        for _, _, live, saved in self._slots:
            if live is not None and saved is not None:
                live.data.copy_(saved)
        self.rebind()


class Generators:
    """The state of torch's default generators, to be put back after an error or a dry run."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def unchanged(self) -> bool:
        """Whether no random number was drawn since."""
        return torch.equal(torch.get_rng_state(), self._cpu) and all(
            torch.equal(torch.cuda.get_rng_state(d), s) for d, s in self._cuda.items()
        )

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class Snapshot:
    """Buffers and generators as they were before a step.

    While a step is ``captured``, the generators of devices belong to the recording and cannot be
    read.
    """

    def __init__(self, members: Members, *, captured: bool = False) -> None:
        self._captured = captured
        self._devices = set() if captured else members.devices()
        self.buffers = Buffers(members.buffers)
        self.generators = Generators(self._devices)
        self._begun = self.generators
        self.trained: Buffers | None = None
        """Buffers after the training forward, where a checkpoint may run parts of it again."""

    def restore_trained(self) -> None:
        """Restore the buffers to those after the training forward; the backwards are over."""
        if self.trained is not None:
            self.trained.restore()

    def mark_generators(self) -> None:
        """Make the present state of the generators the one that a further engine starts from.

        It is called after the clean batch's forward, whose masks are not to be drawn again.
        """
        self._begun = Generators(self._devices)

    def restore(self) -> None:
        """Put both back, for another try."""
        self.trained = None
        self.buffers.restore()
        self._begun.restore()

    def undo(self) -> None:
        """Put both back to before the step."""
        if self._captured:
            self.buffers.rebind()  # a captured step has written no value
        else:
            self.restore()
        self.generators.restore()


class BelowAutograd:
    """Runs operations as kernels only: neither autograd nor a function mode sees them."""

    def __enter__(self) -> None:
        self._functions = torch._C.DisableTorchFunction()
        self._functions.__enter__()
        self._autograd = torch._C._AutoDispatchBelowAutograd()
        self._autograd.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._autograd.__exit__(*error)
        self._functions.__exit__(*error)


@contextlib.contextmanager
def without_hooks(parameters: Sequence[tuple[str, nn.Parameter]]) -> Iterator[None]:
    """Disable hooks on the parameters in the body: they are for the gradient that is accumulated.

    ``autograd.grad`` with respect to a parameter would also run them on directions and on parts of
    a gradient.
    """
    hooks = [(p, p._backward_hooks) for _, p in parameters if p._backward_hooks]
    for p, _ in hooks:
        p._backward_hooks = None
    try:
        yield
    finally:
        for p, held in hooks:
            p._backward_hooks = held


@contextlib.contextmanager
def preserved(members: Members, *, always: bool, captured: bool = False) -> Iterator[Snapshot]:
    """Restore buffers and generators if the body raises, or ``always``.

    In the body hooks on the parameters do not run, compiled models run eagerly, reentrant
    checkpoints run as non-reentrant ones, and autocast is on only during the forwards.
    ``captured``: see :class:`Snapshot`.
    """
    snapshot = Snapshot(members, captured=captured)
    try:
        with without_hooks(members.parameters), without_autocast(), for_steps:
            yield snapshot
    except BaseException:
        snapshot.undo()
        raise
    if always:
        snapshot.undo()
