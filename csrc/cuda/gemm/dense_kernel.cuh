#pragma once

// The kernel of g . (V z + V_b), for products of rows Z Vᵀ: those of a linear layer, and those of a
// convolution as an implicit GEMM. They differ in the loader of their operands.

#include <cstdint>

#include "cuda/gemm/dispatch.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/heuristics.h"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/gemm/scheduler.h"
#include "cuda/reduce/partial_sums.cuh"
#include "cuda/util/launch.cuh"
#include "cuda/util/types.cuh"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {

// `Operands` has a class Loader<Tile> that loads the rows of Z and V, as LinearOperands has.
template <class Operands>
struct DenseProblem {
  Operands operands;
  int64_t products;  // that differ in V and in the columns of G
  int64_t k_tiles;   // of the depth
  int64_t width;     // columns of a product
  MatrixView g;      // [n T, products * width]
  EitherDtype bias;  // [products * width]
  bool has_bias;
};

// What DenseEpilogue reads of G and V_b for one tile of rows. It keeps numbers of 32 bits, because
// registers are scarce.
template <class Tile, class T, class A, class Operands>
class GradientSource {
 public:
  __device__ GradientSource(
      const DenseProblem<Operands>& problem, int32_t product, int32_t row_tile)
      : problem_(problem), product_(product), row_tile_(row_tile) {}

  // The same, from which nothing has been computed before this place.
  __device__ GradientSource opaque_copy() const {
    return {problem_, opaque(product_), opaque(row_tile_)};
  }

  __device__ bool has_bias() const { return problem_.has_bias; }
  __device__ bool is_interior(int64_t column) const {
    return Tile::kAdjacent > 1 && in_vectors() && first_row() + Tile::kRows <= problem_.g.rows &&
           column + Tile::kColumns <= problem_.width;
  }

  template <bool Interior>
  __device__ A bias(int64_t column) const {
    return Interior || column < problem_.width
               ? problem_.bias.template load<T, A>(first_column() + column)
               : A(0);
  }

  template <bool Interior>
  __device__ void load(int row, int64_t column, A (&values)[Tile::kAdjacent]) const {
    const T* const from =
        reinterpret_cast<const T*>(problem_.g.data + (first_row() + row) * problem_.g.stride) +
        first_column() + column;
    const bool row_exists = Interior || first_row() + row < problem_.g.rows;
    if (Interior || (row_exists && in_vectors() && column + Tile::kAdjacent <= problem_.width)) {
      const auto vector = *reinterpret_cast<const Vector<T, Tile::kAdjacent>*>(from);
#pragma unroll
      for (int k = 0; k < Tile::kAdjacent; ++k) {
        values[k] = static_cast<A>(vector.values[k]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < Tile::kAdjacent; ++k) {
        values[k] = row_exists && column + k < problem_.width ? static_cast<A>(from[k]) : A(0);
      }
    }
  }

 private:
  const DenseProblem<Operands>& problem_;
  int32_t product_;
  int32_t row_tile_;

  __device__ int64_t first_column() const { return product_ * problem_.width; }
  __device__ int64_t first_row() const { return int64_t{row_tile_} * Tile::kRows; }
  // Pairs are read at once only if the columns of every product start at even numbers.
  __device__ bool in_vectors() const {
    return Operands::kOneProduct || problem_.products == 1 || problem_.width % Tile::kAdjacent == 0;
  }
};

// Forms tiles of Z Vᵀ. Each is multiplied with that of G and summed over its columns in the block
// that formed it.
template <class Mma, class Operands>
__global__ void __launch_bounds__(Mma::Tile::kThreads, Mma::kMinBlocks) dense_kernel(
    const __grid_constant__ DenseProblem<Operands> problem,
    int64_t row_tiles,
    int64_t work_tiles,
    int64_t column_blocks,
    const __grid_constant__ SplitK split_k,
    typename Mma::Sum* __restrict__ row_sums) {  // [products, column_blocks, n T]
  using Tile = typename Mma::Tile;
  using T = typename Mma::Element;
  using A = typename Mma::Sum;
  using Loader = typename Operands::template Loader<Tile>;
  using Gradient = GradientSource<Tile, T, A, Operands>;
  const auto thread = static_cast<int>(threadIdx.x);
  const auto block = static_cast<int>(blockIdx.x);
  const int64_t blocks = row_tiles * column_blocks;  // of a product
  const auto product = Operands::kOneProduct ? 0 : static_cast<int32_t>(block / blocks);
  const TileCoord tile = tile_of_block(block % blocks, row_tiles, column_blocks);
  const auto row_tile = static_cast<int32_t>(tile.row);
  const KTileIterator steps(split_range(work_tiles, column_blocks, tile.column), split_k);
  const Loader loader(
      problem.operands, product, row_tile, shared_stages<Mma>() + kSharedBytes<Mma>);
  if constexpr (Loader::kTableBytes > 0) {
    loader.prepare(thread);
    __syncthreads();
  }
  const Gradient gradient(problem, product, row_tile);
  DenseEpilogue<Tile, A, Gradient> epilogue(thread, gradient);
  run_mainloop<Mma>(
      shared_stages<Mma>(),
      steps,
      [&](const KTileIterator& step, const auto& copy) { loader.load(thread, step, copy); },
      epilogue);
  // The tile is found a second time rather than kept, because registers are scarce.
  const int64_t column_block =
      tile_of_block(opaque(block) % blocks, row_tiles, column_blocks).column;
  const int64_t rows = problem.g.rows;
  const int64_t first_row = int64_t{row_tile} * Tile::kRows;
  store_row_sums<Tile, A>(
      shared_stages<Mma>(),
      epilogue.rows,
      row_sums + (product * column_blocks + column_block) * rows + first_row,
      rows - first_row);
}

// The scores of n examples, with the tiles of one configuration.
template <class Config, class Operands>
void run_dense(
    const Launch& launch,
    const DenseProblem<Operands>& problem,
    int64_t positions,
    const Tensor& u) {  // [n], acc
  using A = typename Config::Large::Sum;
  const int64_t rows = problem.g.rows;
  const GemmPlan plan = plan_dense(
      problem.products,
      rows,
      problem.width,
      problem.k_tiles,
      tile_shape<typename Config::Large::Tile>(),
      tile_shape<typename Config::Small::Tile>(),
      tile_shape<typename Config::Narrow::Tile>(),
      launch.processors(),
      sizeof(A),
      launch.workspace_bytes());
  const int64_t parts = problem.products * plan.column_blocks;
  sum_parts_of_rows(launch, parts, rows, positions, u, [&](const Tensor& row_sums) {
    with_tile<Config>(plan, [&](auto mma) {
      using Mma = decltype(mma);
      using Loader = typename Operands::template Loader<typename Mma::Tile>;
      launch.run(
          &dense_kernel<Mma, Operands>,
          problem.products * plan.row_tiles * plan.column_blocks,
          Mma::Tile::kThreads,
          kSharedBytes<Mma> + Loader::kTableBytes,
          problem,
          plan.row_tiles,
          plan.column_tiles * plan.splits,
          plan.column_blocks,
          SplitK(plan.splits, problem.k_tiles),
          data<A>(row_sums));
    });
  });
}

// V_b in the dtype of the product or in the accumulation dtype.
inline OptionalTensor bias_of_product(const OptionalTensor& bias, ScalarType dtype) {
  if (bias && bias->scalar_type() != dtype) {
    return torch::stable::to(*bias, accumulation_dtype(dtype));
  }
  return bias;
}

}  // namespace l2rw::cuda
