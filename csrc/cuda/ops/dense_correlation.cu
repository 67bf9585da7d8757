#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/gemm/dense_kernel.cuh"
#include "cuda/gemm/dispatch.cuh"
#include "cuda/gemm/loaders.h"
#include "cuda/gemm/scheduler.h"
#include "cuda/util/aligned_copy.cuh"
#include "cuda/util/integers.h"
#include "cuda/util/launch.cuh"
#include "cuda/util/types.cuh"
#include "operator_checks.h"

namespace l2rw::cuda {
namespace {

constexpr const char* kOperation = "dense_correlation";

Tensor dense_correlation(
    const Tensor& z,
    const Tensor& g,
    const Tensor& direction,
    const OptionalTensor& direction_bias) {
  check_linear_layer(kOperation, z, g, direction, direction_bias);
  const Launch launch(kOperation, z);
  Tensor u = torch::stable::new_empty(z, {z.size(0)}, accumulation_dtype(z.scalar_type()));
  if (z.size(0) * z.size(1) * g.size(2) == 0) {
    return torch::stable::zero_(u);
  }
  // A direction in float32 is not rounded to the dtype of z. The product is then one of float32.
  const ScalarType dtype = direction.scalar_type();
  const AlignedMatrix z_rows = align_matrix(launch, z, dtype);
  const AlignedMatrix g_rows = align_matrix(launch, g, dtype);
  const AlignedMatrix V_rows = align_matrix(launch, torch::stable::unsqueeze(direction, 0), dtype);
  const OptionalTensor bias = bias_of_product(direction_bias, dtype);
  const DenseProblem<LinearOperands> problem{
      {z_rows.view, V_rows.view},
      1,
      k_tiles_of(z_rows.view.width),
      g.size(2),
      g_rows.view,
      bias ? either_dtype(*bias, dtype) : EitherDtype{},
      bias.has_value()};
  with_linear_config(
      launch,
      dtype,
      [&](int64_t columns) { return ceil_div(problem.width, columns) * columns; },
      [&](auto config) { run_dense<decltype(config)>(launch, problem, z.size(1), u); });
  return u;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CUDA, m) {
  m.impl("dense_correlation", TORCH_BOX(&dense_correlation));
}

}  // namespace l2rw::cuda
