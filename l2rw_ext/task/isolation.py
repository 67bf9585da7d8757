"""What a step must leave as it found it: state, generators of random numbers, hooks."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from l2rw_ext.devices import tracing, without_autocast
from l2rw_ext.tracing.members import Members
from l2rw_ext.tracing.writes import BeforeWrites

from .process import for_steps
from .state import State


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

    def key(self) -> bytes:
        """What tells these states from others."""
        return b"".join(bytes(s.numpy()) for s in (self._cpu, *self._cuda.values()))

    def restore(self) -> None:
        """Put the states back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


class HostGenerators:
    """The state of the generators of Python and NumPy, which a model may draw from, too.

    They are put back only where a forward is repeated to compare it with another.
    """

    def __init__(self) -> None:
        self._python = random.getstate()
        numpy = sys.modules.get("numpy")  # if it was never imported, nothing draws from it
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Put the states back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


class Snapshot:
    """State and generators as they were before a step."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._devices = members.devices()
        self.state = State(members)
        self.generators = Generators(self._devices)
        self._begun = self.generators
        self._trained: State | None = None

    def watch(self) -> AbstractContextManager[Any]:
        """A context that finds out what the forward writes to, if that is not known."""
        if self._members.written.known(self._members.kind) and not tracing():
            return contextlib.nullcontext()
        return BeforeWrites(self.state.before_writes())

    def now(self) -> State:
        """The present state, to be put back later in the step."""
        return State(self._members, start=self.state)

    def keep_trained(self) -> None:
        """Keep the present state, that of the training forward.

        It is called where another forward follows, or where a checkpoint may run parts of this one
        again.
        """
        self._trained = self.now()

    def restore_trained(self) -> None:
        """Restore the state that was kept: what could change it is over."""
        if self._trained is not None:
            _check_lost(self._trained.restore())

    def mark_generators(self) -> None:
        """Make the present state of the generators the one that a further engine starts from.

        It is called after the clean batch's forward, whose masks are not to be drawn again.
        """
        self._begun = Generators(self._devices)

    def restore_state(self) -> None:
        """Put the state back, for another forward.

        Raises:
            RuntimeError: the forward wrote to a tensor that no earlier step wrote to.
        """
        if self._members.shards is not None:
            self._members.shards.reset()
        _check_lost(self.state.restore())

    def restore(self) -> None:
        """Put both back, for another try; see :meth:`restore_state`."""
        self._trained = None
        self._begun.restore()
        self.restore_state()

    def undo(self) -> list[str]:
        """Put both back to before the step; returns the names of what could not be put back."""
        self.generators.restore()
        return self.state.restore()


def _check_lost(names: list[str]) -> None:
    if names:
        raise RuntimeError(
            f"the forward wrote to {names[0]!r}, to which no forward of an earlier step wrote, so "
            "that its values before the step are not known and it alone was not put back; the next "
            "step is watched and keeps them"
        )


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
def preserved(members: Members, *, always: bool) -> Iterator[Snapshot]:
    """Restore state and generators if the body raises, or ``always``.

    In the body hooks on the parameters do not run, compiled models run eagerly, reentrant
    checkpoints run as non-reentrant ones, and autocast is on only during the forwards.

    Raises:
        RuntimeError: see :meth:`Snapshot.restore_state`.
    """
    snapshot = Snapshot(members)
    aside = contextlib.nullcontext() if members.shards is None else members.shards.aside()
    try:
        with (
            aside,
            without_hooks(members.parameters),
            without_autocast(),
            for_steps,
            snapshot.watch(),
        ):
            yield snapshot
    except BaseException:
        snapshot.undo()
        raise
    members.written.learn(members.kind)
    if always:
        _check_lost(snapshot.undo())
