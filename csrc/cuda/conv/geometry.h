#pragma once

// Which input pixel an output pixel reads through which tap of a kernel.

#include <cstdint>

#include "convolution_sizes.h"
#include "cuda/util/host_device.h"
#include "cuda/util/integers.h"

namespace l2rw::cuda {

// The coordinates of an output pixel, or the distance of two.
struct PixelCoord {
  int at[3];
};

// The distance from an output pixel, times the stride, to the input pixel that a tap reads.
struct TapOffset {
  int offset[3];
};

// The number of an input pixel, counted row by row, where there is one.
struct InputPixel {
  bool exists;
  uint32_t number;
};

// A convolution of three spatial dimensions, in numbers of 32 bits.
struct ConvolutionGeometry {
  int in[3];
  int out[3];
  int kernel[3];
  int stride[3];
  int padding[3];
  int dilation[3];
  Divisor out_height;
  Divisor out_width;

  // Whether every number that is formed below fits into 32 bits: the pixels of an example, of input
  // and output, and the sizes of padding and kernel.
  static bool fits(const Convolution& convolution) {
    constexpr int64_t kMax = int64_t{1} << 29;
    int64_t taps = 1;
    int64_t inputs = 1;
    int64_t outputs = 1;
    for (int d = 0; d < 3; ++d) {
      const bool padding = convolution.padding[d] <= kMax;
      const auto times = [](int64_t& product, int64_t size) {
        const bool fits = size <= kMax && product * size <= kMax;
        product = fits ? product * size : 0;
        return fits;
      };
      if (!padding || !times(taps, convolution.kernel[d]) || !times(inputs, convolution.in[d]) ||
          !times(outputs, convolution.out[d])) {
        return false;
      }
    }
    return true;
  }

  // For a convolution that fits and has output pixels. Its stride and dilation are no larger than
  // the padded input wherever they matter.
  static ConvolutionGeometry of(const Convolution& convolution) {
    ConvolutionGeometry geometry{
        {}, {}, {}, {}, {}, {}, Divisor(convolution.out[1]), Divisor(convolution.out[2])};
    for (int d = 0; d < 3; ++d) {
      geometry.in[d] = static_cast<int>(convolution.in[d]);
      geometry.out[d] = static_cast<int>(convolution.out[d]);
      geometry.kernel[d] = static_cast<int>(convolution.kernel[d]);
      geometry.stride[d] = convolution.out[d] == 1 ? 1 : static_cast<int>(convolution.stride[d]);
      geometry.padding[d] = static_cast<int>(convolution.padding[d]);
      geometry.dilation[d] =
          convolution.kernel[d] == 1 ? 1 : static_cast<int>(convolution.dilation[d]);
    }
    return geometry;
  }

  // The coordinates of output pixel k, which may lie behind the last one.
  L2RW_HOST_DEVICE PixelCoord coord(int k) const {
    const int row = out_width.divide(k);
    const int plane = out_height.divide(row);
    return {{plane, row - plane * out[1], k - row * out[2]}};
  }

  // The coordinates as many pixels further on as `step` is from pixel 0, without a division.
  L2RW_HOST_DEVICE PixelCoord advance(PixelCoord coord, const PixelCoord& step) const {
    coord.at[2] += step.at[2];
    const bool next_row = coord.at[2] >= out[2];
    coord.at[2] -= next_row ? out[2] : 0;
    coord.at[1] += step.at[1] + (next_row ? 1 : 0);
    const bool next_plane = coord.at[1] >= out[1];
    coord.at[1] -= next_plane ? out[1] : 0;
    coord.at[0] += step.at[0] + (next_plane ? 1 : 0);
    return coord;
  }

  L2RW_HOST_DEVICE TapOffset tap(int t) const {
    return {
        {t / (kernel[1] * kernel[2]) * dilation[0] - padding[0],
         t / kernel[2] % kernel[1] * dilation[1] - padding[1],
         t % kernel[2] * dilation[2] - padding[2]}};
  }

  // The input pixel that an output pixel reads. There is none in the padding and behind the last
  // output pixel.
  L2RW_HOST_DEVICE InputPixel input_pixel(const PixelCoord& coord, const TapOffset& tap) const {
    InputPixel pixel{coord.at[0] < out[0], 0};
    L2RW_UNROLL
    for (int d = 0; d < 3; ++d) {
      // A coordinate before the first one is a large unsigned number.
      const auto at = static_cast<uint32_t>(coord.at[d]) * static_cast<uint32_t>(stride[d]) +
                      static_cast<uint32_t>(tap.offset[d]);
      pixel.exists = pixel.exists && at < static_cast<uint32_t>(in[d]);
      pixel.number = pixel.number * static_cast<uint32_t>(in[d]) + at;
    }
    return pixel;
  }
};

}  // namespace l2rw::cuda
