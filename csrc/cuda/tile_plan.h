#pragma once

// How a product of rows is cut into blocks, and in which order a block works. As tile_index.h, the
// same on the host and the device.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/tile_index.h"

namespace l2rw::cuda {

// What a kernel may use beside its inputs, unless the sums of single rows alone need more.
constexpr int64_t kWorkspaceBytes = int64_t{16} << 20;

struct Range {
  int64_t begin;
  int64_t end;
};

// Part `part` of `parts` of 0 ... count - 1; none is empty where there are at most `count`.
L2RW_HOST_DEVICE constexpr Range split_range(int64_t count, int64_t parts, int64_t part) {
  return {count * part / parts, count * (part + 1) / parts};
}

L2RW_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct TilePlace {
  int64_t row;     // tile of rows
  int64_t column;  // tile, or group of tiles, of columns
};

// Blocks that run at the same time share rows and columns: bands of eight tiles of rows are passed
// through column by column.
L2RW_HOST_DEVICE constexpr TilePlace place_of_block(
    int64_t block, int64_t row_tiles, int64_t columns) {
  constexpr int64_t kBand = 8;
  const int64_t first = block / (kBand * columns) * kBand;
  const int64_t height = row_tiles - first < kBand ? row_tiles - first : kBand;
  const int64_t within = block % (kBand * columns);
  return {first + within % height, within / height};
}

// How the chunks of a depth are divided among `splits` units, which are no more.
struct Depth {
  int32_t splits;
  int32_t share;  // chunks of a unit; the first `longer` ones have one more
  int32_t longer;

  L2RW_HOST_DEVICE Depth(int64_t splits, int64_t chunks)
      : splits(static_cast<int32_t>(splits)),
        share(static_cast<int32_t>(chunks / splits)),
        longer(static_cast<int32_t>(chunks % splits)) {}

  L2RW_HOST_DEVICE int32_t first_chunk(int32_t part) const {
    return part * share + (part < longer ? part : longer);
  }
};

// The steps of a block. A unit is a tile of columns and a part of the depth, a chunk is the depth
// of one stage, and a block takes the units `begin` to `end` with all their chunks. 32 bits count
// them: 2^31 chunks, or tiles of columns, are more than the memory of a device.
struct Walk {
  Depth depth;    // of a tile of columns
  int32_t units;  // that are left
  int32_t column;
  int32_t part;
  int32_t chunk;

  L2RW_HOST_DEVICE Walk(Range range, const Depth& depth)
      : depth(depth),
        units(static_cast<int32_t>(range.end - range.begin)),
        column(static_cast<int32_t>(range.begin / depth.splits)),
        part(static_cast<int32_t>(range.begin % depth.splits)),
        chunk(depth.first_chunk(part)) {}
  // `chunks`: of the whole depth, at least `splits`.
  L2RW_HOST_DEVICE Walk(Range range, int64_t splits, int64_t chunks)
      : Walk(range, Depth(splits, chunks)) {}
  L2RW_HOST_DEVICE bool done() const { return units <= 0; }
  L2RW_HOST_DEVICE bool ends_unit() const { return chunk + 1 == depth.first_chunk(part + 1); }
  L2RW_HOST_DEVICE int64_t column_tile() const { return column; }
  L2RW_HOST_DEVICE int64_t split() const { return part; }
  L2RW_HOST_DEVICE void next() {
    if (++chunk == depth.first_chunk(part + 1)) {
      --units;
      if (++part == depth.splits) {
        part = 0;
        ++column;
      }
      chunk = depth.first_chunk(part);
    }
  }
};

struct TileSize {
  int64_t rows;
  int64_t columns;
};

template <class Tile>
constexpr TileSize size_of() {
  return {Tile::kRows, Tile::kColumns};
}

inline int64_t tile_count(int64_t rows, int64_t columns, TileSize tile) {
  return ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns);
}

// Stages that the depth of a row takes. A depth of zero is one stage of zeros.
L2RW_HOST_DEVICE constexpr int64_t chunks_of(int64_t row_bytes) {
  const int64_t chunks = ceil_div(row_bytes, kLineBytes);
  return chunks > 1 ? chunks : 1;
}

