#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/conv/aligned_image.cuh"
#include "cuda/conv/implicit_gemm.h"
#include "cuda/conv/narrow.cuh"
#include "cuda/gemm/dense_kernel.cuh"
#include "cuda/gemm/dispatch.cuh"
#include "cuda/gemm/scheduler.h"
#include "cuda/util/aligned_copy.cuh"
#include "cuda/util/launch.cuh"
#include "cuda/util/types.cuh"
#include "operator_checks.h"

namespace l2rw::cuda {
namespace {

constexpr const char* kOperation = "conv_correlation";
// A group with fewer output channels, or with less than a vector of input channels, would fill
// little of a tile.
constexpr int64_t kMinGroupOutputs = 8;
// The kernel for narrow groups counts channels in 32 bits.
constexpr int64_t kMaxNarrowChannels = int64_t{1} << 30;

Tensor conv_correlation(
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias,
    const Sizes& stride,
    const Sizes& padding,
    const Sizes& dilation,
    int64_t groups) {
  const Convolution conv = check_directed_convolution(
      kOperation, z, g, direction, direction_bias, stride, padding, dilation, groups);
  check_image_size(kOperation, conv, z);
  const Launch launch(kOperation, z);
  Tensor u = torch::stable::new_empty(z, {z.size(0)}, accumulation_dtype(z.scalar_type()));
  if (g.numel() == 0) {
    return torch::stable::zero_(u);
  }
  // As in dense_correlation, a direction in float32 is not rounded to the dtype of z.
  const ScalarType dtype = direction.scalar_type();
  if (groups > 1 &&
      (conv.outputs < kMinGroupOutputs || conv.inputs * bytes_of(dtype) < kVectorBytes)) {
    check(
        z.size(1) <= kMaxNarrowChannels && g.size(1) <= kMaxNarrowChannels,
        kOperation,
        "z and g must have at most ",
        kMaxNarrowChannels,
        " channels in narrow groups on CUDA, got shapes ",
        shape_of(z),
        " and ",
        shape_of(g));
    correlate_narrow(launch, conv, z, g, direction, direction_bias, u);
    return u;
  }
  const AlignedImage z_image = align_image(launch, z, groups, dtype);
  const AlignedMatrix g_rows = align_matrix(launch, as_matrix(g, g.size(0), g.size(1)), dtype);
  const AlignedMatrix V_rows =
      align_matrix(launch, as_matrix(direction, g.size(1), conv.inputs), dtype);
  check(
      ImplicitGemmOperands::fits(conv, z_image.view, V_rows.view.stride),
      kOperation,
      "z and direction must span less than 32 GiB each on CUDA, got shapes ",
      shape_of(z),
      " and ",
      shape_of(direction));
  const OptionalTensor bias = bias_of_product(direction_bias, dtype);
  const DenseProblem<ImplicitGemmOperands> problem{
      ImplicitGemmOperands(conv, z_image.view, V_rows.view.data, V_rows.view.stride),
      groups,
      k_tiles_of(ImplicitGemmOperands::depth(conv, z_image.view.width) * kVectorBytes),
      conv.outputs,
      g_rows.view,
      bias ? either_dtype(*bias, dtype) : EitherDtype{},
      bias.has_value()};
  with_conv_config(launch, dtype, [&](auto config) {
    run_dense<decltype(config)>(launch, problem, conv.pixels(), u);
  });
  return u;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("conv_correlation", TORCH_BOX(&conv_correlation));
}

}  // namespace l2rw::cuda
