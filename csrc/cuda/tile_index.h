#pragma once

// Where everything lies in a tile of a product of rows, A Bᵀ. Plain arithmetic, the same on the
// host and the device: tests on machines without a GPU run it.
//
// A stage of shared memory holds a line of 128 bytes for each row of A and, below them, of B. A
// line is eight vectors of 16 bytes, so that every dtype is copied and addressed alike.

#include <cstdint>

#ifdef __CUDACC__
#define L2RW_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define L2RW_HOST_DEVICE inline
#endif

// Sums stay in registers only where loops over them are unrolled; the host's compiler does not know
// these words.
#ifdef __CUDA_ARCH__
#define L2RW_PRAGMA(text) _Pragma(#text)
#define L2RW_UNROLL _Pragma("unroll")
#define L2RW_UNROLL_BY(count) L2RW_PRAGMA(unroll(count))
#define L2RW_DO_NOT_UNROLL _Pragma("unroll 1")
#else
#define L2RW_UNROLL
#define L2RW_UNROLL_BY(count)
#define L2RW_DO_NOT_UNROLL
#endif

namespace l2rw::cuda {

constexpr int kVectorBytes = 16;
constexpr int kLineBytes = 128;
constexpr int kLineVectors = kLineBytes / kVectorBytes;
// 96 KiB for the largest tile: what every architecture from sm_80 on has for one block.
constexpr int kStages = 3;

// Byte offset of a vector in its stage. Eight rows of one column of vectors lie in different banks.
L2RW_HOST_DEVICE constexpr int shared_offset(int row, int vector) {
  return row * kLineBytes + (vector ^ (row % kLineVectors)) * kVectorBytes;
}

// A tile for tensor cores. The lanes of a warp hold sums as the results of mma.m16n8 lie, and
// address shared memory as ldmatrix.x4 wants it. A thread's sums are [kThreadRows][kThreadColumns].
template <int Rows, int Columns, int WarpRows, int WarpColumns>
struct MatrixTile {
  static_assert(Rows % WarpRows == 0 && Columns % WarpColumns == 0);
  static_assert(WarpRows % 16 == 0 && WarpColumns % 16 == 0);
  static constexpr int kRows = Rows;
  static constexpr int kColumns = Columns;
  static constexpr int kWarpsDown = Rows / WarpRows;
  static constexpr int kWarpsAcross = Columns / WarpColumns;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kLeftBlocks = WarpRows / 16;       // 16 rows of A each
  static constexpr int kRightBlocks = WarpColumns / 16;   // 16 rows of B each
  static constexpr int kThreadRows = WarpRows / 8;        // of the sums
  static constexpr int kThreadColumns = WarpColumns / 4;  // of the sums
  static constexpr int kAdjacent = 2;                     // columns of a thread side by side
  static constexpr int kLanesAcross = 4;                  // lanes that share a row
  static constexpr int kTogether = 2;                     // rows that a thread loads at once
  static constexpr int kStageBytes = (Rows + Columns) * kLineBytes;

  L2RW_HOST_DEVICE static constexpr int warp_across(int thread) { return thread / 32 / kWarpsDown; }
  L2RW_HOST_DEVICE static constexpr int warp_row(int thread) {
    return thread / 32 % kWarpsDown * WarpRows;
  }
  L2RW_HOST_DEVICE static constexpr int warp_column(int thread) {
    return warp_across(thread) * WarpColumns;
  }

  // Of the sum at place (r, c) of a thread.
  L2RW_HOST_DEVICE static constexpr int row(int thread, int r) {
    return warp_row(thread) + r * 8 + thread % 32 / 4;
  }
  L2RW_HOST_DEVICE static constexpr int column(int thread, int c) {
    return warp_column(thread) + c / 2 * 8 + thread % 4 * 2 + c % 2;
  }