// Groups of units, each of which leaves a sum for every row in the workspace.
inline int64_t groups_of(int64_t units, int64_t rows, int64_t sum_bytes, int64_t workspace_bytes) {
  return std::min(units, std::max<int64_t>(1, workspace_bytes / (rows * sum_bytes)));
}

struct ProductPlan {
  bool large;  // which of two tiles
  int64_t row_tiles;
  int64_t column_tiles;
  int64_t groups;  // blocks per tile of rows
  int64_t splits;  // parts of the depth
  // Of the splits of a factored product, those of Z Z'ᵀ. Zero: one block forms both products.
  int64_t z_splits = 0;
  bool narrow = false;  // in place of the two tiles, the one for few columns

  int64_t blocks() const { return row_tiles * (z_splits > 0 ? column_tiles * splits : groups); }
  // Of the longest block.
  int64_t tiles_of_block() const { return z_splits > 0 ? 1 : ceil_div(column_tiles, groups); }
};

// Whether large tiles cover a product with at most half as much again as small ones do.
inline bool large_fit(int64_t rows, int64_t columns, TileSize large, TileSize small) {
  const auto area = [&](TileSize tile) {
    return tile_count(rows, columns, tile) * tile.rows * tile.columns;
  };
  return 2 * area(large) <= 3 * area(small);
}

inline ProductPlan cut_tiles(
    int64_t rows,
    int64_t columns,
    TileSize large,
    TileSize small,
    int64_t processors,
    int64_t products = 1) {
  for (const bool is_large : {true, false}) {
    const TileSize tile = is_large ? large : small;
    const int64_t down = ceil_div(rows, tile.rows);
    const int64_t across = ceil_div(columns, tile.columns);
    if (!is_large ||
        (large_fit(rows, columns, large, small) && products * down * across >= processors)) {
      return {is_large, down, across, across, 1};
    }
  }
  return {};
}

// The sum of the products with G of a tile's parts is that of the tile: a split depth needs no
// memory beyond one more sum for every row. `products`: of this size, in one launch.
inline ProductPlan plan_dense(
    int64_t products,
    int64_t rows,
    int64_t columns,
    int64_t chunks,
    TileSize large,
    TileSize small,
    TileSize narrow,
    int64_t processors,
    int64_t sum_bytes,
    int64_t workspace_bytes = kWorkspaceBytes) {
  ProductPlan plan = cut_tiles(rows, columns, large, small, processors, products);
  if (columns <= narrow.columns) {
    plan = {false, ceil_div(rows, narrow.rows), 1, 1, 1, 0, true};
  }
  const int64_t tiles = products * plan.row_tiles * plan.column_tiles;
  if (tiles < processors) {
    plan.splits = std::max<int64_t>(1, std::min(ceil_div(2 * processors, tiles), chunks / 2));
  }
  plan.groups =
      groups_of(plan.column_tiles * plan.splits, products * rows, sum_bytes, workspace_bytes);
  return plan;
}

// Both Gram matrices of a layer.
struct FactoredSize {
  int64_t rows;
  int64_t columns;
  int64_t z_chunks;
  int64_t g_chunks;

  int64_t chunks() const { return z_chunks + g_chunks; }
  int64_t tiles(TileSize tile) const { return tile_count(rows, columns, tile); }
  int64_t steps(TileSize tile) const { return tiles(tile) * chunks(); }
};

// Which layers take large tiles: those that these fit, and where no block is longer than a
// processor's share of all their work; if there is a block for every processor.
inline std::vector<bool> choose_large(
    const std::vector<FactoredSize>& layers, TileSize large, TileSize small, int64_t processors) {
  std::vector<bool> chosen(layers.size());
  int64_t steps = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    chosen[l] = large.rows * large.columns > small.rows * small.columns &&
                large_fit(layers[l].rows, layers[l].columns, large, small);
    steps += chosen[l] ? layers[l].steps(large) : 0;
  }
  int64_t tiles = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    chosen[l] = chosen[l] && layers[l].chunks() * processors <= steps;
    tiles += chosen[l] ? layers[l].tiles(large) : 0;
  }
  return tiles >= processors ? chosen : std::vector<bool>(layers.size());
}

