#pragma once

// g . (V z + V_b) for products of rows Z Vᵀ: of a linear layer, and of a convolution whose rows are
// put together from pixels. What differs is how a tile's stages are loaded.

#include <cstdint>

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

// G and V_b where a tile is multiplied with them; see DenseSums. Numbers of 32 bits are kept:
// registers are short.
template <class Tile, class T, class A, class Operands>
class TileGradient {
 public:
  __device__ TileGradient(const DenseLayer<Operands>& layer, int32_t product, int32_t row_tile)
      : layer_(layer), product_(product), row_tile_(row_tile) {}

  // The same, with nothing computed ahead of this place.
  __device__ TileGradient here() const {
    return {layer_, not_before(product_), not_before(row_tile_)};
  }

  __device__ bool has_bias() const { return layer_.has_bias; }
  __device__ bool whole(int64_t column) const {
    return Tile::kAdjacent > 1 && in_packs() && first_row() + Tile::kRows <= layer_.g.rows &&
           column + Tile::kColumns <= layer_.width;
  }

  template <bool Whole>
  __device__ A offset(int64_t column) const {
    return Whole || column < layer_.width ? layer_.bias.template load<T, A>(first() + column)
                                          : A(0);
  }

  template <bool Whole>
  __device__ void read(int row, int64_t column, A (&values)[Tile::kAdjacent]) const {
    const T* const at =
        reinterpret_cast<const T*>(layer_.g.data + (first_row() + row) * layer_.g.stride) +
        first() + column;
    const bool in_rows = Whole || first_row() + row < layer_.g.rows;
    if (Whole || (in_rows && in_packs() && column + Tile::kAdjacent <= layer_.width)) {
      const auto pack = *reinterpret_cast<const Pack<T, Tile::kAdjacent>*>(at);
#pragma unroll
      for (int k = 0; k < Tile::kAdjacent; ++k) {
        values[k] = static_cast<A>(pack.values[k]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < Tile::kAdjacent; ++k) {
        values[k] = in_rows && column + k < layer_.width ? static_cast<A>(at[k]) : A(0);
      }
    }
  }

 private:
  const DenseLayer<Operands>& layer_;
  int32_t product_;
  int32_t row_tile_;

  __device__ int64_t first() const { return product_ * layer_.width; }
  __device__ int64_t first_row() const { return int64_t{row_tile_} * Tile::kRows; }
  // The columns of a product start at even numbers, or pairs are not read at once.
  __device__ bool in_packs() const {
    return Operands::kOneProduct || layer_.products == 1 || layer_.width % Tile::kAdjacent == 0;
  }
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
  using Loader = typename Operands::template Loader<Tile>;
  using Gradient = TileGradient<Tile, T, A, Operands>;
  const auto thread = static_cast<int>(threadIdx.x);
  const auto block = static_cast<int>(blockIdx.x);
  const int64_t blocks = row_tiles * groups;  // of a product
  const auto product = Operands::kOneProduct ? 0 : static_cast<int32_t>(block / blocks);
  const TilePlace place = place_of_block(block % blocks, row_tiles, groups);
  const auto row_tile = static_cast<int32_t>(place.row);
  const Walk walk(split_range(units, groups, place.column), depth);
  const Loader loader(
      layer.operands, product, row_tile, dynamic_shared_memory() + kSharedBytes<Engine>);
  if constexpr (Loader::kTableBytes > 0) {
    loader.prepare(thread);
    __syncthreads();
  }
  const Gradient gradient(layer, product, row_tile);
  DenseSums<Tile, A, Gradient> result(thread, gradient);
  multiply<Engine>(
      dynamic_shared_memory(),
      walk,
      [&](const Walk& step, const auto& copy) { loader.load(thread, step, copy); },
      result);
  // Found a second time rather than kept: registers are short.
  const int64_t group = place_of_block(not_before(block) % blocks, row_tiles, groups).column;
  const int64_t rows = layer.g.rows;
  const int64_t first_row = int64_t{row_tile} * Tile::kRows;
  store_rows<Tile, A>(
      dynamic_shared_memory(),
      result.rows,
      row_sums + (product * groups + group) * rows + first_row,
      rows - first_row);
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
      sizeof(A),
      launch.workspace_bytes());
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
