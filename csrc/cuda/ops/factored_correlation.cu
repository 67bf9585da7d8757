#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "cuda/gemm/dispatch.cuh"
#include "cuda/gemm/epilogue.cuh"
#include "cuda/util/grouped.h"
#include "cuda/gemm/heuristics.h"
#include "cuda/gemm/loaders.h"
#include "cuda/gemm/mainloop.cuh"
#include "cuda/gemm/scheduler.h"
#include "cuda/gemm/tile.h"
#include "cuda/reduce/block.cuh"
#include "cuda/reduce/partial_sums.cuh"
#include "cuda/util/aligned_copy.cuh"
#include "cuda/util/integers.h"
#include "cuda/util/launch.cuh"
#include "cuda/util/limits.h"
#include "cuda/util/vectors.h"
#include "operator_checks.h"

namespace l2rw::cuda {
namespace {

template <class A>
struct Layer {
  MatrixView z;        // [n T, i]
  MatrixView g;        // [n T, o]
  MatrixView z_clean;  // [m S, i]
  MatrixView g_clean;  // [m S, o]
  A bias;
  int64_t row_tiles;
  int64_t column_tiles;
  int64_t column_blocks;
  int64_t z_splits;  // with zero, one block forms both products
  int64_t g_splits;
  A* sums;  // [column_blocks, n T], or [z_splits + g_splits, rows, columns] of whole tiles
};

// The numbers that are divided among the layers are those of the blocks.
template <class A, int Capacity>
using Layers = GroupedLayers<Layer<A>, Capacity>;

// Forms both Gram matrices of a tile in one mainloop. Only their product, summed over the columns
// of the block's tiles, goes to memory.
template <class Mma, int Capacity>
__global__ void __launch_bounds__(Mma::Tile::kThreads, Mma::kMinBlocks)
    factored_kernel(const __grid_constant__ Layers<typename Mma::Sum, Capacity> layers) {
  using Tile = typename Mma::Tile;
  using A = typename Mma::Sum;
  const int l = layers.layer_of(blockIdx.x);
  const Layer<A>& layer = layers.entries[l];
  const int64_t block = blockIdx.x - layers.first[l];
  const TileCoord tile = tile_of_block(block, layer.row_tiles, layer.column_blocks);
  const int64_t first_row = tile.row * Tile::kRows;
  const int64_t z_k_tiles = k_tiles_of(layer.z.width);
  const KTileIterator steps(
      split_range(layer.column_tiles, layer.column_blocks, tile.column),
      1,
      z_k_tiles + k_tiles_of(layer.g.width));
  FactoredEpilogue<Tile, A> epilogue(z_k_tiles, layer.bias);
  run_mainloop<Mma>(
      shared_stages<Mma>(),
      steps,
      [&](const KTileIterator& step, const auto& copy) {
        const bool is_z = step.k_tile < z_k_tiles;
        load_operands<Tile>(
            static_cast<int>(threadIdx.x),
            is_z ? layer.z : layer.g,
            first_row,
            is_z ? layer.z_clean : layer.g_clean,
            step.column_tile() * Tile::kColumns,
            (is_z ? step.k_tile : step.k_tile - z_k_tiles) * kDepthBytes,
            copy);
      },
      epilogue);
  const int64_t rows = layer.z.rows;
  store_row_sums<Tile, A>(
      shared_stages<Mma>(),
      epilogue.rows,
      layer.sums + tile.column * rows + first_row,
      rows - first_row);
}

// Forms a part of the depth of one tile, of Z Z'ᵀ (the first z_splits) or of G G'ᵀ.
template <class Mma, int Capacity>
__global__ void __launch_bounds__(Mma::Tile::kThreads, Mma::kMinBlocks)
    gram_parts_kernel(const __grid_constant__ Layers<typename Mma::Sum, Capacity> layers) {
  using Tile = typename Mma::Tile;
  using A = typename Mma::Sum;
  const int l = layers.layer_of(blockIdx.x);
  const Layer<A>& layer = layers.entries[l];
  const int64_t block = blockIdx.x - layers.first[l];
  const int64_t tiles = layer.row_tiles * layer.column_tiles;
  const int64_t split = block / tiles;
  const TileCoord tile = tile_of_block(block % tiles, layer.row_tiles, layer.column_tiles);
  const int64_t first_row = tile.row * Tile::kRows;
  const int64_t first_column = tile.column * Tile::kColumns;
  const bool is_z = split < layer.z_splits;
  const int64_t part = is_z ? split : split - layer.z_splits;
  const KTileIterator steps(
      {part, part + 1},
      is_z ? layer.z_splits : layer.g_splits,
      k_tiles_of(is_z ? layer.z.width : layer.g.width));
  GramEpilogue<Tile, A> epilogue;
  run_mainloop<Mma>(
      shared_stages<Mma>(),
      steps,
      [&](const KTileIterator& step, const auto& copy) {
        load_operands<Tile>(
            static_cast<int>(threadIdx.x),
            is_z ? layer.z : layer.g,
            first_row,
            is_z ? layer.z_clean : layer.g_clean,
            first_column,
            int64_t{step.k_tile} * kDepthBytes,
            copy);
      },
      epilogue);
  const auto thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int r = 0; r < Tile::kThreadRows; ++r) {
#pragma unroll
    for (int c = 0; c < Tile::kThreadColumns; c += Tile::kAdjacent) {
      Vector<A, Tile::kAdjacent> vector;
#pragma unroll
      for (int k = 0; k < Tile::kAdjacent; ++k) {
        vector.values[k] = epilogue.total[r][c + k];
      }
      const int64_t offset = partial_offset(
          split,
          first_row + Tile::row(thread, r),
          first_column + Tile::column(thread, c),
          layer.row_tiles * Tile::kRows,
          layer.column_tiles * Tile::kColumns);
      *reinterpret_cast<Vector<A, Tile::kAdjacent>*>(layer.sums + offset) = vector;
    }
  }
}

constexpr int kRowThreads = 128;

template <class A>
struct Parts {
  const A* partial;  // [z_splits + g_splits, padded_rows, padded_columns]
  int64_t z_splits;
  int64_t g_splits;
  int64_t padded_rows;
  int64_t padded_columns;
  int64_t columns;
  A bias;
  A* row_sums;  // [rows]
};

// The numbers that are divided among the layers are those of the rows.
template <class A, int Capacity>
using PartLayers = GroupedLayers<Parts<A>, Capacity>;

// Takes one row of both Gram matrices: adds up their parts, multiplies them, and adds up the
// columns.
template <class A, int Capacity>
__global__ void __launch_bounds__(kRowThreads)
    multiply_parts_kernel(const __grid_constant__ PartLayers<A, Capacity> layers) {
  const int l = layers.layer_of(blockIdx.x);
  const Parts<A>& layer = layers.entries[l];
  const int64_t row = blockIdx.x - layers.first[l];
  const int64_t part = layer.padded_rows * layer.padded_columns;
  const int64_t z_splits = layer.z_splits;
  const int64_t splits = z_splits + layer.g_splits;
  A sum = 0;
  for (int64_t column = threadIdx.x; column < layer.columns; column += kRowThreads) {
    const A* const first =
        layer.partial + partial_offset(0, row, column, layer.padded_rows, layer.padded_columns);
    A z = 0;
#pragma unroll 4
    for (int64_t split = 0; split < z_splits; ++split) {
      z += first[split * part];
    }
    A g = 0;
#pragma unroll 4
    for (int64_t split = z_splits; split < splits; ++split) {
      g += first[split * part];
    }
    sum += (z + layer.bias) * g;
  }
  sum = block_sum<kRowThreads>(sum);
  if (threadIdx.x == 0) {
    layer.row_sums[row] = sum;
  }
}

// The arguments of one layer.
struct Arguments {
  AlignedMatrix z;
  AlignedMatrix g;
  AlignedMatrix z_clean;
  AlignedMatrix g_clean;
  bool bias;
  int64_t positions;

