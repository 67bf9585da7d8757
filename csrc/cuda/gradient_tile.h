#pragma once

// Where everything lies in a tile of the gradient of one example, G_i[o, tap, c] = sum over pixels
// p of g_i[p, o] z_i[pixel(p) + offset(tap), c]. As tile_index.h, plain arithmetic.
//
// A product over the pixels, of two operands whose channels lie side by side: a stage of shared
// memory holds, for each of some pixels, 16-byte vectors of g and then, in an area of their own, of
// z. A column of vectors of z is one tap and as many channels as a vector has.

#include <algorithm>
#include <cstdint>

#include "cuda/convolution_index.h"
#include "cuda/pixels.h"
#include "cuda/row_sums.h"
#include "cuda/tile_plan.h"

namespace l2rw::cuda {

// How threads meet shared memory: eight pixels of one column of vectors (ldmatrix), four pixels of
// eight numbers side by side (the operands of mma in four bytes), or one pixel at a time.
enum class Access { matrices, numbers, pixels };

// A distance of pixels, in vectors, with which no two of those meet in a bank.
L2RW_HOST_DEVICE constexpr int conflict_free_pitch(Access access, int vectors) {
  if (access == Access::matrices) {
    return vectors | 1;
  }
  if (access == Access::numbers) {
    return (vectors + 1) / 4 * 4 + 2;
  }
  return vectors;
}

// RowBlocks: 16 output channels each, of one warp. A warp has kWarpVectors columns of vectors;
// there are Down x Across warps for a tile, and Deep of those that share the pixels of a stage.
template <int ElementBytes, Access Kind, int RowBlocks, int Down, int Across, int Deep, int Depth>
struct GradientTile {
  static constexpr Access kAccess = Kind;
  static constexpr int kElementBytes = ElementBytes;
  static constexpr int kNumbers = kVectorBytes / ElementBytes;  // of a vector
  static constexpr int kRowBlocks = RowBlocks;
  static constexpr int kRows = 16 * RowBlocks * Down;  // output channels
  static constexpr int kWarpVectors = ElementBytes == 2 ? 9 : 18;
  static constexpr int kWarpColumns = kWarpVectors * kNumbers;
  static constexpr int kVectors = kWarpVectors * Across;
  static constexpr int kColumns = kVectors * kNumbers;
  static constexpr int kDeep = Deep;
  static constexpr int kThreads = 32 * Down * Across * Deep;
  static constexpr int kDepth = Depth;  // pixels of a stage
  static constexpr int kRowVectors = kRows / kNumbers;
  static constexpr int kColumnLines = kThreads / kVectors;  // pixels that are copied at once
  static constexpr int kRowPitch = conflict_free_pitch(Kind, kRowVectors);
  static constexpr int kColumnPitch = conflict_free_pitch(Kind, kVectors);
  static constexpr int kStageBytes = kDepth * (kRowPitch + kColumnPitch) * kVectorBytes;

  // The lanes of a warp, and what each holds of it. Ordinary multiply-adds: a vector of rows in
  // each block, and nine columns kLanesAcross apart.
  static constexpr bool kPlain = Kind == Access::pixels;
  static constexpr int kLanesAcross = kPlain ? kWarpColumns / 9 : 4;
  static constexpr int kThreadRows = kPlain ? RowBlocks * kNumbers : RowBlocks * 2;
  static constexpr int kProductColumns = kPlain ? 9 : kWarpColumns / 4;
  // The last sum of a row is that of g alone, the gradient of the bias. With tensor cores, each
  // lane has a part of it.
  static constexpr int kBias = kProductColumns;
  static constexpr int kThreadColumns = kProductColumns + 1;
  static_assert(!kPlain || 32 / kLanesAcross * kNumbers == 16);

  L2RW_HOST_DEVICE static constexpr int warp_row(int thread) {
    return thread / 32 % Down * RowBlocks * 16;
  }
  L2RW_HOST_DEVICE static constexpr int warp_vector(int thread) {
    return thread / 32 / Down % Across * kWarpVectors;
  }
  L2RW_HOST_DEVICE static constexpr int deep(int thread) { return thread / 32 / (Down * Across); }

