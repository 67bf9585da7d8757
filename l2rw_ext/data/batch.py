"""Batches: how inputs reach the model, how two batches are checked and merged."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from l2rw_ext import devices

Batch: TypeAlias = tuple[Any, Any]
LossFn: TypeAlias = Callable[[Any, Any], Tensor]

_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure; a tensor alone, the usual case, is its only leaf, without a walk.

    A packed sequence is one leaf: the rows of its tensors are not examples.
    """
    if isinstance(tree, Tensor):
        return [tree], None
    return pytree.tree_flatten(tree, is_leaf=lambda x: isinstance(x, PackedSequence))


def _unflatten(leaves: list[Any], structure: Any) -> Any:
    return leaves[0] if structure is None else pytree.tree_unflatten(leaves, structure)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of the model; a packed sequence is one of them."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    several = isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence)
    return (tuple(inputs) if several else (inputs,)), {}


def forward(model: nn.Module, inputs: Any) -> Any:
    """Call ``model(*x)`` for a tuple or list, ``model(**x)`` for a mapping, else ``model(x)``."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def forward_with(model: nn.Module, values: Mapping[int, Tensor], inputs: Any) -> Any:
    """:func:`forward` with other values of parameters, by id, wherever they are registered."""
    # Torch's own tying of weights goes by names, and swaps a module with two names twice; the
    # second of the values that it puts back is that of the first swap.
    named = {
        f"{prefix}.{name}" if prefix else name: values[id(p)]
        for prefix, module in model.named_modules()
        for name, p in module._parameters.items()
        if id(p) in values
    }
    args, kwargs = arguments(inputs)
    return torch.func.functional_call(model, named, args, kwargs, tie_weights=False)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a nest of tuples, lists and dicts, in order: those that :func:`merge` sees."""
    return [leaf for leaf in _flatten(tree)[0] if isinstance(leaf, Tensor)]


def has_functions(x: Tensor) -> bool:
    """Whether a tensor is of a subclass that has a say in torch's functions."""
    own = type(x).__torch_function__
    return type(x) is not Tensor and own is not torch._C._disabled_torch_function_impl


def plain(x: Tensor) -> Tensor:
    """The tensor without what a subclass of a user's adds to it."""
    return x.as_subclass(Tensor) if has_functions(x) else x


def cloned(tree: Any) -> Any:
    """The nest with copies of its tensors."""
    leaves, structure = _flatten(tree)
    copies = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
    return _unflatten(copies, structure)


def share_memory(a: Any, b: Any) -> bool:
    """Whether some tensor of one nest lies on the memory of one of the other."""
    strided = (
        {x.untyped_storage()._cdata for x in tensors(t) if x.layout == torch.strided}
        for t in (a, b)
    )
    return not set.isdisjoint(*strided)


def leaves_inside(tree: Any) -> Iterator[Any]:
    """The leaves of a nest, also those inside of mappings of any type and of dataclasses."""
    for leaf in _flatten(tree)[0]:
        parts = parts_of(leaf)
        if parts is None:
            yield leaf
        else:
            yield from leaves_inside(parts)


def parts_of(x: Any) -> list[Any] | None:
    """The parts of a tuple, list, mapping, dataclass or whatever torch's trees know; else None.

    Those trees do not know every mapping and dataclass, and take the others for leaves.
    """
    if isinstance(x, Tensor) or is_plain(x):
        return None
    if isinstance(x, (tuple, list)):
        return list(x)
    if isinstance(x, Mapping):
        return list(x.values())
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [getattr(x, field.name, None) for field in dataclasses.fields(x)]
    leaves, _ = _flatten(x)
    return None if any(leaf is x for leaf in leaves) else leaves


def is_plain(leaf: Any) -> bool:
    """Whether a leaf is a number, a string or the like, which holds no tensor."""
    return leaf is None or isinstance(leaf, _PLAIN)


