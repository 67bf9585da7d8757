"""``F.multi_head_attention_forward``, whose projections are linear uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F

from .base import Mode
from .registry import handles
from .torch_functions import inside


@handles(F.multi_head_attention_forward, by_parts=True)
def _multi_head_attention(
    mode: Mode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with mode:
        return inside(F.multi_head_attention_forward)(*args, **kwargs)
