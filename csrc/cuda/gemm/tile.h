#pragma once

// The tile of a matrix product A Bᵀ: how a stage of its operands lies in shared memory, and which
// of its sums each thread has.
//
// A stage holds 128 bytes of the depth for each row of A and, below them, for each row of B. They
// are eight vectors of 16 bytes, so that every dtype is copied and addressed alike.

#include <cstdint>

#include "cuda/util/host_device.h"
#include "cuda/util/integers.h"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {

constexpr int kDepthBytes = 128;
constexpr int kDepthVectors = kDepthBytes / kVectorBytes;
// The largest tile then takes 96 KiB, which every architecture from sm_80 on has for one block.
constexpr int kStages = 3;
// The swizzle repeats after this many rows, and every stage starts at a multiple of them.
constexpr int kSwizzleRows = 8;
constexpr int kSwizzleBytes = kSwizzleRows * kDepthBytes;

// The byte offset of a vector in its stage. Eight rows of one column of vectors lie in different
// banks. This is the pattern that wgmma calls the swizzle of 128 bytes.
L2RW_HOST_DEVICE constexpr int swizzled_offset(int row, int vector) {
  return row * kDepthBytes + (vector ^ (row & (kSwizzleRows - 1))) * kVectorBytes;
}

// The matrix descriptor of rows of a stage at `base`, from row `row` on, which is a multiple of
// kSwizzleRows, and from vector `vector` of every row on. The PTX manual, "Matrix Descriptor
// Format": the address and the stride from one pattern of rows to the next, both without their last
// four bits, and the swizzle of 128 bytes. The stride within a row is not used with this swizzle,
// and an address within the first row selects the same vectors of every row.
L2RW_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t base, int row, int vector) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kNotUsed = uint64_t{1} << 16;
  constexpr uint64_t kStride = uint64_t{kSwizzleBytes / 16} << 32;
  const uint32_t address = base + static_cast<uint32_t>(row * kDepthBytes + vector * kVectorBytes);
  return kSwizzle128 | kStride | kNotUsed | ((address & 0x3ffffu) >> 4);
}

// The first of the 64 rows of a thread's warpgroup.
L2RW_HOST_DEVICE constexpr int warpgroup_row(int thread) { return thread / 128 * 64; }

// A tile for tensor cores, divided into warp tiles of WarpRows x WarpColumns. The accumulators of a
// thread, [kThreadRows][kThreadColumns], lie as the results of mma.m16n8, and its addresses of
// shared memory are those that ldmatrix.x4 takes.
template <int Rows, int Columns, int WarpRows, int WarpColumns>
struct TensorCoreTile {
  static_assert(Rows % WarpRows == 0 && Columns % WarpColumns == 0);
  static_assert(WarpRows % 16 == 0 && WarpColumns % 16 == 0);
  static constexpr int kRows = Rows;
  static constexpr int kColumns = Columns;
  static constexpr int kWarpsM = Rows / WarpRows;
  static constexpr int kWarpsN = Columns / WarpColumns;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kFragmentsA = WarpRows / 16;       // 16 rows of A each
  static constexpr int kFragmentsB = WarpColumns / 16;    // 16 rows of B each
  static constexpr int kThreadRows = WarpRows / 8;        // of accumulators
  static constexpr int kThreadColumns = WarpColumns / 4;  // of accumulators
  static constexpr int kAdjacent = 2;                     // adjacent columns of a thread
  static constexpr int kLanesN = 4;                       // lanes that share a row
  static constexpr int kUnroll = 8;                       // copies that a thread issues at once
  static constexpr int kStageBytes = (Rows + Columns) * kDepthBytes;

  L2RW_HOST_DEVICE static constexpr int warp_n(int thread) { return thread / 32 / kWarpsM; }
  L2RW_HOST_DEVICE static constexpr int warp_row(int thread) {
    return thread / 32 % kWarpsM * WarpRows;
  }
  L2RW_HOST_DEVICE static constexpr int warp_column(int thread) {
    return warp_n(thread) * WarpColumns;
  }

  // The row and the column of accumulator [r][c] of a thread.
  L2RW_HOST_DEVICE static constexpr int row(int thread, int r) {
    return warp_row(thread) + r * 8 + thread % 32 / 4;
  }
  L2RW_HOST_DEVICE static constexpr int column(int thread, int c) {
    return warp_column(thread) + c / 2 * 8 + thread % 4 * 2 + c % 2;
  }

  // The row of A that a lane addresses for fragment f, and the vector, counted from the first of
  // the instruction.
  L2RW_HOST_DEVICE static constexpr int a_row(int thread, int f) {
    return warp_row(thread) + f * 16 + thread % 16;
  }
  L2RW_HOST_DEVICE static constexpr int a_vector(int thread) { return thread % 32 / 16; }
  // The same for B. The four matrices of a fragment are two blocks of eight columns, each with both
  // halves of the depth.
  L2RW_HOST_DEVICE static constexpr int b_row(int thread, int f) {
    return warp_column(thread) + f * 16 + thread % 32 / 16 * 8 + thread % 8;
  }
  L2RW_HOST_DEVICE static constexpr int b_vector(int thread) { return thread % 16 / 8; }
};

// A tile for ordinary multiply-adds, of 16 x 16 threads. The rows and columns of a thread are 16
// apart, so that eight lanes read eight consecutive rows of B.
template <int Rows, int Columns>
struct SimtTile {
  static constexpr int kRows = Rows;
  static constexpr int kColumns = Columns;
  static constexpr int kWarpsN = 1;
  static constexpr int kThreads = 256;
  static constexpr int kThreadRows = Rows / 16;
  static constexpr int kThreadColumns = Columns / 16;
  static constexpr int kAdjacent = 1;
  static constexpr int kLanesN = 16;
  static constexpr int kUnroll = 2;
  static constexpr int kStageBytes = (Rows + Columns) * kDepthBytes;

  L2RW_HOST_DEVICE static constexpr int warp_n(int) { return 0; }
  L2RW_HOST_DEVICE static constexpr int row(int thread, int r) { return thread / 16 + 16 * r; }
  L2RW_HOST_DEVICE static constexpr int column(int thread, int c) { return thread % 16 + 16 * c; }
};

struct TileShape {
  int64_t rows;
  int64_t columns;
};

template <class Tile>
constexpr TileShape tile_shape() {
  return {Tile::kRows, Tile::kColumns};
}

// How many tiles cover a matrix.
inline int64_t tile_count(int64_t rows, int64_t columns, TileShape tile) {
  return ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns);
}

// The sums of one thread, in the accumulation type A.
template <class Tile, class A>
using Accumulators = A[Tile::kThreadRows][Tile::kThreadColumns];

template <class Tile, class A>
L2RW_HOST_DEVICE void clear(Accumulators<Tile, A>& sums) {
  L2RW_UNROLL
  for (int r = 0; r < Tile::kThreadRows; ++r) {
    L2RW_UNROLL
    for (int c = 0; c < Tile::kThreadColumns; ++c) {
      sums[r][c] = A(0);
    }
  }
}

template <class Tile, class A>
L2RW_HOST_DEVICE void add(Accumulators<Tile, A>& sums, const Accumulators<Tile, A>& more) {
  L2RW_UNROLL
  for (int r = 0; r < Tile::kThreadRows; ++r) {
    L2RW_UNROLL
    for (int c = 0; c < Tile::kThreadColumns; ++c) {
      sums[r][c] += more[r][c];
    }
  }
}

}  // namespace l2rw::cuda
