#pragma once

// Images as rows of channels, as the kernels of convolutions read them.

#include "convolution_sizes.h"
#include "cuda/aligned_rows.h"
#include "cuda/gradient_tile.h"
#include "layout.h"

namespace l2rw::cuda {

// The rows of an image, and what keeps their memory.
struct Image {
  Tensor tensor;
  ImageRows rows;
};

// The distance of positions of [n, C, *s] in elements where it is the same for all of them, else
// -1.
inline int64_t position_stride(const Tensor& tensor) {
  int64_t stride = 0;
  int64_t passed = 1;
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    if (tensor.size(d) == 1) {
      continue;
    }
    if (passed == 1) {
      stride = tensor.stride(d);
    } else if (tensor.stride(d) != passed * stride) {
      return -1;
    }
    passed *= tensor.size(d);
  }
  return stride;
}

// z or g [n, C, *s], with channels, positions and examples, as rows of the channels of a group that
// start at multiples of 16 bytes. What lies so (channels last, groups of a multiple of 16 bytes) is
// taken as it is; anything else is copied by aligned_rows, and made contiguous before where its
// positions are not evenly apart.
inline Image image_rows(const Launch& launch, const Tensor& image, int64_t groups) {
  const int64_t n = image.size(0);
  const int64_t channels = image.size(1);
  const int64_t positions = positions_of(image);
  if (channels == 0) {
    return {image, {}};
  }
  const int64_t inner = channels / groups;
  const int64_t apart = position_stride(image);
  // Groups are counted as positions where they lie between them, else as examples.
  const bool within = groups == 1 || positions == 1 || apart == channels * image.stride(1);
  const bool around = n == 1 || image.stride(0) == channels * image.stride(1);
  if (apart < 0 || !(within || around)) {
    return image_rows(launch, torch::stable::contiguous(image), groups);
  }
  const Sizes sizes =
      within ? Sizes{n, positions * groups, inner} : Sizes{n * groups, positions, inner};
  const Sizes strides = groups == 1 ? Sizes{image.stride(0), apart, image.stride(1)}
                        : within ? Sizes{image.stride(0), inner * image.stride(1), image.stride(1)}
                                 : Sizes{inner * image.stride(1), apart, image.stride(1)};
  const Tensor view = torch::stable::from_blob(
      image.data_ptr(), sizes, strides, image.device(), image.scalar_type());
  const AlignedRows aligned = aligned_rows(launch, view, image.scalar_type());
  const int64_t row = aligned.operand.stride;
  return {
      aligned.tensor,
      {aligned.operand.data,
       positions * groups * row,
       within ? groups * row : row,
       within ? row : positions * row,
       aligned.operand.width}};
}

// [n, T, d] as an image of one group.
inline Image image_of_positions(const Launch& launch, const Tensor& rows) {
  const AlignedRows aligned = aligned_rows(launch, rows, rows.scalar_type());
  const int64_t row = aligned.operand.stride;
  return {
      aligned.tensor, {aligned.operand.data, rows.size(1) * row, row, 0, aligned.operand.width}};
}

}  // namespace l2rw::cuda
