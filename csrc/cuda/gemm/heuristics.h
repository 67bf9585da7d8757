#pragma once

// The choices of the host: which tile a product gets, how its work is divided among blocks, and
// what memory that takes.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/gemm/tile.h"
#include "cuda/util/host_device.h"
#include "cuda/util/integers.h"
#include "cuda/util/limits.h"

namespace l2rw::cuda {

// How many blocks share `work_tiles`. Each leaves a sum for every row in the workspace.
inline int64_t column_blocks_for(
    int64_t work_tiles, int64_t rows, int64_t sum_bytes, int64_t workspace_bytes) {
  return std::min(work_tiles, std::max<int64_t>(1, workspace_bytes / (rows * sum_bytes)));
}

// Narrow tiles are for few columns, large ones for where they fit and give every processor work.
enum class TileKind { large, small, narrow };

struct GemmPlan {
  TileKind tile;
  int64_t row_tiles;
  int64_t column_tiles;
  int64_t column_blocks;  // blocks for each tile of rows
  int64_t splits;         // parts of the depth
  // How many of the splits of a factored product are those of Z Z'ᵀ. With zero, one block forms
  // both products.
  int64_t z_splits = 0;

  int64_t blocks() const {
    return row_tiles * (z_splits > 0 ? column_tiles * splits : column_blocks);
  }
  // Of the longest block.
  int64_t tiles_of_block() const {
    return z_splits > 0 ? 1 : ceil_div(column_tiles, column_blocks);
  }
};

// Whether large tiles cover a product with at most half as much again as small ones do.
inline bool large_fit(int64_t rows, int64_t columns, TileShape large, TileShape small) {
  const auto area = [&](TileShape tile) {
    return tile_count(rows, columns, tile) * tile.rows * tile.columns;
  };
  return 2 * area(large) <= 3 * area(small);
}

// The products Z Vᵀ of one launch. The depth can be split without more memory than one sum for
// every row, because the product of G with a tile is the sum of its products with the tile's parts.
inline GemmPlan plan_dense(
    int64_t products,
    int64_t rows,
    int64_t columns,
    int64_t k_tiles,
    TileShape large,
    TileShape small,
    TileShape narrow,
    int64_t processors,
    int64_t sum_bytes,
    int64_t workspace_bytes = kWorkspaceBytes) {
  const bool is_large = large_fit(rows, columns, large, small) &&
                        products * tile_count(rows, columns, large) >= processors;
  const bool is_narrow = columns <= narrow.columns;
  const TileShape tile = is_narrow ? narrow : is_large ? large : small;
  GemmPlan plan{
      is_narrow  ? TileKind::narrow
      : is_large ? TileKind::large
                 : TileKind::small,
      ceil_div(rows, tile.rows),
      ceil_div(columns, tile.columns),
      1,
      1};
  const int64_t tiles = products * plan.row_tiles * plan.column_tiles;
  if (tiles < processors) {
    plan.splits = std::max<int64_t>(1, std::min(ceil_div(2 * processors, tiles), k_tiles / 2));
  }
  plan.column_blocks = column_blocks_for(
      plan.column_tiles * plan.splits, products * rows, sum_bytes, workspace_bytes);
  return plan;
}

// Both Gram matrices of a layer.
struct FactoredProblem {
  int64_t rows;
  int64_t columns;
  int64_t z_k_tiles;
  int64_t g_k_tiles;

  int64_t k_tiles() const { return z_k_tiles + g_k_tiles; }
  int64_t tiles(TileShape tile) const { return tile_count(rows, columns, tile); }
  int64_t steps(TileShape tile) const { return tiles(tile) * k_tiles(); }
};

// Which layers take large tiles: those that large tiles fit, and whose blocks are no longer than a
// processor's share of the work of all such layers. None does unless there is a block for every
// processor.
inline std::vector<bool> choose_large(
    const std::vector<FactoredProblem>& layers,
    TileShape large,
    TileShape small,
    int64_t processors) {
  std::vector<bool> chosen(layers.size());
  int64_t steps = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    chosen[l] = large.rows * large.columns > small.rows * small.columns &&
                large_fit(layers[l].rows, layers[l].columns, large, small);
    steps += chosen[l] ? layers[l].steps(large) : 0;
  }
  int64_t tiles = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    chosen[l] = chosen[l] && layers[l].k_tiles() * processors <= steps;
    tiles += chosen[l] ? layers[l].tiles(large) : 0;
  }
  return tiles >= processors ? chosen : std::vector<bool>(layers.size());
}

