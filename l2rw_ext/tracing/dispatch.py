"""The base of the modes that see the operations of a step, and how they read an argument."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class DispatchMode(TorchDispatchMode):
    """A mode of the dispatcher for the body of a step."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No step runs compiled code, and to skip the compiler would load it, for seconds."""
        return False


def argument(position: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of an operation by its place and its name in the schema; None if not given."""
    return args[position] if position < len(args) else kwargs.get(name)
