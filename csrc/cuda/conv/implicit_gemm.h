#pragma once

// The operands of V * z as an implicit GEMM: a row is an output pixel of some example, and its
// depth are the taps, each with the channels of its input pixel in whole vectors. The loader finds
// the input pixels; no copy of what the taps read exists in memory.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "convolution_sizes.h"
#include "cuda/conv/geometry.h"
#include "cuda/gemm/loaders.h"
#include "cuda/gemm/scheduler.h"
#include "cuda/gemm/tile.h"
#include "cuda/util/host_device.h"
#include "cuda/util/integers.h"
#include "cuda/util/vectors.h"

namespace l2rw::cuda {

// What a row of a tile needs at every step: the input pixel that its first tap reads. Offsets are
// counted in vectors.
struct alignas(kVectorBytes) RowPixel {
  int32_t z;      // offset of the pixel
  int32_t at[3];  // its coordinates
};

// What the vector of a thread needs in every row: its tap and channels.
struct TapVector {
  int32_t z;          // offset from the pixel that the first tap reads
  int32_t V;          // offset from the start of an output channel
  int32_t offset[3];  // distance of the pixels
  int32_t bytes;      // that exist
};

struct ImplicitGemmOperands {
  static constexpr bool kOneProduct = false;  // one for each group

  ConvolutionGeometry geometry;
  ImageView z;
  const char* V;   // [groups, outputs, taps], each with its channels contiguous, as in z
  int64_t rows;    // output pixels of all examples
  int64_t pixels;  // of an example
  int32_t taps;
  int32_t outputs;   // channels of a group
  int32_t width;     // bytes of the channels of a group
  int32_t z_pixel;   // vectors from pixel to pixel
  int32_t V_tap;     // vectors from tap to tap
  int32_t V_output;  // from output channel to output channel
  Divisor vectors;   // of a tap
  Divisor kernel_width;
  Divisor kernel_height;

  // `V_bytes` is the stride of V from tap to tap.
  ImplicitGemmOperands(
      const Convolution& convolution, const ImageView& z, const char* V, int64_t V_bytes)
      : geometry(ConvolutionGeometry::of(convolution)),
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
        kernel_width(convolution.kernel[2]),
        kernel_height(convolution.kernel[1]) {}

  static int64_t vectors_of(int64_t width) { return width > 0 ? ceil_div(width, kVectorBytes) : 1; }

  // How many vectors the depth of a row takes.
  static int64_t depth(const Convolution& convolution, int64_t width) {
    return convolution.taps() * vectors_of(width);
  }

  // Whether 32 bits count the vectors of z, those that a kernel spans, and those of V.
  static bool fits(const Convolution& convolution, const ImageView& z, int64_t V_bytes) {
    constexpr double kMax = std::numeric_limits<int32_t>::max();
    constexpr double kMaxColumns = 128;  // of a tile; with_conv_config takes none that is wider
    double span = 0;                     // pixels
    double rows = static_cast<double>(convolution.groups) * convolution.outputs + kMaxColumns;
    for (int d = 0; d < 3; ++d) {
      span = span * convolution.in[d] + convolution.in[d] + 2.0 * convolution.padding[d];
      rows *= convolution.kernel[d];
    }
    const int64_t vectors = std::max(vectors_of(z.width), V_bytes / kVectorBytes);
    const double last_group = (convolution.groups - 1.0) * z.group;
    return static_cast<double>(convolution.examples) * z.example + last_group + span * z.pixel <
               kMax * kVectorBytes &&
           rows * vectors + kDepthVectors < kMax;
  }

  // The input pixel of output pixel `row`. One behind the last lies outside of the image at every
  // tap.
  L2RW_HOST_DEVICE RowPixel row_pixel(int64_t group, int64_t row) const {
    if (row >= rows) {
      return {0, {std::numeric_limits<int32_t>::min(), 0, 0}};
    }
    const int64_t example = row / pixels;
    const PixelCoord coord = geometry.coord(static_cast<int>(row - example * pixels));
    RowPixel result;
    int64_t pixel = 0;
    L2RW_UNROLL
    for (int d = 0; d < 3; ++d) {
      result.at[d] = coord.at[d] * geometry.stride[d] - geometry.padding[d];
      pixel = pixel * geometry.in[d] + result.at[d];
    }
    const int64_t bytes = example * z.example + group * z.group + pixel * z.pixel;
    result.z = static_cast<int32_t>(bytes / kVectorBytes);
    return result;
  }

