#pragma once

// What each thread copies to fill a stage with rows of A and B.

#include <cstdint>

#include "cuda/gemm/scheduler.h"
#include "cuda/gemm/tile.h"
#include "cuda/util/host_device.h"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {

// What a vector of shared memory is filled with: `bytes` from memory, then zeros.
struct Source {
  const char* from;
  int bytes;
};

// One vector of every row of a matrix, for the rows from `first` on.
class RowSource {
 public:
  L2RW_HOST_DEVICE RowSource(const MatrixView& matrix, int64_t first, int64_t byte)
      : data_(matrix.data),
        offset_(first * matrix.stride + byte),
        stride_(matrix.stride),
        rows_(matrix.rows - first),
        bytes_(matrix.vector_bytes(byte)) {}

  // Nothing is read where no byte exists, and no address outside of the memory is formed.
  L2RW_HOST_DEVICE Source operator()(int row) const {
    const bool exists = row < rows_ && bytes_ > 0;
    return {data_ + (exists ? offset_ + row * stride_ : 0), exists ? bytes_ : 0};
  }

 private:
  const char* data_;
  int64_t offset_;
  int64_t stride_;
  int64_t rows_;
  int bytes_;
};

// The first row that a thread copies to, and its vector in every row.
L2RW_HOST_DEVICE constexpr int thread_row(int thread) { return thread / kDepthVectors; }
L2RW_HOST_DEVICE constexpr int thread_vector(int thread) { return thread % kDepthVectors; }

// What a thread copies of `Count` rows of a stage, from row `to` on: calls copy(offset in the
// stage, source, bytes that exist). `source(k)` gives the Source of the k-th row after the thread's
// first one.
template <class Tile, int Count, class RowsSource, class Copy>
L2RW_HOST_DEVICE void load_rows(int thread, int to, const RowsSource& source, const Copy& copy) {
  constexpr int kRows = Tile::kThreads / kDepthVectors;  // that the block copies at once
  static_assert(Count % kRows == 0 && kRows % kSwizzleRows == 0);
  const int first = swizzled_offset(to + thread_row(thread), thread_vector(thread));
  L2RW_UNROLL_BY(Tile::kUnroll)
  for (int row = 0; row < Count; row += kRows) {
    const Source vector = source(row);
    copy(first + row * kDepthBytes, vector.from, vector.bytes);
  }
}

// The same for a whole stage, from two matrices: A from row `a_row` on, B from row `b_row` on, both
// at byte `depth_byte` of their rows.
template <class Tile, class Copy>
L2RW_HOST_DEVICE void load_operands(
    int thread,
    const MatrixView& a,
    int64_t a_row,
    const MatrixView& b,
    int64_t b_row,
    int64_t depth_byte,
    const Copy& copy) {
  const int64_t byte = depth_byte + thread_vector(thread) * kVectorBytes;
  const int first = thread_row(thread);
  load_rows<Tile, Tile::kRows>(thread, 0, RowSource(a, a_row + first, byte), copy);
  load_rows<Tile, Tile::kColumns>(thread, Tile::kRows, RowSource(b, b_row + first, byte), copy);
}

// The operands of Z Vᵀ in a linear layer.
struct LinearOperands {
  static constexpr bool kOneProduct = true;
  MatrixView z;  // [n T, i]
  MatrixView V;  // [o, i]

  // Loads the stages of a tile.
  template <class Tile>
  class Loader {
   public:
    static constexpr int kTableBytes = 0;

    // There is only one product, and no table in shared memory.
    L2RW_HOST_DEVICE Loader(const LinearOperands& operands, int32_t, int32_t row_tile, char*)
        : operands_(operands), row_tile_(row_tile) {}

    template <class Copy>
    L2RW_HOST_DEVICE void load(int thread, const KTileIterator& step, const Copy& copy) const {
      load_operands<Tile>(
          thread,
          operands_.z,
          int64_t{row_tile_} * Tile::kRows,
          operands_.V,
          step.column_tile() * Tile::kColumns,
          int64_t{step.k_tile} * kDepthBytes,
          copy);
    }

   private:
    const LinearOperands& operands_;
    int32_t row_tile_;
  };
};

}  // namespace l2rw::cuda
