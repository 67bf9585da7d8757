#pragma once

// How one stage is multiplied: the mma of every architecture, on tensor cores and without. An mma
// has number types, a tile, and the interval after which its sums are promoted. Tensor cores
// truncate what they add, so that one long sum in float32 would be too small by some 1e-5; sums of
// at most 512 numbers, added up in ordinary arithmetic, are not.

#include <cstdint>

#include "cuda/gemm/tile.h"
#include "cuda/util/ptx.cuh"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {

// An mma that is complete when its multiply() returns.
struct SynchronousMma {
  static constexpr int kStages = cuda::kStages;
  static constexpr int kSharedAlignment = kVectorBytes;
  static constexpr int kInFlight = 0;  // steps whose mma may still run when the next one starts
};

template <class T, class TileType, int MinBlocks>
struct TensorCoreMma : SynchronousMma {
  using Element = T;
  using Sum = float;
  using Tile = TileType;
  static constexpr int kPromotionInterval = 8;  // k-tiles
  static constexpr int kMinBlocks = MinBlocks;  // that a processor must hold at a time

  __device__ __forceinline__ static void multiply(
      const char* stage, int thread, Accumulators<Tile, float>& sums) {
    const uint32_t base = shared_address(stage);
#pragma unroll 2
    for (int vector = 0; vector < kDepthVectors; vector += 2) {
      uint32_t a[Tile::kFragmentsA][4];
      uint32_t b[Tile::kFragmentsB][4];
#pragma unroll
      for (int f = 0; f < Tile::kFragmentsA; ++f) {
        ldmatrix(
            a[f], base + swizzled_offset(Tile::a_row(thread, f), vector + Tile::a_vector(thread)));
      }
#pragma unroll
      for (int f = 0; f < Tile::kFragmentsB; ++f) {
        ldmatrix(
            b[f],
            base + swizzled_offset(
                       Tile::kRows + Tile::b_row(thread, f), vector + Tile::b_vector(thread)));
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int f = 0; f < Tile::kFragmentsA; ++f) {
          round_operand<T>(a[f][k]);
        }
#pragma unroll
        for (int f = 0; f < Tile::kFragmentsB; ++f) {
          round_operand<T>(b[f][k]);
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsA; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * Tile::kFragmentsB; ++j) {
          mma_sync<T>(
              sums[2 * i][2 * j],
              sums[2 * i][2 * j + 1],
              sums[2 * i + 1][2 * j],
              sums[2 * i + 1][2 * j + 1],
              a[i],
              b[j / 2][j % 2 * 2],
              b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
};

// Multiply-adds of the dtype itself, straight from shared memory.
template <class T, class TileType>
struct SimtMma : SynchronousMma {
  using Element = T;
  using Sum = T;
  using Tile = TileType;
  static constexpr int kPromotionInterval = 4;
  static constexpr int kMinBlocks = sizeof(T) == 4 ? 2 : 1;

  __device__ __forceinline__ static void multiply(
      const char* stage, int thread, Accumulators<Tile, T>& sums) {
    using Fragment = Vector<T, kVectorElements<T>>;
#pragma unroll 1
    for (int vector = 0; vector < kDepthVectors; ++vector) {
      Fragment a[Tile::kThreadRows];
#pragma unroll
      for (int r = 0; r < Tile::kThreadRows; ++r) {
        a[r] = *reinterpret_cast<const Fragment*>(
            stage + swizzled_offset(Tile::row(thread, r), vector));
      }
#pragma unroll
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const Fragment b = *reinterpret_cast<const Fragment*>(
            stage + swizzled_offset(Tile::kRows + Tile::column(thread, c), vector));
#pragma unroll
        for (int k = 0; k < kVectorElements<T>; ++k) {
#pragma unroll
          for (int r = 0; r < Tile::kThreadRows; ++r) {
            sums[r][c] += a[r].values[k] * b.values[k];
          }
        }
      }
    }
  }
};

}  // namespace l2rw::cuda
