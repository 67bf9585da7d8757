"""One description of each layer, from which interception, forward mode and ``functional`` work.

There is one file per family. All build on ``base`` (what a layer is) and ``costs`` (what its forms
cost).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .base import Layer
from .convolution import CONVOLUTION
from .embedding import EMBEDDING, EMBEDDING_BAG
from .linear import INPUTS_FIRST, LINEAR
from .normalization import BATCH_NORM, GROUP_NORM, INSTANCE_NORM, LAYER_NORM, RMS_NORM
from .transposed_convolution import TRANSPOSED_CONVOLUTION

LAYERS: dict[Callable[..., Any], Layer] = {
    function: layer
    for layer in (
        LINEAR,
        INPUTS_FIRST,
        CONVOLUTION,
        TRANSPOSED_CONVOLUTION,
        EMBEDDING,
        EMBEDDING_BAG,
        LAYER_NORM,
        GROUP_NORM,
        RMS_NORM,
        BATCH_NORM,
        INSTANCE_NORM,
    )
    for function in layer.functions
}
"""The layer that takes a torch function. A layer without a function is used by rewrites."""
