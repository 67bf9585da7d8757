#pragma once

// Where the pixels of images lie. As tile_index.h, plain arithmetic.

#include <cstdint>

#include "cuda/tile_index.h"

namespace l2rw::cuda {

// Pixels with the channels of a group side by side. Everything is a multiple of 16 bytes but for
// the width.
struct Pixels {
  const char* data;
  int64_t example;  // bytes from example to example
  int64_t group;    // from group to group of a pixel
  int64_t pixel;    // from pixel to pixel
  int64_t width;    // bytes of the channels of a group

  // How many bytes of the vector at `byte` of a group exist.
  L2RW_HOST_DEVICE int vector_bytes(int64_t byte) const {
    const int64_t left = width - byte;
    return static_cast<int>(left < 0 ? 0 : (left < kVectorBytes ? left : kVectorBytes));
  }
};

}  // namespace l2rw::cuda
