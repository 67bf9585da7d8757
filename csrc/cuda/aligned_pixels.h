#pragma once

// Images as the kernels of convolutions read them.

#include "cuda/aligned_rows.h"
#include "cuda/pixels.h"
#include "layout.h"

namespace l2rw::cuda {

// The pixels of an image, and what keeps their memory.
struct AlignedPixels {
  Tensor tensor;
  Pixels pixels;
};

// An image [n, C, *s] in its dtype, with the channels of a pixel side by side and every group at a
// multiple of 16 bytes. Channels last tensors that lie so are taken as they are, others are copied
// once; groups that do not start there, one after the other. Dimensions of space that do not follow
// each other in memory cost a copy more.
inline AlignedPixels aligned_pixels(const Launch& launch, const Tensor& image, int64_t groups) {
  if (image.numel() == 0) {
    return {image, {}};
  }
  const int64_t n = image.size(0);
  const int64_t channels = image.size(1);
  const int64_t size = positions_of(image);
  const int64_t group_bytes = channels / groups * static_cast<int64_t>(image.element_size());
  const int64_t parts = groups == 1 || group_bytes % kVectorBytes == 0 ? 1 : groups;
  const AlignedRows rows = aligned_rows(
      launch,
      torch::stable::transpose(
          torch::stable::reshape(image, {n * parts, channels / parts, size}), 1, 2),
      image.scalar_type());
  const int64_t pixel = rows.operand.stride;
  return {
      rows.tensor,
      {rows.operand.data,
       parts * size * pixel,
       parts == 1 ? group_bytes : size * pixel,
       pixel,
       group_bytes}};
}

}  // namespace l2rw::cuda
