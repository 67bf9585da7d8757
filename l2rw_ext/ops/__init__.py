"""Typed access to the operators ``torch.ops.l2rw_ext``.

Letters: n, m examples of the training and the clean batch; T, S their positions per example; z a
layer's input; g the gradient of the summed losses with respect to its output; V, V_b the layer's
part of the direction; u scores; w weights; G the gradient of one example.

Floating arguments of one call share dtype (float64, float32, bfloat16 or float16) and device, with
any strides; a direction, a weight or a saved statistic may also have the accumulation dtype.
Results called scores or weighted gradients have the accumulation dtype: float64 for float64,
float32 for all others. Sizes of 0 and 1 are valid. Results are the same from run to run for a given
number of threads; on CUDA convolutions repeat theirs if ``torch.backends.cudnn.deterministic`` is
set. Arguments that do not fit raise ``RuntimeError`` with operator, argument and value; an index
out of range on CUDA is found by the device.

The correlations can be differentiated any number of times in reverse mode; the other operators
raise ``NotImplementedError`` when differentiated, and all of them do in forward mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import _registration

__all__ = list(_registration.OPERATORS)

_ops = torch.ops.l2rw_ext
_factored_correlation = _ops.factored_correlation.default
_factored_correlations = _ops.factored_correlations.default
_dense_correlation = _ops.dense_correlation.default
_conv_correlation = _ops.conv_correlation.default
_affine_correlation = _ops.affine_correlation.default
_embedding_correlation = _ops.embedding_correlation.default
_linear_example_gradients = _ops.linear_example_gradients.default
_conv_example_gradients = _ops.conv_example_gradients.default
_conv_weighted_gradient = _ops.conv_weighted_gradient.default
_affine_example_gradients = _ops.affine_example_gradients.default
_group_norm_backward = _ops.group_norm_backward.default
_batch_norm_tangent = _ops.batch_norm_tangent.default
_weighted_sum = _ops.weighted_sum.default
_scale_rows = _ops.scale_rows.default
_normalize_weights = _ops.normalize_weights.default


def factored_correlation(
    z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor, bias: bool
) -> Tensor:
    """Scores of a linear layer without forming its direction (Eq. 12).

    u_i = Σ_t Σ_j Σ_s (z_it · z'_js + bias) (g_it · g'_js)

    Args:
        z: (n, T, i) input of the layer.
        g: (n, T, o) gradient of the summed training losses.
        z_clean: (m, S, i) input of the clean batch.
        g_clean: (m, S, o) gradient of the mean clean loss: it carries the 1/m.
        bias: whether the layer has a bias.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> one = torch.ones(1, 1, 2)
        >>> ops.factored_correlation(one, one, one, one, True)
        tensor([6.])
    """
    return cast(Tensor, _factored_correlation(z, g, z_clean, g_clean, bias))


def factored_correlations(
    z: Sequence[Tensor],
    g: Sequence[Tensor],
    z_clean: Sequence[Tensor],
    g_clean: Sequence[Tensor],
    bias: Sequence[bool],
) -> Tensor:
    """Scores of several linear layers at once: the sum of their :func:`factored_correlation`.

    u_i = Σ_l Σ_t Σ_j Σ_s (z_lit · z'_ljs + bias_l) (g_lit · g'_ljs)

    On CUDA the work of all layers is divided among the processors together, in few launches. There
    must be at least one layer, and all share n, m, dtype and device.

    Args:
        z: for each layer, its (n, T, i) input.
        g: the (n, T, o) gradients of the summed training losses.
        z_clean: the (m, S, i) inputs of the clean batch.
        g_clean: the (m, S, o) gradients of the mean clean loss: they carry the 1/m.
        bias: whether each layer has a bias.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> wide, narrow = torch.ones(1, 1, 2), torch.ones(1, 3, 1)
        >>> z, g = [wide, narrow], [wide, narrow]
        >>> ops.factored_correlations(z, g, z, g, [True, False])
        tensor([15.])
    """
    if not z:  # without a tensor, torch's dispatcher cannot choose a kernel
        raise RuntimeError(
            "l2rw_ext::factored_correlations: z must hold at least one layer, got none"
        )
    return cast(Tensor, _factored_correlations(z, g, z_clean, g_clean, bias))


def dense_correlation(
    z: Tensor, g: Tensor, direction: Tensor, direction_bias: Tensor | None = None
) -> Tensor:
    """Scores of a linear layer from its direction.

    u_i = Σ_t g_it · (V z_it + V_b)

    Args:
        z: (n, T, i) input of the layer.
        g: (n, T, o) gradient of the summed training losses.
        direction: (o, i) V.
        direction_bias: (o,) V_b.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> ops.dense_correlation(torch.ones(1, 1, 2), torch.ones(1, 1, 3), torch.ones(3, 2))
        tensor([6.])
    """
    return cast(Tensor, _dense_correlation(z, g, direction, direction_bias))


def conv_correlation(
    z: Tensor,
    g: Tensor,
    direction: Tensor,
    direction_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Scores of a convolution from its direction, in one to three spatial dimensions.

    u_i = Σ_p g_i[:, p] · (V * z_i + V_b)[:, p]

    Args:
        z: (n, C, *s) input of the layer.
        g: (n, O, *p) gradient of the summed training losses.
        direction: (O, C / groups, *k) V.
        direction_bias: (O,) V_b.
        stride: step of each spatial dimension.
        padding: zeros added on both sides of each spatial dimension.
        dilation: distance of kernel elements in each spatial dimension.
        groups: number of groups.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> z, g, V = torch.ones(1, 1, 3), torch.ones(1, 1, 2), torch.ones(1, 1, 2)
        >>> ops.conv_correlation(z, g, V, None, [1], [0], [1], 1)
        tensor([4.])
    """
    return cast(
        Tensor,
        _conv_correlation(z, g, direction, direction_bias, stride, padding, dilation, groups),
    )


