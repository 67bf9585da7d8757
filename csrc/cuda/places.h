#pragma once

// Where the numbers of a strided tensor lie. As tile_index.h, plain arithmetic.

#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/tile_index.h"

namespace l2rw::cuda {

// Offsets of numbers that are counted with the last dimension running fastest, with as few
// dimensions as the memory allows.
struct Places {
  static constexpr int kMost = 8;
  int dims;
  int64_t sizes[kMost];
  int64_t strides[kMost];

  L2RW_HOST_DEVICE int64_t offset(int64_t k) const {
    int64_t offset = 0;
    for (int d = dims - 1; d >= 0; --d) {
      offset += k % sizes[d] * strides[d];
      k /= sizes[d];
    }
    return offset;
  }

  // Nothing where more than kMost dimensions are left.
  static std::optional<Places> of(
      const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    Places places{1, {1}, {1}};
    bool first = true;
    for (size_t d = 0; d < sizes.size(); ++d) {
      const int last = places.dims - 1;
      if (sizes[d] == 1) {
        continue;
      }
      if (first) {
        places.sizes[0] = sizes[d];
        places.strides[0] = strides[d];
        first = false;
      } else if (places.strides[last] == sizes[d] * strides[d]) {
        places.sizes[last] *= sizes[d];
        places.strides[last] = strides[d];
      } else if (places.dims < kMost) {
        places.sizes[places.dims] = sizes[d];
        places.strides[places.dims] = strides[d];
        ++places.dims;
      } else {
        return std::nullopt;
      }
    }
    return places;
  }
};

}  // namespace l2rw::cuda
