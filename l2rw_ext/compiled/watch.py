"""What a CUDA graph cannot hold, found while a step runs, on any device.

A replay repeats kernels on the tensors that the capture saw. Python does not run in it, no value
reaches the host, and no tensor that was exchanged since is met. So a step can be replayed if it
never waits for the device, and is the same each time: the same operations, on the same tensors,
with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from l2rw_ext.errors import NotCapturableError
from l2rw_ext.tracing.dispatch import DispatchMode

_aten = torch.ops.aten

_WAITING = {
    _aten._local_scalar_dense,
    _aten.equal,
    _aten.is_nonzero,
    _aten.item,
    _aten.lift_fresh,
    _aten.masked_select,
    _aten.nonzero,
    _aten.nonzero_numpy,
    _aten.argwhere,
    _aten.bincount,
    _aten.unique_consecutive,
    _aten.unique_dim,
    _aten._unique,
    _aten._unique2,
}
"""They return values to the host, or a shape that depends on values, or copy from the host."""


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation makes the host wait, if its tensors are on a device."""
    packet = func.overloadpacket
    if packet in (_aten.index, _aten.index_put, _aten.index_put_):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if packet is _aten._to_copy:
        return kwargs.get("device") not in (None, args[0].device)
    if packet is _aten.repeat_interleave:
        counts = func._overloadname != "self_int"
        return counts and kwargs.get("output_size") is None
    return packet in _WAITING


class Watch(DispatchMode):
    """Follows the operations of a step on one device.

    Args:
        device: where all tensors have to be.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        self._made: set[int] = {0}  # where a tensor without elements is
        self._refusal: NotCapturableError | None = None
        self.given: dict[int, torch.UntypedStorage] = {}
        """By address, the memory that the step reads or writes and has not made itself."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        try:
            # What is asked of tensors here is no call of the model's.
            with torch._C.DisableTorchFunction():
                return self._followed(func, args, kwargs or {})
        except NotCapturableError as error:
            self._refusal = self._refusal or error
            raise

    def _followed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = pytree.tree_leaves((args, kwargs))
        if any(isinstance(x, torch.Generator) for x in given):
            raise NotCapturableError(
                f"{func} draws from a generator of its own", "draw from torch's default one, or "
            )
        if waits(func, args, kwargs) and self._here(given):
            raise NotCapturableError(
                f"{func} makes the host wait for values of the device", "do without it, or "
            )
        out = func(*args, **kwargs)
        # Detaching reads no memory; how often torch does it depends on what else is watching.
        if func.overloadpacket is _aten.detach:
            return out
        made = pytree.tree_leaves(out)
        # Attention has the seed of its dropout on the host, and in a capture on the device.
        seeded = "_attention" in str(func)
        if not seeded:
            self._check_devices(func, [*given, *made])
        for x in _tensors(given):
            self._meet(func, x)
        told = [x for x in given if not (seeded and isinstance(x, Tensor))]
        self._calls.append((str(func), tuple(map(_described, told))))
        for x in _tensors(made):
            storage = _storage(func, x)
            if storage is not None and storage.data_ptr() not in self.given:
                self._made.add(storage.data_ptr())
        return out

    def check(self) -> None:
        """Raise again what was raised during the step, should the model have caught it."""
        if self._refusal is not None:
            raise self._refusal

    def check_same(self, before: Watch) -> None:
        """Raise if the step that was watched ``before`` did something else.

        Raises:
            NotCapturableError: names the first operation that differs.
        """
        stay = "let it stay the same from step to step, or "
        for mine, other in zip(self._calls, before._calls, strict=False):
            if mine != other:
                what = "other numbers or shapes" if mine[0] == other[0] else f"now {mine[0]}"
                raise NotCapturableError(
                    f"what the step computes changes, at {other[0]} ({what})", stay
                )
        if len(self._calls) != len(before._calls):
            raise NotCapturableError("the number of operations of the step changes", stay)
        exchanged = self.given.keys() ^ before.given.keys()
        if exchanged:
            size = next({**before.given, **self.given}[a].nbytes() for a in exchanged)
            raise NotCapturableError(
                "the model or a loss function uses a tensor that was exchanged for another "
                f"since the last step ({size} bytes)",
                "write to it in place, give it with the batch, or ",
            )

    def _here(self, given: list[Any]) -> bool:
        return any(x.device == self._device for x in _tensors(given))

    def _check_devices(self, func: Any, leaves: list[Any]) -> None:
        devices = {x.device for x in _tensors(leaves)}
        if self._device.type != "meta":  # torch asks for shapes there
            devices = {device for device in devices if device.type != "meta"}
        if len(devices) > 1:
            named = " and ".join(sorted(map(str, devices)))
            raise NotCapturableError(
                f"{func} meets tensors on {named}", f"keep all of them on {self._device}, or "
            )

    def _meet(self, func: Any, x: Tensor) -> None:
        if x.device != self._device:
            return
        storage = _storage(func, x)
        if storage is not None and storage.data_ptr() not in self._made:
            self.given.setdefault(storage.data_ptr(), storage)


def _tensors(leaves: list[Any]) -> Iterator[Tensor]:
    return (x for x in leaves if isinstance(x, Tensor))


def _storage(func: Any, x: Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor; None for a zero of forward mode, which has none."""
    if x._is_zerotensor():
        return None
    if x.layout != torch.strided:
        raise NotCapturableError(f"{func} works on a sparse tensor", "use dense ones, or ")
    return x.untyped_storage()


def _described(x: Any) -> Any:
    """An argument as the same step has it each time; a number also if it is not a number."""
    if isinstance(x, Tensor):
        return (x.shape, x.dtype)
    if x is None or isinstance(x, (bool, int, float, complex, str)):
        return repr(x)
    if isinstance(x, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return x
    return type(x)