def unpack(batch: Any, name: str) -> Batch:
    """Check that ``batch`` is a pair (inputs, targets) whose tensors can be used.

    Inputs that are a mapping come back as a dict.
    """
    if batch is None:
        raise TypeError(f"{name}: this step needs one, a pair (inputs, targets); got None")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        kind = type(batch).__name__
        length = f" of length {len(batch)}" if hasattr(batch, "__len__") else ""
        hint = ""
        if isinstance(batch, (tuple, list)) and len(batch) == 3:
            hint = "; the examples' numbers are given apart, as index="
        elif not isinstance(batch, (Tensor, Mapping, tuple, list)) and (
            isinstance(batch, Iterable) or hasattr(batch, "__getitem__")
        ):
            hint = "; give one batch of it, by next() or in a loop"
        raise TypeError(f"{name}: expected a pair (inputs, targets), got {kind}{length}{hint}")
    inputs, targets = batch
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    found = list(leaves_inside(inputs))
    if all(is_plain(x) or (hasattr(x, "__array__") and not isinstance(x, Tensor)) for x in found):
        raise TypeError(
            f"{name}: inputs must be a tensor, or a tuple or dict with at least one tensor, "
            f"got {type(inputs).__name__}"
        )
    for x in found:
        if not isinstance(x, Tensor):
            continue
        if not x.is_leaf:  # a leaf that requires grad may be left from a forward's requires_grad_
            raise ValueError(
                f"{name}: an input of shape {tuple(x.shape)} was computed with grad; gradients "
                "flow to parameters only, pass x.detach()"
            )
        if x.is_inference():
            raise ValueError(
                f"{name}: an input of shape {tuple(x.shape)} was made under torch.inference_mode; "
                "pass x.clone() made outside of it"
            )
    return inputs, targets


def describe(tree: Any) -> tuple[Any, ...]:
    """A hashable description of a nest of tensors: structure, shapes, dtypes and devices."""
    leaves, spec = _flatten(tree)
    return (str(spec), *map(_describe_leaf, leaves))


