"""How many examples a batch has: its losses say it, and its tensors suggest it until then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .batch import LossFn, is_plain, leaves_inside


class BatchSize:
    """The number of examples of one batch.

    The rows of a tensor may be those of several examples: the nodes of all graphs, the targets of
    all sequences. So the number of examples is the length of the losses. A loss for each row, where
    an example has several, must not pass for that: the length has to be one that the targets
    have and the inputs allow, or else one that the caller gives.

    Args:
        name: of the batch, in errors.
        inputs: checked inputs.
        targets: whatever the loss function takes.
        given: the number that the caller gives, if any.
        index: the examples' numbers in the training set, if the caller gives them, shape (n,).

    Raises:
        ValueError: the batch is empty; or ``index`` has another length than ``given``.
    """

    def __init__(
        self,
        name: str,
        inputs: Any,
        targets: Any,
        given: int | None = None,
        index: Tensor | None = None,
    ) -> None:
        self._name = name
        self._index = index
        self._given = given
        leaves = list(leaves_inside(inputs))
        self._inputs = [x for x in leaves if isinstance(x, Tensor) and x.dim()]
        self._opaque = not all(isinstance(x, Tensor) or is_plain(x) for x in leaves)
        self._lengths = list(_lengths(targets)) or [x.size(0) for x in self._inputs]
        self.number = self._suggested()
        """What the batch suggests; once the losses are known, how many there are."""
        if given is not None:
            self._check_index(given)

    def losses(self, loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
        """Call ``loss_fn`` and check that it returned one unreduced loss for each example.

        Raises:
            TypeError, ValueError: it did not.
        """
        losses = loss_fn(outputs, targets)
        with torch._C.DisableTorchFunction():  # a function mode is to see the model's calls only
            self._check(losses)
            self.number = losses.numel()
        return losses

    def _suggested(self) -> int:
        if self._given is not None:
            return self._given
        if self._index is not None:
            return self._index.numel()
        if self._lengths and not any(self._lengths):
            raise self._empty()
        rows = {x.size(0) for x in self._inputs}
        lengths = [n for n in self._lengths if n]
        agreed = [n for n in lengths if n in rows]
        return (agreed or lengths or [0])[0]

    def _check(self, losses: Any) -> None:
        name, n = self._name, self.number
        shape = f"({n},)" if n else "(n,)"
        if not isinstance(losses, Tensor):
            raise TypeError(
                f"{name}: loss_fn must return a tensor of shape {shape}, got "
                f"{type(losses).__name__}"
            )
        if losses.dim() != 1 or not self._explains(losses.numel()):
            raise ValueError(
                f"{name}: loss_fn must return one loss for each "
                f"{f'of the {n} examples' if n else 'example'}, shape {shape}, got shape "
                f"{tuple(losses.shape)}; {self._hint(losses)}"
            )
        if losses.numel() == 0:
            raise self._empty()
        self._check_index(losses.numel())
        if not losses.is_floating_point():
            raise TypeError(f"{name}: loss_fn must return floating losses, got {losses.dtype}")

    def _explains(self, count: int) -> bool:
        """Whether the caller or the batch says that there are so many examples."""
        if self._given is not None:
            return count == self._given
        if self._index is not None and count == self._index.numel():
            return True
        allowed = (
            self._opaque
            or not self._inputs
            or any(count <= x.size(0) or count in x.shape for x in self._inputs)
        )
        return allowed and count in self._lengths

    def _hint(self, losses: Tensor) -> str:
        hint = (
            'give unreduced losses, for example F.cross_entropy(outputs, targets, reduction="none")'
        )
        if losses.dim() > 1 and losses.size(0) == self.number:
            hint += ", and sum or average what belongs to one example: losses.flatten(1).sum(1)"
        elif losses.dim() == 1:
            hint += (
                ", and sum or average what belongs to one example; if there are as many examples "
                f"as losses, say so: batch_size={losses.numel()}"
            )
        return hint

    def _check_index(self, count: int) -> None:
        if self._index is not None and self._index.numel() != count:
            raise ValueError(
                f"index must have one number for each of the {count} training examples, got shape "
                f"{tuple(self._index.shape)}"
            )

    def _empty(self) -> ValueError:
        return ValueError(f"{self._name}: the batch is empty; give at least one example")


def _lengths(targets: Any) -> Iterator[int]:
    """The lengths of all lists and the rows of all tensors in a nest, from outside in."""
    if isinstance(targets, PackedSequence):
        yield int(targets.batch_sizes[0])  # which is on the CPU wherever the data is
    elif isinstance(targets, (tuple, list)):
        yield len(targets)
        for part in targets:
            yield from _lengths(part)
        return
    for leaf in leaves_inside(targets):
        if isinstance(leaf, Tensor) and leaf.dim():
            yield leaf.size(0)


def given_sizes(batch_size: Any) -> tuple[int | None, int | None]:
    """(n, m) from the argument ``batch_size``, with None for what it does not say.

    Raises:
        ValueError: it is neither a number of at least 1 nor a pair of such numbers.
    """
    if batch_size is None:
        return None, None
    pair = batch_size if isinstance(batch_size, (tuple, list)) else (batch_size, None)
    (n, m), one = (pair if len(pair) == 2 else (0, 0)), pair is not batch_size
    for size in (n,) if one else (n, m):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                "batch_size must be the number of training examples, or a pair of those of the "
                f"training and the clean batch, each at least 1, got {batch_size!r}"
            )
    return n, m
