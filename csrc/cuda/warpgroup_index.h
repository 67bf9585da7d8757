#pragma once

// How products of warpgroups are told where their operands lie. As tile_index.h, plain arithmetic.

#include <cstdint>

#include "cuda/tile_index.h"

namespace l2rw::cuda {

// The first row of a thread's warpgroup, which has 64.
L2RW_HOST_DEVICE constexpr int warpgroup_row(int thread) { return thread / 128 * 64; }

// The matrix descriptor of rows in a stage at `base`, from row `row`, a multiple of kPatternRows,
// and from vector `vector` of every row on. The PTX manual, "Matrix Descriptor Format": address,
// and bytes from one pattern of rows to the next, both without their last four bits; the swizzle of
// 128 bytes. The distance within a row is not used with it, and an address within the first row
// means that place of every row.
L2RW_HOST_DEVICE constexpr uint64_t describe_rows(uint32_t base, int row, int vector) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kNotUsed = uint64_t{1} << 16;
  constexpr uint64_t kDistance = uint64_t{kPatternBytes / 16} << 32;
  const uint32_t address = base + static_cast<uint32_t>(row * kLineBytes + vector * kVectorBytes);
  return kSwizzle128 | kDistance | kNotUsed | ((address & 0x3ffffu) >> 4);
}

}  // namespace l2rw::cuda
