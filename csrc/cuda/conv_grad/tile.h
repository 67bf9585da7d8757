#pragma once

// The tile of the gradient of one example, G_i[o, tap, c] = sum over pixels p of
// g_i[p, o] z_i[pixel(p) + offset(tap), c]: its layout in shared memory and in registers, which
// part of the gradient it is, what each thread copies of z and g, and how a sum over examples is
// divided among blocks.
//
// It is a matrix product whose depth are the pixels, with the channels of both operands contiguous.
// A stage holds vectors of g for some pixels and, in an area behind them, vectors of z. A column of
// vectors of z belongs to one tap and as many channels as a vector has.

#include <algorithm>
#include <cstdint>

#include "convolution_sizes.h"
#include "cuda/conv/geometry.h"
#include "cuda/util/host_device.h"
#include "cuda/util/integers.h"
#include "cuda/util/limits.h"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {

// How a warp reads shared memory: with ldmatrix, eight pixels of one column of vectors at a time;
// as scalars of four bytes, four pixels of eight adjacent ones, for the operands of TF32; or one
// pixel at a time, for ordinary multiply-adds.
enum class Access { ldmatrix, scalars, simt };

// Where a multiple of eight vectors a pixel leaves no room between pixels, vector v of pixel p lies
// at v xor this. The pixels of one read then lie in different banks.
L2RW_HOST_DEVICE constexpr int pixel_swizzle(Access access, int pixel) {
  if (access == Access::ldmatrix) {
    return pixel & 7;
  }
  return access == Access::scalars ? 2 * (pixel & 3) : 0;
}

// A pitch of pixels, in vectors, with which such a read has no bank conflicts without that.
L2RW_HOST_DEVICE constexpr int conflict_free_pitch(Access access, int vectors) {
  if (access == Access::ldmatrix) {
    return vectors | 1;
  }
  if (access == Access::scalars) {
    return (vectors + 1) / 4 * 4 + 2;
  }
  return vectors;
}

// A warp has RowFragments times 16 output channels and kWarpVectors columns of vectors. WarpsM x
// WarpsN warps make a tile, and SlicesK such sets of warps share the pixels of a stage.
template <
    int ElementBytes,
    Access Kind,
    int RowFragments,
    int WarpsM,
    int WarpsN,
    int SlicesK,
    int Depth>
struct GradientTile {
  static constexpr Access kAccess = Kind;
  static constexpr int kElementBytes = ElementBytes;
  static constexpr int kElements = kVectorBytes / ElementBytes;  // of a vector
  static constexpr int kRowFragments = RowFragments;
  static constexpr int kRows = 16 * RowFragments * WarpsM;  // output channels
  static constexpr int kWarpVectors = ElementBytes == 2 ? 9 : 18;
  static constexpr int kWarpColumns = kWarpVectors * kElements;
  static constexpr int kVectors = kWarpVectors * WarpsN;
  static constexpr int kColumns = kVectors * kElements;
  static constexpr int kSlicesK = SlicesK;
  static constexpr int kThreads = 32 * WarpsM * WarpsN * SlicesK;
  static constexpr int kDepth = Depth;  // pixels of a stage
  static constexpr int kRowVectors = kRows / kElements;
  static constexpr int kColumnPixels = kThreads / kVectors;  // pixels of z that are copied at once
  static constexpr bool kRowSwizzle = kRowVectors % 8 == 0;
  static constexpr int kRowPitch =
      kRowSwizzle ? kRowVectors : conflict_free_pitch(Kind, kRowVectors);
  static constexpr int kColumnPitch = conflict_free_pitch(Kind, kVectors);
  static constexpr int kStageBytes = kDepth * (kRowPitch + kColumnPitch) * kVectorBytes;

  // The accumulators of a lane. With ordinary multiply-adds it has a vector of rows in each
  // fragment and nine columns that are kLanesN apart.
  static constexpr bool kSimt = Kind == Access::simt;
  static constexpr int kLanesN = kSimt ? kWarpColumns / 9 : 4;
  static constexpr int kThreadRows = kSimt ? RowFragments * kElements : RowFragments * 2;
  static constexpr int kProductColumns = kSimt ? 9 : kWarpColumns / 4;
  // The last accumulator of a row is the sum of g alone, the gradient of the bias. With tensor
  // cores, each lane has a part of it.
  static constexpr int kBias = kProductColumns;
  static constexpr int kThreadColumns = kProductColumns + 1;
  static_assert(!kSimt || 32 / kLanesN * kElements == 16);

