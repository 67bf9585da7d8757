#pragma once

// Tensors with any strides: which of them can be read in vectors, and where an element lies.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "collapse.h"
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
template <class T>
bool fits_vectors(const T* data, Strides strides, int64_t inner, int64_t count) {
  return inner % count == 0 && strides.inner == 1 && strides.outer % count == 0 &&
         strides.example % count == 0 &&
         reinterpret_cast<uintptr_t>(data) % (static_cast<uint64_t>(count) * sizeof(T)) == 0;
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

  // Returns nothing if more than kMaxDims are left.
  static std::optional<StridedLayout> of(std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    collapse(sizes, strides);
    if (sizes.size() > kMaxDims) {
      return std::nullopt;
    }
    StridedLayout layout{std::max(1, static_cast<int>(sizes.size())), {1}, {1}};
    std::copy(sizes.begin(), sizes.end(), layout.sizes);
    std::copy(strides.begin(), strides.end(), layout.strides);
    return layout;
  }
};

}  // namespace l2rw::cuda
