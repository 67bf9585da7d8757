#pragma once

// Epilogues: what becomes of a tile's sums. The mainloop hands its accumulators to an epilogue when
// `is_due` says so, and at the latest after the promotion interval of its mma; `consume` takes
// them. The sums of rows that are left at the end go to memory with store_row_sums.

#include <cstdint>

#include "cuda/gemm/scheduler.h"
#include "cuda/gemm/tile.h"
#include "cuda/reduce/block.cuh"
#include "cuda/util/ptx.cuh"

namespace l2rw::cuda {

// Equation (12). The k-tiles of z come first in a work tile, those of g follow. The product is
// linear in G G'ᵀ once Z Z'ᵀ is complete, so that partial sums of the second need no accumulators
// of their own.
template <class Tile, class A>
struct FactoredEpilogue {
  int64_t z_k_tiles;
  A bias;
  Accumulators<Tile, A> inner;     // Z Z'ᵀ + bias
  A rows[Tile::kThreadRows] = {};  // the result: a part of every row of this thread

  __device__ __forceinline__ FactoredEpilogue(int64_t z_k_tiles, A bias)
      : z_k_tiles(z_k_tiles), bias(bias) {
    clear<Tile, A>(inner);
  }
  __device__ __forceinline__ bool is_due(const KTileIterator& step) const {
    return step.k_tile + 1 == z_k_tiles || step.ends_work_tile();
  }
  __device__ __forceinline__ void consume(
      const KTileIterator& step, const Accumulators<Tile, A>& sums) {
    if (step.k_tile < z_k_tiles) {
      add<Tile, A>(inner, sums);
      if (step.k_tile + 1 == z_k_tiles) {
#pragma unroll
        for (int r = 0; r < Tile::kThreadRows; ++r) {
#pragma unroll
          for (int c = 0; c < Tile::kThreadColumns; ++c) {
            inner[r][c] += bias;
          }
        }
      }
      return;
    }
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      A sum = 0;
#pragma unroll
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        sum += inner[r][c] * sums[r][c];
      }
      rows[r] += sum;
    }
    if (step.ends_work_tile()) {
      clear<Tile, A>(inner);
    }
  }
};

// One Gram matrix, or a part of its depth.
template <class Tile, class A>
struct GramEpilogue {
  Accumulators<Tile, A> total;

  __device__ __forceinline__ GramEpilogue() { clear<Tile, A>(total); }
  __device__ __forceinline__ bool is_due(const KTileIterator& step) const {
    return step.ends_work_tile();
  }
  __device__ __forceinline__ void consume(const KTileIterator&, const Accumulators<Tile, A>& sums) {
    add<Tile, A>(total, sums);
  }
};

// g . (V z + V_b). `Gradient` gives G and V_b: `is_interior(column)` says whether all of the tile's
// rows, and its columns from `column` on, exist and can be read in vectors; `opaque_copy()` is the
// same object; `load<Interior>(row, column, values)` reads Tile::kAdjacent numbers of G and
// `bias<Interior>(column)` one of V_b, both zero where none exist.
template <class Tile, class A, class Gradient>
struct DenseEpilogue {
  int thread;
  const Gradient& gradient;
  Accumulators<Tile, A> total;
  A rows[Tile::kThreadRows] = {};

  __device__ __forceinline__ DenseEpilogue(int thread, const Gradient& gradient)
      : thread(thread), gradient(gradient) {
    clear<Tile, A>(total);
  }
  __device__ __forceinline__ bool is_due(const KTileIterator& step) const {
    return step.ends_work_tile();
  }
  __device__ __forceinline__ void consume(
      const KTileIterator& step, const Accumulators<Tile, A>& sums) {
    add<Tile, A>(total, sums);
    if (!step.ends_work_tile()) {
      return;
    }
    const int64_t first = step.column_tile() * Tile::kColumns;
    const bool adds_bias = step.split == 0;  // the parts of a depth share one bias
    // What follows is computed here: kept through the mainloop it would take registers. Most tiles
    // are interior, and with no condition between their loads many are in flight at a time.
    const Gradient copy = gradient.opaque_copy();
    if (copy.is_interior(first)) {
      multiply<true>(copy, opaque(thread), first, adds_bias);
    } else {
      multiply<false>(copy, opaque(thread), first, adds_bias);
    }
    clear<Tile, A>(total);
  }

 private:
  template <bool Interior>
  __device__ __forceinline__ void multiply(
      const Gradient& g, int thread_copy, int64_t first, bool adds_bias) {
    if (adds_bias && g.has_bias()) {
#pragma unroll
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        const A bias = g.template bias<Interior>(first + Tile::column(thread_copy, c));
#pragma unroll
        for (int r = 0; r < Tile::kThreadRows; ++r) {
          total[r][c] += bias;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      A sum = 0;
      const int row_thread = opaque(thread_copy);
#pragma unroll
      for (int c = 0; c < Tile::kThreadColumns; c += Tile::kAdjacent) {
        A values[Tile::kAdjacent];
        g.template load<Interior>(
            Tile::row(row_thread, r), first + Tile::column(row_thread, c), values);
#pragma unroll
        for (int k = 0; k < Tile::kAdjacent; ++k) {
          sum += values[k] * total[r][c + k];
        }
      }
      rows[r] += sum;
    }
  }
};

// Adds up the threads' parts of every row, in order, and writes the sum of row k of the tile to
// to[k]. It reuses the memory of the stages, which the mainloop has left.
template <class Tile, class A>
__device__ __forceinline__ void store_row_sums(
    char* shared, const A (&rows)[Tile::kThreadRows], A* __restrict__ to, int64_t count) {
  static_assert(
      Tile::kWarpsN * Tile::kRows * int64_t{sizeof(A)} <= int64_t{kStages} * Tile::kStageBytes);
  A* const partial = reinterpret_cast<A*>(shared);  // [kWarpsN, kRows]
  const auto thread = static_cast<int>(threadIdx.x);
  __syncthreads();
#pragma unroll
  for (int r = 0; r < Tile::kThreadRows; ++r) {
    const A sum = warp_sum<Tile::kLanesN>(rows[r]);
    if (thread % Tile::kLanesN == 0) {
      partial[Tile::warp_n(thread) * Tile::kRows + Tile::row(thread, r)] = sum;
    }
  }
  __syncthreads();
  for (int row = thread; row < Tile::kRows; row += Tile::kThreads) {
    if (row < count) {
      A sum = partial[row];
#pragma unroll
      for (int warp = 1; warp < Tile::kWarpsN; ++warp) {
        sum += partial[warp * Tile::kRows + row];
      }
      to[row] = sum;
    }
  }
}

}  // namespace l2rw::cuda
