"""Perturbed layers: torch's functions with y_i = (W + ε_i V) z_i + (b + ε_i V_b).

Each function is a drop-in for torch's function of the same name, values and gradients included, and
takes three more keyword arguments:

- ``eps``, shape (n,), one entry for each example, any floating dtype. ``None`` is the plain layer.
  The normalization layers, where ``eps`` is torch's numerical constant, call it ``perturbation``.
- ``direction``: ``Dense`` or ``Factored``, the layer's part of the direction v.
- ``example_dim``: the dimension of the input that counts the examples, 0 unless told. An ``eps`` of
  shape () says that the whole input is one example without such a dimension, as under ``vmap``.

The result is exact for any ``eps``, in the input, the parameters, ``eps`` and the direction. At
``eps`` = 0 it equals the plain layer, and after ``losses.sum().backward()``, with losses of shape
(n,), ``eps.grad[i]`` is u_i = <∇f_i, v>, summed over the layers that share ``eps``: Eq. 12 of
the paper without its factor αη. The losses are the examples' own, not divided by n; a sequence
loss that averages over its tokens gives other scores than one that sums them.

Backward, double backward, forward mode, ``torch.func`` and ``torch.compile(fullgraph=True)`` work.
"""

from .broadcast import add, expand, mul
from .convolution import conv1d, conv2d, conv3d
from .directions import Dense, Direction, Factored
from .embedding import embedding
from .linear import linear
from .normalization import batch_norm, group_norm, layer_norm, rms_norm

__all__ = [
    "Dense",
    "Direction",
    "Factored",
    "add",
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv3d",
    "embedding",
    "expand",
    "group_norm",
    "layer_norm",
    "linear",
    "mul",
    "rms_norm",
]
