#pragma once

// Images as the kernels of convolutions read them.

#include "cuda/aligned_rows.h"
#include "cuda/convolution_index.h"
#include "cuda/pixels.h"
#include "cuda/types.cuh"
#include "layout.h"

namespace l2rw::cuda {

inline void check_pixels(const char* operation, const Convolution& convolution, const Tensor& z) {
  check(
      ConvolutionIndex::fits(convolution),
      operation,
      "an example must have at most 536870912 pixels, before and after the convolution, and as "
      "much "
      "padding and taps on CUDA, got z of shape ",
      shape_of(z));
}

// The pixels of an image, and what keeps their memory.
struct AlignedPixels {
  AlignedRows rows;
  Pixels pixels;
};

// [n, C, *s] as [n, s, C], with other numbers of examples and channels: a view, but for dimensions
// that do not follow each other.
inline Tensor as_pixels(const Tensor& image, int64_t examples, int64_t channels) {
  return torch::stable::transpose(
      torch::stable::reshape(image, {examples, channels, positions_of(image)}), 1, 2);
}

// An image [n, C, *s] in `dtype`, with the channels of a pixel side by side and every group at a
// multiple of 16 bytes. A channels last tensor that lies so is taken as it is, any other copied
// once; groups that do not start there, one after the other.
inline AlignedPixels aligned_pixels(
    const Launch& launch, const Tensor& image, int64_t groups, ScalarType dtype) {
  if (image.numel() == 0) {  // nothing but padding
    return {{image, {}}, {}};
  }
  const int64_t size = positions_of(image);
  const int64_t channels = image.size(1);
  const int64_t width = channels / groups * bytes_of(dtype);
  const bool together = groups == 1 || width % kVectorBytes == 0;
  const int64_t parts = together ? 1 : groups;
  const AlignedRows rows =
      aligned_rows(launch, as_pixels(image, image.size(0) * parts, channels / parts), dtype);
  const int64_t pixel = rows.operand.stride;
  return {
      rows,
      {rows.operand.data, parts * size * pixel, together ? width : size * pixel, pixel, width}};
}

}  // namespace l2rw::cuda
