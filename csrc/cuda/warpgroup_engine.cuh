#pragma once

// Large tiles of numbers of two bytes on sm_90a: products of warpgroups, which read both
// operands straight from shared memory and run on while the next stages are copied.

#include <cstdint>

#include "cuda/instructions.cuh"
#include "cuda/product.cuh"
#include "cuda/warpgroup_index.h"

namespace l2rw::cuda {

template <class T, int Columns>
struct WarpgroupEngine {
  using Element = T;
  using Sum = float;
  // Two warpgroups, each with 64 rows and all columns: a warp has 16 of the rows.
  using Tile = MatrixTile<128, Columns, 16, Columns>;
  static constexpr int kChunks = MatrixEngine<T, Tile, 1>::kChunks;
  static constexpr int kBlocks = 1;
  static constexpr int kStages = 5;
  static constexpr int kRunning = 1;
  static_assert(kStages * Tile::kStageBytes <= 224 << 10);
  static_assert(Tile::kStageBytes % kPatternBytes == 0);

  // All products of one stage.
  __device__ __forceinline__ static void start(
      const char* stage, int thread, Sums<Tile, float>& sums) {
    const uint32_t base = shared_address(stage);
    hold_all(sums);
    open_products();
#pragma unroll
    for (int vector = 0; vector < kLineVectors; vector += 2) {
      multiply_warpgroup<T>(
          sums,
          describe_rows(base, warpgroup_row(thread), vector),
          describe_rows(base, Tile::kRows, vector));
    }
    close_products();
    hold_all(sums);
  }

  // After this the sums can be read.
  __device__ __forceinline__ static void finish(Sums<Tile, float>& sums) {
    wait_for_products<0>();
    hold_all(sums);
  }

 private:
  __device__ __forceinline__ static void hold_all(Sums<Tile, float>& sums) {
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        hold(sums[r][c]);
      }
    }
  }
};

}  // namespace l2rw::cuda
