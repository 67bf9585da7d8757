#pragma once

// The inner loops of the convolutions and of the small matrix products, compiled once per
// instruction set (kernels.cpp). They know pointers, sizes and strides alone. docs/kernels.md says
// how they are put together.

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "cpu/isa.h"

namespace l2rw {

using torch::headeronly::ScalarType;

template <class T>
constexpr ScalarType kDtype = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

constexpr int kMaxVectors = 4;  // vectors of the b side in one tile
constexpr int kMaxRows = 16;    // rows of the a side in one tile
constexpr int kMaxRowTile = 8;  // and in one row tile

// The pixels a tile sums over: `count` rows of `width` pixels.
template <class T>
struct PixelRows {
  const int64_t* a;  // [count], where the rows start in a
  const int64_t* b;  // [count], and in b
  int64_t count;
  int64_t width;
  int64_t step_a;  // from one pixel of a row to the next
  int64_t step_b;
  // Memory that will be read soon: this many bytes of it are fetched into the cache with each row.
  const char* soon;
  int64_t soon_bytes;
};

// What becomes of a tile's sums S [R, V * L], or [R, V] for planes.
template <class T>
struct TileResult {
  T* out;              // S is stored there, or added if `add`; null: it is not kept
  const T* direction;  // same layout as out; null: none
  int64_t ld;          // from one row of the tile to the next, in both
  bool add;
};

template <class T>
struct Kernels {
  int64_t lanes;  // L, numbers in a vector
  // Rows of a tile that is this many vectors wide; 0: there is none.
  int64_t max_rows[kMaxVectors + 1];
  int64_t max_planar_rows[kMaxVectors + 1];

  // S[r, v * L + l] = sum over pixels of a[.. + r] * b[v][.. + l], r < R, v < V. Returns
  // <S, direction>.
  using ChannelTile = T (*)(
      const T* a,
      const T* const* b,  // [V]
      const PixelRows<T>& pixels,
      const TileResult<T>& result);
  ChannelTile channel_tile[kMaxVectors + 1][kMaxRows + 1];  // [V][R]

  // S[r, v] = sum_{s < length} a[r * lda + s] * b[v][s], r < R, v < V; L divides length. Returns
  // <S, direction>.
  using PlanarTile = T (*)(
      const T* a,
      int64_t lda,
      const T* const* b,  // [V]
      int64_t length,
      const TileResult<T>& result);
  PlanarTile planar_tile[kMaxVectors + 1][kMaxRows + 1];  // [V][R]

  // out[r * ldo + c] += sum_{k < depth} a[r * lda + k] * b[k * V * L + c], r < R, c < V * L.
  using RowTile = void (*)(const T* a, int64_t lda, const T* b, int64_t depth, T* out, int64_t ldo);
  RowTile row_tile[kMaxVectors + 1][kMaxRowTile + 1];  // [V][R]

  // to[j * to_row + i] = scale * from[i * from_row + j * from_column], i < rows, j < columns.
  void (*transpose)(
      T* to,
      int64_t to_row,
      const void* from,
      ScalarType dtype,  // of from
      int64_t from_row,
      int64_t from_column,
      int64_t rows,
      int64_t columns,
      T scale);

  // sum a[i], i < size.
  T (*sum)(const T* a, int64_t size);

  // sum a[i] * b[i], i < size.
  T (*dot)(const T* a, const T* b, int64_t size);

  // out[c] += sum_{p < rows} a[p * lda + c], c < columns.
  void (*column_sums)(const T* a, int64_t lda, int64_t rows, int64_t columns, T* out);
};

}  // namespace l2rw

L2RW_FOR_EACH_ISA(template <class T> const Kernels<T>& kernels();)

namespace l2rw {

// The kernels of the instruction set in use.
template <class T>
const Kernels<T>& kernels() {
  return L2RW_ISA_CALL(kernels<T>);
}

}  // namespace l2rw
