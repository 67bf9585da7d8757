"""A small clean set as batches without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, default_collate

from .batch import is_plain


class CleanBatches:
    """Clean batches without end, in an order that depends only on the seed.

    The set is drawn without replacement and reshuffled after each pass. A batch may span two
    passes, so that all batches have the same size, and a set smaller than the batch is repeated in
    it.

    Args:
        data: a map-style dataset of (input, target) pairs, or a pair (inputs, targets) of tensors
            (or nests of tensors) whose dimension 0 counts examples. Graphs, or images with any
            number of boxes, need a dataset.
        batch_size: m; default the whole set.
        seed: of the order; no global generator is used or advanced.
        device: where the batches go; default where the data is.
        collate_fn: makes a pair (inputs, targets) of a list of m examples of a dataset, as that of
            a ``DataLoader`` does; default torch's.

    Raises:
        ValueError: the set is empty, its tensors disagree in length, a pair holds objects that have
            no rows, or ``batch_size`` < 1.
        TypeError: from ``next``, ``collate_fn`` returned no pair.

    Example:
        >>> import torch
        >>> from l2rw_ext import CleanBatches
        >>> clean = iter(CleanBatches((torch.arange(3.0), torch.arange(3)), batch_size=2, seed=0))
        >>> next(clean)[0].shape
        torch.Size([2])
    """

    def __init__(
        self,
        data: Any,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        collate_fn: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        self._data = data = _with_dicts(data) if isinstance(data, (tuple, list)) else data
        self._collate = collate_fn
        self._size = _length(data)
        if self._size == 0:
            raise ValueError("data: the clean set is empty")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = self._size if batch_size is None else batch_size
        self.seed = seed
        self.device = device
        self._drawn = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        positions = range(self._drawn, self._drawn + self.batch_size)
        self._drawn += self.batch_size
        return self._take([self._index(p) for p in positions])

    def state_dict(self) -> dict[str, int]:
        """The position in the cycle, for a checkpoint."""
        return {"seed": self.seed, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the position that another cycle over the same set had reached."""
        self.seed, self._drawn = state["seed"], state["drawn"]

    def _index(self, position: int) -> int:
        turn, place = divmod(position, self._size)
        if getattr(self, "_turn", None) != (self.seed, turn):
            generator = torch.Generator(device="cpu").manual_seed(hash((self.seed, turn)) % 2**63)
            order = torch.randperm(self._size, generator=generator, device="cpu")
            self._order: list[int] = order.tolist()
            self._turn = (self.seed, turn)
        return self._order[place]

    def _take(self, indices: list[int]) -> Any:
        if isinstance(self._data, (tuple, list)):
            batch = tree_map(lambda x: _rows(x, indices), tuple(self._data))
        else:
            batch = _pair(self._collate([self._data[i] for i in indices]))
        return batch if self.device is None else _moved(batch, self.device)


def _pair(batch: Any) -> tuple[Any, Any]:
    """What a collate_fn returns, if it is a pair (inputs, targets)."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return tuple(batch)
    length = f" of length {len(batch)}" if isinstance(batch, Sized) else ""
    got = type(batch).__name__ + length
    if isinstance(batch, Mapping):
        got += "; take the targets out of it: `return batch, batch.pop(NAME)`"
    raise TypeError(f"collate_fn must return a pair (inputs, targets), got {got}")


def _rows(x: Any, indices: list[int]) -> Any:
    return x[torch.tensor(indices, device=x.device)] if isinstance(x, Tensor) else x


def _with_dicts(tree: Any) -> Any:
    """The nest with a dict in place of every mapping, because torch's trees do not know all."""
    return tree_map(lambda x: _with_dicts(dict(x)) if isinstance(x, Mapping) else x, tree)


def _moved(tree: Any, device: torch.device | str) -> Any:
    """The nest on a device; a packed sequence and other objects know what of them is to move."""

    def move(x: Any) -> Any:
        if hasattr(x, "to"):
            return x.to(device)
        return _moved(dict(x), device) if isinstance(x, Mapping) else x

    return tree_map(move, tree, is_leaf=lambda x: isinstance(x, PackedSequence))


def _length(data: Any) -> int:
    if isinstance(data, (tuple, list)):
        if len(data) != 2:
            raise ValueError(
                f"data: expected a pair (inputs, targets), got {len(data)} parts; give a "
                "list of examples as a torch.utils.data.Dataset, or as tensors of all of them"
            )
        for x in tree_leaves(tuple(data)):
            if not (isinstance(x, Tensor) or is_plain(x)):
                raise ValueError(
                    f"data: an object of type {type(x).__name__} has no rows; give a dataset, and "
                    "a collate_fn if its examples need one"
                )
        lengths = {len(x) for x in tree_leaves(tuple(data)) if isinstance(x, Tensor)}
        if not lengths:
            raise ValueError("data: no tensor among inputs and targets")
        if len(lengths) > 1:
            raise ValueError(f"data: inputs and targets differ in length: {sorted(lengths)}")
        return lengths.pop()
    if isinstance(data, Mapping):
        raise ValueError(
            f"data: expected a dataset or a pair (inputs, targets), got {type(data).__name__}; "
            "give (inputs, targets), where inputs may be a dict"
        )
    indexed = isinstance(data, Dataset) or hasattr(data, "__getitem__")
    if isinstance(data, Sized) and indexed and not isinstance(data, Tensor):
        return len(data)
    if isinstance(data, Dataset):
        raise ValueError("data: the dataset has no length; a map-style dataset is needed")
    raise ValueError(f"data: expected a dataset or a pair of tensors, got {type(data).__name__}")
