#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "collapse.h"
#include "layout.h"
#include "operator_checks.h"
#include "cpu/grain.h"
#include "cpu/isa/row_kernels.h"

namespace l2rw {
namespace {

// Numbers a thread adds up at a time: the partial sums stay in the first-level cache.
constexpr int64_t kBlock = 2048;

template <class T>
void sum_rows(const Tensor& gradients, const Tensor& weights, const Tensor& total) {
  using A = accumulation_t<T>;
  // 0 * NaN is NaN: an example without weight is left out.
  std::vector<const T*> active;
  std::vector<A> active_weights;
  for (int64_t i = 0; i < weights.size(0); ++i) {
    const A weight = data<A>(weights)[i * weights.stride(0)];
    if (weight != 0) {
      active.push_back(data<T>(gradients) + i * gradients.stride(0));
      active_weights.push_back(weight);
    }
  }
  const Runs runs(
      Sizes(gradients.sizes().begin() + 1, gradients.sizes().end()),
      Sizes(gradients.strides().begin() + 1, gradients.strides().end()));
  const int64_t blocks_per_run = (runs.length + kBlock - 1) / kBlock;
  const auto examples = static_cast<int64_t>(active.size());
  const int64_t grain = grain_of(std::min(runs.length, kBlock) * examples);
  torch::stable::parallel_for(
      0, runs.count * blocks_per_run, grain, [&](int64_t begin, int64_t end) {
        std::vector<const T*> starts(active.size());
        for (int64_t block = begin; block < end; ++block) {
          const int64_t run = block / blocks_per_run;
          const int64_t first = block % blocks_per_run * kBlock;
          A* const to = data<A>(total) + run * runs.length + first;
          const int64_t offset = runs.offset(run) + first * runs.stride;
          for (size_t r = 0; r < active.size(); ++r) {
            starts[r] = active[r] + offset;
          }
          const int64_t count = std::min(kBlock, runs.length - first);
          L2RW_ISA_CALL(
              RowKernels<T>::combine,
              starts.data(),
              runs.stride,
              active_weights.data(),
              examples,
              to,
              count);
        }
      });
}

Tensor weighted_sum(const Tensor& gradients, const Tensor& weights) {
  check_weighted_sum(gradients, weights);

  const ScalarType dtype = gradients.scalar_type();
  const Sizes shape(gradients.sizes().begin() + 1, gradients.sizes().end());
  Tensor total = torch::stable::new_empty(gradients, shape, accumulation_dtype(dtype));
  if (total.numel() == 0) {
    return total;
  }
  const Tensor wide = *in_accumulation_dtype(weights);
  dispatch_floating(dtype, [&](auto zero) { sum_rows<decltype(zero)>(gradients, wide, total); });
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(l2rw_ext, CPU, m) { m.impl("weighted_sum", TORCH_BOX(&weighted_sum)); }

}  // namespace l2rw
