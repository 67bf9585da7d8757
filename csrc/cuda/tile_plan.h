#pragma once

// How a product of rows is cut into blocks, and in which order a block works. As tile_index.h, the
// same on the host and the device.

#include <algorithm>
#include <cstdint>

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

// The steps of a block. A unit is a tile of columns and a part of the depth, a chunk is the depth
// of one stage, and a block takes the units `begin` to `end` with all their chunks.
struct Walk {
  int64_t unit;
  int64_t last_unit;
  int64_t splits;  // units per tile of columns
  int64_t chunks;  // of the whole depth, at least `splits`
  int64_t chunk = 0;
  int64_t last_chunk = 0;

  L2RW_HOST_DEVICE Walk(Range units, int64_t splits, int64_t chunks)
      : unit(units.begin), last_unit(units.end), splits(splits), chunks(chunks) {
    open();
  }
  L2RW_HOST_DEVICE bool done() const { return unit >= last_unit; }
  L2RW_HOST_DEVICE bool ends_unit() const { return chunk + 1 == last_chunk; }
  L2RW_HOST_DEVICE int64_t column_tile() const { return unit / splits; }
  L2RW_HOST_DEVICE int64_t split() const { return unit % splits; }
  L2RW_HOST_DEVICE void next() {
    if (++chunk == last_chunk) {
      ++unit;
      open();
    }
  }

 private:
  L2RW_HOST_DEVICE void open() {
    const Range range = split_range(chunks, splits, split());
    chunk = range.begin;
    last_chunk = range.end;
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

// Stages that the depth of a row takes. A depth of zero is one stage of zeros.
inline int64_t chunks_of(int64_t row_bytes) {
  return std::max<int64_t>(1, ceil_div(row_bytes, kLineBytes));
}

// Groups of units, each of which leaves a sum for every row in the workspace.
inline int64_t groups_of(int64_t units, int64_t rows, int64_t sum_bytes) {
  return std::min(units, std::max<int64_t>(1, kWorkspaceBytes / (rows * sum_bytes)));
}

struct ProductPlan {
  bool large;  // which of two tiles
  int64_t row_tiles;
  int64_t column_tiles;
  int64_t groups;  // blocks per tile of rows
  int64_t splits;  // parts of the depth
  // Of the splits of a factored product, those of Z Z'ᵀ. Zero: one block forms both products.
  int64_t z_splits = 0;
};

inline ProductPlan cut_tiles(
    int64_t rows, int64_t columns, TileSize large, TileSize small, int64_t processors) {
  for (const bool is_large : {true, false}) {
    const TileSize tile = is_large ? large : small;
    const int64_t down = ceil_div(rows, tile.rows);
    const int64_t across = ceil_div(columns, tile.columns);
    if (!is_large || down * across >= processors) {
      return {is_large, down, across, across, 1};
    }
  }
  return {};
}

// The sum of the products with G of a tile's parts is that of the tile: a split depth needs no
// memory beyond one more sum for every row.
inline ProductPlan plan_dense(
    int64_t rows,
    int64_t columns,
    int64_t chunks,
    TileSize large,
    TileSize small,
    int64_t processors,
    int64_t sum_bytes) {
  ProductPlan plan = cut_tiles(rows, columns, large, small, processors);
  const int64_t tiles = plan.row_tiles * plan.column_tiles;
  if (tiles < processors) {
    plan.splits = std::max<int64_t>(1, std::min(ceil_div(2 * processors, tiles), chunks / 2));
  }
  plan.groups = groups_of(plan.column_tiles * plan.splits, rows, sum_bytes);
  return plan;
}

// Where there are fewer tiles than processors, even small ones, the depth of both Gram matrices is
// split as well. Their product is not linear in partial sums, so these go through the workspace.
inline ProductPlan plan_factored(
    int64_t rows,
    int64_t columns,
    int64_t z_chunks,
    int64_t g_chunks,
    TileSize large,
    TileSize small,
    int64_t processors,
    int64_t sum_bytes) {
  ProductPlan plan = cut_tiles(rows, columns, large, small, processors);
  if (plan.row_tiles * plan.column_tiles < processors) {
    const int64_t tiles = plan.row_tiles * plan.column_tiles;
    const int64_t tile_bytes = tiles * small.rows * small.columns * sum_bytes;
    const int64_t splits = std::min(
        {ceil_div(2 * processors, tiles), (z_chunks + g_chunks) / 2, kWorkspaceBytes / tile_bytes});
    if (splits >= 2) {
      plan.groups = 1;
      const int64_t share = splits * z_chunks / (z_chunks + g_chunks);
      plan.z_splits = std::clamp<int64_t>(share, 1, splits - 1);
      plan.z_splits = std::min(plan.z_splits, z_chunks);
      plan.splits = plan.z_splits + std::min(splits - plan.z_splits, g_chunks);
      return plan;
    }
  }
  plan.groups = groups_of(plan.column_tiles, rows, sum_bytes);
  return plan;
}

// Where a split of Z Z'ᵀ or G G'ᵀ leaves its sum: [splits][rows][columns] of whole tiles.
L2RW_HOST_DEVICE constexpr int64_t partial_place(
    int64_t split, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  return (split * rows + row) * columns + column;
}

}  // namespace l2rw::cuda