// The layers of one grouped launch. If a block on a small tile would be longer than a processor's
// share of all work on small tiles, the depth of both Gram matrices is split into parts of half
// that share. Their product is not linear in partial sums, so that the parts go through the
// workspace, which is divided among the layers by their work. Other layers of few tiles are then
// split as well, so that they run in the same launch.
inline std::vector<GemmPlan> plan_factored(
    const std::vector<FactoredProblem>& layers,
    TileShape large,
    TileShape small,
    int64_t processors,
    int64_t sum_bytes,
    int64_t workspace_bytes = kWorkspaceBytes) {
  const std::vector<bool> is_large = choose_large(layers, large, small, processors);
  int64_t all_steps = 0;
  int64_t small_steps = 0;
  int64_t longest = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    all_steps += layers[l].steps(small);
    if (!is_large[l]) {
      small_steps += layers[l].steps(small);
      longest = std::max(longest, layers[l].k_tiles());
    }
  }
  const bool split = longest >= 4 && longest * processors > small_steps;
  std::vector<GemmPlan> plans;
  for (size_t l = 0; l < layers.size(); ++l) {
    const FactoredProblem& layer = layers[l];
    const TileShape tile = is_large[l] ? large : small;
    GemmPlan plan{
        is_large[l] ? TileKind::large : TileKind::small,
        ceil_div(layer.rows, tile.rows),
        ceil_div(layer.columns, tile.columns),
        1,
        1};
    const double share = static_cast<double>(layer.steps(small)) / static_cast<double>(all_steps);
    const auto own_bytes = static_cast<int64_t>(share * static_cast<double>(workspace_bytes));
    const int64_t tiles = layer.tiles(small);
    if (split && !is_large[l] && tiles < processors) {
      const int64_t k_tiles = layer.k_tiles();
      const int64_t splits = std::min(
          {std::max<int64_t>(2, ceil_div(2 * processors * k_tiles, small_steps)),
           std::max<int64_t>(2, k_tiles / 2),
           own_bytes / (tiles * small.rows * small.columns * sum_bytes)});
      if (splits >= 2) {
        plan.z_splits = std::clamp<int64_t>(splits * layer.z_k_tiles / k_tiles, 1, splits - 1);
        plan.z_splits = std::min(plan.z_splits, layer.z_k_tiles);
        plan.splits = plan.z_splits + std::min(splits - plan.z_splits, layer.g_k_tiles);
      }
    }
    if (plan.z_splits == 0) {
      plan.column_blocks = column_blocks_for(plan.column_tiles, layer.rows, sum_bytes, own_bytes);
    }
    plans.push_back(plan);
  }
  return plans;
}

// What the layers of one grouped launch leave in memory, counted in numbers. The parts of Gram
// matrices come first, in whole tiles, so that their rows can be written in vectors.
struct FactoredWorkspace {
  std::vector<int64_t> partial;   // where the parts of a layer's Gram matrices begin
  std::vector<int64_t> row_sums;  // where its sums of rows begin: [column_blocks, rows]
  int64_t parts = 0;              // numbers of all parts
  int64_t size = 0;

  FactoredWorkspace(
      const std::vector<FactoredProblem>& layers,
      const std::vector<GemmPlan>& plans,
      TileShape small) {
    for (const GemmPlan& plan : plans) {
      partial.push_back(parts);
      const int64_t tiles = plan.row_tiles * plan.column_tiles * small.rows * small.columns;
      parts += plan.z_splits > 0 ? plan.splits * tiles : 0;
    }
    size = parts;
    for (size_t l = 0; l < plans.size(); ++l) {
      row_sums.push_back(size);
      size += plans[l].column_blocks * layers[l].rows;
    }
  }
};

// Blocks that take longest start first, so that none is left alone at the end.
inline std::vector<size_t> longest_blocks_first(
    const std::vector<FactoredProblem>& layers, const std::vector<GemmPlan>& plans) {
  const auto steps = [&](size_t l) {
    return ceil_div(layers[l].k_tiles(), plans[l].splits) * plans[l].tiles_of_block();
  };
  std::vector<size_t> order(plans.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(
      order.begin(), order.end(), [&](size_t a, size_t b) { return steps(a) > steps(b); });
  return order;
}

// Where a split of Z Z'ᵀ or G G'ᵀ leaves its sum, in [splits][rows][columns] of whole tiles.
L2RW_HOST_DEVICE constexpr int64_t partial_offset(
    int64_t split, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  return (split * rows + row) * columns + column;
}

}  // namespace l2rw::cuda
