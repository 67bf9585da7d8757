#pragma once

// Strided memory with as few dimensions as it allows.

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace l2rw {

// Merges dimensions that one stride covers, and drops those of size one.
inline void collapse(std::vector<int64_t>& sizes, std::vector<int64_t>& strides) {
  size_t kept = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) {
      continue;
    }
    const bool merges = kept > 0 && strides[kept - 1] == sizes[d] * strides[d];
    const int64_t size = merges ? sizes[--kept] * sizes[d] : sizes[d];
    sizes[kept] = size;
    strides[kept] = strides[d];
    ++kept;
  }
  sizes.resize(kept);
  strides.resize(kept);
}

// Strided memory as runs of `length` numbers that lie `stride` apart.
struct Runs {
  Runs(std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    collapse(sizes, strides);
    if (!sizes.empty()) {
      length = sizes.back();
      stride = strides.back();
      sizes.pop_back();
    }
    outer_sizes = std::move(sizes);
    outer_strides = std::move(strides);
    for (const int64_t size : outer_sizes) {
      count *= size;
    }
  }

  // Where a run starts.
  int64_t offset(int64_t run) const {
    int64_t offset = 0;
    for (size_t d = outer_sizes.size(); d-- > 0;) {
      offset += run % outer_sizes[d] * outer_strides[d];
      run /= outer_sizes[d];
    }
    return offset;
  }

  std::vector<int64_t> outer_sizes, outer_strides;
  int64_t length = 1;
  int64_t stride = 1;
  int64_t count = 1;
};

}  // namespace l2rw
