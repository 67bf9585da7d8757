#pragma once

// Vectors, the numbers that one instruction loads or stores, 16 bytes at most; and memory whose
// vectors can be copied asynchronously: matrices and images with aligned rows. Bytes are counted
// there, so that every dtype is handled alike.

#include <cstdint>

#include "cuda/util/host_device.h"

namespace l2rw::cuda {

constexpr int kVectorBytes = 16;

template <class T, int Count>
struct alignas(sizeof(T) * Count) Vector {
  T values[Count];
};

// Elements of the widest vector.
template <class T>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

// The bytes of a vector that exist if `left` are left from its first one on.
template <class Integer>
L2RW_HOST_DEVICE constexpr int existing_bytes(Integer left) {
  return static_cast<int>(left < 0 ? 0 : (left < kVectorBytes ? left : kVectorBytes));
}

// A matrix with evenly spaced rows. Each row starts at a multiple of 16 bytes; its width may cut
// off the last vector.
struct MatrixView {
  const char* data;
  int64_t stride;  // bytes from row to row
  int64_t rows;
  int64_t width;  // bytes of a row

  // How many bytes of the vector at `byte` of a row exist.
  L2RW_HOST_DEVICE int vector_bytes(int64_t byte) const { return existing_bytes(width - byte); }
};

// Images whose pixels hold the channels of a group contiguously. Every member but the width is a
// multiple of 16 bytes.
struct ImageView {
  const char* data;
  int64_t example;  // bytes from example to example
  int64_t group;    // from group to group of a pixel
  int64_t pixel;    // from pixel to pixel
  int64_t width;    // bytes of the channels of a group

  // How many bytes of the vector at `byte` of a group exist.
  L2RW_HOST_DEVICE int vector_bytes(int64_t byte) const { return existing_bytes(width - byte); }
};

}  // namespace l2rw::cuda
