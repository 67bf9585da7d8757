#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "layout.h"
#include "cpu/grain.h"
#include "cpu/isa/row_kernels.h"

namespace l2rw {
namespace {

constexpr const char* kOperation = "group_norm_backward";

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(
    const Tensor& g,
    const Tensor& x,
    const Tensor& mean,
    const Tensor& rstd,
    const OptionalTensor& weight,
    int64_t groups) {
  check(x.dim() >= 2, kOperation, "x must have at least 2 dimensions, got shape ", shape_of(x));
  check_floating(kOperation, {"x", x});
  check_like(kOperation, {"x", x}, {"g", g});
  check(
      groups > 0 && x.size(1) % groups == 0,
      kOperation,
      "groups must divide the ",
      x.size(1),
      " channels of x, got ",
      groups);
  for (const auto& [name, statistic] : {std::pair{"mean", &mean}, std::pair{"rstd", &rstd}}) {
    const Argument argument{name, *statistic};
    check_same_or_accumulation(kOperation, {"x", x}, argument);
    check_dim(kOperation, argument, 2);
    check_size(kOperation, argument, 0, x.size(0), "examples of x");
    check_size(kOperation, argument, 1, groups, "groups");
  }
  check_vector(kOperation, {"x", x}, "weight", weight, x.size(1), "channels of x");

  const int64_t n = x.size(0);
  const int64_t channels = x.size(1);
  const bool by_position = !x.is_contiguous() && channels_last(x);
  const Tensor input = by_position ? x : torch::stable::contiguous(x);
  const Tensor gradient = in_layout_of(input, by_position, g);
  const Tensor result = torch::stable::empty_like(input);
  const ScalarType accumulation = accumulation_dtype(x.scalar_type());
  const Tensor gradients = torch::stable::new_empty(x, {n, channels}, accumulation);
  const Tensor bias_gradients = torch::stable::new_empty(x, {n, channels}, accumulation);
  const OptionalTensor shift = contiguous_in_accumulation_dtype(mean);
  const OptionalTensor factor = contiguous_in_accumulation_dtype(rstd);
  const OptionalTensor scale = contiguous_in_accumulation_dtype(weight);
  const int64_t positions = positions_of(x);

  dispatch_floating(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = accumulation_t<T>;
    // Group `group` of all examples in a row, with the `count` groups that follow.
    const int64_t per_group = channels / groups;
    const auto block = [&](int64_t group, int64_t count) {
      const int64_t channel = group * per_group;
      const int64_t element = channel * positions;
      return GroupNormBlock<T>{
          data<T>(input) + element,
          data<T>(gradient) + element,
          data<T>(result) + element,
          data<A>(shift) + group,
          data<A>(factor) + group,
          scale ? data<A>(scale) + group % groups * per_group : nullptr,
          data<A>(gradients) + channel,
          data<A>(bias_gradients) + channel,
          count,
          per_group,
          positions};
    };
    if (by_position) {
      const int64_t grain = grain_of(channels * positions);
      torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
        std::vector<A> buffer(static_cast<size_t>(4 * channels));
        for (int64_t i = begin; i < end; ++i) {
          L2RW_ISA_CALL(
              RowKernels<T>::group_norm_by_position, block(i * groups, groups), buffer.data());
        }
      });
    } else {
      const int64_t grain = grain_of(per_group * positions);
      torch::stable::parallel_for(0, n * groups, grain, [&](int64_t begin, int64_t end) {
        for (int64_t group = begin; group < end; ++group) {
          L2RW_ISA_CALL(RowKernels<T>::group_norm_by_channel, block(group, 1));
        }
      });
    }
  });
  return {result, gradients, bias_gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) {
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
}

}  // namespace l2rw
