#pragma once

// Strided memory with as few dimensions as it allows.

#include <cstddef>
#include <cstdint>
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

}  // namespace l2rw