  // Of the sum at place (r, c) of a thread.
  L2RW_HOST_DEVICE static constexpr int row(int thread, int r) {
    const int lane = thread % 32;
    return warp_row(thread) +
           (kPlain ? r / kNumbers * 16 + lane / kLanesAcross * kNumbers + r % kNumbers
                   : r * 8 + lane / 4);
  }
  L2RW_HOST_DEVICE static constexpr int column(int thread, int c) {
    const int lane = thread % 32;
    return warp_vector(thread) * kNumbers +
           (kPlain ? c * kLanesAcross + lane % kLanesAcross : c / 2 * 8 + lane % 4 * 2 + c % 2);
  }

  // Byte offsets of vectors of a pixel in its stage.
  L2RW_HOST_DEVICE static constexpr int row_offset(int pixel, int vector) {
    return (pixel * kRowPitch + vector) * kVectorBytes;
  }
  L2RW_HOST_DEVICE static constexpr int column_offset(int pixel, int vector) {
    return (kDepth * kRowPitch + pixel * kColumnPitch + vector) * kVectorBytes;
  }

  // What a lane addresses for ldmatrix.x4 with transposition, for 16 pixels from `pixel` on: block
  // b of rows, or columns of vectors v and, where there are two, v + 1. The transposed matrices are
  // the operands of mma.m16n8k16.
  L2RW_HOST_DEVICE static constexpr int row_matrix(int thread, int pixel, int b) {
    const int lane = thread % 32;
    return row_offset(
        pixel + lane / 16 * 8 + lane % 8, (warp_row(thread) + b * 16) / kNumbers + lane / 8 % 2);
  }
  L2RW_HOST_DEVICE static constexpr int column_matrix(int thread, int pixel, int v) {
    const int lane = thread % 32;
    return column_offset(pixel + lane / 8 % 2 * 8 + lane % 8, warp_vector(thread) + v + lane / 16);
  }
  // Of eight pixels, four bytes each: operand k of block b of rows, and of columns 8 j to 8 j + 7,
  // as mma.m16n8k8 wants them.
  L2RW_HOST_DEVICE static constexpr int row_number(int thread, int pixel, int b, int k) {
    const int lane = thread % 32;
    return row_offset(pixel + k / 2 * 4 + lane % 4, 0) +
           (warp_row(thread) + b * 16 + k % 2 * 8 + lane / 4) * ElementBytes;
  }
  L2RW_HOST_DEVICE static constexpr int column_number(int thread, int pixel, int j, int k) {
    const int lane = thread % 32;
    return column_offset(pixel + k * 4 + lane % 4, warp_vector(thread)) +
           (j * 8 + lane / 4) * ElementBytes;
  }
};

// The taps and channels of a tile. Its columns of vectors are counted with the channels running
// fastest, so that neighbouring threads read what lies side by side.
struct Rectangle {
  int first_vector;  // of the channels of a group
  int vectors;
  int first_tap;
  int taps;

  L2RW_HOST_DEVICE bool has(int column) const { return column / vectors < taps; }
  L2RW_HOST_DEVICE int vector(int column) const { return first_vector + column % vectors; }
  L2RW_HOST_DEVICE int tap(int column) const { return first_tap + column / vectors; }
  // Where number k of a column of vectors of `numbers` stands among those of one output channel,
  // counted as the gradient is: taps run fastest.
  L2RW_HOST_DEVICE int place(int column, int k, int numbers) const {
    return (column % vectors * numbers + k) * taps + column / vectors;
  }
};

// How the gradient is cut into tiles: all taps of as many channels as a tile has room for; where
// the taps alone are more, equal parts of them.
struct GradientTiles {
  int row_tiles;  // of a group
  int column_tiles;
  int tap_tiles;
  int vectors;  // of the channels of a group; no channels are one vector of zeros
  int taps;
  int tile_vectors;
  int tile_taps;

