#pragma once

// The order of work: which tile a block starts with, and which steps its mainloop takes.

#include <cstdint>

#include "cuda/gemm/tile.h"
#include "cuda/util/host_device.h"
#include "cuda/util/integers.h"

namespace l2rw::cuda {

struct TileCoord {
  int64_t row;     // tile of rows
  int64_t column;  // tile, or group of tiles, of columns
};

// The tile of a block. Bands of eight tiles of rows are traversed column by column, so that blocks
// that run at the same time share rows and columns.
L2RW_HOST_DEVICE constexpr TileCoord tile_of_block(
    int64_t block, int64_t row_tiles, int64_t columns) {
  constexpr int64_t kBand = 8;
  const int64_t first = block / (kBand * columns) * kBand;
  const int64_t height = row_tiles - first < kBand ? row_tiles - first : kBand;
  const int64_t within = block % (kBand * columns);
  return {first + within % height, within / height};
}

// How many stages the depth of a row takes; each is one k-tile. A depth of zero is one k-tile of
// zeros.
L2RW_HOST_DEVICE constexpr int64_t k_tiles_of(int64_t row_bytes) {
  const int64_t k_tiles = ceil_div(row_bytes, kDepthBytes);
  return k_tiles > 1 ? k_tiles : 1;
}

// How the k-tiles of a depth are divided among `splits` parts. There are at least as many k-tiles
// as parts.
struct SplitK {
  int32_t splits;
  int32_t share;   // k-tiles of a part
  int32_t longer;  // so many parts, the first ones, have one more

  L2RW_HOST_DEVICE SplitK(int64_t splits, int64_t k_tiles)
      : splits(static_cast<int32_t>(splits)),
        share(static_cast<int32_t>(k_tiles / splits)),
        longer(static_cast<int32_t>(k_tiles % splits)) {}

  L2RW_HOST_DEVICE int32_t first_k_tile(int32_t split) const {
    return split * share + (split < longer ? split : longer);
  }
};

// The steps of a block's mainloop. A work tile is a tile of columns with one part of the depth; a
// block takes a range of work tiles, each with all its k-tiles. 32 bits count them, because 2^31
// k-tiles, or tiles of columns, are more than the memory of a device.
struct KTileIterator {
  SplitK split_k;      // of a tile of columns
  int32_t work_tiles;  // that are left
  int32_t column;
  int32_t split;
  int32_t k_tile;

  L2RW_HOST_DEVICE KTileIterator(Range range, const SplitK& split_k)
      : split_k(split_k),
        work_tiles(static_cast<int32_t>(range.end - range.begin)),
        column(static_cast<int32_t>(range.begin / split_k.splits)),
        split(static_cast<int32_t>(range.begin % split_k.splits)),
        k_tile(split_k.first_k_tile(split)) {}
  // `k_tiles`: of the whole depth, at least `splits`.
  L2RW_HOST_DEVICE KTileIterator(Range range, int64_t splits, int64_t k_tiles)
      : KTileIterator(range, SplitK(splits, k_tiles)) {}
  L2RW_HOST_DEVICE bool done() const { return work_tiles <= 0; }
  L2RW_HOST_DEVICE bool ends_work_tile() const {
    return k_tile + 1 == split_k.first_k_tile(split + 1);
  }
  L2RW_HOST_DEVICE int64_t column_tile() const { return column; }
  L2RW_HOST_DEVICE void next() {
    if (++k_tile == split_k.first_k_tile(split + 1)) {
      --work_tiles;
      if (++split == split_k.splits) {
        split = 0;
        ++column;
      }
      k_tile = split_k.first_k_tile(split);
    }
  }
};

}  // namespace l2rw::cuda
