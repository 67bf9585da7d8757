#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "operator_checks.h"
#include "cuda/aligned_rows.h"
#include "cuda/dense_product.cuh"
#include "cuda/launch.cuh"
#include "cuda/linear_rows.h"

namespace l2rw {
namespace cuda {
namespace {

constexpr const char* kOperation = "dense_correlation";

Tensor dense_correlation(
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias) {
  check_dense_correlation(z, g, direction, direction_bias);
  const Launch launch(kOperation, z);
  Tensor u = torch::stable::new_empty(z, {z.size(0)}, accumulation_dtype(z.scalar_type()));
  if (z.size(0) * z.size(1) * g.size(2) == 0) {
    return torch::stable::zero_(u);
  }
  // A direction in float32 is not rounded to the dtype of z: the product is one of float32 then.
  const ScalarType dtype = direction.scalar_type();
  const AlignedRows z_rows = aligned_rows(launch, z, dtype);
  const AlignedRows g_rows = aligned_rows(launch, g, dtype);
  const AlignedRows V_rows = aligned_rows(launch, torch::stable::unsqueeze(direction, 0), dtype);
  const OptionalTensor bias = bias_of_product(direction_bias, dtype);
  const DenseLayer<LinearRows> layer{
      {z_rows.operand, V_rows.operand},
      1,
      chunks_of(z_rows.operand.width),
      g.size(2),
      g_rows.operand,
      bias ? either(*bias, dtype) : Either{},
      bias.has_value()};
  with_row_engines(
      launch,
      dtype,
      [&](int64_t columns) { return ceil_div(layer.width, columns) * columns; },
      [&](auto engines) { correlate_rows<decltype(engines)>(launch, layer, z.size(1), u); });
  return u;
}

}  // namespace
}  // namespace cuda

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("dense_correlation", TORCH_BOX(&cuda::dense_correlation));
}

}  // namespace l2rw
