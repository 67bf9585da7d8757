#pragma once

// Images as the kernels of convolutions read them: pixels with aligned channels, copied if need be.

#include "checks.h"
#include "convolution_sizes.h"
#include "cuda/conv/geometry.h"
#include "cuda/util/aligned_copy.cuh"
#include "cuda/util/launch.cuh"
#include "cuda/util/types.cuh"
#include "cuda/util/vectors.h"
#include "layout.h"

namespace l2rw::cuda {

inline void check_image_size(
    const char* operation, const Convolution& convolution, const Tensor& z) {
  check(
      ConvolutionGeometry::fits(convolution),
      operation,
      "an example must have at most 536870912 pixels, before and after the convolution, and as "
      "much "
      "padding and taps on CUDA, got z of shape ",
      shape_of(z));
}

// An image, and what keeps its memory.
struct AlignedImage {
  AlignedMatrix matrix;
  ImageView view;
};

// [n, C, *s] as [n, s, C], with other numbers of examples and channels. This is a view unless the
// strides of the spatial dimensions do not allow one.
inline Tensor as_matrix(const Tensor& image, int64_t examples, int64_t channels) {
  return torch::stable::transpose(
      torch::stable::reshape(image, {examples, channels, positions_of(image)}), 1, 2);
}

// An image [n, C, *s] in `dtype`, with the channels of a pixel contiguous and every group at a
// multiple of 16 bytes. A channels last tensor that lies so is read in place, and any other is
// copied once. Where the channels of a group do not fill whole vectors, the copy has the groups one
// after the other.
inline AlignedImage align_image(
    const Launch& launch, const Tensor& image, int64_t groups, ScalarType dtype) {
  if (image.numel() == 0) {  // taps read nothing but padding
    return {{image, {}}, {}};
  }
  const int64_t size = positions_of(image);
  const int64_t channels = image.size(1);
  const int64_t width = channels / groups * bytes_of(dtype);
  const bool together = groups == 1 || width % kVectorBytes == 0;
  const int64_t parts = together ? 1 : groups;
  const AlignedMatrix matrix =
      align_matrix(launch, as_matrix(image, image.size(0) * parts, channels / parts), dtype);
  const int64_t pixel = matrix.view.stride;
  return {
      matrix,
      {matrix.view.data, parts * size * pixel, together ? width : size * pixel, pixel, width}};
}

}  // namespace l2rw::cuda
