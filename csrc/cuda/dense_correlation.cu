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

constexpr const char* kOperation = "dense_correlation";

struct Layer {
  Operand z;          // [n T, i]
  Operand g;          // [n T, o]
  Operand direction;  // [o, i]
  Either bias;        // [o]
  bool has_bias;
  int64_t width;  // o
  int64_t chunks;
};

// A tile of Z Vᵀ, which is multiplied with that of G and summed over its columns where it was
// formed.
template <class Engine>
__global__ void __launch_bounds__(Engine::Tile::kThreads, Engine::kBlocks) correlate(
    const __grid_constant__ Layer layer,
    int64_t row_tiles,
    int64_t units,
    int64_t groups,
    int64_t splits,
    typename Engine::Sum* __restrict__ row_sums) {  // [groups, n T]
  using Tile = typename Engine::Tile;
  using T = typename Engine::Element;
  using A = typename Engine::Sum;
  const TilePlace place = place_of_block(blockIdx.x, row_tiles, groups);
  const int64_t first_row = place.row * Tile::kRows;
  const Walk walk(split_range(units, groups, place.column), splits, layer.chunks);
  const auto gradient = [&](int row, int64_t column, A(&values)[Tile::kAdjacent]) {
    const T* const at =
        reinterpret_cast<const T*>(layer.g.data + (first_row + row) * layer.g.stride) + column;
    const bool in_rows = first_row + row < layer.g.rows;
    Pack<T, Tile::kAdjacent> pack;
    if (in_rows && column + Tile::kAdjacent <= layer.width) {
      pack = *reinterpret_cast<const Pack<T, Tile::kAdjacent>*>(at);
#pragma unroll
      for (int k = 0; k < Tile::kAdjacent; ++k) {
        values[k] = static_cast<A>(pack.values[k]);
      }
    } else {  // the first of a pair may be the last of its row
      values[0] = in_rows && column < layer.width ? static_cast<A>(*at) : A(0);
#pragma unroll
      for (int k = 1; k < Tile::kAdjacent; ++k) {
        values[k] = A(0);
      }
    }
  };
  const auto offset = [&](int64_t column) {
    return layer.has_bias && column < layer.width ? layer.bias.load<T, A>(column) : A(0);
  };
  DenseSums<Tile, A, decltype(gradient), decltype(offset)> result(
      static_cast<int>(threadIdx.x), gradient, offset);
  multiply<Engine>(
      dynamic_shared_memory(),
      walk,
      [&](const Walk& step, const auto& copy) {
        for_each_vector<Tile>(
            static_cast<int>(threadIdx.x),
            layer.z,
            first_row,
            layer.direction,
            step.column_tile() * Tile::kColumns,
            step.chunk * kLineBytes,
            copy);
      },
      result);
  const int64_t rows = layer.z.rows;
  store_rows<Tile, A>(result.rows, row_sums + place.column * rows + first_row, rows - first_row);
}

template <class Engines>
void correlate_rows(const Launch& launch, const Layer& layer, int64_t positions, const Tensor& u) {
  using A = typename Engines::Large::Sum;
  const int64_t rows = layer.z.rows;
  const ProductPlan plan = plan_dense(
      rows,
      layer.width,
      layer.chunks,
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
        layer,
        plan.row_tiles,
        plan.column_tiles * plan.splits,
        plan.groups,
        plan.splits,
        data<A>(row_sums));
  };
  if (plan.large) {
    run(typename Engines::Large{});
  } else {
    run(typename Engines::Small{});
  }
  if (!direct) {
    sum_positions(launch, row_sums, positions, u);
  }
}

Tensor dense_correlation(
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias) {
  check_dense_correlation(z, g, direction, direction_bias);
  const Launch launch(kOperation, z);
  Tensor u = torch::stable::new_empty(z, {z.size(0)}, accumulation_dtype(z.scalar_type()));
  if (z.size(0) * z.size(1) * g.size(2) == 0) {
    return torch::stable::zero_(u);
  }
  // A direction in float32 is not rounded to the dtype of z: the product is one of float32 then.
  const ScalarType dtype = direction.scalar_type();
  const AlignedRows z_rows = aligned_rows(launch, z, dtype);
  const AlignedRows g_rows = aligned_rows(launch, g, dtype);
  const AlignedRows V_rows = aligned_rows(launch, torch::stable::unsqueeze(direction, 0), dtype);
  OptionalTensor bias = direction_bias;
  if (bias && bias->scalar_type() != dtype) {
    bias = torch::stable::to(*bias, u.scalar_type());
  }
  const Layer layer{
      z_rows.operand,
      g_rows.operand,
      V_rows.operand,
      bias ? either(*bias, dtype) : Either{},
      bias.has_value(),
      g.size(2),
      chunks_of(z_rows.operand.width)};
  with_engines(
      dtype, [&](auto engines) { correlate_rows<decltype(engines)>(launch, layer, z.size(1), u); });
  return u;
}

}  // namespace
}  // namespace cuda

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("dense_correlation", TORCH_BOX(&cuda::dense_correlation));
}

}  // namespace l2rw
