"""How many examples a batch has: its losses say it, and its tensors suggest it until then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .batch import LossFn, arguments, is_plain, leaves_inside, parts_of, plain

Per = Literal["example", "position"]


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
        per: whether there is a loss for each example, or for each position of each example.

    Raises:
        ValueError: the batch is empty, or nothing in it has a length; or ``index`` has another
            length than ``given``.
    """

    def __init__(
        self,
        name: str,
        inputs: Any,
        targets: Any,
        given: int | None = None,
        index: Tensor | None = None,
        per: Per = "example",
    ) -> None:
        self._name = name
        self._per = per
        self.mask: Tensor | None = None
        """Which positions count, of the shape of the losses, once these are known; None for all."""
        self.count: Tensor | None = None
        """How many they are, shape (), float64; None if there is a loss for each example."""
        self._indexed = None if index is None else index.numel()
        self._given = given
        leaves = list(leaves_inside(inputs))
        # Not the tensors, which the caller may want to free.
        self._shapes = [x.shape for x in leaves if isinstance(x, Tensor) and x.dim()]
        self._opaque = not all(isinstance(x, Tensor) or is_plain(x) for x in leaves)
        args, kwargs = arguments(inputs)
        self._lengths = list(_lengths(targets))
        if not self._lengths:  # Only the first: masks and tables among the inputs have rows too.
            self._lengths = [n for x in (*args, *kwargs.values()) for n in _lengths(x)][:1]
        self.guess = self._suggested()
        """How many examples the batch suggests."""
        self.number = self.guess
        """How many there are, once the losses are known; the guess until then."""
        if given is not None:
            self._check_index(given)

    def like(self, inputs: Any, targets: Any) -> BatchSize:
        """The size of another batch of the same kind, which has to show it."""
        return BatchSize(self._name, inputs, targets, per=self._per)

    def losses(self, loss_fn: LossFn, outputs: Any, targets: Any) -> Tensor:
        """Call ``loss_fn`` and check that it returned one unreduced loss for each example.

        If there is one for each position, it may also return which of them count. The losses of
        the others are then zero.

        Raises:
            TypeError, ValueError: it did not.
        """
        losses, mask = loss_fn(outputs, targets), None
        if self._per == "position" and isinstance(losses, tuple) and len(losses) == 2:
            losses, mask = losses
        with torch._C.DisableTorchFunction():  # a function mode is to see the model's calls only
            self._check(losses, loss_fn, targets)
            if mask is not None:
                self._check_mask(mask, losses)
                mask = plain(mask).clone()  # which a loader may write to
            self.mask, self.number = mask, losses.shape[0]
            if self._per == "position":
                counted = torch.ones_like(losses) if mask is None else mask
                self.count = counted.sum(dtype=torch.float64)
            # Of inputs or targets of a subclass; what a step hands out and differentiates is plain.
            losses = plain(losses)
        return losses if mask is None else losses.masked_fill(~mask, 0)

    @property
    def excess(self) -> int:
        """How many more examples the caller says that there are than the batch shows."""
        said = self._given is not None or self._indexed is not None
        return self.guess - (self._shown() if any(self._lengths) else 0) if said else 0

    def _suggested(self) -> int:
        said = self._indexed if self._given is None else self._given
        return self._shown() if said is None else said

    def _shown(self) -> int:
        if not self._lengths:
            raise ValueError(
                f"{self._name}: no tensor and no list among inputs and targets says how many "
                "examples there are; say so by batch_size="
            )
        lengths = [n for n in self._lengths if n]
        if not lengths:
            raise self._empty()
        rows = [shape[0] for shape in self._shapes]
        anywhere = [size for shape in self._shapes for size in shape]
        agreed = (n for sizes in (rows, anywhere) for n in lengths if n in sizes)
        return next(agreed, lengths[0])

    def _check(self, losses: Any, loss_fn: LossFn, targets: Any) -> None:
        name, n = self._name, self.number
        if not isinstance(losses, Tensor):
            raise TypeError(
                f"{name}: loss_fn must return a tensor of shape ({n},), got {type(losses).__name__}"
            )
        if self._per == "position":
            if losses.dim() < 2 or not self._explains(losses.shape[0]):
                rows = losses.numel() // n
                hint = f"; losses.view({n}, {rows}) if its rows follow one another"
                raise ValueError(
                    f"{name}: per='position': loss_fn must return one loss for each position of "
                    f"the {n} examples, shape ({n}, ...), or (losses, mask), got shape "
                    f"{tuple(losses.shape)}{hint if losses.dim() == 1 and rows > 1 else ''}"
                )
        elif losses.dim() != 1 or not self._explains(losses.numel()):
            raise ValueError(f"{name}: {self._refusal(losses, loss_fn, targets)}")
        if losses.numel() == 0:
            raise self._empty()
        self._check_index(losses.shape[0])
        if not losses.is_floating_point():
            raise TypeError(f"{name}: loss_fn must return floating losses, got {losses.dtype}")

    def _check_mask(self, mask: Any, losses: Tensor) -> None:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        if kind != torch.bool:
            raise TypeError(f"{self._name}: the mask of losses must be a bool tensor, got {kind}")
        if mask.shape != losses.shape:
            raise ValueError(
                f"{self._name}: the mask must have the shape of the losses, {tuple(losses.shape)}, "
                f"got {tuple(mask.shape)}"
            )

    def _explains(self, count: int) -> bool:
        """Whether the caller or the batch says that there are so many examples."""
        if self._given is not None:
            return count == self._given
        if count == self._indexed:
            return True
        allowed = (
            self._opaque
            or not self._shapes
            or any(count <= shape[0] or count in shape for shape in self._shapes)
        )
        return allowed and count in self._lengths

    def _refusal(self, losses: Tensor, loss_fn: LossFn, targets: Any) -> str:
        n, shape = self.number, tuple(losses.shape)
        if losses.dim() == 1 and self._given is not None:
            return f"batch_size says that there are {n} examples, but the losses have shape {shape}"
        each = f"of the {n} examples, shape ({n},)"
        if shape == (n,):
            each = f"example, and no input has {n} rows"
        count = losses.numel()
        hint = "sum or average what belongs to one example"
        if losses.dim() == 0:
            call = "F.cross_entropy(outputs, targets, "
            if isinstance(getattr(loss_fn, "reduction", None), str):
                call = f"{type(loss_fn).__name__}("
            hint = f'give unreduced losses, for example {call}reduction="none")'
            if isinstance(targets, Tensor) and targets.dim() > 1:
                hint += ", and average the positions of each example, if it has several: "
                hint += ".flatten(1).mean(1)"
        elif losses.dim() == 1:
            if count > n and count % n == 0:
                hint += f": losses.view({n}, {count // n}).mean(1) if its rows follow one another"
                hint += ", or weigh each of them by per='position'"
            hint += f", or say by batch_size= that there are {count} examples"
        elif shape[0] == n:
            hint += ": losses.flatten(1).sum(1); or weigh each position by per='position'"
        return f"loss_fn must return one loss for each {each}, got shape {shape}; {hint}"

    def _check_index(self, count: int) -> None:
        if self._indexed is not None and self._indexed != count:
            raise ValueError(
                f"index must have one number for each of the {count} training examples, got shape "
                f"({self._indexed},)"
            )

    def _empty(self) -> ValueError:
        return ValueError(f"{self._name}: the batch is empty; give at least one example")


def _lengths(tree: Any) -> Iterator[int]:
    """The lengths of all lists and the rows of all tensors in a nest, from outside in."""
    if isinstance(tree, Tensor) and tree.dim():
        yield tree.size(0)
    elif isinstance(tree, PackedSequence):
        yield int(tree.batch_sizes[0])  # which is on the CPU wherever the data is
    elif isinstance(tree, (tuple, list)):
        yield len(tree)
    for part in parts_of(tree) or ():
        yield from _lengths(part)


def given_sizes(batch_size: Any) -> tuple[int | None, int | None]:
    """(n, m) from the argument ``batch_size``, with None for what it does not say.

    Raises:
        ValueError: it is neither a number of at least 1 nor a pair of such numbers.
    """
    if batch_size is None:
        return None, None
    sizes = batch_size if isinstance(batch_size, (tuple, list)) else (batch_size,)
    if len(sizes) not in (1, 2) or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(
            "batch_size must be the number of training examples, or a pair of those of the "
            f"training and the clean batch, each at least 1, got {batch_size!r}"
        )
    return sizes[0], (sizes[1] if len(sizes) == 2 else None)