// The layers of one call. Where a block on a small tile would be longer than a processor's share of
// all work on small tiles, the depth of both Gram matrices is split as well, into parts of half
// that share. Their product is not linear in partial sums, so these go through the workspace, which
// layers get by their work. Other layers of few tiles are then split too, to run in the same
// launch.
inline std::vector<ProductPlan> plan_factored(
    const std::vector<FactoredSize>& layers,
    TileSize large,
    TileSize small,
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
      longest = std::max(longest, layers[l].chunks());
    }
  }
  const bool split = longest >= 4 && longest * processors > small_steps;
  std::vector<ProductPlan> plans;
  for (size_t l = 0; l < layers.size(); ++l) {
    const FactoredSize& layer = layers[l];
    const TileSize tile = is_large[l] ? large : small;
    ProductPlan plan{
        is_large[l], ceil_div(layer.rows, tile.rows), ceil_div(layer.columns, tile.columns), 1, 1};
    const double share = static_cast<double>(layer.steps(small)) / static_cast<double>(all_steps);
    const auto own_bytes = static_cast<int64_t>(share * static_cast<double>(workspace_bytes));
    const int64_t tiles = layer.tiles(small);
    if (split && !plan.large && tiles < processors) {
      const int64_t chunks = layer.chunks();
      const int64_t splits = std::min(
          {std::max<int64_t>(2, ceil_div(2 * processors * chunks, small_steps)),
           std::max<int64_t>(2, chunks / 2),
           own_bytes / (tiles * small.rows * small.columns * sum_bytes)});
      if (splits >= 2) {
        plan.z_splits = std::clamp<int64_t>(splits * layer.z_chunks / chunks, 1, splits - 1);
        plan.z_splits = std::min(plan.z_splits, layer.z_chunks);
        plan.splits = plan.z_splits + std::min(splits - plan.z_splits, layer.g_chunks);
      }
    }
    if (plan.z_splits == 0) {
      plan.groups = groups_of(plan.column_tiles, layer.rows, sum_bytes, own_bytes);
    }
    plans.push_back(plan);
  }
  return plans;
}

// What the layers of one call leave in memory, in numbers. Whole tiles come first, so that their
// rows can be written several numbers at a time.
struct FactoredWorkspace {
  std::vector<int64_t> partial;   // where parts of Gram matrices begin
  std::vector<int64_t> row_sums;  // where sums of rows begin: [groups, rows]
  int64_t parts = 0;              // all parts
  int64_t size = 0;

  FactoredWorkspace(
      const std::vector<FactoredSize>& layers,
      const std::vector<ProductPlan>& plans,
      TileSize small) {
    for (const ProductPlan& plan : plans) {
      partial.push_back(parts);
      const int64_t tiles = plan.row_tiles * plan.column_tiles * small.rows * small.columns;
      parts += plan.z_splits > 0 ? plan.splits * tiles : 0;
    }
    size = parts;
    for (size_t l = 0; l < plans.size(); ++l) {
      row_sums.push_back(size);
      size += plans[l].groups * layers[l].rows;
    }
  }
};

// Blocks that take longest start first, so that none is left alone at the end.
inline std::vector<size_t> longest_blocks_first(
    const std::vector<FactoredSize>& layers, const std::vector<ProductPlan>& plans) {
  const auto steps = [&](size_t l) {
    return ceil_div(layers[l].chunks(), plans[l].splits) * plans[l].tiles_of_block();
  };
  std::vector<size_t> order(plans.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(
      order.begin(), order.end(), [&](size_t a, size_t b) { return steps(a) > steps(b); });
  return order;
}

// Where a split of Z Z'ᵀ or G G'ᵀ leaves its sum: [splits][rows][columns] of whole tiles.
L2RW_HOST_DEVICE constexpr int64_t partial_place(
    int64_t split, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  return (split * rows + row) * columns + column;
}

}  // namespace l2rw::cuda
