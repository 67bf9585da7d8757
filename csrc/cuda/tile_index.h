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
// Rows after which the places of vectors repeat; stages start at multiples of as many lines.
constexpr int kPatternRows = 8;
constexpr int kPatternBytes = kPatternRows * kLineBytes;

// Byte offset of a vector in its stage. Eight rows of one column of vectors lie in different banks.
// It is the pattern that products of warpgroups know as the swizzle of 128 bytes.
L2RW_HOST_DEVICE constexpr int shared_offset(int row, int vector) {
  return row * kLineBytes + (vector ^ (row & (kPatternRows - 1))) * kVectorBytes;
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
  static constexpr int kTogether = 8;                     // lines that a thread fills at once
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
  static constexpr int kTogether = 2;
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

// Rows from a first one on, at one place of the depth.
class RowSources {
 public:
  L2RW_HOST_DEVICE RowSources(const Operand& operand, int64_t first, int64_t byte)
      : data_(operand.data),
        offset_(first * operand.stride + byte),
        stride_(operand.stride),
        rows_(operand.rows - first),
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
  int64_t rows_;
  int bytes_;
};

// The first line that a thread fills, and its vector in every line.
L2RW_HOST_DEVICE constexpr int line_of(int thread) { return thread / kLineVectors; }
L2RW_HOST_DEVICE constexpr int vector_of(int thread) { return thread % kLineVectors; }

// What a thread copies of `Count` lines from line `to` of a stage on: calls copy(offset in the
// stage, source, bytes that exist). `rows(k)` gives the Source of the k-th row after that of the
// thread's first line.
template <class Tile, int Count, class Rows, class Copy>
L2RW_HOST_DEVICE void for_each_line(int thread, int to, const Rows& rows, const Copy& copy) {
  constexpr int kLines = Tile::kThreads / kLineVectors;
  static_assert(Count % kLines == 0 && kLines % kPatternRows == 0);
  const int first = shared_offset(to + line_of(thread), vector_of(thread));
  L2RW_UNROLL_BY(Tile::kTogether)
  for (int row = 0; row < Count; row += kLines) {
    const Source source = rows(row);
    copy(first + row * kLineBytes, source.from, source.bytes);
  }
}

// The same for all rows of A and then B, that lie evenly apart.
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
  const int first = line_of(thread);
  for_each_line<Tile, Tile::kRows>(thread, 0, RowSources(left, left_row + first, byte), copy);
  for_each_line<Tile, Tile::kColumns>(
      thread, Tile::kRows, RowSources(right, right_row + first, byte), copy);
}

}  // namespace l2rw::cuda
