#pragma once

// The mma of sm_90a for large tiles of 16-bit numbers: wgmma, which reads both operands from shared
// memory itself and runs on while the next stages are copied.

#include <cstdint>

#include "cuda/gemm/mma.cuh"
#include "cuda/gemm/tile.h"
#include "cuda/util/ptx.cuh"

namespace l2rw::cuda {

template <class T, int Columns>
struct Sm90Mma {
  using Element = T;
  using Sum = float;
  // Two warpgroups have 64 rows and all columns each, and each of their warps 16 of the rows.
  using Tile = TensorCoreTile<128, Columns, 16, Columns>;
  static constexpr int kPromotionInterval = TensorCoreMma<T, Tile, 1>::kPromotionInterval;
  static constexpr int kMinBlocks = 1;
  static constexpr int kStages = 5;
  static constexpr int kSharedAlignment = kSwizzleBytes;  // wgmma swizzles addresses
  static constexpr int kInFlight = 1;
  static_assert(kStages * Tile::kStageBytes <= 224 << 10);
  static_assert(Tile::kStageBytes % kSwizzleBytes == 0);

  // Starts the mma of one stage.
  __device__ __forceinline__ static void issue(
      const char* stage, int thread, Accumulators<Tile, float>& sums) {
    const uint32_t base = shared_address(stage);
    fence_accumulators(sums);
    wgmma_fence();
#pragma unroll
    for (int vector = 0; vector < kDepthVectors; vector += 2) {
      wgmma<T>(
          sums,
          matrix_descriptor(base, warpgroup_row(thread), vector),
          matrix_descriptor(base, Tile::kRows, vector));
    }
    wgmma_commit();
    fence_accumulators(sums);
  }

  // Waits for all of them. Only then can the sums be read.
  __device__ __forceinline__ static void wait(Accumulators<Tile, float>& sums) {
    wgmma_wait<0>();
    fence_accumulators(sums);
  }

 private:
  __device__ __forceinline__ static void fence_accumulators(Accumulators<Tile, float>& sums) {
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        fence_register(sums[r][c]);
      }
    }
  }
};

}  // namespace l2rw::cuda
