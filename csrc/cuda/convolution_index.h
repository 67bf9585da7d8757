#pragma once

// Which input pixel an output pixel meets through which tap of a kernel. As tile_index.h, plain
// arithmetic.

#include <cstdint>
#include <limits>

#include "convolution_sizes.h"
#include "cuda/tile_index.h"

namespace l2rw::cuda {

// Of an output pixel, or of a number of them that are passed over.
struct OutputPlace {
  int at[3];
};

// From an output pixel times the stride to the input pixel.
struct TapOffset {
  int by[3];
};

// A convolution of three spatial dimensions, in numbers that a processor multiplies at once.
struct ConvolutionIndex {
  int in[3];
  int out[3];
  int kernel[3];
  int stride[3];
  int padding[3];
  int dilation[3];

  // Whether every sum of these numbers that is formed below fits.
  static bool fits(const Convolution& convolution) {
    for (int d = 0; d < 3; ++d) {
      const int64_t most = std::numeric_limits<int32_t>::max() / 2;
      if (convolution.in[d] > most || convolution.padding[d] > most / 2 ||
          convolution.in[d] + 2 * convolution.padding[d] > most) {
        return false;
      }
    }
    return true;
  }

  // Of a convolution that fits and has output pixels: kernel and stride are then no larger than the
  // padded input, or of no account.
  static ConvolutionIndex of(const Convolution& convolution) {
    ConvolutionIndex index{};
    for (int d = 0; d < 3; ++d) {
      index.in[d] = static_cast<int>(convolution.in[d]);
      index.out[d] = static_cast<int>(convolution.out[d]);
      index.kernel[d] = static_cast<int>(convolution.kernel[d]);
      index.stride[d] = convolution.out[d] == 1 ? 1 : static_cast<int>(convolution.stride[d]);
      index.padding[d] = static_cast<int>(convolution.padding[d]);
      index.dilation[d] =
          convolution.kernel[d] == 1 ? 1 : static_cast<int>(convolution.dilation[d]);
    }
    return index;
  }

  // Of output pixel k, which may lie behind the last one.
  L2RW_HOST_DEVICE OutputPlace place(int64_t k) const {
    const int64_t row = k / out[2];
    return {
        {static_cast<int>(row / out[1]),
         static_cast<int>(row % out[1]),
         static_cast<int>(k % out[2])}};
  }

  // The place as many pixels further on as `step` is from the first one.
  L2RW_HOST_DEVICE OutputPlace after(OutputPlace place, const OutputPlace& step) const {
    place.at[2] += step.at[2];
    if (place.at[2] >= out[2]) {
      place.at[2] -= out[2];
      ++place.at[1];
    }
    place.at[1] += step.at[1];
    if (place.at[1] >= out[1]) {
      place.at[1] -= out[1];
      ++place.at[0];
    }
    place.at[0] += step.at[0];
    return place;
  }

  L2RW_HOST_DEVICE TapOffset tap(int t) const {
    return {
        {t / (kernel[1] * kernel[2]) * dilation[0] - padding[0],
         t / kernel[2] % kernel[1] * dilation[1] - padding[1],
         t % kernel[2] * dilation[2] - padding[2]}};
  }

  // The input pixel, counted row by row; -1 in the padding and behind the last output pixel.
  L2RW_HOST_DEVICE int64_t input_pixel(const OutputPlace& place, const TapOffset& tap) const {
    if (place.at[0] >= out[0]) {
      return -1;
    }
    int64_t pixel = 0;
    L2RW_UNROLL
    for (int d = 0; d < 3; ++d) {
      const int at = place.at[d] * stride[d] + tap.by[d];
      if (at < 0 || at >= in[d]) {
        return -1;
      }
      pixel = pixel * in[d] + at;
    }
    return pixel;
  }
};

}  // namespace l2rw::cuda
