#pragma once

// Which input pixel an output pixel meets through which tap of a kernel. As tile_index.h, plain
// arithmetic.

#include <cstdint>

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

  // Whether every number that is formed below fits: the pixels of an example, in and out, and the
  // sizes of padding and kernel.
  static bool fits(const Convolution& convolution) {
    constexpr int64_t kMost = int64_t{1} << 29;
    int64_t taps = 1;
    int64_t inputs = 1;
    int64_t outputs = 1;
    for (int d = 0; d < 3; ++d) {
      const bool padding = convolution.padding[d] <= kMost;
      const auto times = [](int64_t& product, int64_t size) {
        const bool fits = size <= kMost && product * size <= kMost;
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

  // Of a convolution that fits and has output pixels: stride and dilation are then no larger than
  // the padded input, or of no account.
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
  L2RW_HOST_DEVICE OutputPlace place(int k) const {
    const int row = k / out[2];
    return {{row / out[1], row % out[1], k % out[2]}};
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
  L2RW_HOST_DEVICE int input_pixel(const OutputPlace& place, const TapOffset& tap) const {
    bool inside = place.at[0] < out[0];
    uint32_t pixel = 0;
    L2RW_UNROLL
    for (int d = 0; d < 3; ++d) {
      // A place before the first one is a large number without a sign.
      const auto at = static_cast<uint32_t>(place.at[d]) * static_cast<uint32_t>(stride[d]) +
                      static_cast<uint32_t>(tap.by[d]);
      inside = inside && at < static_cast<uint32_t>(in[d]);
      pixel = pixel * static_cast<uint32_t>(in[d]) + at;
    }
    return inside ? static_cast<int>(pixel) : -1;
  }
};

}  // namespace l2rw::cuda