  L2RW_HOST_DEVICE static constexpr int warp_row(int thread) {
    return thread / 32 % WarpsM * RowFragments * 16;
  }
  L2RW_HOST_DEVICE static constexpr int warp_vector(int thread) {
    return thread / 32 / WarpsM % WarpsN * kWarpVectors;
  }
  L2RW_HOST_DEVICE static constexpr int slice_k(int thread) {
    return thread / 32 / (WarpsM * WarpsN);
  }

  // The row and the column of accumulator [r][c] of a thread.
  L2RW_HOST_DEVICE static constexpr int row(int thread, int r) {
    const int lane = thread % 32;
    return warp_row(thread) + (kSimt
                                   ? r / kElements * 16 + lane / kLanesN * kElements + r % kElements
                                   : r * 8 + lane / 4);
  }
  L2RW_HOST_DEVICE static constexpr int column(int thread, int c) {
    const int lane = thread % 32;
    return warp_vector(thread) * kElements +
           (kSimt ? c * kLanesN + lane % kLanesN : c / 2 * 8 + lane % 4 * 2 + c % 2);
  }

  // The byte offsets of the vectors of a pixel in its stage: of g, and of z. `like` is a number
  // that the swizzle takes for that of the pixel, and that the compiler may know to be constant.
  L2RW_HOST_DEVICE static constexpr int row_offset(int pixel, int vector, int like) {
    return (pixel * kRowPitch + (vector ^ (kRowSwizzle ? pixel_swizzle(Kind, like) : 0))) *
           kVectorBytes;
  }
  L2RW_HOST_DEVICE static constexpr int row_offset(int pixel, int vector) {
    return row_offset(pixel, vector, pixel);
  }
  L2RW_HOST_DEVICE static constexpr int column_offset(int pixel, int vector) {
    return (kDepth * kRowPitch + pixel * kColumnPitch + vector) * kVectorBytes;
  }

  // What a lane addresses for ldmatrix.x4.trans, for 16 pixels from `pixel` on, a multiple of
  // eight: row fragment f, or columns of vectors v and, where there are two, v + 1. The transposed
  // matrices are the operands of mma.m16n8k16.
  L2RW_HOST_DEVICE static constexpr int row_ldmatrix(int thread, int pixel, int f) {
    const int lane = thread % 32;
    return row_offset(
        pixel + lane / 16 * 8 + lane % 8,
        (warp_row(thread) + f * 16) / kElements + lane / 8 % 2,
        lane);
  }
  L2RW_HOST_DEVICE static constexpr int column_ldmatrix(int thread, int pixel, int v) {
    const int lane = thread % 32;
    return column_offset(pixel + lane / 8 % 2 * 8 + lane % 8, warp_vector(thread) + v + lane / 16);
  }
  // The operands of mma.m16n8k8, of four bytes each, for eight pixels from `pixel` on, a multiple
  // of eight: number k of row fragment f, and of columns 8 j to 8 j + 7.
  L2RW_HOST_DEVICE static constexpr int row_scalar(int thread, int pixel, int f, int k) {
    const int lane = thread % 32;
    const int row = warp_row(thread) + f * 16 + k % 2 * 8 + lane / 4;
    return row_offset(pixel + k / 2 * 4 + lane % 4, row / kElements, lane) +
           row % kElements * ElementBytes;
  }
  L2RW_HOST_DEVICE static constexpr int column_scalar(int thread, int pixel, int j, int k) {
    const int lane = thread % 32;
    return column_offset(pixel + k * 4 + lane % 4, warp_vector(thread)) +
           (j * 8 + lane / 4) * ElementBytes;
  }
};

// The taps and channels of a tile. Its columns of vectors are numbered with the channels fastest,
// so that neighbouring threads read contiguous memory.
struct TileColumns {
  int first_vector;  // of the channels of a group
  int vectors;
  int first_tap;
  int taps;

  L2RW_HOST_DEVICE bool has(int column) const { return column / vectors < taps; }
  L2RW_HOST_DEVICE int vector(int column) const { return first_vector + column % vectors; }
  L2RW_HOST_DEVICE int tap(int column) const { return first_tap + column / vectors; }
  // Where element k of a column of vectors of `elements` lies in a row of the tile that is ordered
  // as the gradient is, with the taps fastest.
  L2RW_HOST_DEVICE int offset(int column, int k, int elements) const {
    return (column % vectors * elements + k) * taps + column / vectors;
  }
};

// How the gradient is divided into tiles. A tile has all taps of as many channels as it has room
// for, or, where the taps alone are too many, an equal part of them.
struct GradientTiling {
  int row_tiles;  // of a group
  int column_tiles;
  int tap_tiles;
  int vectors;  // of the channels of a group; one vector of zeros if there are no channels
  int taps;
  int tile_vectors;
  int tile_taps;

