#pragma once

// The sizes of a convolution, as the kernels of both devices read them.

#include <cstdint>

namespace l2rw {

// A convolution of one to three spatial dimensions, written as one of three.
struct Convolution {
  int64_t examples;
  int64_t groups;
  int64_t inputs;   // channels of one group
  int64_t outputs;  // channels of one group
  int64_t in[3];
  int64_t out[3];
  int64_t kernel[3];
  int64_t stride[3];
  int64_t padding[3];
  int64_t dilation[3];

  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t pixels() const { return out[0] * out[1] * out[2]; }
};

}  // namespace l2rw
