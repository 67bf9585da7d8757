"""What the compiled operators need besides their kernels: fakes, derivatives, and compositions.

On CUDA tensors an operator runs as the kernel of ``_ops_cuda.so`` if that library is loaded and has
one, and otherwise as its composition.

Every correlation is linear in each of its arguments, and its derivative is written with ordinary
torch operations, so it can be differentiated again. All other operators refuse to be
differentiated. All operators refuse forward mode, because `torch.library.register_autograd` would
return a tangent of zero without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import (
    _native,  # noqa: F401  registers the operators, on CUDA too where that library is loaded
    compositions,
)
from .arithmetic import accumulation_dtype

__all__ = ["COMPOSED", "OPERATORS"]

OPERATORS = (
    "factored_correlation",
    "factored_correlations",
    "dense_correlation",
    "conv_correlation",
    "affine_correlation",
    "embedding_correlation",
    "linear_example_gradients",
    "conv_example_gradients",
    "conv_weighted_gradient",
    "affine_example_gradients",
    "group_norm_backward",
    "batch_norm_tangent",
    "weighted_sum",
    "scale_rows",
    "normalize_weights",
)


# Fakes: shape, dtype and strides of every result.


def _scores(tensor: Tensor) -> Tensor:
    return tensor.new_empty((tensor.shape[0],), dtype=accumulation_dtype(tensor.dtype))


def _fake_factored_correlation(
    z: Tensor, g: Tensor, z_clean: Tensor, g_clean: Tensor, bias: bool
) -> Tensor:
    return _scores(z)


def _fake_factored_correlations(
    z: Sequence[Tensor],
    g: Sequence[Tensor],
    z_clean: Sequence[Tensor],
    g_clean: Sequence[Tensor],
    bias: Sequence[bool],
) -> Tensor:
    return _scores(z[0])


def _fake_dense_correlation(
    z: Tensor, g: Tensor, direction: Tensor, direction_bias: Tensor | None = None
) -> Tensor:
    return _scores(z)


def _fake_conv_correlation(
    z: Tensor,
    g: Tensor,
    direction: Tensor,
    direction_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return _scores(z)


def _fake_affine_correlation(
    x: Tensor,
    g: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    direction: Tensor | None,
    direction_bias: Tensor | None,
) -> Tensor:
    return _scores(x)


def _fake_embedding_correlation(index: Tensor, g: Tensor, direction: Tensor) -> Tensor:
    return _scores(g)


def _fake_linear_example_gradients(
    z: Tensor,
    g: Tensor,
    direction: Tensor | None = None,
    direction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    n, o, i = g.shape[0], g.shape[2], z.shape[2]
    return z.new_empty((n, o, i)), z.new_empty((n, o)), _scores(z)


def _fake_conv_example_gradients(
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
    n, o, c = g.shape[0], g.shape[1], z.shape[1] // groups
    return z.new_empty((n, o, c, *kernel_size)), z.new_empty((n, o)), _scores(z)


def _fake_conv_weighted_gradient(
    z: Tensor,
    g: Tensor,
    weights: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor]:
    o, c, dtype = g.shape[1], z.shape[1] // groups, accumulation_dtype(z.dtype)
    return z.new_empty((o, c, *kernel_size), dtype=dtype), z.new_empty((o,), dtype=dtype)


def _fake_affine_example_gradients(
    x: Tensor, g: Tensor, mean: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor]:
    n, d, dtype = x.shape[0], x.shape[2], accumulation_dtype(x.dtype)
    return x.new_empty((n, d), dtype=dtype), x.new_empty((n, d), dtype=dtype)


def _fake_group_norm_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    n, c, dtype = x.shape[0], x.shape[1], accumulation_dtype(x.dtype)
    kept = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    data = torch.empty_like(x) if kept else x.new_empty(x.shape)
    return data, x.new_empty((n, c), dtype=dtype), x.new_empty((n, c), dtype=dtype)


def _fake_batch_norm_tangent(
    x: Tensor,
    x_tangent: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    direction: Tensor | None,
    direction_bias: Tensor | None,
) -> Tensor:
    kept = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    return torch.empty_like(x) if kept else x.new_empty(x.shape)


def _fake_weighted_sum(gradients: Tensor, weights: Tensor) -> Tensor:
    return gradients.new_empty(gradients.shape[1:], dtype=accumulation_dtype(gradients.dtype))


def _fake_scale_rows(g: Tensor, weights: Tensor, active: Tensor) -> Tensor:
    k, t, d = active.shape[0], g.shape[1], g.shape[2]
    if g.stride(1) == 1 and g.stride(2) != 1:
        return g.new_empty((k, d, t)).transpose(1, 2)
    return g.new_empty((k, t, d))


def _fake_normalize_weights(u: Tensor) -> Tensor:
    return u.new_empty((u.shape[0],))


# Derivatives. `grad` is the gradient with respect to the scores, [n] in the accumulation dtype.


def _factored_gradients(grad: Tensor, layer: Sequence[Tensor], bias: bool) -> tuple[Tensor, ...]:
    z, g, z_clean, g_clean = (tensor.to(grad.dtype) for tensor in layer)
    dtype = layer[0].dtype
    scaled = grad[:, None, None] * g
    V = g_clean.flatten(0, 1).T @ z_clean.flatten(0, 1)
    M = scaled.flatten(0, 1).T @ z.flatten(0, 1)  # as V, of the training batch weighted by grad
    grad_g = z @ V.T
    grad_g_clean = z_clean @ M.T
    if bias:
        grad_g = grad_g + g_clean.sum((0, 1))
        grad_g_clean = grad_g_clean + scaled.sum((0, 1))
    return (
        (scaled @ V).to(dtype),
        (grad[:, None, None] * grad_g).to(dtype),
        (g_clean @ M).to(dtype),
        grad_g_clean.to(dtype),
    )


def _save_factored(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.bias = inputs[4]


def _factored_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return *_factored_gradients(grad, ctx.saved_tensors, ctx.bias), None


def _save_factored_layers(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(tensor for tensors in inputs[:4] for tensor in tensors))
    ctx.bias = inputs[4]


def _factored_layers_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    count = len(ctx.bias)
    gradients = [
        _factored_gradients(grad, ctx.saved_tensors[layer::count], bias)
        for layer, bias in enumerate(ctx.bias)
    ]
    return *(list(parts) for parts in zip(*gradients, strict=True)), None


def _save_dense(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _dense_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    z, g, V, V_b = ctx.saved_tensors
    z_, g_, V_ = z.to(grad.dtype), g.to(grad.dtype), V.to(grad.dtype)
    scaled = grad[:, None, None] * g_
    product = z_ @ V_.T
    if V_b is not None:
        product = product + V_b.to(grad.dtype)
    return (
        (scaled @ V_).to(z.dtype),
        (grad[:, None, None] * product).to(g.dtype),
        (scaled.flatten(0, 1).T @ z_.flatten(0, 1)).to(V.dtype),
        None if V_b is None else scaled.sum((0, 1)).to(V_b.dtype),
    )


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.geometry = inputs[4:]


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    z, g, V, V_b = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.geometry
    no_padding = [0] * len(stride)
    geometry = (stride, padding, dilation, False, no_padding, groups)
    z_, g_, V_ = z.to(grad.dtype), g.to(grad.dtype), V.to(grad.dtype)
    V_b_ = None if V_b is None else V_b.to(grad.dtype)
    c = grad.view(-1, *[1] * (g.dim() - 1))
    scaled = c * g_
    product = torch.ops.aten.convolution(z_, V_, V_b_, *geometry)
    grad_z, grad_V, _ = torch.ops.aten.convolution_backward(
        scaled, z_, V_, None, *geometry, [True, True, False]
    )
    return (
        grad_z.to(z.dtype),
        (c * product).to(g.dtype),
        grad_V.to(V.dtype),
        None if V_b is None else scaled.transpose(0, 1).flatten(1).sum(1).to(V_b.dtype),
        None,
        None,
        None,
        None,
    )


def _affine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, g, mean, rstd, V, V_b = ctx.saved_tensors
    dtype = grad.dtype
    g_ = g.to(dtype)
    c = grad[:, None, None]
    shifted = x.to(dtype) if mean is None else x.to(dtype) - mean.to(dtype)
    factor = None if rstd is None else rstd.to(dtype)
    normalized = shifted if factor is None else shifted * factor
    scaled = c * g_
    product = torch.zeros_like(normalized)
    along = torch.zeros_like(normalized)  # derivative with respect to the normalized input
    if V is not None:
        product = product + normalized * V.to(dtype)
        along = scaled * V.to(dtype)
    if V_b is not None:
        product = product + V_b.to(dtype)
    grad_x = along if factor is None else along * factor
    return (
        grad_x.to(x.dtype),
        (c * product).to(g.dtype),
        None if mean is None else (-grad_x).sum_to_size(mean.shape).to(mean.dtype),
        None if rstd is None else (along * shifted).sum_to_size(rstd.shape).to(rstd.dtype),
        None if V is None else (scaled * normalized).sum((0, 1)).to(V.dtype),
        None if V_b is None else scaled.sum((0, 1)).to(V_b.dtype),
    )


def _embedding_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    index, g, V = ctx.saved_tensors
    c = grad[:, None, None]
    rows = torch.nn.functional.embedding(index, V.to(grad.dtype))
    scaled = (c * g.to(grad.dtype)).flatten(0, 1)
    grad_V = torch.zeros(V.shape, dtype=grad.dtype, device=V.device)
    return (
        None,
        (c * rows).to(g.dtype),
        grad_V.index_add(0, index.flatten(), scaled).to(V.dtype),
    )


_DERIVATIVES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "factored_correlation": (_save_factored, _factored_backward),
    "factored_correlations": (_save_factored_layers, _factored_layers_backward),
    "dense_correlation": (_save_dense, _dense_backward),
    "conv_correlation": (_save_conv, _conv_backward),
    "affine_correlation": (_save_dense, _affine_backward),
    "embedding_correlation": (_save_dense, _embedding_backward),
}


def _map_factored_layers(
    info: Any, in_dims: tuple[Any, ...], *arguments: Any
) -> tuple[Tensor, int]:
    """The vmap of operators with lists of tensors; torch loops over all others itself."""

    def select(k: int) -> Iterator[list[Any]]:
        for dims, tensors in zip(in_dims[:4], arguments[:4], strict=True):
            yield [
                tensor if dim is None else tensor.select(dim, k)
                for dim, tensor in zip(dims, tensors, strict=True)
            ]

    operator = torch.ops.l2rw_ext.factored_correlations.default
    return torch.stack([operator(*select(k), arguments[4]) for k in range(info.batch_size)]), 0


_MAPS = {"factored_correlations": _map_factored_layers}


def _refuse_backward(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            f"l2rw_ext::{name} has no derivative; "
            "differentiate the layers of l2rw_ext.functional instead"
        )

    return backward


def _forward_mode_is_on() -> bool:
    # Checking every argument costs as much as a small operator.
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def _has_tangent(argument: object) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(map(_has_tangent, argument))
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


class _ReverseModeOnly(torch.library.Library):
    """Registers autograd kernels that raise when an argument carries a forward-mode tangent."""

    def impl(
        self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any
    ) -> None:
        def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
            if _forward_mode_is_on() and any(map(_has_tangent, arguments)):
                raise NotImplementedError(
                    f"l2rw_ext::{op_name} has no forward-mode derivative; "
                    "use reverse mode, or the layers of l2rw_ext.functional"
                )
            return fn(keyset, *arguments)

        super().impl(op_name, kernel, dispatch_key, **options)  # type: ignore[no-untyped-call]


COMPOSED = frozenset(
    name
    for name in OPERATORS
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"l2rw_ext::{name}", "CUDA")
)
"""Operators that run on CUDA tensors as compositions, because no loaded library has a kernel."""

_library = _ReverseModeOnly("l2rw_ext", "FRAGMENT")
_plain_library = torch.library.Library("l2rw_ext", "FRAGMENT")
for _name in OPERATORS:
    _qualified = f"l2rw_ext::{_name}"
    torch.library.register_fake(_qualified, globals()[f"_fake_{_name}"], lib=_plain_library)
    _save, _backward = _DERIVATIVES.get(_name, (None, _refuse_backward(_name)))
    torch.library.register_autograd(_qualified, _backward, setup_context=_save, lib=_library)
    if _name in _MAPS:
        torch.library.register_vmap(_qualified, _MAPS[_name], lib=_plain_library)
    if _name in COMPOSED:
        _plain_library.impl(_name, getattr(compositions, _name), "CUDA")