  L2RW_HOST_DEVICE Rectangle rectangle(int column_tile) const {
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
GradientTiles cut_gradient(const Convolution& convolution) {
  const int64_t taps = convolution.taps();
  const int64_t tap_tiles = ceil_div(taps, Tile::kVectors);
  const int64_t vectors = std::max<int64_t>(1, ceil_div(convolution.inputs, Tile::kNumbers));
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

// A layer as its gradients are formed, tile by tile.
struct GradientLayer {
  Pixels z;
  Pixels g;
  ConvolutionIndex index;
  GradientTiles tiles;
  OutputPlace stage_step;  // from one stage to the next
  OutputPlace line_step;   // to the next pixel of the same thread
  int groups;
  int inputs;   // channels of a group
  int outputs;  // channels of a group
  int pixels;
  int chunks;  // stages for all pixels

  int64_t tile_count() const { return int64_t{groups} * tiles.row_tiles * tiles.column_tiles; }
  // Numbers of an example's gradient, and of that of the bias.
  L2RW_HOST_DEVICE int64_t size() const { return bias_size() * inputs * tiles.taps; }
  L2RW_HOST_DEVICE int64_t bias_size() const { return int64_t{groups} * outputs; }
};

template <class Tile>
GradientLayer lay_out_gradient(const Convolution& convolution, const Pixels& z, const Pixels& g) {
  const ConvolutionIndex index = ConvolutionIndex::of(convolution);
  return {
      z,
      g,
      index,
      cut_gradient<Tile>(convolution),
      index.place(Tile::kDepth),
      index.place(Tile::kColumnLines),
      static_cast<int>(convolution.groups),
      static_cast<int>(convolution.inputs),
      static_cast<int>(convolution.outputs),
      static_cast<int>(convolution.pixels()),
      static_cast<int>(ceil_div(convolution.pixels(), Tile::kDepth))};
}

// A tile, counted over groups, rows and columns.
struct GradientPlace {
  int group;
  int first_output;  // in its group
  int column_tile;
  Rectangle rectangle;

  // The output channel of a row, over all groups.
  L2RW_HOST_DEVICE int64_t output(const GradientLayer& layer, int row) const {
    return int64_t{group} * layer.outputs + first_output + row;
  }
};

template <class Tile>
L2RW_HOST_DEVICE GradientPlace gradient_place(const GradientLayer& layer, int tile) {
  const int column = tile % layer.tiles.column_tiles;
  const int row_tile = tile / layer.tiles.column_tiles;
  return {
      row_tile / layer.tiles.row_tiles,
      row_tile % layer.tiles.row_tiles * Tile::kRows,
      column,
      layer.tiles.rectangle(column)};
}

// What a thread copies, stage by stage: always the same columns of vectors, of other pixels.
template <class Tile>
class GradientLoader {
 public:
  L2RW_HOST_DEVICE GradientLoader(
      const GradientLayer& layer, const GradientPlace& place, int thread)
      : layer_(layer),
        row_vector_(thread % Tile::kRowVectors),
        row_pixel_(thread / Tile::kRowVectors),
        column_(thread % Tile::kVectors),
        column_pixel_(thread / Tile::kVectors) {
    const int64_t row_byte =
        int64_t{place.first_output / Tile::kNumbers + row_vector_} * kVectorBytes;
    g_bytes_ = layer.g.vector_bytes(row_byte);
    g_ = layer.g.data + (g_bytes_ > 0 ? place.group * layer.g.group + row_byte : 0);
    const bool has = place.rectangle.has(column_);
    const int64_t column_byte = has ? int64_t{place.rectangle.vector(column_)} * kVectorBytes : 0;
    z_bytes_ = has ? layer.z.vector_bytes(column_byte) : 0;
    z_ = layer.z.data + (z_bytes_ > 0 ? place.group * layer.z.group + column_byte : 0);
    tap_ = layer.index.tap(has ? place.rectangle.tap(column_) : 0);
  }

  // Calls copy(offset in the stage, source, bytes that exist, whether other threads copy the same)
  // for a chunk of an example's pixels. Nothing is read where no byte exists, and no address
  // outside of the memory is formed.
  template <class Copy>
  L2RW_HOST_DEVICE void load(int64_t example, int64_t chunk, const Copy& copy) {
    const int first = static_cast<int>(chunk) * Tile::kDepth;
    L2RW_UNROLL
    for (int line = 0; line < Tile::kDepth; line += kRowLines) {
      const int pixel = line + row_pixel_;
      if (Tile::kDepth % kRowLines == 0 || pixel < Tile::kDepth) {
        const int bytes = first + pixel < layer_.pixels ? g_bytes_ : 0;
        const char* source =
            bytes > 0 ? g_ + example * layer_.g.example + int64_t{first + pixel} * layer_.g.pixel
                      : g_;
        copy(Tile::row_offset(pixel, row_vector_), source, bytes, false);
      }
    }
    // The places of pixels are counted on, without a division, as long as chunks follow each other.
    place_ = chunk == next_chunk_ && chunk > 0 ? layer_.index.after(place_, layer_.stage_step)
                                               : layer_.index.place(first + column_pixel_);
    next_chunk_ = chunk + 1;
    OutputPlace place = place_;
    L2RW_UNROLL
    for (int line = 0; line < Tile::kDepth; line += kColumnLines) {
      const int pixel = line + column_pixel_;
      if (column_pixel_ < kColumnLines && pixel < Tile::kDepth) {
        const int input = z_bytes_ > 0 ? layer_.index.input_pixel(place, tap_) : -1;
        const bool exists = input >= 0;
        const char* source =
            exists ? z_ + example * layer_.z.example + int64_t{input} * layer_.z.pixel : z_;
        copy(Tile::column_offset(pixel, column_), source, exists ? z_bytes_ : 0, true);
      }
      place = layer_.index.after(place, layer_.line_step);
    }
  }

 private:
  static constexpr int kRowLines = Tile::kThreads / Tile::kRowVectors;
  static constexpr int kColumnLines = Tile::kColumnLines;
  static_assert(Tile::kThreads % Tile::kRowVectors == 0);

  const GradientLayer& layer_;
  int row_vector_;
  int row_pixel_;
  int column_;
  int column_pixel_;
  int g_bytes_;
  int z_bytes_;
  const char* g_;
  const char* z_;
  TapOffset tap_;
  OutputPlace place_{};
  int64_t next_chunk_ = -1;
};

// Sums of examples, or of parts of them, each with its weight: `weight(example of the walk)`.
template <class Tile, class A, class Weight>
struct WeightedSums {
  const Weight& weight;
  Sums<Tile, A> total;

  L2RW_HOST_DEVICE explicit WeightedSums(const Weight& weight) : weight(weight) {
    clear<Tile, A>(total);
  }
  L2RW_HOST_DEVICE bool complete(const Walk& walk) const { return walk.ends_unit(); }
  L2RW_HOST_DEVICE void take(const Walk& walk, const Sums<Tile, A>& sums) {
    const A w = weight(walk.column_tile());
    L2RW_UNROLL
    for (int r = 0; r < Tile::kThreadRows; ++r) {
      L2RW_UNROLL
      for (int c = 0; c < Tile::kThreadColumns; ++c) {
        total[r][c] += w * sums[r][c];
      }
    }
  }
};

// How a sum over examples is shared out: blocks for each tile, each with some parts of examples.
struct SharePlan {
  int64_t shares;
  int64_t splits;  // parts of an example's pixels
};

// As many shares as occupy all processors twice and as the workspace holds sums of. The pixels of
// examples are divided where there are fewer examples than shares.
inline SharePlan plan_shares(
    int64_t tiles, int64_t examples, int64_t chunks, int64_t sum_bytes, int64_t processors) {
  const int64_t wanted = std::clamp<int64_t>(
      std::min(2 * processors / tiles, kWorkspaceBytes / sum_bytes), 1, examples * chunks);
  const int64_t splits = std::min(chunks, ceil_div(wanted, examples));
  return {std::min(wanted, examples * splits), splits};
}

// Where the sums of a tile stand once they are complete: [kRows][kStagedPitch], a row as the
// gradient has it, and behind them the sums of g [kRows].
template <class Tile>
constexpr int kStagedPitch = Tile::kColumns + 1;

template <class Tile, class A>
constexpr int64_t kStagedBytes = int64_t{Tile::kRows} * (kStagedPitch<Tile> + 1) * sizeof(A);

// Calls body(row, place in the staged row, place among the numbers of an output channel's gradient)
// for what a thread writes of a tile. Neighbouring threads write what lies side by side.
template <class Tile, class Body>
L2RW_HOST_DEVICE void for_each_number(
    const GradientLayer& layer, const GradientPlace& place, int thread, const Body& body) {
  const Rectangle& rectangle = place.rectangle;
  const int left = layer.outputs - place.first_output;
  const int rows = left < Tile::kRows ? left : Tile::kRows;
  const int run = rectangle.vectors * Tile::kNumbers * rectangle.taps;
  for (int x = thread % 32; x < run; x += 32) {
    const int channel = rectangle.first_vector * Tile::kNumbers + x / rectangle.taps;
    if (channel < layer.inputs) {
      const int64_t at =
          int64_t{channel} * layer.tiles.taps + rectangle.first_tap + x % rectangle.taps;
      for (int row = thread / 32; row < rows; row += Tile::kThreads / 32) {
        body(row, x, at);
      }
    }
  }
}

}  // namespace l2rw::cuda
