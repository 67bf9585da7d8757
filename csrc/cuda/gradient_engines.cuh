#pragma once

// How the tiles of gradient_tile.h are multiplied, dtype by dtype.

#include <bit>

#include "cuda/engines.cuh"
#include "cuda/gradient_tile.h"
#include "cuda/types.cuh"

namespace l2rw::cuda {

// Two numbers of two bytes that lie in one register.
template <class T>
__device__ __forceinline__ float pair_sum(uint32_t packed) {
  const auto pair = std::bit_cast<Pack<T, 2>>(packed);
  return static_cast<float>(pair.values[0]) + static_cast<float>(pair.values[1]);
}

// Tensor cores. MostPixels are added up before their sum is handed over, as in product.cuh. The
// sums of g itself are ordinary ones, of numbers that are not rounded.
template <class T, class TileType, int MostPixels, int Blocks>
struct GradientMatrices : Synchronous {
  using Element = T;
  using Sum = float;
  using Tile = TileType;
  static constexpr int kChunks = MostPixels / Tile::kDepth;
  static constexpr int kBlocks = Blocks;  // that a processor is to hold at a time
  static constexpr int kStep = 32 / static_cast<int>(sizeof(T));  // pixels of one instruction

  __device__ __forceinline__ static void multiply(
      const char* stage, int thread, Sums<Tile, float>& sums) {
#pragma unroll 1
    for (int pixel = kStep * Tile::deep(thread); pixel < Tile::kDepth;
         pixel += kStep * Tile::kDeep) {
      uint32_t left[Tile::kRowBlocks][4];
      if constexpr (Tile::kAccess == Access::matrices) {
        multiply_pairs(shared_address(stage), thread, pixel, left, sums);
      } else {
        multiply_numbers(stage, thread, pixel, left, sums);
      }
    }
  }

 private:
  // Columns 8 j to 8 j + 7.
  __device__ __forceinline__ static void multiply_columns(
      const uint32_t (&left)[Tile::kRowBlocks][4],
      int j,
      uint32_t b0,
      uint32_t b1,
      Sums<Tile, float>& sums) {
#pragma unroll
    for (int b = 0; b < Tile::kRowBlocks; ++b) {
      multiply_matrices<T>(
          sums[2 * b][2 * j],
          sums[2 * b][2 * j + 1],
          sums[2 * b + 1][2 * j],
          sums[2 * b + 1][2 * j + 1],
          left[b],
          b0,
          b1);
    }
  }

  __device__ __forceinline__ static void multiply_pairs(
      uint32_t stage,
      int thread,
      int pixel,
      uint32_t (&left)[Tile::kRowBlocks][4],
      Sums<Tile, float>& sums) {
#pragma unroll
    for (int b = 0; b < Tile::kRowBlocks; ++b) {
      load_transposed(left[b], stage + Tile::row_matrix(thread, pixel, b));
      sums[2 * b][Tile::kBias] += pair_sum<T>(left[b][0]) + pair_sum<T>(left[b][2]);
      sums[2 * b + 1][Tile::kBias] += pair_sum<T>(left[b][1]) + pair_sum<T>(left[b][3]);
    }
#pragma unroll
    for (int v = 0; v + 1 < Tile::kWarpVectors; v += 2) {
      uint32_t right[4];
      load_transposed(right, stage + Tile::column_matrix(thread, pixel, v));
      multiply_columns(left, v, right[0], right[1], sums);
      multiply_columns(left, v + 1, right[2], right[3], sums);
    }
    if constexpr (Tile::kWarpVectors % 2 == 1) {
      constexpr int kLast = Tile::kWarpVectors - 1;
      uint32_t right[2];
      load_transposed(right, stage + Tile::column_matrix(thread & ~16, pixel, kLast));
      multiply_columns(left, kLast, right[0], right[1], sums);
    }
  }

