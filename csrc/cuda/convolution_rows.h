#pragma once

// V * z as a product of rows without a copy of what the taps meet: a row is an output pixel of all
// examples, its depth are the taps with the channels of a group side by side, filled up to vectors
// of 16 bytes. As tile_index.h, plain arithmetic.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda/convolution_index.h"
#include "cuda/divisor.h"
#include "cuda/pixels.h"
#include "cuda/tile_plan.h"

namespace l2rw::cuda {

// What a row of a tile is at every step. Offsets are counted in vectors of 16 bytes.
struct alignas(kVectorBytes) PixelRow {
  int32_t z;      // of the pixel that the first tap meets
  int32_t at[3];  // that pixel
};

// What a thread's vector of a step is in every row.
struct TapVector {
  int32_t z;      // from the pixel that the first tap meets
  int32_t V;      // from the start of an output channel
  int32_t by[3];  // from pixel to pixel
  int32_t bytes;  // that exist
};

struct ConvolutionRows {
  static constexpr bool kOneProduct = false;  // one for each group

  ConvolutionIndex index;
  Pixels z;
  const char* V;   // [groups, outputs, taps], each with its channels side by side, as in z
  int64_t rows;    // output pixels of all examples
  int64_t pixels;  // of an example
  int32_t taps;
  int32_t outputs;   // channels of a group
  int32_t width;     // bytes of the channels of a group
  int32_t z_pixel;   // vectors from pixel to pixel
  int32_t V_tap;     // vectors from tap to tap
  int32_t V_output;  // from output channel to output channel
  Divisor vectors;   // of a tap
  Divisor across;    // kernel[2]
  Divisor down;      // kernel[1]

  // `V_bytes`: from tap to tap.
  ConvolutionRows(const Convolution& convolution, const Pixels& z, const char* V, int64_t V_bytes)
      : index(ConvolutionIndex::of(convolution)),
        z(z),
        V(V),
        rows(convolution.examples * convolution.pixels()),
        pixels(convolution.pixels()),
        taps(static_cast<int32_t>(convolution.taps())),
        outputs(static_cast<int32_t>(convolution.outputs)),
        width(static_cast<int32_t>(z.width)),
        z_pixel(static_cast<int32_t>(z.pixel / kVectorBytes)),
        V_tap(static_cast<int32_t>(V_bytes / kVectorBytes)),
        V_output(static_cast<int32_t>(convolution.taps() * V_bytes / kVectorBytes)),
        vectors(vectors_of(z.width)),
        across(convolution.kernel[2]),
        down(convolution.kernel[1]) {}

  static int64_t vectors_of(int64_t width) { return width > 0 ? ceil_div(width, kVectorBytes) : 1; }

  // Vectors of the depth of a row.
  static int64_t depth(const Convolution& convolution, int64_t width) {
    return convolution.taps() * vectors_of(width);
  }

  // Whether 32 bits count the vectors of z, those that a kernel spans, and those of V.
  static bool fits(const Convolution& convolution, const Pixels& z, int64_t V_bytes) {
    constexpr double kMost = std::numeric_limits<int32_t>::max();
    constexpr double kMostColumns = 128;  // of a tile
    double span = 0;                      // pixels
    double rows = static_cast<double>(convolution.groups) * convolution.outputs + kMostColumns;
    for (int d = 0; d < 3; ++d) {
      span = span * convolution.in[d] + convolution.in[d] + 2.0 * convolution.padding[d];
      rows *= convolution.kernel[d];
    }
    const int64_t vectors = std::max(vectors_of(z.width), V_bytes / kVectorBytes);
    return static_cast<double>(convolution.examples) * z.example + span * z.pixel <
               kMost * kVectorBytes &&
           rows * vectors + kLineVectors < kMost;
  }

  // Of output pixel `row`; one behind the last one lies outside of the image at every tap.
  L2RW_HOST_DEVICE PixelRow row(int64_t group, int64_t row) const {
    if (row >= rows) {
      return {0, {std::numeric_limits<int32_t>::min(), 0, 0}};
    }
    const int64_t example = row / pixels;
    const OutputPlace place = index.place(static_cast<int>(row - example * pixels));
    PixelRow result;
    int64_t pixel = 0;
    L2RW_UNROLL
    for (int d = 0; d < 3; ++d) {
      result.at[d] = place.at[d] * index.stride[d] - index.padding[d];
      pixel = pixel * index.in[d] + result.at[d];
    }
    const int64_t bytes = example * z.example + group * z.group + pixel * z.pixel;
    result.z = static_cast<int32_t>(bytes / kVectorBytes);
    return result;
  }

