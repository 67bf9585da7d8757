#pragma once

// g . (V z + V_b) for products of rows Z Vᵀ: of a linear layer, and of a convolution whose rows are
// put together from pixels. What differs is how a tile's stages are loaded.

#include <cstdint>

#include "correlation.h"
#include "cuda/engines.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_sums.h"
#include "cuda/product.cuh"
#include "cuda/types.cuh"

namespace l2rw::cuda {

// `Operands` has a class Loader<Tile>, as ConvolutionRows, that loads the rows of Z and V.
template <class Operands>
struct DenseLayer {
  Operands operands;
  int64_t products;  // that differ in V and in the columns of G
  int64_t chunks;    // of the depth
  int64_t width;     // columns of a product
  Operand g;         // [n T, products * width]
  Either bias;       // [products * width]
  bool has_bias;
};

// A tile of Z Vᵀ, which is multiplied with that of G and summed over its columns where it was
// formed.
template <class Engine, class Operands>
__global__ void __launch_bounds__(Engine::Tile::kThreads, Engine::kBlocks) correlate_tile(
    const __grid_constant__ DenseLayer<Operands> layer,
    int64_t row_tiles,
    int64_t units,
    int64_t groups,
    const __grid_constant__ Depth depth,
    typename Engine::Sum* __restrict__ row_sums) {  // [products, groups, n T]
  using Tile = typename Engine::Tile;
  using T = typename Engine::Element;
  using A = typename Engine::Sum;
  const auto thread = static_cast<int>(threadIdx.x);
  const auto product =
      Operands::kOneProduct ? 0 : static_cast<int32_t>(blockIdx.x / (row_tiles * groups));
  const TilePlace place = place_of_block(blockIdx.x % (row_tiles * groups), row_tiles, groups);
  // Numbers of 32 bits are kept: registers are short.
  const auto row_tile = static_cast<int32_t>(place.row);
  const auto first_row = [&] { return int64_t{row_tile} * Tile::kRows; };
  const auto sums = static_cast<int32_t>(product * groups + place.column);
  const Walk walk(split_range(units, groups, place.column), depth);
  using Loader = typename Operands::template Loader<Tile>;
  const Loader loader(
      layer.operands, product, row_tile, dynamic_shared_memory() + kSharedBytes<Engine>);
  if constexpr (Loader::kTableBytes > 0) {
    loader.prepare(thread);
    __syncthreads();
  }
  // The columns of a product start at even numbers, or pairs are not read at once.
  const bool in_pairs =
      Operands::kOneProduct || layer.products == 1 || layer.width % Tile::kAdjacent == 0;
  const auto gradient = [&](int row, int64_t column, A(&values)[Tile::kAdjacent]) {
    const T* const at =
        reinterpret_cast<const T*>(layer.g.data + (first_row() + row) * layer.g.stride) +
        product * layer.width + column;
    const bool in_rows = first_row() + row < layer.g.rows;
    if (in_rows && in_pairs && column + Tile::kAdjacent <= layer.width) {
      const auto pack = *reinterpret_cast<const Pack<T, Tile::kAdjacent>*>(at);
#pragma unroll
      for (int k = 0; k < Tile::kAdjacent; ++k) {
        values[k] = static_cast<A>(pack.values[k]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < Tile::kAdjacent; ++k) {
        values[k] = in_rows && column + k < layer.width ? static_cast<A>(at[k]) : A(0);
      }
    }
  };
  const auto offset = [&](int64_t column) {
    return layer.has_bias && column < layer.width
               ? layer.bias.template load<T, A>(product * layer.width + column)
               : A(0);
  };
  DenseSums<Tile, A, decltype(gradient), decltype(offset)> result(thread, gradient, offset);
  multiply<Engine>(
      dynamic_shared_memory(),
      walk,
      [&](const Walk& step, const auto& copy) { loader.load(thread, step, copy); },
      result);
  const int64_t rows = layer.g.rows;
  store_rows<Tile, A>(
      dynamic_shared_memory(),
      result.rows,
      row_sums + sums * rows + first_row(),
      rows - first_row());
}

// Scores of n examples by one way to multiply.
template <class Engines, class Operands>
void correlate_rows(
    const Launch& launch,
    const DenseLayer<Operands>& layer,
    int64_t positions,
    const Tensor& u) {  // [n], acc
  using A = typename Engines::Large::Sum;
  const int64_t rows = layer.g.rows;
  const ProductPlan plan = plan_dense(
      layer.products,
      rows,
      layer.width,
      layer.chunks,
      size_of<typename Engines::Large::Tile>(),
      size_of<typename Engines::Small::Tile>(),
      size_of<typename Engines::Narrow::Tile>(),
      launch.processors(),
      sizeof(A));
  sum_rows(launch, layer.products * plan.groups, rows, positions, u, [&](const Tensor& row_sums) {
    const auto run = [&](auto engine) {
      using Engine = decltype(engine);
      using Loader = typename Operands::template Loader<typename Engine::Tile>;
      launch.run(
          &correlate_tile<Engine, Operands>,
          layer.products * plan.row_tiles * plan.groups,
          Engine::Tile::kThreads,
          kSharedBytes<Engine> + Loader::kTableBytes,
          layer,
          plan.row_tiles,
          plan.column_tiles * plan.splits,
          plan.groups,
          Depth(plan.splits, layer.chunks),
          data<A>(row_sums));
    };
    if (plan.narrow) {
      run(typename Engines::Narrow{});
    } else {
      with_tile<Engines>(plan, run);
    }
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
