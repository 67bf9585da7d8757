#pragma once

// Products of rows, A Bᵀ, tile by tile: shared memory pipeline and multiplication. What becomes of
// the sums is the business of a class of row_sums.h.

#include <cstdint>

#include "cuda/instructions.cuh"
#include "cuda/reduce.cuh"
#include "cuda/row_sums.h"

namespace l2rw::cuda {

// An engine whose products are formed before it goes on; what multiply() below asks of every
// engine.
struct Synchronous {
  static constexpr int kStages = cuda::kStages;
  static constexpr int kRunning = 0;  // steps whose products may still be formed at the next one
};

// A kernel's way to multiply: number types, tile, and how many chunks are added up before their sum
// is handed over. Tensor cores cut off what they add, always towards zero, so that one long sum in
// float32 would shrink by some 1e-5; sums of at most 512 numbers, added up properly, do not.
template <class T, class TileType, int Blocks>
struct MatrixEngine : Synchronous {
  using Element = T;
  using Sum = float;
  using Tile = TileType;
  static constexpr int kChunks = 8;
  static constexpr int kBlocks = Blocks;  // that a processor is to hold at a time

  __device__ __forceinline__ static void multiply(
      const char* stage, int thread, Sums<Tile, float>& sums) {
    const uint32_t base = shared_address(stage);
#pragma unroll 2
    for (int vector = 0; vector < kLineVectors; vector += 2) {
      uint32_t left[Tile::kLeftBlocks][4];
      uint32_t right[Tile::kRightBlocks][4];
#pragma unroll
      for (int b = 0; b < Tile::kLeftBlocks; ++b) {
        load_matrices(
            left[b],
            base + shared_offset(Tile::left_row(thread, b), vector + Tile::left_vector(thread)));
      }
#pragma unroll
      for (int b = 0; b < Tile::kRightBlocks; ++b) {
        load_matrices(
            right[b],
            base +
                shared_offset(
                    Tile::kRows + Tile::right_row(thread, b), vector + Tile::right_vector(thread)));
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int b = 0; b < Tile::kLeftBlocks; ++b) {
          round_operand<T>(left[b][k]);
        }
#pragma unroll
        for (int b = 0; b < Tile::kRightBlocks; ++b) {
          round_operand<T>(right[b][k]);
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::kLeftBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * Tile::kRightBlocks; ++j) {
          multiply_matrices<T>(
              sums[2 * i][2 * j],
              sums[2 * i][2 * j + 1],
              sums[2 * i + 1][2 * j],
              sums[2 * i + 1][2 * j + 1],
              left[i],
              right[j / 2][j % 2 * 2],
              right[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
};

template <class T, class TileType>
struct PlainEngine : Synchronous {
  using Element = T;
  using Sum = T;
  using Tile = TileType;
  static constexpr int kChunks = 4;
  static constexpr int kBlocks = sizeof(T) == 4 ? 2 : 1;

  __device__ __forceinline__ static void multiply(
      const char* stage, int thread, Sums<Tile, T>& sums) {
    multiply_plainly<Tile, T>(stage, thread, sums);
  }
};

template <class Engine>
constexpr int64_t kSharedBytes = int64_t{Engine::kStages} * Engine::Tile::kStageBytes;

// Forms the sums of all steps of a walk and hands them to `result`, whenever it wants them and
// after Engine::kChunks at the latest. `load(walk, copy)` calls for_each_vector for one step, or
// copy itself; `again` says that threads near by copy the same.
//
// One barrier a step: past it every thread has multiplied the step before, or the one before that
// where products of a step run on during the next, and its stage is the one that is loaded then.
template <class Engine, class Load, class Result>
__device__ __forceinline__ void form_sums(
    char* shared, Walk walk, const Load& load, Result& result) {
  using Tile = typename Engine::Tile;
  using A = typename Engine::Sum;
  constexpr int kAhead = Engine::kStages - 1 - Engine::kRunning;  // steps that are loaded
  const auto thread = static_cast<int>(threadIdx.x);
  Walk ahead = walk;
  const auto load_ahead = [&](int stage) {
    if (!ahead.done()) {
      const uint32_t base = shared_address(shared + stage * Tile::kStageBytes);
      load(ahead, [&](int offset, const char* source, int bytes, bool again = false) {
        const uint32_t to = base + static_cast<uint32_t>(offset);
        again ? copy_vector_cached(to, source, bytes) : copy_vector(to, source, bytes);
      });
      ahead.next();
    }
    close_stage();  // empty at the end, so that the count of stages to wait for stays the same
  };
#pragma unroll 1
  for (int stage = 0; stage < kAhead; ++stage) {
    load_ahead(stage);
  }
  int stage = 0;
  while (!walk.done()) {
    Sums<Tile, A> sums;
    clear<Tile, A>(sums);
#pragma unroll 1
    for (int chunks = 1;; ++chunks, walk.next()) {
      const char* const here = shared + stage * Tile::kStageBytes;
      const int next = stage + kAhead - (stage + kAhead < Engine::kStages ? 0 : Engine::kStages);
      wait_for_stage<kAhead - 1>();
      if constexpr (Engine::kRunning > 0) {
        show_copies();
        __syncthreads();
        Engine::start(here, thread, sums);
        load_ahead(next);
        wait_for_products<Engine::kRunning>();
      } else {
        __syncthreads();
        load_ahead(next);
        Engine::multiply(here, thread, sums);
      }
      stage = stage + 1 == Engine::kStages ? 0 : stage + 1;
      if (chunks == Engine::kChunks || result.complete(walk)) {
        break;
      }
    }
    if constexpr (Engine::kRunning > 0) {
      Engine::finish(sums);
    }
    result.take(walk, sums);
    walk.next();
  }
}

// The same where the architecture that is compiled for has what the engine takes; a kernel that
// lacks it is never launched.
template <class Engine, class Load, class Result>
__device__ __forceinline__ void multiply(
    char* shared, const Walk& walk, const Load& load, Result& result) {
  if constexpr (Engine::kRunning > 0 && !kHasWarpgroups) {
    __trap();
  } else {
    form_sums<Engine>(shared, walk, load, result);
  }
}

// Adds up the threads' parts of every row, in order, and writes the sum of row k of the tile to
// to[k]. The stages are over, and their memory serves for it.
template <class Tile, class A>
__device__ __forceinline__ void store_rows(
    char* shared, const A (&rows)[Tile::kThreadRows], A* __restrict__ to, int64_t count) {
  static_assert(
      Tile::kWarpsAcross * Tile::kRows * int64_t{sizeof(A)} <=
      int64_t{kStages} * Tile::kStageBytes);
  A* const partial = reinterpret_cast<A*>(shared);  // [kWarpsAcross, kRows]
  const auto thread = static_cast<int>(threadIdx.x);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < Tile::kThreadRows; ++r) {
    const A sum = lane_sum<Tile::kLanesAcross>(rows[r]);
    if (thread % Tile::kLanesAcross == 0) {
      partial[Tile::warp_across(thread) * Tile::kRows + Tile::row(thread, r)] = sum;
    }
  }
  __syncthreads();
  for (int row = thread; row < Tile::kRows; row += Tile::kThreads) {
    if (row < count) {
      A sum = partial[row];
#pragma unroll
      for (int warp = 1; warp < Tile::kWarpsAcross; ++warp) {
        sum += partial[warp * Tile::kRows + row];
      }
      to[row] = sum;
    }
  }
}

}  // namespace l2rw::cuda