  __device__ __forceinline__ static void multiply_numbers(
      const char* stage,
      int thread,
      int pixel,
      uint32_t (&left)[Tile::kRowBlocks][4],
      Sums<Tile, float>& sums) {
    const auto load = [&](int offset) {
      return *reinterpret_cast<const uint32_t*>(stage + offset);
    };
#pragma unroll
    for (int b = 0; b < Tile::kRowBlocks; ++b) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        left[b][k] = load(Tile::row_number(thread, pixel, b, k));
        sums[2 * b + k % 2][Tile::kBias] += std::bit_cast<float>(left[b][k]);
        round_operand<T>(left[b][k]);
      }
    }
#pragma unroll
    for (int j = 0; j < Tile::kWarpColumns / 8; ++j) {
      uint32_t right[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        right[k] = load(Tile::column_number(thread, pixel, j, k));
        round_operand<T>(right[k]);
      }
      multiply_columns(left, j, right[0], right[1], sums);
    }
  }
};

// Multiply-adds of the dtype itself.
template <class T, class TileType, int MostPixels, int Blocks>
struct GradientPixels : Synchronous {
  using Element = T;
  using Sum = T;
  using Tile = TileType;
  static constexpr int kChunks = MostPixels / Tile::kDepth;
  static constexpr int kBlocks = Blocks;

  __device__ __forceinline__ static void multiply(
      const char* stage, int thread, Sums<Tile, T>& sums) {
    const int lane = thread % 32;
#pragma unroll 2
    for (int pixel = Tile::deep(thread); pixel < Tile::kDepth; pixel += Tile::kDeep) {
      Vector<T> left[Tile::kRowBlocks];
#pragma unroll
      for (int b = 0; b < Tile::kRowBlocks; ++b) {
        left[b] = *reinterpret_cast<const Vector<T>*>(
            stage +
            Tile::row_offset(pixel, Tile::row(thread, b * Tile::kNumbers) / Tile::kNumbers));
#pragma unroll
        for (int k = 0; k < Tile::kNumbers; ++k) {
          sums[b * Tile::kNumbers + k][Tile::kBias] += left[b].values[k];
        }
      }
      const T* const right = reinterpret_cast<const T*>(
                                 stage + Tile::column_offset(pixel, Tile::warp_vector(thread))) +
                             lane % Tile::kLanesAcross;
#pragma unroll
      for (int c = 0; c < Tile::kProductColumns; ++c) {
        const T value = right[c * Tile::kLanesAcross];
#pragma unroll
        for (int b = 0; b < Tile::kRowBlocks; ++b) {
#pragma unroll
          for (int k = 0; k < Tile::kNumbers; ++k) {
            sums[b * Tile::kNumbers + k][c] += left[b].values[k] * value;
          }
        }
      }
    }
  }
};

// Three tiles: 128 output channels for sums over many examples of wide layers, 64, and, where no
// more than 16 are there, four warps that share the pixels of a stage.
template <class Engines>
struct GradientEngines;

template <class T>
struct GradientEngines<MatrixEngines<T>> {
  static constexpr int kBytes = static_cast<int>(sizeof(T));
  static constexpr Access kAccess = kBytes == 2 ? Access::matrices : Access::numbers;
  static constexpr int kMost = kBytes == 2 ? 512 : 256;
  template <int RowBlocks, int Down, int Across, int Deep, int Depth>
  using Tile = GradientTile<kBytes, kAccess, RowBlocks, Down, Across, Deep, Depth>;
  using Large = GradientMatrices<T, Tile<2, 4, 2, 1, 64 / kBytes>, kMost, 1>;
  using Small = GradientMatrices<T, Tile<1, 4, 1, 1, 128 / kBytes>, kMost, 3>;
  using Narrow = GradientMatrices<T, Tile<1, 1, 1, 4, 128 / kBytes>, kMost, 3>;
};

template <class T>
struct GradientEngines<PlainEngines<T>> {
  static constexpr int kBytes = static_cast<int>(sizeof(T));
  static constexpr int kMost = 512 / kBytes;
  template <int RowBlocks, int Down, int Across, int Deep, int Depth>
  using Tile = GradientTile<kBytes, Access::pixels, RowBlocks, Down, Across, Deep, Depth>;
  using Large = GradientPixels<T, Tile<2, 4, 2, 1, 64 / kBytes>, kMost, 1>;
  using Small = GradientPixels<T, Tile<1, 4, 1, 1, 128 / kBytes>, kMost, 3>;
  using Narrow = GradientPixels<T, Tile<1, 1, 1, 4, 128 / kBytes>, kMost, 3>;
};

}  // namespace l2rw::cuda
