"""Parameters, buffers and modes of a model and its loss functions, from one walk over modules."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .shards import Shards
from .writes import Written


@dataclass(frozen=True)
class Members:
    """What a step needs to know of a model, and of losses that are modules, besides their forward.

    Every step walks the modules once, because any of them may have been exchanged, frozen or
    switched to another mode since the last step.
    """

    parts: dict[str, nn.Module]
    """The model under the name "", and loss functions that are modules under theirs."""
    modules: list[tuple[str, nn.Module]]
    """Name and module; one that has several names is listed under its first."""
    parameters: list[tuple[str, nn.Parameter]]
    """Name and parameter, as the forward sees it; a shared one is listed under its first name."""
    buffers: list[tuple[nn.Module, str, Tensor | None]]
    """Module, name in it, and buffer."""
    training: tuple[bool, ...]
    """The mode of every module."""
    written: Written
    """What is known of the forward's writes."""
    shards: Shards | None = None
    """The parameters that are sharded (FSDP2), if there are any."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss_fn: Any = None,
        clean_loss_fn: Any = None,
        written: Written | None = None,
    ) -> Members:
        """The members as they are now; a parameter of a loss is named ``loss_fn.NAME``.

        Raises:
            ValueError: two parameters have one name.
            TypeError: parameters are sharded in a way that no engine supports.
        """
        losses = {"loss_fn": loss_fn, "clean_loss_fn": clean_loss_fn}
        parts = {"": model} | {k: v for k, v in losses.items() if isinstance(v, nn.Module)}
        seen: set[nn.Module] = set()
        modules = [
            named for prefix, part in parts.items() for named in part.named_modules(seen, prefix)
        ]
        shards = Shards.of(modules)
        whole = {} if shards is None else shards.whole
        parameters: dict[int, tuple[str, nn.Parameter]] = {}
        buffers: list[tuple[nn.Module, str, Tensor | None]] = []
        training = []
        for prefix, module in modules:
            training.append(module.training)
            for name, held in module._parameters.items():
                p = whole.get(id(held), held)
                if p is not None and id(p) not in parameters:
                    parameters[id(p)] = (f"{prefix}.{name}" if prefix else name, p)
            for name, buffer in module._buffers.items():
                buffers.append((module, name, buffer))
        listed = list(parameters.values())
        if len(parts) > 1 and len(dict(listed)) < len(listed):
            raise ValueError(
                "a parameter of the model and one of a loss function have the same name: the model "
                "has a child that is called like an argument of Reweighter; give it another name"
            )
        return cls(parts, modules, listed, buffers, tuple(training), written or Written(), shards)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that require grad."""
        return [p for _, p in self.parameters if p.requires_grad]

    def held(self, p: nn.Parameter) -> nn.Parameter:
        """The parameter that the model holds outside of its forward, and that optimisers know."""
        return p if self.shards is None else self.shards.shard_of(p)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the forward's writes may depend on: which modules there are, and their modes."""
        return tuple([name for name, _ in self.modules]), self.training

    def every_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and parameter, for all names of each parameter."""
        whole = {} if self.shards is None else self.shards.whole
        for prefix, part in self.parts.items():
            for name, p in part.named_parameters(prefix, remove_duplicate=False):
                yield name, whole.get(id(p), p)

    @property
    def permanent(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of all parameters and buffers."""
        buffers = [(name, x) for _, name, x in self.buffers if x is not None]
        return [*self.parameters, *buffers]

    def devices(self) -> set[torch.device]:
        """Where the parameters are."""
        return {p.device for _, p in self.parameters}

    @contextlib.contextmanager
    def exchanged(self, other: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
        """In the body, other tensors take the place of parameters, buffers and attributes.

        Args:
            other: (name in its module, tensor) -> what takes its place, None to leave it there.
        """
        replaced: list[tuple[Any, str, Any]] = []
        exchanged: dict[int, Tensor] = {}
        try:
            for _, module in self.modules:
                tables: Any = (module._parameters, module._buffers, module.__dict__)
                for table in tables:
                    for name, x in list(table.items()):
                        y = other(name, x) if isinstance(x, Tensor) else None
                        if y is not None:
                            replaced.append((table, name, x))
                            table[name] = y
                            exchanged[id(x)] = y
                if isinstance(module, nn.RNNBase):  # it lists its weights, to see if they change
                    listed = [exchanged.get(id(x), x) for x in module._flat_weights]
                    references = [None if x is None else weakref.ref(x) for x in listed]
                    own: Any = module.__dict__
                    for name in ("_flat_weights", "_flat_weight_refs"):
                        replaced.append((own, name, own[name]))
                    own |= {"_flat_weights": listed, "_flat_weight_refs": references}
            yield
        finally:
            for table, name, x in replaced:
                table[name] = x
