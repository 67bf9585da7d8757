#pragma once

// The sizes of a convolution, as the kernels of both devices read them.

#include <array>
#include <cstdint>

namespace l2rw {

// Depth, height, width.
using Extents = std::array<int64_t, 3>;

// A convolution of one to three spatial dimensions, written as one of three. The others are of size
// one.
struct Convolution {
  int64_t examples;
  int64_t groups;
  int64_t inputs;   // channels of one group
  int64_t outputs;  // channels of one group
  Extents in = {1, 1, 1};
  Extents out = {1, 1, 1};
  Extents kernel = {1, 1, 1};
  Extents stride = {1, 1, 1};
  Extents padding = {0, 0, 0};
  Extents dilation = {1, 1, 1};

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t pixels() const { return out[0] * out[1] * out[2]; }
};

}  // namespace l2rw
