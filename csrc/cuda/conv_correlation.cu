#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "operator_checks.h"
#include "cuda/aligned_pixels.h"
#include "cuda/convolution_rows.h"
#include "cuda/dense_product.cuh"
#include "cuda/launch.cuh"
#include "cuda/narrow_convolution.h"

namespace l2rw {
namespace cuda {
namespace {

constexpr const char* kOperation = "conv_correlation";
// A group with fewer output channels, or less than a vector of input channels, would fill hardly
// any of a tile.
constexpr int64_t kFewOutputs = 8;
// They are counted in 32 bits.
constexpr int64_t kMostNarrow = int64_t{1} << 30;

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
  check_pixels(kOperation, conv, z);
  const Launch launch(kOperation, z);
  Tensor u = torch::stable::new_empty(z, {z.size(0)}, accumulation_dtype(z.scalar_type()));
  if (g.numel() == 0) {
    return torch::stable::zero_(u);
  }
  // As in dense_correlation, a direction in float32 is not rounded to the dtype of z.
  const ScalarType dtype = direction.scalar_type();
  if (groups > 1 && (conv.outputs < kFewOutputs || conv.inputs * bytes_of(dtype) < kVectorBytes)) {
    check(
        g.size(1) <= kMostNarrow,
        kOperation,
        "g must have at most 1073741824 channels in narrow groups on CUDA, got shape ",
        shape_of(g));
    correlate_narrow_groups(launch, conv, z, g, direction, direction_bias, u);
    return u;
  }
  const AlignedPixels z_pixels = aligned_pixels(launch, z, groups, dtype);
  const AlignedRows g_rows = aligned_rows(launch, as_pixels(g, g.size(0), g.size(1)), dtype);
  const AlignedRows V_rows =
      aligned_rows(launch, as_pixels(direction, g.size(1), conv.inputs), dtype);
  check(
      ConvolutionRows::fits(conv, z_pixels.pixels, V_rows.operand.stride),
      kOperation,
      "z and direction must span less than 32 GiB each on CUDA, got shapes ",
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
  with_narrow_row_engines(launch, dtype, [&](auto engines) {
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