def affine_correlation(
    x: Tensor,
    g: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    direction: Tensor | None,
    direction_bias: Tensor | None,
) -> Tensor:
    """Scores of the scale and shift of a normalization layer, in one pass over x and g.

    x̂ = (x - mean) rstd; u_i = Σ_t Σ_c g_itc (x̂_itc V_c + V_bc)

    Memory in which the channels, or the positions, of x and g lie side by side is read at full
    speed; other strides are read as they are.

    Args:
        x: (n, T, d) input of the layer.
        g: (n, T, d) gradient of the summed training losses.
        mean: three dimensions that broadcast to those of x; None: zero.
        rstd: the same for the factor; None: one.
        direction: (d,) V of the scale; None: there is no scale.
        direction_bias: (d,) V_b of the shift; None: there is no shift.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> x = torch.ones(1, 2, 3)
        >>> ops.affine_correlation(x, x, None, None, torch.ones(3), None)
        tensor([6.])
    """
    return cast(Tensor, _affine_correlation(x, g, mean, rstd, direction, direction_bias))


def embedding_correlation(index: Tensor, g: Tensor, direction: Tensor) -> Tensor:
    """Scores of an embedding.

    u_i = Σ_t g_it · V[index_it]

    Args:
        index: (n, T) rows, int64 or int32.
        g: (n, T, d) gradient of the summed training losses.
        direction: (v, d) V.

    Returns:
        (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> V = torch.tensor([[1.0], [10.0]])
        >>> ops.embedding_correlation(torch.tensor([[0, 1]]), torch.ones(1, 2, 1), V)
        tensor([11.])
    """
    return cast(Tensor, _embedding_correlation(index, g, direction))


