"""Parameters that ``fully_shard`` (FSDP2) shards: what a model holds, and what its forward sees.

A module holds *shards*, parameters that are DTensors. While FSDP has gathered them, in the forward
and in the backward, the module holds *whole* parameters instead, one object for each shard, whose
memory comes and goes. A step knows the whole ones, because the forward uses them. Directions and
finished gradients are sharded, because whole ones would not fit.

FSDP reduces whatever gradients its whole parameters have when it is told that the backward has
passed them. So finished gradients are given to FSDP itself, and all that it was told about dtypes,
meshes, offloading and communication holds for them. torch has no public names for the two kinds of
parameters and for that call; what is private of torch's is in this file.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

_OPERATIONS = ("unshard", "wait_for_unshard", "reshard", "post_backward")
"""What FSDP does to a group of parameters, and no part of a model's forward."""
_HOOK = "_register_pre_backward_hook"
"""Puts the hooks on outputs that gather parameters for the backward, and change no gradient."""


_ORDERS: weakref.WeakKeyDictionary[Any, Sequence[int]] = weakref.WeakKeyDictionary()
"""By the first sharded module of a model: the groups that its last forward has gathered."""


class Shards:
    """The sharded parameters of a model.

    It is made anew at each step and keeps nothing but references to FSDP's own records, so that it
    cannot be stale.

    Args:
        modules: the modules of type ``FSDPModule``, parents before their children.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        # Modules may share a state, as those of ``fully_shard([a, b])`` do.
        self._modules = list({id(m._get_fsdp_state()): m for m in modules}.values())
        self._states = [module._get_fsdp_state() for module in self._modules]
        self._groups = [group for module in self._modules for group in _groups_of(module)]
        self._owner = {id(group): m for m in self._modules for group in _groups_of(m)}
        self.whole: dict[int, nn.Parameter] = {}
        """By id of whatever the model may hold in a parameter's place: the whole parameter."""
        self._record: dict[int, Any] = {}
        """By id of a whole parameter: FSDP's record of it."""
        self._gathered: list[int] = []
        """Numbers of the groups that the present forward has gathered, in order."""
        self._together: Callable[[int], int] | None = None
        """What is called before a group is gathered in a first forward: see :meth:`owing`."""
        self._divisor = 1.0
        """What FSDP divides sums of gradients by."""

    @classmethod
    def of(cls, modules: Sequence[tuple[str, nn.Module]]) -> Shards | None:
        """The shards of a model; None if ``fully_shard`` has sharded none of it.

        What was never gathered is gathered once, one module after the other, which all processes
        have to do together.

        Raises:
            TypeError: parameters are sharded in a way that no engine supports.
        """
        # Modules that were never imported have made nothing; importing them takes seconds.
        fsdp = sys.modules.get("torch.distributed.fsdp")
        tensor = sys.modules.get("torch.distributed.tensor")
        if fsdp is None or tensor is None:
            return None
        for name, module in modules:
            if isinstance(module, fsdp.FullyShardedDataParallel):
                raise TypeError(
                    f"the parameters of {repr(name) if name else 'the model'} are sharded by "
                    "FullyShardedDataParallel, which no engine supports; shard them by "
                    "torch.distributed.fsdp.fully_shard"
                )
        found = cls([module for _, module in modules if isinstance(module, fsdp.FSDPModule)])
        if found._groups:
            if not hasattr(fsdp.FSDPModule, "reset_iter_state"):
                raise TypeError("parameters that fully_shard has sharded need torch 2.13 or newer")
            found._gather_once()
            found._check_shared({id(module): name for name, module in modules})
        for prefix, module in modules:
            for name, p in module._parameters.items():
                if p is not None:
                    found._check(f"{prefix}.{name}" if prefix else name, p, tensor.DTensor)
        return found if found._groups else None

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """Whole trainable parameters in groups, in the order in which a backward finishes them."""
        groups = ([each.unsharded_param for each in g.fsdp_params] for g in reversed(self._groups))
        return [[p for p in group if p.requires_grad] for group in groups]

    def shard_of(self, whole: nn.Parameter) -> nn.Parameter:
        """The shard, which users and optimisers hold; a parameter that is not sharded itself."""
        record = self._record.get(id(whole))
        return whole if record is None else record.sharded_param

    @contextlib.contextmanager
    def gathered(self, ids: Collection[int]) -> Iterator[None]:
        """In the body, the whole parameters with these ids have their values."""
        gathered = [
            self._owner[id(group)]
            for group in self._groups
            if not group.is_unsharded
            and any(id(e.unsharded_param) in ids for e in group.fsdp_params)
        ]
        for module in gathered:
            module.unshard()
        try:
            yield
        finally:
            for module in gathered:
                module.reshard()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A context for a step: gradients in the body have nothing to do with those before it.

        In the body no parameter has a gradient from before or a hook that takes one, and FSDP
        reduces each gradient at once. No mode sees what FSDP does. Nothing is gathered when it
        begins and when it ends: what a forward without a backward has gathered, FSDP would use
        again after an optimiser has changed the shards.
        """
        kept = [(owner, name, getattr(owner, name)) for owner, name, _ in self._fields()]
        for owner, name, value in self._fields():
            setattr(owner, name, value)
        operations = [(group, name) for group in self._groups for name in _OPERATIONS]
        operations += [(state, _HOOK) for state in self._states]
        for owner, name in operations:
            setattr(owner, name, _without_modes(getattr(owner, name)))
        for number, group in enumerate(self._groups):
            group.unshard = functools.partial(self._unshard, number, group.unshard)
        try:
            self.reset()
            yield
        finally:
            self.reset()
            for owner, name in operations:
                delattr(owner, name)
            for owner, name, value in kept:
                setattr(owner, name, value)

    @contextlib.contextmanager
    def owing(self, together: Callable[[int], int]) -> Iterator[None]:
        """A body that runs the model forward once; if it fails, what it had to gather is gathered.

        That is what the last forward has gathered. If there was none, the processes tell each other
        before each group which it is, and one that has failed follows the others.

        Args:
            together: called by all processes at the same time: the number of a group, or -1 for
                none -> the largest of those that the processes say.
        """
        order = _ORDERS.get(self._modules[0])
        self._gathered = []
        self._together = together if order is None else None
        try:
            yield
        except Exception:
            self._together = None
            owed = iter(lambda: together(-1), -1) if order is None else order[len(self._gathered) :]
            for number in owed:
                self._groups[number].reshard()
                self._groups[number].unshard()
                self._groups[number].wait_for_unshard()
            raise
        self._together = None
        if order is None:
            together(-1)

    def remember_order(self) -> None:
        """Remember what the forward has gathered, which has succeeded in all processes."""
        _ORDERS[self._modules[0]] = tuple(self._gathered)

    def _unshard(
        self, number: int, unshard: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        """Gather a group, and note that it was to be gathered."""
        group = self._groups[number]
        if group._all_gather_result is None and not group.is_unsharded:
            self._gathered.append(number)
            if self._together is not None:
                self._together(number)
        unshard(*args, **kwargs)

    @contextlib.contextmanager
    def moved(self, point: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
        """Give shards other values in the body, which FSDP gathers there."""
        before = [(p, p.detach().clone()) for p in point]

        def move(values: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
            self.reset()  # what is gathered has the values from before
            for p, value in values:
                p.detach().copy_(value)

        try:
            move(point.items())
            yield
        finally:
            move(before)

    def reset(self) -> None:
        """Let FSDP forget a forward or a backward that did not come to its end."""
        for module, state in zip(self._modules, self._states, strict=True):
            if state._is_root:
                module.reset_iter_state()

    def give(self, gradients: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
        """Add to the gradients that FSDP reduces when the backward has passed their parameters.

        They are multiplied by what FSDP divides by: the result is the sum over processes.
        """
        for p, g in gradients:
            g = (g * self._divisor).to(p.dtype)
            p.grad = g if p.grad is None else p.grad + g

    def gradients(
        self, losses: Tensor, parameters: Sequence[nn.Parameter], seed: Tensor, *, retain: bool
    ) -> dict[int, Tensor]:
        """Gradients summed over processes, by id of the whole parameter, as sharded as it is."""
        seed = seed * self._divisor
        torch.autograd.backward(losses, seed, retain_graph=retain, inputs=list(parameters))
        return self.take()

    def reduce(self, parameters: Collection[nn.Parameter]) -> None:
        """Let FSDP reduce the gradients that these parameters and others of their groups have."""
        ids = set(map(id, parameters))
        for group in self._groups:
            if any(id(each.unsharded_param) in ids for each in group.fsdp_params):
                group.post_backward()

    def take(self) -> dict[int, Tensor]:
        """The reduced gradients by id of the whole parameter; the parameters lose them."""
        for state in self._states:
            if state._is_root:
                state._root_post_backward_final_callback()
        gradients = {}
        for key, record in self._record.items():
            shard = record.sharded_param
            if shard.grad is not None:
                gradients[key], shard.grad = shard.grad, None
        return gradients

    def _gather_once(self) -> None:
        for module in self._modules:
            records = [each for group in _groups_of(module) for each in group.fsdp_params]
            if not all(hasattr(each, "_unsharded_param") for each in records):
                module.unshard()
                module.reshard()
        divisors = set()
        for group in self._groups:
            factor = group.gradient_divide_factor
            divisors.add(group.mesh_info.mesh.size() if factor is None else factor)
            if group._all_reduce_hook is not None:
                raise TypeError(
                    "the gradients of sharded parameters go through an all-reduce hook, after "
                    "which it is not known what they are divided by"
                )
            for record in group.fsdp_params:
                shard, whole = record.sharded_param, record.unsharded_param
                whole.requires_grad_(shard.requires_grad)  # as FSDP does when it gathers next
                others = shard, whole, getattr(record, "_sharded_post_forward_param", None)
                self.whole.update((id(p), whole) for p in others if p is not None)
                self._record[id(whole)] = record
        if len(divisors) > 1:
            raise TypeError(
                f"sharded gradients are divided by {sorted(divisors)} in different modules; a step "
                "over several processes needs one mesh and one factor for all"
            )
        (self._divisor,) = divisors

    def _check_shared(self, names: Mapping[int, str]) -> None:
        """Raise if a parameter was shared and is now two shards; ``names`` are those of modules."""
        seen: dict[int, str] = {}
        for record in self._record.values():
            place = record._module_info
            name = f"{names[id(place.module)]}.{place.param_name}"
            if record._orig_param_uid in seen:
                raise TypeError(
                    f"parameter {name!r} was one with {seen[record._orig_param_uid]!r} before "
                    "fully_shard sharded them one by one, and is not any more; shard the modules "
                    "that share it in one call, fully_shard([a, b])"
                )
            seen[record._orig_param_uid] = name

    def _check(self, name: str, p: nn.Parameter, dtensor: type) -> None:
        whole = self.whole.get(id(p))
        if whole is None and isinstance(p, dtensor):
            raise TypeError(
                f"parameter {name!r} is a DTensor, which no engine supports if fully_shard has not "
                "made it"
            )
        if whole is None and p.requires_grad and self._groups:
            raise TypeError(
                f"parameter {name!r} is trained and not sharded, although others are, so that each "
                "process would train its own; put it into a module that fully_shard shards"
            )
        if whole is not None and type(whole.data) is not Tensor:
            raise TypeError(
                f"parameter {name!r} is a {type(whole.data).__name__} where fully_shard has "
                "gathered it, which no engine supports"
            )

    def _fields(self) -> Iterator[tuple[Any, str, Any]]:
        """Owner and name of what a step sets aside, and what it is in the step."""
        for state in self._states:
            if state._is_root:
                yield state._state_ctx, "is_last_backward", True
        for group in self._groups:
            yield from ((group, name, True) for name in ("reduce_grads", "all_reduce_grads"))
            yield group, "_partial_reduce_output", None
            for record in group.fsdp_params:
                yield record, "unsharded_accumulated_grad", None
                yield record.unsharded_param, "grad", None
                yield record.sharded_param, "grad", None
                yield record.sharded_param, "_post_accumulate_grad_hooks", None


def _without_modes(operation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operation)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return operation(*args, **kwargs)

    return run


def passes_on(node: Any) -> bool:
    """Whether a node of autograd's graph is FSDP's, which passes gradients on as they are."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    return fsdp is not None and isinstance(node, fsdp.RegisterPostBackwardFunction._backward_cls)


def whole(x: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered from all processes."""
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None or not isinstance(x, tensor.DTensor):
        return x
    gathered: Tensor = x.full_tensor()
    return gathered


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks among which ``fully_shard`` has sharded a model; None if it has not."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return None
    for module in model.modules():
        for group in _groups_of(module) if isinstance(module, fsdp.FSDPModule) else ():
            mesh = group.mesh_info.mesh
            if mesh.ndim > 1 and mesh.size() == dist.get_world_size():
                return dist.group.WORLD
            found: dist.ProcessGroup = (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()
            return found
    return None


def _groups_of(module: Any) -> list[Any]:
    groups: list[Any] = module._get_fsdp_state()._fsdp_param_groups
    return groups
