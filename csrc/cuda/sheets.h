#pragma once

// How the memory-bound kernels see a tensor [n, T, d]: one sheet [outer, inner] for each example,
// whose inner dimension is the one that lies side by side. As tile_index.h, plain arithmetic.

#include <algorithm>
#include <cstdint>

#include "cuda/tile_plan.h"

namespace l2rw::cuda {

constexpr int kSheetThreads = 256;

// Strides in elements; zero where a value is shared.
struct SheetStrides {
  int64_t example;
  int64_t outer;
  int64_t inner;
};

// Whether rows of `inner` numbers can be read Count at a time: they lie side by side and every row
// starts at a multiple of the vector.
inline bool fits_vectors(
    uint64_t address, int64_t element_bytes, SheetStrides strides, int64_t inner, int64_t count) {
  return inner % count == 0 && strides.inner == 1 && strides.outer % count == 0 &&
         strides.example % count == 0 &&
         address % static_cast<uint64_t>(count * element_bytes) == 0;
}

// A block of 256 threads as `across` along the inner dimension and `down` along the outer one.
struct SheetThreads {
  int across;
  int down;
};

inline SheetThreads sheet_threads(int64_t inner_vectors) {
  int across = 1;
  while (across < kSheetThreads && across < inner_vectors) {
    across *= 2;
  }
  return {across, kSheetThreads / across};
}

// Parts of the outer dimension of a sheet, each a block's: `rows` each, the last one the rest.
struct SheetParts {
  unsigned count;
  int64_t rows;

  L2RW_HOST_DEVICE Range range(int64_t part, int64_t outer) const {
    const int64_t end = (part + 1) * rows;
    return {part * rows, end < outer ? end : outer};
  }
};

// As many parts as let `sheets` sheets occupy all processors, of at least one pass of the block's
// threads each.
inline SheetParts parts_of_sheet(
    int64_t sheets, int64_t outer, SheetThreads threads, int64_t processors) {
  constexpr int64_t kBlocksPerProcessor = 8;
  const int64_t wanted = ceil_div(kBlocksPerProcessor * processors, std::max<int64_t>(1, sheets));
  const int64_t rows =
      ceil_div(outer, std::clamp<int64_t>(ceil_div(outer, threads.down), 1, wanted));
  return {static_cast<unsigned>(ceil_div(outer, rows)), rows};
}

}  // namespace l2rw::cuda
