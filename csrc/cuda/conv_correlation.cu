#include "correlation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "convolution_checks.h"
#include "cuda/aligned_rows.h"
#include "cuda/convolution_rows.h"
#include "cuda/dense_product.cuh"
#include "cuda/launch.cuh"
#include "cuda/narrow_convolution.h"
#include "layout.h"

namespace l2rw {
namespace cuda {
namespace {

constexpr const char* kOperation = "conv_correlation";
// A group with fewer output channels, or less than a vector of input channels, would fill hardly
// any of a tile.
constexpr int64_t kFewOutputs = 8;
// Narrow groups count pixels and channels in 32 bits.
constexpr int64_t kMostNarrow = int64_t{1} << 30;

// [n, C, *s] as [n, s, C]: a view, but for dimensions of space that do not follow each other.
Tensor as_pixels(const Tensor& tensor, int64_t examples, int64_t channels) {
  return torch::stable::transpose(
      torch::stable::reshape(tensor, {examples, channels, positions_of(tensor)}), 1, 2);
}

struct AlignedPixels {
  AlignedRows rows;
  Pixels pixels;
};

// z [n, C, *s] with the channels of a pixel side by side and every group at a multiple of 16 bytes.
// Groups that do not start there are copied one after the other.
AlignedPixels aligned_pixels(
    const Launch& launch, const Tensor& z, const Convolution& conv, ScalarType dtype) {
  if (z.numel() == 0) {  // nothing but padding
    return {{z, {}}, {nullptr, 0, 0, 0, 0}};
  }
  const int64_t size = positions_of(z);
  const int64_t width = conv.inputs * bytes_of(dtype);
  const bool together = conv.groups == 1 || width % kVectorBytes == 0;
  const int64_t parts = together ? 1 : conv.groups;
  const AlignedRows rows =
      aligned_rows(launch, as_pixels(z, conv.examples * parts, z.size(1) / parts), dtype);
  const int64_t pixel = rows.operand.stride;
  return {
      rows,
      {rows.operand.data, parts * size * pixel, together ? width : size * pixel, pixel, width}};
}

Tensor conv_correlation(
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups) {
  const Convolution conv =
      check_conv_correlation(z, g, direction, direction_bias, stride, padding, dilation, groups);
  check(
      ConvolutionIndex::fits(conv),
      kOperation,
      "the padded z must have fewer than 2^30 pixels along each dimension on CUDA, got shape ",
      shape_of(z),
      " and padding ",
      text_of(padding));
  const Launch launch(kOperation, z);
  Tensor u = torch::stable::new_empty(z, {z.size(0)}, accumulation_dtype(z.scalar_type()));
  if (g.numel() == 0) {
    return torch::stable::zero_(u);
  }
  // As in dense_correlation, a direction in float32 is not rounded to the dtype of z.
  const ScalarType dtype = direction.scalar_type();
  if (groups > 1 && (conv.outputs < kFewOutputs || conv.inputs * bytes_of(dtype) < kVectorBytes)) {
    check(
        std::max(conv.pixels(), g.size(1)) <= kMostNarrow,
        kOperation,
        "g must have at most 1073741824 channels, and as many pixels, in narrow groups on CUDA, "
        "got "
        "shape ",
        shape_of(g));
    correlate_narrow_groups(launch, conv, z, g, direction, direction_bias, u);
    return u;
  }
  const AlignedPixels z_pixels = aligned_pixels(launch, z, conv, dtype);
  const AlignedRows g_rows = aligned_rows(launch, as_pixels(g, g.size(0), g.size(1)), dtype);
  const AlignedRows V_rows =
      aligned_rows(launch, as_pixels(direction, g.size(1), conv.inputs), dtype);
  check(
      ConvolutionRows::fits(conv, z_pixels.pixels, V_rows.operand.stride),
      kOperation,
      "z, and an output channel of direction, must span less than 32 GiB on CUDA, got shapes ",
      shape_of(z),
      " and ",
      shape_of(direction));
  const OptionalTensor bias = bias_of_product(direction_bias, dtype);
  const DenseLayer<ConvolutionRows> layer{
      ConvolutionRows(conv, z_pixels.pixels, V_rows.operand.data, V_rows.operand.stride),
      groups,
      chunks_of(ConvolutionRows::depth(conv, z_pixels.pixels.width) * kVectorBytes),
      conv.outputs,
      g_rows.operand,
      bias ? either(*bias, dtype) : Either{},
      bias.has_value()};
  with_engines(dtype, [&](auto engines) {
    correlate_rows<decltype(engines)>(launch, layer, conv.pixels(), u);
  });
  return u;
}

}  // namespace
}  // namespace cuda

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("conv_correlation", TORCH_BOX(&cuda::conv_correlation));
}

}  // namespace l2rw
