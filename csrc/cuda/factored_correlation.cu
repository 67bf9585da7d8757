#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "operator_checks.h"
#include "cuda/aligned_rows.h"
#include "cuda/engines.cuh"
#include "cuda/launch.cuh"
#include "cuda/layers.h"
#include "cuda/partial_sums.h"
#include "cuda/types.cuh"

namespace l2rw {
namespace cuda {
namespace {

template <class A>
struct Layer {
  Operand z;        // [n T, i]
  Operand g;        // [n T, o]
  Operand z_clean;  // [m S, i]
  Operand g_clean;  // [m S, o]
  A bias;
  int64_t row_tiles;
  int64_t column_tiles;
  int64_t groups;
  int64_t z_splits;  // zero: one block forms both products
  int64_t g_splits;
  A* sums;  // [groups, n T], or [z_splits + g_splits, rows, columns] of whole tiles
};

// Numbered are the blocks.
template <class A, int Capacity>
using Layers = LayerTable<Layer<A>, Capacity>;

// Both Gram matrices of a tile in one pass: their product, summed over the columns of the block's
// tiles, is all that leaves the chip.
template <class Engine, int Capacity>
__global__ void __launch_bounds__(Engine::Tile::kThreads, Engine::kBlocks)
    correlate(const __grid_constant__ Layers<typename Engine::Sum, Capacity> layers) {
  using Tile = typename Engine::Tile;
  using A = typename Engine::Sum;
  const int l = layers.layer_of(blockIdx.x);
  const Layer<A>& layer = layers.entries[l];
  const int64_t block = blockIdx.x - layers.first[l];
  const TilePlace place = place_of_block(block, layer.row_tiles, layer.groups);
  const int64_t first_row = place.row * Tile::kRows;
  const int64_t z_chunks = chunks_of(layer.z.width);
  const Walk walk(
      split_range(layer.column_tiles, layer.groups, place.column),
      1,
      z_chunks + chunks_of(layer.g.width));
  FactoredSums<Tile, A> result(z_chunks, layer.bias);
  multiply<Engine>(
      dynamic_shared_memory(),
      walk,
      [&](const Walk& step, const auto& copy) {
        const bool is_z = step.chunk < z_chunks;
        for_each_vector<Tile>(
            static_cast<int>(threadIdx.x),
            is_z ? layer.z : layer.g,
            first_row,
            is_z ? layer.z_clean : layer.g_clean,
            step.column_tile() * Tile::kColumns,
            (is_z ? step.chunk : step.chunk - z_chunks) * kLineBytes,
            copy);
      },
      result);
  const int64_t rows = layer.z.rows;
  store_rows<Tile, A>(
      dynamic_shared_memory(),
      result.rows,
      layer.sums + place.column * rows + first_row,
      rows - first_row);
}

// A part of the depth of one tile of Z Z'ᵀ (the first z_splits) or of G G'ᵀ.
template <class Engine, int Capacity>
__global__ void __launch_bounds__(Engine::Tile::kThreads, Engine::kBlocks)
    form_partial_products(const __grid_constant__ Layers<typename Engine::Sum, Capacity> layers) {
  using Tile = typename Engine::Tile;
  using A = typename Engine::Sum;
  const int l = layers.layer_of(blockIdx.x);
  const Layer<A>& layer = layers.entries[l];
  const int64_t block = blockIdx.x - layers.first[l];
  const int64_t tiles = layer.row_tiles * layer.column_tiles;
  const int64_t split = block / tiles;
  const TilePlace place = place_of_block(block % tiles, layer.row_tiles, layer.column_tiles);
  const int64_t first_row = place.row * Tile::kRows;
  const int64_t first_column = place.column * Tile::kColumns;
  const bool is_z = split < layer.z_splits;
  const int64_t part = is_z ? split : split - layer.z_splits;
  const Walk walk(
      {part, part + 1},
      is_z ? layer.z_splits : layer.g_splits,
      chunks_of(is_z ? layer.z.width : layer.g.width));
  GramSums<Tile, A> result;
  multiply<Engine>(
      dynamic_shared_memory(),
      walk,
      [&](const Walk& step, const auto& copy) {
        for_each_vector<Tile>(
            static_cast<int>(threadIdx.x),
            is_z ? layer.z : layer.g,
            first_row,
            is_z ? layer.z_clean : layer.g_clean,
            first_column,
            int64_t{step.chunk} * kLineBytes,
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
          layer.row_tiles * Tile::kRows,
          layer.column_tiles * Tile::kColumns);
      *reinterpret_cast<Pack<A, Tile::kAdjacent>*>(layer.sums + at) = values;
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

// Numbered are the rows.
template <class A, int Capacity>
using PartTable = LayerTable<Parts<A>, Capacity>;

// One row of both Gram matrices: the sum over their parts, their product, the sum over columns.
template <class A, int Capacity>
__global__ void __launch_bounds__(kRowThreads)
    multiply_partial_products(const __grid_constant__ PartTable<A, Capacity> layers) {
  const int l = layers.layer_of(blockIdx.x);
  const Parts<A>& layer = layers.entries[l];
  const int64_t row = blockIdx.x - layers.first[l];
  const int64_t part = layer.padded_rows * layer.padded_columns;
  const int64_t z_splits = layer.z_splits;
  const int64_t splits = z_splits + layer.g_splits;
  A sum = 0;
  for (int64_t column = threadIdx.x; column < layer.columns; column += kRowThreads) {
    const A* const at =
        layer.partial + partial_place(0, row, column, layer.padded_rows, layer.padded_columns);
    A z = 0;
#pragma unroll 4
    for (int64_t split = 0; split < z_splits; ++split) {
      z += at[split * part];
    }
    A g = 0;
#pragma unroll 4
    for (int64_t split = z_splits; split < splits; ++split) {
      g += at[split * part];
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
  AlignedRows z;
  AlignedRows g;
  AlignedRows z_clean;
  AlignedRows g_clean;
  bool bias;
  int64_t positions;

  FactoredSize size() const {
    return {
        z.operand.rows,
        z_clean.operand.rows,
        chunks_of(z.operand.width),
        chunks_of(g.operand.width)};
  }
};

template <class Engine, class Table>
void run_products(const Launch& launch, void (*kernel)(Table), const Table& layers) {
  if (layers.total > 0) {
    launch.run(kernel, layers.total, Engine::Tile::kThreads, kSharedBytes<Engine>, layers);
  }
}

// Adds the scores of at most Capacity layers, or writes them unless `add`.
template <class Engines, int Capacity>
void correlate_layers(
    const Launch& launch, const std::vector<Arguments>& arguments, bool add, const Tensor& u) {
  using Large = typename Engines::Large;
  using Small = typename Engines::Small;
  using A = typename Large::Sum;
  constexpr TileSize kSmall = size_of<typename Small::Tile>();
  std::vector<FactoredSize> sizes;
  for (const Arguments& layer : arguments) {
    sizes.push_back(layer.size());
  }
  const std::vector<ProductPlan> plans = plan_factored(
      sizes,
      size_of<typename Large::Tile>(),
      kSmall,
      launch.processors(),
      sizeof(A),
      launch.workspace_bytes());
  const FactoredWorkspace workspace(sizes, plans, kSmall);
  // With one sum for each example there is nothing left to add up.
  const bool direct =
      !add && plans.size() == 1 && arguments[0].positions == 1 && plans[0].groups == 1;
  const int64_t size = direct ? workspace.parts : workspace.size;
  const Tensor memory = size > 0 ? torch::stable::new_empty(u, {size}) : u;

  Layers<A, Capacity> large;
  Layers<A, Capacity> small;
  Layers<A, Capacity> split;
  PartTable<A, Capacity> parts;
  for (const size_t l : longest_blocks_first(sizes, plans)) {
    const Arguments& layer = arguments[l];
    const ProductPlan& plan = plans[l];
    A* const sums = direct ? data<A>(u) : data<A>(memory) + workspace.row_sums[l];
    A* const partial = data<A>(memory) + workspace.partial[l];
    const A bias = layer.bias ? A(1) : A(0);
    const int64_t g_splits = plan.splits - plan.z_splits;
    const bool is_split = plan.z_splits > 0;
    Layers<A, Capacity>& table = is_split ? split : plan.large ? large : small;
    table.add(
        {layer.z.operand,
         layer.g.operand,
         layer.z_clean.operand,
         layer.g_clean.operand,
         bias,
         plan.row_tiles,
         plan.column_tiles,
         plan.groups,
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
  run_products<Large>(launch, &correlate<Large, Capacity>, large);
  run_products<Small>(launch, &correlate<Small, Capacity>, small);
  run_products<Small>(launch, &form_partial_products<Small, Capacity>, split);
  if (parts.total > 0) {
    launch.run(&multiply_partial_products<A, Capacity>, parts.total, kRowThreads, 0, parts);
  }
  if (!direct) {
    std::vector<RowSums> row_sums;
    for (size_t l = 0; l < plans.size(); ++l) {
      row_sums.push_back({workspace.row_sums[l], plans[l].groups, arguments[l].positions});
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
    with_row_engines(launch, dtype, area, [&](auto engines) {
      using Engines = decltype(engines);
      if (layers.size() == 1) {
        correlate_layers<Engines, 1>(launch, layers, scored, u);
      } else {
        correlate_layers<Engines, kMostLayers>(launch, layers, scored, u);
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
      AlignedRows aligned = aligned_rows(launch, tensor, dtype);
      const bool is_copy = aligned.operand.data != tensor.data_ptr();
      copied += is_copy ? aligned.operand.rows * aligned.operand.stride : 0;
      return aligned;
    };
    layers.push_back(
        {rows(z[l]), rows(g[l]), rows(z_clean[l]), rows(g_clean[l]), bias[l], z[l].size(1)});
    // Copies of several layers at a time take no more memory than a workspace.
    if (layers.size() == kMostLayers || copied > kWorkspaceBytes) {
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
  check_factored_correlation(z, g, z_clean, g_clean);
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
}  // namespace cuda

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("factored_correlation", TORCH_BOX(&cuda::factored_correlation));
  m.impl("factored_correlations", TORCH_BOX(&cuda::factored_correlations));
}

}  // namespace l2rw