def _describe_leaf(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device, x.is_contiguous()
    parts = parts_of(x)
    if parts is not None:
        return type(x).__qualname__, *describe(parts)
    # The text of another object may have an address or values, which differ from batch to batch.
    return repr(x) if is_plain(x) else type(x).__qualname__


def check_same_kind(train: Any, clean: Any) -> None:
    """Raise if training and clean inputs differ in their arguments, in dtype or in device.

    Inside of an argument the two may differ, as two lists of images do.
    """
    a, spec_a = _flatten(train)
    b, spec_b = _flatten(clean)
    if spec_a != spec_b:
        if _structure(train) == _structure(clean):
            return
        raise ValueError(
            "inputs of the training and the clean batch differ in structure: "
            f"{_structure(train)} and {_structure(clean)}"
        )
    for x, y in zip(a, b, strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            continue
        if x.device != y.device:
            raise ValueError(
                f"training inputs are on {x.device}, clean inputs on {y.device}; "
                "move both to the model's device"
            )
        if x.dtype != y.dtype:
            raise ValueError(f"training inputs have dtype {x.dtype}, clean inputs {y.dtype}")


def in_order_of(train: Any, clean: Any) -> Any:
    """The clean inputs with a dict's keys in the order of the training inputs' keys."""
    if isinstance(train, dict) and isinstance(clean, dict) and train.keys() == clean.keys():
        return {key: clean[key] for key in train}
    return clean


def _structure(tree: Any) -> str:
    if isinstance(tree, dict):
        return "a dict with keys " + ", ".join(sorted(map(str, tree)))
    if isinstance(tree, (tuple, list)):
        return f"a {type(tree).__name__} of {len(tree)}"
    return f"a {type(tree).__name__}"


def merge(train: Any, clean: Any, n: int, m: int, *, known_batched: bool = False) -> Any | None:
    """Concatenate [train; clean] along dimension 0; None if that is not possible or not safe.

    A tensor is batched if its ``size(0)`` is n in the training and m in the clean batch. Every
    other leaf (a mask, a number) must be equal in both and is passed once. With n = m an equal
    tensor among several could be either, so it is not merged.

    If the host cannot read values, a tensor that is not batched must be the same object in both
    batches. Comparing batched tensors then synchronises with the device, so the comparison is left
    out if an earlier step on batches of these shapes has shown that they are ``known_batched``.
    """
    a, spec = _flatten(train)
    b, spec_b = _flatten(clean)
    if spec != spec_b:
        return None
    alone = sum(isinstance(x, Tensor) for x in a) == 1
    merged = []
    batched = False
    for x, y in zip(a, b, strict=True):
        one = _merge_leaf(x, y, n, m, alone=alone, known_batched=known_batched)
        if one is None and x is not None:
            return None
        batched = batched or one is not x
        merged.append(one)
    if not batched:
        return None
    return _unflatten(merged, spec)


def _merge_leaf(x: Any, y: Any, n: int, m: int, *, alone: bool, known_batched: bool) -> Any | None:
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        if x.layout != torch.strided or y.layout != torch.strided:
            return None  # what is asked of merged rows, sparse tensors cannot say
        if has_functions(x) and (vars(x) or vars(y)):
            return None  # of what a subclass knows beside its values, one would go for both
        if x.dim() and y.dim() and x.size(0) == n and y.size(0) == m:
            if x.shape[1:] != y.shape[1:]:
                return None
            if not alone and n == m and _equal(x, y, ask=not known_batched):
                return None
            merged = torch.cat([x, y])
            return merged if type(merged) is type(x) else None
        return x if x.shape == y.shape and _equal(x, y, ask=False) else None
    return x if x is y or (is_plain(x) and is_plain(y) and x == y) else None


def _equal(x: Tensor, y: Tensor, *, ask: bool) -> bool:
    """Whether two tensors of one shape are equal; ``ask`` allows reading values on a device."""
    if x is y:
        return True
    return (ask or devices.readable(x)) and torch.equal(x, y)


def split(outputs: Any, n: int, m: int) -> tuple[Any, Any] | None:
    """Cut merged outputs into the rows of the training and of the clean batch.

    The result is None if the outputs cannot be cut: dimension 0 of some output tensor has not size
    n + m, or some output is an object that may hold tensors and is neither a dataclass nor a dict.
    """
    leaves, spec = _flatten(outputs)
    pairs = [_split_leaf(x, n, m) for x in leaves]
    if any(pair is None for pair in pairs):
        return None
    train, clean = ([pair[k] for pair in pairs if pair is not None] for k in (0, 1))
    return _unflatten(train, spec), _unflatten(clean, spec)


def _split_leaf(x: Any, n: int, m: int) -> tuple[Any, Any] | None:
    if isinstance(x, Tensor):
        # Not the unsafe split: autograd would miss that a loss function writes to a part.
        return x.split((n, m)) if x.dim() and x.size(0) == n + m else None
    if is_plain(x):
        return x, x
    return _split_object(x, n, m)


def _split_object(x: Any, n: int, m: int) -> tuple[Any, Any] | None:
    """:func:`split` of a dataclass, or of a dict of another type whose attributes are its items.

    The result is None for an object that holds more than that.
    """
    attributes = getattr(x, "__dict__", None)
    if attributes is None:
        return None
    if isinstance(x, dict):
        if any(key not in x or x[key] is not value for key, value in attributes.items()):
            return None
        parts = split(dict(x), n, m)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type):
        if attributes.keys() != {field.name for field in dataclasses.fields(x)}:
            return None
        parts = split(dict(attributes), n, m)
    else:
        return None
    return None if parts is None else (_with_parts(x, parts[0]), _with_parts(x, parts[1]))


def _with_parts(x: Any, values: dict[Any, Any]) -> Any:
    new = copy.copy(x)
    for key, value in values.items():
        if isinstance(x, dict):
            new[key] = value
        if key in vars(x):
            object.__setattr__(new, key, value)
    return new
