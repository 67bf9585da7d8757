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
  bool narrow = false;  // in place of the two tiles, the one for few columns
};

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
    if (!is_large || products * down * across >= processors) {
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
    int64_t sum_bytes) {
  ProductPlan plan = cut_tiles(rows, columns, large, small, processors, products);
  if (columns <= narrow.columns) {
    plan = {false, ceil_div(rows, narrow.rows), 1, 1, 1, 0, true};
  }
  const int64_t tiles = products * plan.row_tiles * plan.column_tiles;
  if (tiles < processors) {
    plan.splits = std::max<int64_t>(1, std::min(ceil_div(2 * processors, tiles), chunks / 2));
  }
  plan.groups = groups_of(plan.column_tiles * plan.splits, products * rows, sum_bytes);
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