  L2RW_HOST_DEVICE TileColumns columns_of(int column_tile) const {
    const int vector = column_tile / tap_tiles * tile_vectors;
    const int tap = column_tile % tap_tiles * tile_taps;
    return {
        vector,
        vectors - vector < tile_vectors ? vectors - vector : tile_vectors,
        tap,
        taps - tap < tile_taps ? taps - tap : tile_taps};
  }
};

template <class Tile>
GradientTiling tiling_of(const Convolution& convolution) {
  const int64_t taps = convolution.taps();
  const int64_t tap_tiles = ceil_div(taps, Tile::kVectors);
  const int64_t vectors = std::max<int64_t>(1, ceil_div(convolution.inputs, Tile::kElements));
  const int64_t tile_vectors = std::max<int64_t>(1, Tile::kVectors / taps);
  return {
      static_cast<int>(ceil_div(convolution.outputs, Tile::kRows)),
      static_cast<int>(ceil_div(vectors, tile_vectors) * tap_tiles),
      static_cast<int>(tap_tiles),
      static_cast<int>(vectors),
      static_cast<int>(taps),
      static_cast<int>(tile_vectors),
      static_cast<int>(ceil_div(taps, tap_tiles))};
}

// A layer whose gradients are formed tile by tile.
struct GradientProblem {
  ImageView z;
  ImageView g;
  ConvolutionGeometry geometry;
  GradientTiling tiling;
  PixelCoord pixel_step;  // to the next pixel of the same thread
  int groups;
  int inputs;   // channels of a group
  int outputs;  // channels of a group
  int pixels;
  int k_tiles;  // stages of all pixels

  int64_t tile_count() const { return int64_t{groups} * tiling.row_tiles * tiling.column_tiles; }
};

template <class Tile>
GradientProblem make_gradient_problem(
    const Convolution& convolution, const ImageView& z, const ImageView& g) {
  const ConvolutionGeometry geometry = ConvolutionGeometry::of(convolution);
  return {
      z,
      g,
      geometry,
      tiling_of<Tile>(convolution),
      geometry.coord(Tile::kColumnPixels),
      static_cast<int>(convolution.groups),
      static_cast<int>(convolution.inputs),
      static_cast<int>(convolution.outputs),
      static_cast<int>(convolution.pixels()),
      static_cast<int>(ceil_div(convolution.pixels(), Tile::kDepth))};
}

// Which tile of the gradient this is, over groups, rows and columns.
struct GradientTileCoord {
  int group;
  int first_output;  // in its group
  int column_tile;
  TileColumns columns;

  // The output channel of a row, over all groups.
  L2RW_HOST_DEVICE int64_t output(const GradientProblem& problem, int row) const {
    return int64_t{group} * problem.outputs + first_output + row;
  }
};

template <class Tile>
L2RW_HOST_DEVICE GradientTileCoord tile_coord(const GradientProblem& problem, int tile) {
  const int column = tile % problem.tiling.column_tiles;
  const int row_tile = tile / problem.tiling.column_tiles;
  return {
      row_tile / problem.tiling.row_tiles,
      row_tile % problem.tiling.row_tiles * Tile::kRows,
      column,
      problem.tiling.columns_of(column)};
}

// What a thread copies, stage by stage. Its columns of vectors are always the same, of other
// pixels.
template <class Tile>
class GradientLoader {
 public:
  L2RW_HOST_DEVICE GradientLoader(
      const GradientProblem& problem, const GradientTileCoord& tile, int thread)
      : problem_(problem),
        row_vector_(thread % Tile::kRowVectors),
        row_pixel_(thread / Tile::kRowVectors),
        column_(thread % Tile::kVectors),
        column_pixel_(thread / Tile::kVectors) {
    const int64_t row_byte =
        int64_t{tile.first_output / Tile::kElements + row_vector_} * kVectorBytes;
    g_bytes_ = problem.g.vector_bytes(row_byte);
    g_ = problem.g.data + (g_bytes_ > 0 ? tile.group * problem.g.group + row_byte : 0);
    const bool has = tile.columns.has(column_);
    const int64_t column_byte = has ? int64_t{tile.columns.vector(column_)} * kVectorBytes : 0;
    z_bytes_ = has ? problem.z.vector_bytes(column_byte) : 0;
    z_ = problem.z.data + (z_bytes_ > 0 ? tile.group * problem.z.group + column_byte : 0);
    tap_ = problem.geometry.tap(has ? tile.columns.tap(column_) : 0);
  }

  // Calls copy(offset in the stage, source, bytes that exist, whether other threads copy the same)
  // for one stage of an example's pixels. Nothing is read where no byte exists, and no address
  // outside of the memory is formed.
  template <class Copy>
  L2RW_HOST_DEVICE void load(int64_t example, int64_t k_tile, const Copy& copy) const {
    const int first = static_cast<int>(k_tile) * Tile::kDepth;
    load_rows(example, first, copy);
    if (column_pixel_ < kColumnPixels) {
      load_columns(example, first, copy);
    }
  }

