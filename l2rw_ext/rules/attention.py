"""``F.multi_head_attention_forward``: a composite whose projections are linear uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

from .base import handles

if TYPE_CHECKING:
    from ..interception import Interception


@handles(F.multi_head_attention_forward, composite=True)
def _multi_head_attention(
    mode: Interception, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    from ..interception import inside

    with mode:
        return inside(F.multi_head_attention_forward)(*args, **kwargs)
