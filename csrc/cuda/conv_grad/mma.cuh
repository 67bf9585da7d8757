#pragma once

// How one stage of a gradient's tile is multiplied.

#include <bit>
#include <cstdint>

#include "cuda/conv_grad/tile.h"
#include "cuda/gemm/mma.cuh"
#include "cuda/gemm/tile.h"
#include "cuda/util/ptx.cuh"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {

// The sum of two 16-bit numbers in one register.
template <class T>
__device__ __forceinline__ float pair_sum(uint32_t packed) {
  const auto pair = std::bit_cast<Vector<T, 2>>(packed);
  return static_cast<float>(pair.values[0]) + static_cast<float>(pair.values[1]);
}

// Tensor cores. Sums are promoted after PromotionPixels, as in gemm/mma.cuh. The sums of g alone
// are formed by ordinary additions, of numbers that are not rounded.
template <class T, class TileType, int PromotionPixels, int MinBlocks>
struct GradientTensorCoreMma : SynchronousMma {
  using Element = T;
  using Sum = float;
  using Tile = TileType;
  static constexpr int kPromotionInterval = PromotionPixels / Tile::kDepth;
  static constexpr int kMinBlocks = MinBlocks;  // that a processor must hold at a time
  static constexpr int kStep = 32 / static_cast<int>(sizeof(T));  // pixels of one instruction

  __device__ __forceinline__ static void multiply(
      const char* stage, int thread, Accumulators<Tile, float>& sums) {
#pragma unroll 1
    for (int pixel = kStep * Tile::slice_k(thread); pixel < Tile::kDepth;
         pixel += kStep * Tile::kSlicesK) {
      uint32_t a[Tile::kRowFragments][4];
      if constexpr (Tile::kAccess == Access::ldmatrix) {
        multiply_16_bits(shared_address(stage), thread, pixel, a, sums);
      } else {
        multiply_tf32(stage, thread, pixel, a, sums);
      }
    }
  }

 private:
  // Multiplies columns 8 j to 8 j + 7.
  __device__ __forceinline__ static void multiply_columns(
      const uint32_t (&a)[Tile::kRowFragments][4],
      int j,
      uint32_t b0,
      uint32_t b1,
      Accumulators<Tile, float>& sums) {
#pragma unroll
    for (int f = 0; f < Tile::kRowFragments; ++f) {
      mma_sync<T>(
          sums[2 * f][2 * j],
          sums[2 * f][2 * j + 1],
          sums[2 * f + 1][2 * j],
          sums[2 * f + 1][2 * j + 1],
          a[f],
          b0,
          b1);
    }
  }

  __device__ __forceinline__ static void multiply_16_bits(
      uint32_t stage,
      int thread,
      int pixel,
      uint32_t (&a)[Tile::kRowFragments][4],
      Accumulators<Tile, float>& sums) {
#pragma unroll
    for (int f = 0; f < Tile::kRowFragments; ++f) {
      ldmatrix_transposed(a[f], stage + Tile::row_ldmatrix(thread, pixel, f));
      sums[2 * f][Tile::kBias] += pair_sum<T>(a[f][0]) + pair_sum<T>(a[f][2]);
      sums[2 * f + 1][Tile::kBias] += pair_sum<T>(a[f][1]) + pair_sum<T>(a[f][3]);
    }
#pragma unroll
    for (int v = 0; v + 1 < Tile::kWarpVectors; v += 2) {
      uint32_t b[4];
      ldmatrix_transposed(b, stage + Tile::column_ldmatrix(thread, pixel, v));
      multiply_columns(a, v, b[0], b[1], sums);
      multiply_columns(a, v + 1, b[2], b[3], sums);
    }
    if constexpr (Tile::kWarpVectors % 2 == 1) {
      constexpr int kLast = Tile::kWarpVectors - 1;
      uint32_t b[2];
      ldmatrix_transposed(b, stage + Tile::column_ldmatrix(thread & ~16, pixel, kLast));
      multiply_columns(a, kLast, b[0], b[1], sums);
    }
  }

  __device__ __forceinline__ static void multiply_tf32(
      const char* stage,
      int thread,
      int pixel,
      uint32_t (&a)[Tile::kRowFragments][4],
      Accumulators<Tile, float>& sums) {
    const auto load = [&](int offset) {
      return *reinterpret_cast<const uint32_t*>(stage + offset);
    };
#pragma unroll
    for (int f = 0; f < Tile::kRowFragments; ++f) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        a[f][k] = load(Tile::row_scalar(thread, pixel, f, k));
        sums[2 * f + k % 2][Tile::kBias] += std::bit_cast<float>(a[f][k]);
        round_operand<T>(a[f][k]);
      }
    }
#pragma unroll
    for (int j = 0; j < Tile::kWarpColumns / 8; ++j) {
      uint32_t b[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        b[k] = load(Tile::column_scalar(thread, pixel, j, k));
        round_operand<T>(b[k]);
      }
      multiply_columns(a, j, b[0], b[1], sums);
    }
  }
};

// Multiply-adds of the dtype itself.
template <class T, class TileType, int PromotionPixels, int MinBlocks>
struct GradientSimtMma : SynchronousMma {
  using Element = T;
  using Sum = T;
  using Tile = TileType;
  static constexpr int kPromotionInterval = PromotionPixels / Tile::kDepth;
  static constexpr int kMinBlocks = MinBlocks;

  __device__ __forceinline__ static void multiply(
      const char* stage, int thread, Accumulators<Tile, T>& sums) {
    using Fragment = Vector<T, Tile::kElements>;
    const int lane = thread % 32;
#pragma unroll 2
    for (int pixel = Tile::slice_k(thread); pixel < Tile::kDepth; pixel += Tile::kSlicesK) {
      Fragment a[Tile::kRowFragments];
#pragma unroll
      for (int f = 0; f < Tile::kRowFragments; ++f) {
        a[f] = *reinterpret_cast<const Fragment*>(
            stage +
            Tile::row_offset(pixel, Tile::row(thread, f * Tile::kElements) / Tile::kElements));
#pragma unroll
        for (int k = 0; k < Tile::kElements; ++k) {
          sums[f * Tile::kElements + k][Tile::kBias] += a[f].values[k];
        }
      }
      const T* const b = reinterpret_cast<const T*>(
                             stage + Tile::column_offset(pixel, Tile::warp_vector(thread))) +
                         lane % Tile::kLanesN;
#pragma unroll
      for (int c = 0; c < Tile::kProductColumns; ++c) {
        const T value = b[c * Tile::kLanesN];
#pragma unroll
        for (int f = 0; f < Tile::kRowFragments; ++f) {
#pragma unroll
          for (int k = 0; k < Tile::kElements; ++k) {
            sums[f * Tile::kElements + k][c] += a[f].values[k] * value;
          }
        }
      }
    }
  }
};

}  // namespace l2rw::cuda