 private:
  static constexpr int kRowPixels = Tile::kThreads / Tile::kRowVectors;
  static constexpr int kColumnPixels = Tile::kColumnPixels;
  static_assert(Tile::kThreads % Tile::kRowVectors == 0);

  // The vectors of g. Where no pixel is left, the address stays that of the last one.
  template <class Copy>
  L2RW_HOST_DEVICE void load_rows(int64_t example, int first, const Copy& copy) const {
    const int left = problem_.pixels - first - row_pixel_;
    int64_t at =
        example * problem_.g.example + (left > 0 ? first + row_pixel_ : 0) * problem_.g.pixel;
    L2RW_UNROLL
    for (int base = 0; base < Tile::kDepth; base += kRowPixels) {
      const int pixel = base + row_pixel_;
      if (Tile::kDepth % kRowPixels == 0 || pixel < Tile::kDepth) {
        const int bytes = base < left ? g_bytes_ : 0;
        copy(Tile::row_offset(pixel, row_vector_), g_ + at, bytes, false);
      }
      at += base + kRowPixels < left ? kRowPixels * problem_.g.pixel : 0;
    }
  }

  // The vectors of z. Where a tap reads none, the address is that of the first pixel.
  template <class Copy>
  L2RW_HOST_DEVICE void load_columns(int64_t example, int first, const Copy& copy) const {
    const char* const z = z_ + example * problem_.z.example;
    PixelCoord coord = problem_.geometry.coord(first + column_pixel_);
    L2RW_UNROLL
    for (int base = 0; base < Tile::kDepth; base += kColumnPixels) {
      const int pixel = base + column_pixel_;
      if (base + kColumnPixels <= Tile::kDepth || pixel < Tile::kDepth) {
        const InputPixel input = problem_.geometry.input_pixel(coord, tap_);
        const int64_t at = (input.exists ? input.number : 0) * problem_.z.pixel;
        copy(Tile::column_offset(pixel, column_), z + at, input.exists ? z_bytes_ : 0, true);
      }
      coord = problem_.geometry.advance(coord, problem_.pixel_step);
    }
  }

  const GradientProblem& problem_;
  int row_vector_;
  int row_pixel_;
  int column_;
  int column_pixel_;
  int g_bytes_;
  int z_bytes_;
  const char* g_;
  const char* z_;
  TapOffset tap_;
};

// At the end the sums of a tile are staged in shared memory, in the order of the gradient:
// [kRows][kStagedPitch], and behind them the sums of g, [kRows].
template <class Tile>
constexpr int kStagedPitch = Tile::kColumns + 1;

template <class Tile, class A>
constexpr int64_t kStagedBytes = int64_t{Tile::kRows} * (kStagedPitch<Tile> + 1) * sizeof(A);

// Calls body(row, offset in the staged row, offset in the gradient of an output channel) for what a
// thread writes of a tile. Neighbouring threads write contiguous memory.
template <class Tile, class Body>
L2RW_HOST_DEVICE void for_each_element(
    const GradientProblem& problem, const GradientTileCoord& tile, int thread, const Body& body) {
  const TileColumns& columns = tile.columns;
  const int left = problem.outputs - tile.first_output;
  const int rows = left < Tile::kRows ? left : Tile::kRows;
  const int run = columns.vectors * Tile::kElements * columns.taps;
  for (int x = thread % 32; x < run; x += 32) {
    const int channel = columns.first_vector * Tile::kElements + x / columns.taps;
    if (channel < problem.inputs) {
      const int64_t at =
          int64_t{channel} * problem.tiling.taps + columns.first_tap + x % columns.taps;
      for (int row = thread / 32; row < rows; row += Tile::kThreads / 32) {
        body(row, x, at);
      }
    }
  }
}

// How the sum over the examples of a gradient is divided.
struct SplitExamples {
  int64_t blocks;  // for each tile of the gradient
  int64_t splits;  // parts of an example's pixels
};

// As many blocks for each tile as give every processor two, if the workspace holds a sum for each.
// The pixels of an example are divided if there are fewer examples than blocks.
inline SplitExamples split_examples(
    int64_t tiles, int64_t examples, int64_t k_tiles, int64_t sum_bytes, int64_t processors) {
  const int64_t wanted = std::clamp<int64_t>(
      std::min(2 * processors / tiles, kWorkspaceBytes / sum_bytes), 1, examples * k_tiles);
  const int64_t splits = std::min(k_tiles, ceil_div(wanted, examples));
  return {std::min(wanted, examples * splits), splits};
}

}  // namespace l2rw::cuda