  L2RW_HOST_DEVICE TapVector tap_vector(int32_t vector) const {
    const int32_t number = vectors.divide(vector);
    const int32_t channel = vector - number * vectors.divisor();
    const int32_t tap = number < taps ? number : 0;
    const int32_t line = across.divide(tap);
    const int32_t plane = down.divide(line);
    TapVector result;
    result.by[0] = plane * index.dilation[0];
    result.by[1] = (line - plane * down.divisor()) * index.dilation[1];
    result.by[2] = (tap - line * across.divisor()) * index.dilation[2];
    const int32_t pixel = (result.by[0] * index.in[1] + result.by[1]) * index.in[2] + result.by[2];
    result.z = pixel * z_pixel + channel;
    result.V = tap * V_tap + channel;
    const int32_t left = number < taps ? width - channel * kVectorBytes : 0;
    result.bytes = left < 0 ? 0 : (left < kVectorBytes ? left : kVectorBytes);
    return result;
  }

  // Nothing is read where no byte exists, and no address outside of the memory is formed.
  L2RW_HOST_DEVICE Source pixel(const PixelRow& row, const TapVector& tap) const {
    bool inside = tap.bytes > 0;
    L2RW_UNROLL
    for (int d = 0; d < 3; ++d) {
      // A pixel before the first one is a large number without a sign.
      inside = inside &&
               static_cast<uint32_t>(row.at[d] + tap.by[d]) < static_cast<uint32_t>(index.in[d]);
    }
    return {z.data + (inside ? int64_t{row.z + tap.z} * kVectorBytes : 0), inside ? tap.bytes : 0};
  }

  // `end`: the output channels of this group and of all before it.
  L2RW_HOST_DEVICE Source output(int32_t output, int32_t end, const TapVector& tap) const {
    const bool exists = output < end && tap.bytes > 0;
    const auto vector = [&] { return output * V_output + tap.V; };
    return {V + (exists ? int64_t{vector()} * kVectorBytes : 0), exists ? tap.bytes : 0};
  }

  // Loads the stages of a tile. What its rows have in common for all steps is in a table beside
  // the stages.
  template <class Tile>
  class Loader {
   public:
    static constexpr int kTableBytes = Tile::kRows * static_cast<int>(sizeof(PixelRow));

    L2RW_HOST_DEVICE Loader(
        const ConvolutionRows& operands, int32_t group, int32_t row_tile, char* table)
        : operands_(operands),
          group_(group),
          row_tile_(row_tile),
          table_(reinterpret_cast<PixelRow*>(table)) {}

    // All threads do this before any of them loads.
    L2RW_HOST_DEVICE void prepare(int thread) const {
      for (int row = thread; row < Tile::kRows; row += Tile::kThreads) {
        table_[row] = operands_.row(group_, int64_t{row_tile_} * Tile::kRows + row);
      }
    }

    template <class Copy>
    L2RW_HOST_DEVICE void load(int thread, const Walk& step, const Copy& copy) const {
      const TapVector tap = operands_.tap_vector(step.chunk * kLineVectors + vector_of(thread));
      const int line = line_of(thread);
      const int32_t first = group_ * operands_.outputs + line +
                            static_cast<int32_t>(step.column_tile() * Tile::kColumns);
      const int32_t end = (group_ + 1) * operands_.outputs;
      for_each_line<Tile, Tile::kRows>(
          thread, 0, [&](int row) { return operands_.pixel(table_[line + row], tap); }, copy);
      for_each_line<Tile, Tile::kColumns>(
          thread,
          Tile::kRows,
          [&](int row) { return operands_.output(first + row, end, tap); },
          copy);
    }

   private:
    const ConvolutionRows& operands_;
    int32_t group_;
    int32_t row_tile_;
    PixelRow* table_;
  };
};

}  // namespace l2rw::cuda
