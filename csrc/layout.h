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

inline Tensor in_accumulation_dtype(const Tensor& tensor) {
  const ScalarType dtype = accumulation_dtype(tensor.scalar_type());
  return torch::stable::contiguous(
      tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

}  // namespace l2rw
