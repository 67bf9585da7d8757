#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "layout.h"
#include "operator_checks.h"
#include "cpu/grain.h"
#include "cpu/isa/row_kernels.h"

namespace l2rw {
namespace {

// The mean or rstd of an affine layer as [n, T, d], with strides of zero where it broadcasts.
struct Statistic {
  Tensor tensor;
  std::array<int64_t, 3> strides;
};

Statistic broadcast(const Tensor& x, const OptionalTensor& statistic, double absent) {
  if (!statistic.has_value()) {
    return {torch::stable::full({1}, absent, accumulation_dtype(x.scalar_type())), {0, 0, 0}};
  }
  Statistic result{*in_accumulation_dtype(statistic), {}};
  for (size_t d = 0; d < 3; ++d) {
    const auto dim = static_cast<int64_t>(d);
    result.strides[d] = result.tensor.size(dim) == 1 ? 0 : result.tensor.stride(dim);
  }
  return result;
}

std::tuple<Tensor, Tensor> affine_example_gradients(
    const Tensor& x, const Tensor& g, const OptionalTensor& mean, const OptionalTensor& rstd) {
  check_affine_example_gradients(x, g, mean, rstd);

  const ScalarType accumulation = accumulation_dtype(x.scalar_type());
  const int64_t n = x.size(0);
  const int64_t positions = x.size(1);
  const int64_t channels = x.size(2);
  Tensor gradients = torch::stable::new_empty(x, {n, channels}, accumulation);
  Tensor bias_gradients = torch::stable::new_empty(x, {n, channels}, accumulation);
  const Statistic shift = broadcast(x, mean, 0);
  const Statistic factor = broadcast(x, rstd, 1);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    // A stride along a dimension of one element is arbitrary: make it the one that is fast.
    const auto stride = [](const Tensor& tensor, int64_t d) {
      return tensor.size(d) == 1 ? 1 : tensor.stride(d);
    };
    const int64_t grain = grain_of(positions * channels);
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const AffineExample<T> example{
            data<T>(x) + i * x.stride(0),
            stride(x, 1),
            stride(x, 2),
            data<T>(g) + i * g.stride(0),
            stride(g, 1),
            stride(g, 2),
            data<A>(shift.tensor) + i * shift.strides[0],
            shift.strides[1],
            shift.strides[2],
            data<A>(factor.tensor) + i * factor.strides[0],
            factor.strides[1],
            factor.strides[2],
            positions,
            channels};
        L2RW_ISA_CALL(
            RowKernels<T>::affine_gradient,
            example,
            data<A>(gradients) + i * channels,
            data<A>(bias_gradients) + i * channels);
      }
    });
  });
  return {gradients, bias_gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("affine_example_gradients", TORCH_BOX(&affine_example_gradients));
}

}  // namespace l2rw