  // The row of A, and the vector after the first of a step, that a lane addresses for block b.
  L2RW_HOST_DEVICE static constexpr int left_row(int thread, int b) {
    return warp_row(thread) + b * 16 + thread % 16;
  }
  L2RW_HOST_DEVICE static constexpr int left_vector(int thread) { return thread % 32 / 16; }
  // The same for B. Its four matrices are two columns of sums, each with both halves of the depth.
  L2RW_HOST_DEVICE static constexpr int right_row(int thread, int b) {
    return warp_column(thread) + b * 16 + thread % 32 / 16 * 8 + thread % 8;
  }
  L2RW_HOST_DEVICE static constexpr int right_vector(int thread) { return thread % 16 / 8; }
};

// A tile for ordinary multiply-adds: 16 by 16 threads, whose rows and columns are 16 apart, so that
// eight lanes read eight consecutive rows of B.
template <int Rows, int Columns>
struct PlainTile {
  static constexpr int kRows = Rows;
  static constexpr int kColumns = Columns;
  static constexpr int kWarpsAcross = 1;
  static constexpr int kThreads = 256;
  static constexpr int kThreadRows = Rows / 16;
  static constexpr int kThreadColumns = Columns / 16;
  static constexpr int kAdjacent = 1;
  static constexpr int kLanesAcross = 16;
  static constexpr int kTogether = 1;
  static constexpr int kStageBytes = (Rows + Columns) * kLineBytes;

  L2RW_HOST_DEVICE static constexpr int warp_across(int) { return 0; }
  L2RW_HOST_DEVICE static constexpr int row(int thread, int r) { return thread / 16 + 16 * r; }
  L2RW_HOST_DEVICE static constexpr int column(int thread, int c) { return thread % 16 + 16 * c; }
};

// What a vector of shared memory is filled with: `bytes` from memory, then zeros.
struct Source {
  const char* from;
  int bytes;
};

// Rows in memory, evenly apart. Vectors start at multiples of 16 bytes, the last one of a row may
// be cut off by its width.
struct Operand {
  const char* data;
  int64_t stride;  // bytes from row to row
  int64_t rows;
  int64_t width;  // bytes of a row

  // How many bytes of the vector at `byte` of a row exist.
  L2RW_HOST_DEVICE int vector_bytes(int64_t byte) const {
    const int64_t left = width - byte;
    return static_cast<int>(left < 0 ? 0 : (left < kVectorBytes ? left : kVectorBytes));
  }
};

// Rows of a tile, at one place of the depth.
class TileRows {
 public:
  L2RW_HOST_DEVICE TileRows(const Operand& operand, int64_t first_row, int64_t byte)
      : data_(operand.data),
        offset_(first_row * operand.stride + byte),
        stride_(operand.stride),
        rows_(operand.rows - first_row),
        bytes_(operand.vector_bytes(byte)) {}

  // Nothing is read where no byte exists, and no address outside of the memory is formed.
  L2RW_HOST_DEVICE Source operator()(int row) const {
    const bool exists = row < rows_ && bytes_ > 0;
    return {data_ + (exists ? offset_ + row * stride_ : 0), exists ? bytes_ : 0};
  }

 private:
  const char* data_;
  int64_t offset_;
  int64_t stride_;
  int64_t rows_;  // from the first one of the tile on
  int bytes_;
};

// The vector of every line that a thread fills.
L2RW_HOST_DEVICE constexpr int vector_of(int thread) { return thread % kLineVectors; }

// What a thread copies for one stage: calls copy(offset in the stage, source, bytes that exist).
// `left(row)` and `right(row)` give the Source of a row of the tile, for the thread's vector.
template <class Tile, class Left, class Right, class Copy>
L2RW_HOST_DEVICE void for_each_line(
    int thread, const Left& left, const Right& right, const Copy& copy) {
  constexpr int kLines = Tile::kThreads / kLineVectors;
  static_assert(Tile::kRows % kLines == 0 && Tile::kColumns % kLines == 0);
  const int first = thread / kLineVectors;
  L2RW_UNROLL_BY(Tile::kTogether)
  for (int row = first; row < Tile::kRows; row += kLines) {
    const Source source = left(row);
    copy(shared_offset(row, vector_of(thread)), source.from, source.bytes);
  }
  L2RW_UNROLL_BY(Tile::kTogether)
  for (int row = first; row < Tile::kColumns; row += kLines) {
    const Source source = right(row);
    copy(shared_offset(Tile::kRows + row, vector_of(thread)), source.from, source.bytes);
  }
}

// The same for rows that lie evenly apart.
template <class Tile, class Copy>
L2RW_HOST_DEVICE void for_each_vector(
    int thread,
    const Operand& left,
    int64_t left_row,
    const Operand& right,
    int64_t right_row,
    int64_t line_byte,
    const Copy& copy) {
  const int64_t byte = line_byte + vector_of(thread) * kVectorBytes;
  for_each_line<Tile>(
      thread, TileRows(left, left_row, byte), TileRows(right, right_row, byte), copy);
}

}  // namespace l2rw::cuda
