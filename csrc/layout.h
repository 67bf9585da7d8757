#pragma once

// Memory layouts of [n, channels, *s], and dtypes of what belongs to a channel.

#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace l2rw {

// Whether the channels lie side by side, then the positions, then the examples.
inline bool channels_last(const Tensor& x) {
  int64_t stride = x.size(1);
  if (x.size(1) != 1 && x.stride(1) != 1) {
    return false;
  }
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    if (d == 1) {
      continue;
    }
    if (x.size(d) != 1 && x.stride(d) != stride) {
      return false;
    }
    stride *= x.size(d);
  }
  return true;
}

inline int64_t positions_of(const Tensor& x) {
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) {
    positions *= x.size(d);
  }
  return positions;
}

// `tensor` in the layout of `like`, which is contiguous unless its channels lie side by side.
inline Tensor in_layout_of(const Tensor& like, bool side_by_side, const Tensor& tensor) {
  if (side_by_side ? channels_last(tensor) : tensor.is_contiguous()) {
    return tensor;
  }
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// A tensor in its accumulation dtype. What is not there stays so.
inline OptionalTensor in_accumulation_dtype(const OptionalTensor& tensor) {
  if (!tensor || tensor->scalar_type() == accumulation_dtype(tensor->scalar_type())) {
    return tensor;
  }
  return torch::stable::to(*tensor, accumulation_dtype(tensor->scalar_type()));
}

// The same without gaps.
inline OptionalTensor contiguous_in_accumulation_dtype(const OptionalTensor& tensor) {
  const OptionalTensor wide = in_accumulation_dtype(tensor);
  return wide ? OptionalTensor(torch::stable::contiguous(*wide)) : wide;
}

}  // namespace l2rw