def linear_example_gradients(
    z: Tensor,
    g: Tensor,
    direction: Tensor | None = None,
    direction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of single examples of a linear layer, and their scores on the way.

    G_i = Σ_t g_it z_itᵀ, G_bi = Σ_t g_it, u_i = <V, G_i> + <V_b, G_bi>

    Args:
        z: (n, T, i) input of the layer.
        g: (n, T, o) gradient of the summed training losses.
        direction: (o, i) V; None: it adds nothing to the scores.
        direction_bias: (o,) V_b; None: it adds nothing to the scores.

    Returns:
        G (n, o, i) and G_b (n, o) in the dtype of z, and (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> G, G_b, u = ops.linear_example_gradients(torch.ones(1, 4, 2), torch.ones(1, 4, 1))
        >>> G, G_b, u
        (tensor([[[4., 4.]]]), tensor([[4.]]), tensor([0.]))
    """
    return cast(
        "tuple[Tensor, Tensor, Tensor]",
        _linear_example_gradients(z, g, direction, direction_bias),
    )


def conv_example_gradients(
    z: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    direction: Tensor | None = None,
    direction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of single examples of a convolution, and their scores on the way.

    G_i is what a convolution's backward returns for example i alone, G_bi = Σ_p g_i[:, p], and
    u_i = <V, G_i> + <V_b, G_bi>.

    Args:
        z: (n, C, *s) input of the layer.
        g: (n, O, *p) gradient of the summed training losses.
        kernel_size: size of the kernel in each spatial dimension.
        stride: step of each spatial dimension.
        padding: zeros added on both sides of each spatial dimension.
        dilation: distance of kernel elements in each spatial dimension.
        groups: number of groups.
        direction: (O, C / groups, *k) V; None: it adds nothing to the scores.
        direction_bias: (O,) V_b; None: it adds nothing to the scores.

    Returns:
        G (n, O, C / groups, *k) and G_b (n, O) in the dtype of z, and (n,) scores.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> z, g = torch.ones(1, 1, 3), torch.ones(1, 1, 2)
        >>> G, G_b, u = ops.conv_example_gradients(z, g, [2], [1], [0], [1], 1)
        >>> G, G_b
        (tensor([[[[2., 2.]]]]), tensor([[2.]]))
    """
    return cast(
        "tuple[Tensor, Tensor, Tensor]",
        _conv_example_gradients(
            z,
            g,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            direction,
            direction_bias,
        ),
    )


def conv_weighted_gradient(
    z: Tensor,
    g: Tensor,
    weights: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Weighted gradient of a convolution, without storing the gradients of single examples.

    W = Σ_i w_i G_i and W_b = Σ_i w_i G_bi; examples with w_i = 0 are never read.

    Args:
        z: (n, C, *s) input of the layer.
        g: (n, O, *p) gradient of the summed training losses.
        weights: (n,) weights; None: all ones.
        kernel_size: size of the kernel in each spatial dimension.
        stride: step of each spatial dimension.
        padding: zeros added on both sides of each spatial dimension.
        dilation: distance of kernel elements in each spatial dimension.
        groups: number of groups.

    Returns:
        W (O, C / groups, *k) and W_b (O,) in the accumulation dtype.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> z, g, w = torch.ones(2, 1, 3), torch.ones(2, 1, 2), torch.tensor([0.5, 0.0])
        >>> ops.conv_weighted_gradient(z, g, w, [2], [1], [0], [1], 1)
        (tensor([[[1., 1.]]]), tensor([1.]))
    """
    return cast(
        "tuple[Tensor, Tensor]",
        _conv_weighted_gradient(z, g, weights, kernel_size, stride, padding, dilation, groups),
    )


def affine_example_gradients(
    x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of single examples of a normalization layer's scale and shift.

    x̂ = (x - mean) rstd; G_i = Σ_t g_it x̂_it, G_bi = Σ_t g_it

    Args:
        x: (n, T, d) input of the layer.
        g: (n, T, d) gradient of the summed training losses.
        mean: three dimensions that broadcast to those of x; None: zero.
        rstd: the same for the factor; None: one.

    Returns:
        G and G_b, (n, d) each, in the accumulation dtype.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> x = torch.full((1, 2, 1), 3.0)
        >>> ops.affine_example_gradients(x, torch.ones(1, 2, 1), None, None)
        (tensor([[6.]]), tensor([[2.]]))
    """
    return cast("tuple[Tensor, Tensor]", _affine_example_gradients(x, g, mean, rstd))


def group_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a group norm's input and, of single examples, of its scale and shift.

    x̂ = (x - mean) rstd; G_i = Σ_s g_is x̂_is, G_bi = Σ_s g_is; the gradient of x is
    rstd (γ g - x̂ Σ γ G / S - Σ γ G_b / S), where both sums are over the channels of a group and S
    is its number of elements.

    Args:
        g: (n, C, ...) gradient of the summed training losses.
        x: (n, C, ...) input of the layer.
        mean: (n, groups) as ``torch.native_group_norm`` returns it.
        rstd: (n, groups) the same.
        weight: (C,) the scale γ; None: all ones.
        groups: the number of groups, a divisor of C.

    Returns:
        The gradient of x, (n, C, ...) in its dtype, contiguous or with the channels side by side
        in memory as x; G and G_b, (n, C) each, in the accumulation dtype.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> x, g = torch.tensor([[[-1.0, 1.0]]]), torch.tensor([[[0.0, 2.0]]])
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> ops.group_norm_backward(g, x, zero, one, None, 1)
        (tensor([[[0., 0.]]]), tensor([[2.]]), tensor([[2.]]))
    """
    return cast(
        "tuple[Tensor, Tensor, Tensor]", _group_norm_backward(g, x, mean, rstd, weight, groups)
    )


def batch_norm_tangent(
    x: Tensor,
    x_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    direction: Tensor | None,
    direction_bias: Tensor | None,
) -> Tensor:
    """Derivative of a batch norm in train mode along a direction of its input and parameters.

    With x̂ = (x - mean) rstd and E the mean over examples and positions, it is
    weight rstd (ẋ - E ẋ - x̂ E(x̂ ẋ)) + x̂ V + V_b.

    Args:
        x: (n, C, *s) input of the layer.
        x_tangent: (n, C, *s) ẋ; None where x is constant.
        mean: (C,) as ``torch.native_batch_norm`` returns it.
        rstd: (C,) as ``torch.native_batch_norm`` returns it.
        weight: (C,) scale; None stands for ones.
        direction: (C,) V, of the scale; None stands for zeros.
        direction_bias: (C,) V_b, of the shift; None stands for zeros.

    Returns:
        (n, C, *s) in the dtype and memory format of x.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> x = torch.tensor([[-1.0], [1.0]])
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> ops.batch_norm_tangent(x, x + 1, zero, one, None, one, one)
        tensor([[0.],
                [2.]])
    """
    return cast(
        Tensor,
        _batch_norm_tangent(x, x_tangent, mean, rstd, weight, direction, direction_bias),
    )


def weighted_sum(gradients: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the gradients of single examples.

    W = Σ_i w_i G_i over the examples with w_i ≠ 0; the others are never read.

    Args:
        gradients: (n, ...) one gradient per example.
        weights: (n,) weights.

    Returns:
        (...) W in the accumulation dtype.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> G = torch.tensor([[2.0, 4.0], [float("nan"), 1.0]])
        >>> ops.weighted_sum(G, torch.tensor([0.5, 0.0]))
        tensor([1., 2.])
    """
    return cast(Tensor, _weighted_sum(gradients, weights))


def scale_rows(g: Tensor, weights: Tensor, active: Tensor) -> Tensor:
    """Examples with weight, scaled by it: the left factor of a weighted gradient.

    Row a of the result is w_a g_a, for a in `active`.

    Args:
        g: (n, T, d) gradient of the summed training losses.
        weights: (n,) weights.
        active: (k,) int64, the examples to keep.

    Returns:
        (k, T, d) in the dtype of g; positions lie side by side in memory where they do in g.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> w = torch.tensor([0.0, 0.5])
        >>> ops.scale_rows(torch.ones(2, 1, 2), w, w.nonzero().flatten())
        tensor([[[0.5000, 0.5000]]])
    """
    return cast(Tensor, _scale_rows(g, weights, active))


def normalize_weights(u: Tensor) -> Tensor:
    """Weights from scores, without waiting for the device.

    Eq. 8: w̃_i = max(u_i, 0); Eq. 9: w_i = w̃_i / (Σ_k w̃_k + δ(Σ_k w̃_k)). They sum to one, or are
    all zero where no score is positive. A score that is not finite counts as zero.

    Args:
        u: (n,) scores.

    Returns:
        (n,) weights in the dtype of u.

    Example:
        >>> import torch
        >>> from l2rw_ext import ops
        >>> ops.normalize_weights(torch.tensor([1.0, -2.0, 3.0]))
        tensor([0.2500, 0.0000, 0.7500])
    """
    return cast(Tensor, _normalize_weights(u))
