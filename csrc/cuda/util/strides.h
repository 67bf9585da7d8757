#pragma once

// Tensors with any strides: which of them can be read in vectors, and where an element lies.

#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/util/host_device.h"

namespace l2rw::cuda {

// Strides, in elements, of a tensor [n, outer, inner]. A stride is zero where a value is shared.
struct Strides {
  int64_t example;
  int64_t outer;
  int64_t inner;
};

// Whether rows of `inner` elements can be read in vectors of `count`: the elements are contiguous
// and every row starts at a multiple of the vector.
inline bool fits_vectors(
    uint64_t address, int64_t element_bytes, Strides strides, int64_t inner, int64_t count) {
  return inner % count == 0 && strides.inner == 1 && strides.outer % count == 0 &&
         strides.example % count == 0 &&
         address % static_cast<uint64_t>(count * element_bytes) == 0;
}

// A tensor with as few dimensions as its strides allow. Elements are numbered with the last
// dimension fastest.
struct StridedLayout {
  static constexpr int kMaxDims = 8;
  int dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kMaxDims];

  L2RW_HOST_DEVICE int64_t offset(int64_t k) const {
    int64_t offset = 0;
    for (int d = dims - 1; d >= 0; --d) {
      offset += k % sizes[d] * strides[d];
      k /= sizes[d];
    }
    return offset;
  }

  // Merges dimensions that one stride covers. Returns nothing if more than kMaxDims are left.
  static std::optional<StridedLayout> of(
      const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    StridedLayout layout{1, {1}, {1}};
    bool first = true;
    for (size_t d = 0; d < sizes.size(); ++d) {
      const int last = layout.dims - 1;
      if (sizes[d] == 1) {
        continue;
      }
      if (first) {
        layout.sizes[0] = sizes[d];
        layout.strides[0] = strides[d];
        first = false;
      } else if (layout.strides[last] == sizes[d] * strides[d]) {
        layout.sizes[last] *= sizes[d];
        layout.strides[last] = strides[d];
      } else if (layout.dims < kMaxDims) {
        layout.sizes[layout.dims] = sizes[d];
        layout.strides[layout.dims] = strides[d];
        ++layout.dims;
      } else {
        return std::nullopt;
      }
    }
    return layout;
  }
};

}  // namespace l2rw::cuda
