#pragma once

// The mainloop of a matrix product: a pipeline of asynchronous copies and mma over the k-tiles of a
// block.

#include <cstdint>

#include "cuda/gemm/scheduler.h"
#include "cuda/gemm/tile.h"
#include "cuda/util/ptx.cuh"

namespace l2rw::cuda {

template <class Mma>
constexpr int64_t kSharedBytes = int64_t{Mma::kStages} * Mma::Tile::kStageBytes;

// The memory of the stages, and of what a kernel has behind them.
template <class Mma>
__device__ __forceinline__ char* shared_stages() {
  return dynamic_shared_memory<Mma::kSharedAlignment>();
}

// Forms the sums of all steps and hands them to the epilogue, whenever it is due and after
// Mma::kPromotionInterval k-tiles at the latest. `load(step, copy)` calls copy(offset in the stage,
// source, bytes that exist, again) for the vectors of one step; `again` says that threads nearby
// copy the same.
//
// There is one barrier a step. Past it every thread has multiplied the stage of the step before, or
// of the one before that if an mma stays in flight during the next step, and that stage is the one
// that is loaded then.
template <class Mma, class Load, class Epilogue>
__device__ __forceinline__ void run_pipeline(
    char* shared, KTileIterator step, const Load& load, Epilogue& epilogue) {
  using Tile = typename Mma::Tile;
  using A = typename Mma::Sum;
  constexpr int kAhead = Mma::kStages - 1 - Mma::kInFlight;  // steps that are loaded ahead
  const auto thread = static_cast<int>(threadIdx.x);
  KTileIterator ahead = step;
  const auto load_ahead = [&](int stage) {
    if (!ahead.done()) {
      const uint32_t base = shared_address(shared + stage * Tile::kStageBytes);
      load(ahead, [&](int offset, const char* source, int bytes, bool again = false) {
        const uint32_t to = base + static_cast<uint32_t>(offset);
        again ? cp_async_cached(to, source, bytes) : cp_async(to, source, bytes);
      });
      ahead.next();
    }
    cp_async_commit();  // empty at the end, so that the number of groups to wait for stays the same
  };
#pragma unroll 1
  for (int stage = 0; stage < kAhead; ++stage) {
    load_ahead(stage);
  }
  int stage = 0;
  while (!step.done()) {
    Accumulators<Tile, A> sums;
    clear<Tile, A>(sums);
#pragma unroll 1
    for (int k_tiles = 1;; ++k_tiles, step.next()) {
      const char* const current = shared + stage * Tile::kStageBytes;
      const int next = stage + kAhead - (stage + kAhead < Mma::kStages ? 0 : Mma::kStages);
      cp_async_wait<kAhead - 1>();
      if constexpr (Mma::kInFlight > 0) {
        fence_async_proxy();
        __syncthreads();
        Mma::issue(current, thread, sums);
        load_ahead(next);
        wgmma_wait<Mma::kInFlight>();
      } else {
        __syncthreads();
        load_ahead(next);
        Mma::multiply(current, thread, sums);
      }
      stage = stage + 1 == Mma::kStages ? 0 : stage + 1;
      if (k_tiles == Mma::kPromotionInterval || epilogue.is_due(step)) {
        break;
      }
    }
    if constexpr (Mma::kInFlight > 0) {
      Mma::wait(sums);
    }
    epilogue.consume(step, sums);
    step.next();
  }
}

// The mainloop, where the architecture that is compiled for has what the mma takes. A kernel that
// lacks it is never launched.
template <class Mma, class Load, class Epilogue>
__device__ __forceinline__ void run_mainloop(
    char* shared, const KTileIterator& steps, const Load& load, Epilogue& epilogue) {
  if constexpr (Mma::kInFlight > 0 && !kHasWgmma) {
    __trap();
  } else {
    run_pipeline<Mma>(shared, steps, load, epilogue);
  }
}

}  // namespace l2rw::cuda
