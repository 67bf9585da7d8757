#include "correlation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "correlation_checks.h"
#include "cuda/aligned_rows.h"
#include "cuda/launch.cuh"
#include "cuda/partial_sums.h"
#include "cuda/engines.cuh"
#include "cuda/types.cuh"

namespace l2rw {
namespace cuda {
namespace {

constexpr const char* kOperation = "factored_correlation";

template <class A>
struct Factors {
  Operand z;        // [n T, i]
  Operand g;        // [n T, o]
  Operand z_clean;  // [m S, i]
  Operand g_clean;  // [m S, o]
  int64_t z_chunks;
  int64_t g_chunks;
  A bias;
};

// Both Gram matrices of a tile in one pass: their product, summed over the columns of the block's
// tiles, is all that leaves the chip.
template <class Engine>
__global__ void __launch_bounds__(Engine::Tile::kThreads, Engine::kBlocks) correlate(
    const __grid_constant__ Factors<typename Engine::Sum> factors,
    int64_t row_tiles,
    int64_t column_tiles,
    int64_t groups,
    typename Engine::Sum* __restrict__ row_sums) {  // [groups, n T]
  using Tile = typename Engine::Tile;
  using A = typename Engine::Sum;
  const TilePlace place = place_of_block(blockIdx.x, row_tiles, groups);
  const int64_t first_row = place.row * Tile::kRows;
  const Walk walk(
      split_range(column_tiles, groups, place.column), 1, factors.z_chunks + factors.g_chunks);
  FactoredSums<Tile, A> result(factors.z_chunks, factors.bias);
  multiply<Engine>(
      dynamic_shared_memory(),
      walk,
      [&](const Walk& step, const auto& copy) {
        const bool is_z = step.chunk < factors.z_chunks;
        for_each_vector<Tile>(
            static_cast<int>(threadIdx.x),
            is_z ? factors.z : factors.g,
            first_row,
            is_z ? factors.z_clean : factors.g_clean,
            step.column_tile() * Tile::kColumns,
            (is_z ? step.chunk : step.chunk - factors.z_chunks) * kLineBytes,
            copy);
      },
      result);
  const int64_t rows = factors.z.rows;
  store_rows<Tile, A>(result.rows, row_sums + place.column * rows + first_row, rows - first_row);
}

// A part of the depth of one tile of Z Z'ᵀ (the first z_splits) or of G G'ᵀ.
template <class Engine>
__global__ void __launch_bounds__(Engine::Tile::kThreads, Engine::kBlocks) form_partial_products(
    const __grid_constant__ Factors<typename Engine::Sum> factors,
    int64_t row_tiles,
    int64_t column_tiles,
    int64_t z_splits,
    int64_t g_splits,
    typename Engine::Sum* __restrict__ partial) {  // [splits, rows, columns] of whole tiles
  using Tile = typename Engine::Tile;
  using A = typename Engine::Sum;
  const int64_t tiles = row_tiles * column_tiles;
  const int64_t split = blockIdx.x / tiles;
  const TilePlace place = place_of_block(blockIdx.x % tiles, row_tiles, column_tiles);
  const int64_t first_row = place.row * Tile::kRows;
  const int64_t first_column = place.column * Tile::kColumns;
  const bool is_z = split < z_splits;
  const int64_t part = is_z ? split : split - z_splits;
  const Walk walk(
      {part, part + 1}, is_z ? z_splits : g_splits, is_z ? factors.z_chunks : factors.g_chunks);
  GramSums<Tile, A> result;
  multiply<Engine>(
      dynamic_shared_memory(),
      walk,
      [&](const Walk& step, const auto& copy) {
        for_each_vector<Tile>(
            static_cast<int>(threadIdx.x),
            is_z ? factors.z : factors.g,
            first_row,
            is_z ? factors.z_clean : factors.g_clean,
            first_column,
            step.chunk * kLineBytes,
            copy);
      },
      result);
  const auto thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int r = 0; r < Tile::kThreadRows; ++r) {
#pragma unroll
    for (int c = 0; c < Tile::kThreadColumns; c += Tile::kAdjacent) {
      Pack<A, Tile::kAdjacent> values;
#pragma unroll
      for (int k = 0; k < Tile::kAdjacent; ++k) {
        values.values[k] = result.total[r][c + k];
      }
      const int64_t at = partial_place(
          split,
          first_row + Tile::row(thread, r),
          first_column + Tile::column(thread, c),
          row_tiles * Tile::kRows,
          column_tiles * Tile::kColumns);
      *reinterpret_cast<Pack<A, Tile::kAdjacent>*>(partial + at) = values;
    }
  }
}

constexpr int kRowThreads = 128;

// One row of both Gram matrices: the sum over their parts, their product, the sum over columns.
template <class A>
__global__ void __launch_bounds__(kRowThreads) multiply_partial_products(
    const A* __restrict__ partial,  // [z_splits + g_splits, padded_rows, padded_columns]
    int64_t z_splits,
    int64_t g_splits,
    int64_t padded_rows,
    int64_t padded_columns,
    int64_t columns,
    A bias,
    A* __restrict__ row_sums) {  // [rows]
  A sum = 0;
  for (int64_t column = threadIdx.x; column < columns; column += kRowThreads) {
    const A* const at = partial + partial_place(0, blockIdx.x, column, padded_rows, padded_columns);
    const int64_t part = padded_rows * padded_columns;
    A z = 0;
#pragma unroll 4
    for (int64_t split = 0; split < z_splits; ++split) {
      z += at[split * part];
    }
    A g = 0;
#pragma unroll 4
    for (int64_t split = z_splits; split < z_splits + g_splits; ++split) {
      g += at[split * part];
    }
    sum += (z + bias) * g;
  }
  sum = block_sum<kRowThreads>(sum);
  if (threadIdx.x == 0) {
    row_sums[blockIdx.x] = sum;
  }
}

// The sums of single rows by way of partial Gram matrices.
template <class Engine>
void correlate_parts(
    const Launch& launch,
    const Factors<typename Engine::Sum>& factors,
    const ProductPlan& plan,
    const Tensor& row_sums) {
  using Tile = typename Engine::Tile;
  using A = typename Engine::Sum;
  const int64_t padded_rows = plan.row_tiles * Tile::kRows;
  const int64_t padded_columns = plan.column_tiles * Tile::kColumns;
  const int64_t g_splits = plan.splits - plan.z_splits;
  const Tensor partial =
      torch::stable::new_empty(row_sums, {plan.splits, padded_rows, padded_columns});
  launch.run(
      &form_partial_products<Engine>,
      plan.row_tiles * plan.column_tiles * plan.splits,
      Tile::kThreads,
      kSharedBytes<Engine>,
      factors,
      plan.row_tiles,
      plan.column_tiles,
      plan.z_splits,
      g_splits,
      data<A>(partial));
  launch.run(
      &multiply_partial_products<A>,
      factors.z.rows,
      kRowThreads,
      0,
      static_cast<const A*>(data<A>(partial)),
      plan.z_splits,
      g_splits,
      padded_rows,
      padded_columns,
      factors.z_clean.rows,
      factors.bias,
      data<A>(row_sums));
}

// Scores of n examples by one way to multiply.
template <class Engines>
void correlate_rows(
    const Launch& launch,
    const Factors<typename Engines::Large::Sum>& factors,
    int64_t positions,
    const Tensor& u) {
  using A = typename Engines::Large::Sum;
  const int64_t rows = factors.z.rows;
  const ProductPlan plan = plan_factored(
      rows,
      factors.z_clean.rows,
      factors.z_chunks,
      factors.g_chunks,
      size_of<typename Engines::Large::Tile>(),
      size_of<typename Engines::Small::Tile>(),
      launch.processors(),
      sizeof(A));
  // With one sum for each example there is nothing left to add up.
  const bool direct = positions == 1 && plan.groups == 1;
  const Tensor row_sums = direct ? u : torch::stable::new_empty(u, {plan.groups, rows});
  const auto run = [&](auto engine) {
    using Engine = decltype(engine);
    launch.run(
        &correlate<Engine>,
        plan.row_tiles * plan.groups,
        Engine::Tile::kThreads,
        kSharedBytes<Engine>,
        factors,
        plan.row_tiles,
        plan.column_tiles,
        plan.groups,
        data<A>(row_sums));
  };
  if (plan.z_splits > 0) {
    correlate_parts<typename Engines::Small>(launch, factors, plan, row_sums);
  } else if (plan.large) {
    run(typename Engines::Large{});
  } else {
    run(typename Engines::Small{});
  }
  if (!direct) {
    sum_positions(launch, row_sums, positions, u);
  }
}

Tensor factored_correlation(
    const Tensor& z, const Tensor& g, const Tensor& z_clean, const Tensor& g_clean, bool bias) {
  check_factored_correlation(z, g, z_clean, g_clean);
  const ScalarType dtype = z.scalar_type();
  const Launch launch(kOperation, z);
  Tensor u = torch::stable::new_empty(z, {z.size(0)}, accumulation_dtype(dtype));
  if (z.size(0) * z.size(1) * z_clean.size(0) * z_clean.size(1) * g.size(2) == 0) {
    return torch::stable::zero_(u);
  }
  const AlignedRows rows[] = {
      aligned_rows(launch, z, dtype),
      aligned_rows(launch, g, dtype),
      aligned_rows(launch, z_clean, dtype),
      aligned_rows(launch, g_clean, dtype)};
  const auto correlate_with = [&](auto engines) {
    using Engines = decltype(engines);
    using A = typename Engines::Large::Sum;
    const Factors<A> factors{
        rows[0].operand,
        rows[1].operand,
        rows[2].operand,
        rows[3].operand,
        chunks_of(rows[0].operand.width),
        chunks_of(rows[1].operand.width),
        bias ? A(1) : A(0)};
    correlate_rows<Engines>(launch, factors, z.size(1), u);
  };
  with_engines(dtype, correlate_with);
  return u;
}

}  // namespace
}  // namespace cuda

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("factored_correlation", TORCH_BOX(&cuda::factored_correlation));
}

}  // namespace l2rw