  L2RW_HOST_DEVICE TapVector tap_vector(int32_t vector) const {
    const int32_t number = vectors.divide(vector);
    const int32_t channel = vector - number * vectors.divisor();
    const int32_t tap = number < taps ? number : 0;
    const int32_t row = kernel_width.divide(tap);  // of the kernel
    const int32_t plane = kernel_height.divide(row);
    TapVector result;
    result.offset[0] = plane * geometry.dilation[0];
    result.offset[1] = (row - plane * kernel_height.divisor()) * geometry.dilation[1];
    result.offset[2] = (tap - row * kernel_width.divisor()) * geometry.dilation[2];
    const int32_t pixel =
        (result.offset[0] * geometry.in[1] + result.offset[1]) * geometry.in[2] + result.offset[2];
    result.z = pixel * z_pixel + channel;
    result.V = tap * V_tap + channel;
    result.bytes = existing_bytes(number < taps ? width - channel * kVectorBytes : 0);
    return result;
  }

  // Nothing is read where no byte exists, and no address outside of the memory is formed.
  L2RW_HOST_DEVICE Source z_source(const RowPixel& row, const TapVector& tap) const {
    bool inside = tap.bytes > 0;
    L2RW_UNROLL
    for (int d = 0; d < 3; ++d) {
      // A pixel before the first one is a large unsigned number.
      inside = inside && static_cast<uint32_t>(row.at[d] + tap.offset[d]) <
                             static_cast<uint32_t>(geometry.in[d]);
    }
    return {z.data + (inside ? int64_t{row.z + tap.z} * kVectorBytes : 0), inside ? tap.bytes : 0};
  }

  // `end` counts the output channels of this group and of all before it.
  L2RW_HOST_DEVICE Source V_source(int32_t output, int32_t end, const TapVector& tap) const {
    const bool exists = output < end && tap.bytes > 0;
    const auto vector = [&] { return output * V_output + tap.V; };
    return {V + (exists ? int64_t{vector()} * kVectorBytes : 0), exists ? tap.bytes : 0};
  }

  // Loads the stages of a tile. A table in shared memory, behind the stages, holds what its rows
  // need at every step.
  template <class Tile>
  class Loader {
   public:
    static constexpr int kTableBytes = Tile::kRows * static_cast<int>(sizeof(RowPixel));

    L2RW_HOST_DEVICE Loader(
        const ImplicitGemmOperands& operands, int32_t group, int32_t row_tile, char* table)
        : operands_(operands),
          group_(group),
          row_tile_(row_tile),
          table_(reinterpret_cast<RowPixel*>(table)) {}

    // All threads do this before any of them loads.
    L2RW_HOST_DEVICE void prepare(int thread) const {
      for (int row = thread; row < Tile::kRows; row += Tile::kThreads) {
        table_[row] = operands_.row_pixel(group_, int64_t{row_tile_} * Tile::kRows + row);
      }
    }

    template <class Copy>
    L2RW_HOST_DEVICE void load(int thread, const KTileIterator& step, const Copy& copy) const {
      const TapVector tap =
          operands_.tap_vector(step.k_tile * kDepthVectors + thread_vector(thread));
      const int thread_first = thread_row(thread);
      const int32_t first = group_ * operands_.outputs + thread_first +
                            static_cast<int32_t>(step.column_tile() * Tile::kColumns);
      const int32_t end = (group_ + 1) * operands_.outputs;
      load_rows<Tile, Tile::kRows>(
          thread,
          0,
          [&](int row) { return operands_.z_source(table_[thread_first + row], tap); },
          copy);
      load_rows<Tile, Tile::kColumns>(
          thread,
          Tile::kRows,
          [&](int row) { return operands_.V_source(first + row, end, tap); },
          copy);
    }

   private:
    const ImplicitGemmOperands& operands_;
    int32_t group_;
    int32_t row_tile_;
    RowPixel* table_;
  };
};

}  // namespace l2rw::cuda
