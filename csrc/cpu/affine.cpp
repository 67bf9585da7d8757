#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "operator_checks.h"
#include "cpu/row_kernels.h"

namespace l2rw {
namespace {

// The mean or rstd of an affine layer as [n, T, d], with strides of zero where it broadcasts.
struct Statistic {
  Tensor tensor;
  std::array<int64_t, 3> strides;
};

Tensor in_accumulation_dtype(const Tensor& tensor) {
  const ScalarType dtype = accumulation_dtype(tensor.scalar_type());
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

Statistic broadcast(const Tensor& x, const OptionalTensor& statistic, double absent) {
  if (!statistic.has_value()) {
    return {torch::stable::full({1}, absent, accumulation_dtype(x.scalar_type())), {0, 0, 0}};
  }
  Statistic result{in_accumulation_dtype(*statistic), {}};
  for (size_t d = 0; d < 3; ++d) {
    const auto dim = static_cast<int64_t>(d);
    result.strides[d] = result.tensor.size(dim) == 1 ? 0 : result.tensor.stride(dim);
  }
  return result;
}

// Calls body(i, G_i, Gb_i) for every example; `make_place()(i)` gives where both [d] are written.
template <class T, class Place, class Body>
void for_each_example(
    const Tensor& x,
    const Tensor& g,
    const Statistic& mean,
    const Statistic& rstd,
    const Place& make_place,
    const Body& body) {
  using A = accumulation_t<T>;
  const int64_t per_example = std::max<int64_t>(1, x.size(1) * x.size(2));
  // A stride along a dimension of one element is arbitrary: make it the one that is fast.
  const bool one_position = x.size(1) == 1;
  const bool one_channel = x.size(2) == 1;
  torch::stable::parallel_for(
      0, x.size(0), std::max<int64_t>(1, 32768 / per_example), [&](int64_t begin, int64_t end) {
        auto place = make_place();
        for (int64_t i = begin; i < end; ++i) {
          const AffineExample<T> example{
              data<T>(x) + i * x.stride(0),
              one_position ? 1 : x.stride(1),
              one_channel ? 1 : x.stride(2),
              data<T>(g) + i * g.stride(0),
              one_position ? 1 : g.stride(1),
              one_channel ? 1 : g.stride(2),
              data<A>(mean.tensor) + i * mean.strides[0],
              mean.strides[1],
              mean.strides[2],
              data<A>(rstd.tensor) + i * rstd.strides[0],
              rstd.strides[1],
              rstd.strides[2],
              x.size(1),
              x.size(2)};
          const auto [gradient, gradient_bias] = place(i);
          L2RW_ISA_CALL(affine_gradient, example, gradient, gradient_bias);
          body(i, gradient, gradient_bias);
        }
      });
}

Tensor affine_correlation(
    const Tensor& x,
    const Tensor& g,
    const OptionalTensor& mean,
    const OptionalTensor& rstd,
    const OptionalTensor& direction,
    const OptionalTensor& direction_bias) {
  check_affine_correlation(x, g, mean, rstd, direction, direction_bias);

  const ScalarType accumulation = accumulation_dtype(x.scalar_type());
  Tensor u = torch::stable::new_empty(x, {x.size(0)}, accumulation);
  const Statistic shift = broadcast(x, mean, 0);
  const Statistic factor = broadcast(x, rstd, 1);
  const OptionalTensor scale =
      direction.has_value() ? OptionalTensor(in_accumulation_dtype(*direction)) : std::nullopt;
  const OptionalTensor offset = direction_bias.has_value()
                                    ? OptionalTensor(in_accumulation_dtype(*direction_bias))
                                    : std::nullopt;
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    const int64_t channels = x.size(2);
    for_each_example<T>(
        x,
        g,
        shift,
        factor,
        [&] {
          return [channels,
                  buffer = std::vector<A>(static_cast<size_t>(2 * channels))](int64_t) mutable {
            return std::pair{buffer.data(), buffer.data() + channels};
          };
        },
        [&](int64_t i, const A* gradient, const A* gradient_bias) {
          A score = 0;
          if (scale.has_value()) {
            score += L2RW_ISA_CALL(dot, gradient, 1, data<A>(*scale), scale->stride(0), channels);
          }
          if (offset.has_value()) {
            score +=
                L2RW_ISA_CALL(dot, gradient_bias, 1, data<A>(*offset), offset->stride(0), channels);
          }
          data<A>(u)[i] = score;
        });
  });
  return u;
}

std::tuple<Tensor, Tensor> affine_example_gradients(
    const Tensor& x, const Tensor& g, const OptionalTensor& mean, const OptionalTensor& rstd) {
  check_affine_layer("affine_example_gradients", x, g, mean, rstd);

  const ScalarType accumulation = accumulation_dtype(x.scalar_type());
  const int64_t channels = x.size(2);
  Tensor gradients = torch::stable::new_empty(x, {x.size(0), channels}, accumulation);
  Tensor bias_gradients = torch::stable::new_empty(x, {x.size(0), channels}, accumulation);
  const Statistic shift = broadcast(x, mean, 0);
  const Statistic factor = broadcast(x, rstd, 1);
  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    A* const first = data<A>(gradients);
    A* const first_bias = data<A>(bias_gradients);
    for_each_example<T>(
        x,
        g,
        shift,
        factor,
        [&] {
          return
              [=](int64_t i) { return std::pair{first + i * channels, first_bias + i * channels}; };
        },
        [](int64_t, const A*, const A*) {});
  });
  return {gradients, bias_gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("affine_correlation", TORCH_BOX(&affine_correlation));
  m.impl("affine_example_gradients", TORCH_BOX(&affine_example_gradients));
}

}  // namespace l2rw