  FactoredProblem size() const {
    return {z.view.rows, z_clean.view.rows, k_tiles_of(z.view.width), k_tiles_of(g.view.width)};
  }
};

template <class Mma, class Table>
void run_kernel(const Launch& launch, void (*kernel)(Table), const Table& layers) {
  if (layers.total > 0) {
    launch.run(kernel, layers.total, Mma::Tile::kThreads, kSharedBytes<Mma>, layers);
  }
}

// Adds the scores of at most Capacity layers, or writes them unless `add`.
template <class Config, int Capacity>
void correlate_layers(
    const Launch& launch, const std::vector<Arguments>& arguments, bool add, const Tensor& u) {
  using Large = typename Config::Large;
  using Small = typename Config::Small;
  using A = typename Large::Sum;
  constexpr TileShape kSmall = tile_shape<typename Small::Tile>();
  std::vector<FactoredProblem> sizes;
  for (const Arguments& layer : arguments) {
    sizes.push_back(layer.size());
  }
  const std::vector<GemmPlan> plans = plan_factored(
      sizes,
      tile_shape<typename Large::Tile>(),
      kSmall,
      launch.processors(),
      sizeof(A),
      launch.workspace_bytes());
  const FactoredWorkspace workspace(sizes, plans, kSmall);
  // With one sum for each example there is nothing left to add up.
  const bool direct =
      !add && plans.size() == 1 && arguments[0].positions == 1 && plans[0].column_blocks == 1;
  const int64_t size = direct ? workspace.parts : workspace.size;
  const Tensor memory = size > 0 ? torch::stable::new_empty(u, {size}) : u;

  Layers<A, Capacity> large;
  Layers<A, Capacity> small;
  Layers<A, Capacity> split;
  PartLayers<A, Capacity> parts;
  for (const size_t l : longest_blocks_first(sizes, plans)) {
    const Arguments& layer = arguments[l];
    const GemmPlan& plan = plans[l];
    A* const sums = direct ? data<A>(u) : data<A>(memory) + workspace.row_sums[l];
    A* const partial = data<A>(memory) + workspace.partial[l];
    const A bias = layer.bias ? A(1) : A(0);
    const int64_t g_splits = plan.splits - plan.z_splits;
    const bool is_split = plan.z_splits > 0;
    Layers<A, Capacity>& table = is_split ? split : plan.tile == TileKind::large ? large : small;
    table.add(
        {layer.z.view,
         layer.g.view,
         layer.z_clean.view,
         layer.g_clean.view,
         bias,
         plan.row_tiles,
         plan.column_tiles,
         plan.column_blocks,
         plan.z_splits,
         g_splits,
         is_split ? partial : sums},
        plan.blocks());
    if (is_split) {
      parts.add(
          {partial,
           plan.z_splits,
           g_splits,
           plan.row_tiles * kSmall.rows,
           plan.column_tiles * kSmall.columns,
           sizes[l].columns,
           bias,
           sums},
          sizes[l].rows);
    }
  }
  run_kernel<Large>(launch, &factored_kernel<Large, Capacity>, large);
  run_kernel<Small>(launch, &factored_kernel<Small, Capacity>, small);
  run_kernel<Small>(launch, &gram_parts_kernel<Small, Capacity>, split);
  if (parts.total > 0) {
    launch.run(&multiply_parts_kernel<A, Capacity>, parts.total, kRowThreads, 0, parts);
  }
  if (!direct) {
    std::vector<LayerRowSums> row_sums;
    for (size_t l = 0; l < plans.size(); ++l) {
      row_sums.push_back({workspace.row_sums[l], plans[l].column_blocks, arguments[l].positions});
    }
    sum_layers(launch, memory, row_sums, add, u);
  }
}

// Both operators, whose arguments have been checked.
Tensor correlate(
    const char* operation,
    const Tensors& z,
    const Tensors& g,
    const Tensors& z_clean,
    const Tensors& g_clean,
    const std::vector<bool>& bias) {
  const ScalarType dtype = z[0].scalar_type();
  const Launch launch(operation, z[0]);
  Tensor u = torch::stable::new_empty(z[0], {z[0].size(0)}, accumulation_dtype(dtype));
  bool scored = false;
  std::vector<Arguments> layers;
  int64_t copied = 0;
  const auto score = [&] {
    const auto area = [&](int64_t columns) {
      int64_t sum = 0;
      for (const Arguments& layer : layers) {
        sum += layer.size().tiles({1, columns}) * columns;
      }
      return sum;
    };
    with_linear_config(launch, dtype, area, [&](auto config) {
      using Config = decltype(config);
      if (layers.size() == 1) {
        correlate_layers<Config, 1>(launch, layers, scored, u);
      } else {
        correlate_layers<Config, kMaxLayers>(launch, layers, scored, u);
      }
    });
    scored = true;
    layers.clear();
    copied = 0;
  };
  for (size_t l = 0; l < z.size(); ++l) {
    if (z[l].size(0) * z[l].size(1) * z_clean[l].size(0) * z_clean[l].size(1) * g[l].size(2) == 0) {
      continue;
    }
    const auto rows = [&](const Tensor& tensor) {
      AlignedMatrix aligned = align_matrix(launch, tensor, dtype);
      const bool is_copy = aligned.view.data != tensor.data_ptr();
      copied += is_copy ? aligned.view.rows * aligned.view.stride : 0;
      return aligned;
    };
    layers.push_back(
        {rows(z[l]), rows(g[l]), rows(z_clean[l]), rows(g_clean[l]), bias[l], z[l].size(1)});
    // A launch is closed as soon as the copies of its layers are larger than a workspace.
    if (layers.size() == kMaxLayers || copied > kWorkspaceBytes) {
      score();
    }
  }
  if (!layers.empty()) {
    score();
  }
  return scored ? u : torch::stable::zero_(u);
}

Tensor factored_correlation(
    const Tensor& z, const Tensor& g, const Tensor& z_clean, const Tensor& g_clean, bool bias) {
  check_factored_layer("factored_correlation", "", z, g, z_clean, g_clean);
  return correlate("factored_correlation", {z}, {g}, {z_clean}, {g_clean}, {bias});
}

Tensor factored_correlations(
    const Tensors& z,
    const Tensors& g,
    const Tensors& z_clean,
    const Tensors& g_clean,
    const std::vector<bool>& bias) {
  check_factored_correlations(z, g, z_clean, g_clean, bias);
  return correlate("factored_correlations", z, g, z_clean, g_clean, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("factored_correlation", TORCH_BOX(&factored_correlation));
  m.impl("factored_correlations", TORCH_BOX(&factored_correlations));
}

}  // namespace l2rw::cuda
